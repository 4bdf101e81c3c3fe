"""Section `monitoring`: where metrics go besides metrics.jsonl, and what the report keeps."""

from pydantic import Field

from dapo_megatron.config.section import Section


class Monitoring(Section):
    """Trackers and the report."""

    tensorboard: bool = True
    """Whether TensorBoard files are written into the run directory."""

    wandb: bool = False
    """Whether metrics go to Weights & Biases; needs wandb installed."""

    mlflow: bool = False
    """Whether metrics go to MLflow; needs mlflow installed."""

    project: str = Field("dapo-megatron", min_length=1)
    """Project (wandb) or experiment (mlflow) to log to."""

    samples: int = Field(3, ge=0)
    """Completions kept for the report at each time they are taken."""

    report: bool = True
    """Whether report.html and report.png are written at the end."""
