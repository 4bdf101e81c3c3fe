"""Which kernels compute the loss, and a model that hands out hidden states for a loss that holds the output layer."""

import torch
from dapo_kernels import choose_implementation
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from dapo_megatron.errors import RequestError


def choose_loss_kernel(setting: str, device: torch.device, dtype: torch.dtype) -> str:
    """learner.loss_kernel → "triton" or "torch".

    Raises:
        RequestError: it cannot run here.
    """
    try:
        return choose_implementation(setting, device, dtype)
    except ValueError as problem:
        raise RequestError(f"learner.loss_kernel={setting} cannot run here: {problem}") from None


def take_output_layer(model: GPTModel) -> Tensor | None:
    """The weight [V/TP, H] that the output layer of a last stage would have used; None on other stages.

    From here on the model returns what that layer was given: [1, T, H], T/TP rows under sequence parallelism. The
    layer stays where it is, so parameters keep their names; only its forward pass is gone, and with it the reduction of
    its input's gradient over the tensor-parallel ranks, which the fused op does.
    """
    if not model.post_process:
        return None
    layer = model.output_layer
    layer.forward = lambda hidden, **_: (hidden, None)
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return layer.weight
