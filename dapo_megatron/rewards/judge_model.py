"""A judge from a Hugging Face folder: one forward pass a case tells the distribution of its first token.

It runs as `scoring_model.py` says; several cases go through it at a time, padded on the left.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dapo_megatron.config.reward import Judge
from dapo_megatron.data.prompts import Prompt, encode_prompt
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.judge_prompt import PROMPT, Case, render
from dapo_megatron.rewards.model_folder import check_judge_folder
from dapo_megatron.rewards.scoring_model import batches, load_model
from dapo_megatron.rewards.verdicts import SPELLINGS, TOP, Opinions, word_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class JudgeModel:
    """Judges with the model of `settings.model` on `device`.

    Raises:
        RequestError: as `check_judge_folder` and `spelling_tokens`.
        RunError: as `load_model`.
    """

    def __init__(self, settings: Judge, device: torch.device) -> None:
        check_judge_folder(settings)
        self.settings, self.device = settings, device
        self._setting = f"reward.judge.model={settings.model}"
        self._wording = settings.prompt or PROMPT
        self.tokenizer = load_tokenizer(settings.model)
        self._spelled = spelling_tokens(self.tokenizer, self._setting)
        self._special = control_tokens(self.tokenizer)
        self._frame = self._count_special(self._encode(Case("", "", "")))
        self._model = load_model("AutoModelForCausalLM", settings.model, device, self._setting)
        positions = getattr(self._model.config, "max_position_embeddings", None) or math.inf
        self._longest = min(positions, settings.tokens_per_batch)

    def ask(self, cases: Sequence[Case]) -> Opinions:
        """See `Judging`. A case that does not fit into the model, or whose text still holds a control token, has no
        verdict.

        Raises:
            RunError: scores that are not finite; no memory left on the device.
        """
        ids = [self._encode(case) for case in cases]
        fit = [i for i, row in enumerate(ids) if self._fits(row)]
        p_yes_B = np.full(len(ids), np.nan)
        for batch in batches([len(ids[i]) for i in fit], self.settings.tokens_per_batch):
            rows = [fit[i] for i in batch]
            p_yes_B[rows] = self._forward([ids[i] for i in rows])
        return Opinions(p_yes_B, np.ones(len(ids), bool))

    def _fits(self, ids: list[int]) -> bool:
        return len(ids) <= self._longest and self._count_special(ids) == self._frame

    def _encode(self, case: Case) -> list[int]:
        text = render(case, self._wording, lambda part: without(part, self._special.values()))
        return encode_prompt(self.tokenizer, Prompt(0, text, ""), self.settings.chat_template).tolist()

    def _count_special(self, ids: Iterable[int]) -> int:
        return sum(token in self._special for token in ids)

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> np.ndarray:
        """P(YES) of each row, NaN where neither word is among the TOP most probable tokens."""
        longest = max(map(len, ids))
        tokens_BT = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=self.device)
        real_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=self.device)
        try:
            logits_BV = self._model(
                input_ids=tokens_BT,
                attention_mask=real_BT,
                position_ids=(real_BT.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=1,
            ).logits[:, -1]
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"reward.judge: {self.device} has no memory for {tokens_BT.numel()} tokens; use a "
                f"reward.judge.tokens_per_batch less than {self.settings.tokens_per_batch}"
            ) from error
        logp_BV = torch.log_softmax(logits_BV.double(), dim=-1)
        if not torch.isfinite(logp_BV).any(dim=1).all():
            raise RunError(f"{self._setting} has no finite scores; is its dtype too narrow, or the folder damaged?")
        least_B = logp_BV.topk(min(TOP, logp_BV.shape[1])).values[:, -1]
        yes_B, no_B = (logp_BV[:, self._spelled[word]] for word in ("YES", "NO"))
        among_B = torch.maximum(yes_B.max(1).values, no_B.max(1).values) >= least_B
        p_yes_B = torch.sigmoid(yes_B.logsumexp(1) - no_B.logsumexp(1))
        return torch.where(among_B, p_yes_B, torch.nan).cpu().numpy()


def spelling_tokens(tokenizer: "PreTrainedTokenizerBase", setting: str) -> dict[str, list[int]]:
    """Token ids that spell "YES" and "NO": whole spellings, else first pieces that start no spelling of the other.

    Raises:
        RequestError: a tokenizer that tells the two apart by no first token.
    """
    whole: dict[str, set[int]] = {"YES": set(), "NO": set()}
    first: dict[str, set[int]] = {"YES": set(), "NO": set()}
    for spelling in SPELLINGS:
        ids, word = tokenizer.encode(spelling, add_special_tokens=False), word_of(spelling)
        if not ids or tokenizer.unk_token_id in ids:
            continue
        first[word].add(ids[0])
        if len(ids) == 1:
            whole[word].add(ids[0])
    found = whole if all(whole.values()) else first
    alone = {word: sorted(found[word] - found[other]) for word, other in (("YES", "NO"), ("NO", "YES"))}
    if not all(alone.values()):
        raise RequestError(f"{setting}: its tokenizer has no tokens that tell YES from NO; use a model of English text")
    return alone


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """id → text of the special tokens, and of added ones that look like control marks."""
    marks = ("<", "[", "\uff5c")
    return {
        token: added.content
        for token, added in tokenizer.added_tokens_decoder.items()
        if len(added.content) > 1 and (added.special or added.content.lstrip().startswith(marks))
    }


def without(text: str, marks: Iterable[str]) -> str:
    """`text` with a blank behind the first character of each of the marks in it."""
    for mark in marks:
        if mark in text:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text
