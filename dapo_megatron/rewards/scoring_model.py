"""A transformers model that scores, from a Hugging Face folder: loaded whole, run without gradients, fed in batches.

It lies on one device, in fp32 on a CPU and in the folder's own dtype elsewhere. Code in the folder is not run.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from dapo_megatron.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(kind: str, folder: str, device: torch.device, setting: str) -> "PreTrainedModel":
    """The model of a folder as transformers' class `kind` ("AutoModelForCausalLM") has it; `setting` is for messages.

    Raises:
        RunError: the folder cannot be loaded or lacks weights; no memory for the model on the device.
    """
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model, loaded = getattr(transformers, kind).from_pretrained(
            folder,
            dtype=torch.float32 if device.type == "cpu" else "auto",
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{setting}: {device} has no memory for this model beside what it holds already; use a smaller one, or "
            "where a vllm engine shares it a smaller rollout.gpu_memory_share"
        ) from error
    except Exception as error:  # transformers and safetensors raise bare ones, too
        raise RunError(f"{setting} cannot be loaded: {first_line(error)}") from error
    # transformers would fill what is missing with random numbers, the head too
    if missing := sorted(loaded["missing_keys"]):
        raise RunError(f"{setting} has no weights for {', '.join(missing[:4])}")
    return model


def batches(lengths: Sequence[int], tokens: int, alone: bool = False) -> Iterator[list[int]]:
    """Every index once, those of like lengths together: longest × number ≤ `tokens` in each batch, or one sequence."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (alone or lengths[i] * (len(batch) + 1) > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def first_line(error: Exception) -> str:
    """Of an error's words, or its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
