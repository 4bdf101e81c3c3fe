"""Section `checkpoint`: when the learner's state is saved and what is left at the end."""

from pydantic import Field

from dapo_megatron.config.section import Section


class Checkpoint(Section):
    """Sharded checkpoints in the run directory."""

    every: int = Field(10, ge=0)
    """Rollout steps between checkpoints; 0 = only at the end. There is one after a warm start, too."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""

    keep_best: bool = True
    """Keep the checkpoint of the best `validation/accuracy`, too: unless `every` is 0 each validation that is better
    than all before is saved, and `best.json` names it; the one before the first step only after a warm start."""

    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory of each rank's weights and optimizer
    state. False: it waits, and the memory is saved."""

    time_limit_s: float = Field(1800.0, gt=0)
    """Longest a checkpoint may take to be written, seconds. Before the launcher kills ranks that do not end, it gives
    them twice as long and 300 s after a signal; and after one failed 60 s, or as long while a checkpoint is under
    way."""

    hugging_face: bool = True
    """Whether the trained model is written as a Hugging Face folder, `hf` in the run directory, at the end; a critic
    too, as `critic`, a token classifier of one label that critic.path takes."""
