"""The value head of a critic: one number a token, where a policy has its output layer."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class ValueHead(nn.Module):
    """hidden states [S, 1, H] → values fp32 [T, 1, 1]: h · w + b, computed in fp32. weight [1, H] and bias [1] in the
    model's dtype, whole on every tensor-parallel rank.

    Under sequence parallelism a rank has S = T / TP rows: it gathers the others' values, and takes back the gradient of
    its own alone, since every rank computes the whole loss. Weight and bias are marked, so that megatron sums their
    gradients over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        place = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, **place))
        self.bias = nn.Parameter(torch.zeros(1, **place))
        self._sequence_parallel = config.sequence_parallel
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor, **_: object) -> tuple[Tensor, None]:
        """(values, None): what megatron expects of an output layer."""
        values = F.linear(hidden.float(), self.weight.float(), self.bias.float())
        if self._sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None
