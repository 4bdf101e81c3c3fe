"""The entropy of a transformers model at every token of given responses: one scoring pass, nothing is drawn.

The model runs as `rewards/scoring_model.py` says. Logits are made for a few rows at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dapo_megatron.errors import RunError
from dapo_megatron.rewards.scoring_model import batches, load_model

TOKENS_PER_BATCH = 16384
MOST_LOGITS = 1 << 24  # of a chunk; 64 MiB in fp32


@dataclass(frozen=True)
class TokenizedText:
    """A prompt, one token or more, and a response to it: int arrays [P] and [L]."""

    prompt: np.ndarray
    response: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def response_entropies(folder: str, texts: Sequence[TokenizedText], device: torch.device, setting: str) -> np.ndarray:
    """fp32 [N], nats at temperature 1: the responses' tokens end to end, of the model in a Hugging Face folder.

    `setting` is for messages.

    Raises:
        RunError: as `load_model`; entropies that are not finite; no memory left on the device.
    """
    model = load_model("AutoModelForCausalLM", folder, device, setting)
    found: dict[int, np.ndarray] = {}
    for batch in batches([len(text) for text in texts], TOKENS_PER_BATCH):
        try:
            scored = _entropies(model, [texts[i] for i in batch], device)
        except torch.OutOfMemoryError as error:
            longest = max(len(texts[i]) for i in batch)
            raise RunError(f"{setting}: {device} has no memory for {len(batch)} texts of {longest} tokens") from error
        found |= dict(zip(batch, scored, strict=True))
    entropies_N = np.concatenate([np.zeros(0, np.float32), *(found[i] for i in range(len(texts)))])
    if not np.isfinite(entropies_N).all():
        raise RunError(f"{setting} has no finite scores; is its dtype too narrow, or the folder damaged?")
    return entropies_N


@torch.inference_mode()
def _entropies(model, texts: Sequence[TokenizedText], device: torch.device) -> list[np.ndarray]:
    longest = max(map(len, texts))
    tokens_BT = np.zeros((len(texts), longest), np.int64)
    real_BT = np.zeros((len(texts), longest), np.int64)
    drawn_BT = np.zeros((len(texts), longest), bool)  # rows whose next token is one of the response
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)] = np.concatenate([text.prompt, text.response])
        real_BT[row, : len(text)] = 1
        drawn_BT[row, len(text.prompt) - 1 : len(text) - 1] = True
    hidden_BTH = model.base_model(
        input_ids=torch.from_numpy(tokens_BT).to(device),
        attention_mask=torch.from_numpy(real_BT).to(device),
        use_cache=False,
    ).last_hidden_state
    hidden_NH = hidden_BTH[torch.from_numpy(drawn_BT).to(device)]
    head = model.get_output_embeddings()
    rows = max(1, MOST_LOGITS // head.weight.shape[0])
    parts = [_entropy(head(part_NH).float()) for part_NH in hidden_NH.split(rows)]
    entropies_N = torch.cat([hidden_NH.new_zeros(0, dtype=torch.float32), *parts]).cpu().numpy()
    return np.split(entropies_N, np.cumsum([len(text.response) for text in texts])[:-1])


def _entropy(logits_NV: Tensor) -> Tensor:
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    return -(logp_NV.exp() * logp_NV).sum(-1)
