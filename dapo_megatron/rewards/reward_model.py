"""Rewards by a model: a sequence classifier with one label, from a Hugging Face folder.

    reward = clip(scale · score(prompt, response), −bound, bound),   right where score > threshold

The model runs as transformers has it, on one device, without gradients, in fp32 on a CPU and in the folder's own dtype
elsewhere. Code in the folder is not run.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from dapo_megatron.config.reward import RewardModel
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import RunError
from dapo_megatron.rewards.model_folder import check_reward_model
from dapo_megatron.rewards.pool import Scores
from dapo_megatron.rewards.scoring_model import batches, first_line, load_model


class ModelReward:
    """Scores responses with the model of `settings.path` on `device`.

    Raises:
        RequestError: as `check_reward_model`.
        RunError: the folder cannot be loaded or lacks weights; no memory for the model on the device.
    """

    def __init__(self, settings: RewardModel, device: torch.device) -> None:
        check_reward_model(settings)
        self.settings, self.device = settings, device
        self._tokenizer = load_tokenizer(settings.path)
        setting = f"reward.model.path={settings.path}"
        self._model = load_model("AutoModelForSequenceClassification", settings.path, device, setting)
        config = self._model.config
        # the model finds the last token of each sequence by what is padding; without that, one sequence at a time
        self._pad = config.pad_token_id if config.pad_token_id is not None else self._tokenizer.pad_token_id
        config.pad_token_id = self._pad
        positions = getattr(config, "max_position_embeddings", None) or math.inf
        self._longest = int(min(positions, settings.max_length or positions, settings.tokens_per_batch))

    def score(self, responses: Sequence[str], prompts: Sequence[str]) -> Scores:
        """right and reward of B responses to their prompts.

        Raises:
            RunError: a score that is not finite; no memory left on the device.
        """
        settings = self.settings
        texts = [self._text(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        special = not settings.chat_template  # a template writes its special tokens itself
        ids = [self._tokenizer.encode(text, add_special_tokens=special)[-self._longest :] for text in texts]
        scores_B = np.empty(len(ids))
        for batch in batches([len(sequence) for sequence in ids], settings.tokens_per_batch, self._pad is None):
            scores_B[batch] = self._forward([ids[i] for i in batch])
        for i in np.flatnonzero(~np.isfinite(scores_B))[:1]:
            raise RunError(
                f"reward.model.path={settings.path} scored {scores_B[i]} for the response {responses[i][:60]!r} "
                f"({len(ids[i])} tokens with its prompt); a score must be finite: is its dtype too narrow, or the "
                "folder damaged?"
            )
        bound = settings.bound or math.inf
        return Scores(scores_B > settings.threshold, np.clip(settings.scale * scores_B, -bound, bound))

    def _text(self, prompt: str, response: str) -> str:
        if not self.settings.chat_template:
            return prompt + response
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # templates are programs and raise what they like
            raise RunError(
                f"reward.model.path={self.settings.path}: its chat template refuses a prompt and a response: "
                f"{first_line(error)}; use reward.model.chat_template=false"
            ) from error

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> np.ndarray:
        longest = max(1, *map(len, ids))
        fill = self._pad or 0
        tokens_BT = torch.tensor([[*row, *[fill] * (longest - len(row))] for row in ids], device=self.device)
        real_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self.device)
        try:
            scores_B1 = self._model(input_ids=tokens_BT, attention_mask=real_BT, use_cache=False).logits
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"reward.model: {self.device} has no memory for {tokens_BT.numel()} tokens; use a "
                f"reward.model.tokens_per_batch less than {self.settings.tokens_per_batch}"
            ) from error
        return scores_B1[:, 0].double().cpu().numpy()
