"""Groups of a preference file, in the place of groups that an engine draws (`rollout.shape: preferences`)."""

from collections.abc import Callable, Sequence

import numpy as np

from dapo_megatron.data.completions import NOT_DRAWN, Completion, PromptGroup
from dapo_megatron.data.preferences import Preference
from dapo_megatron.data.prompts import Prompt
from dapo_megatron.data.records import SequenceBatch, sequence_batch

ROWS_SCORED = 256  # pairs in one scoring pass of the reference

EncodedPreference = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen, rejected: int32 token ids


class PreferencePairs:
    """Two responses a prompt: the chosen one, right and of reward 1, and the rejected one, wrong and of reward −1.

    Args:
        encoded: token ids of each preference, the end of sequence behind each response.
    """

    def __init__(self, preferences: Sequence[Preference], encoded: Sequence[EncodedPreference]) -> None:
        self._preferences, self._encoded = preferences, encoded
        self._reference: list[list[np.ndarray]] = []

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of each row."""
        return [preference.prompt for preference in self._preferences]

    def keep_reference(self, score: Callable[[SequenceBatch], list[np.ndarray]]) -> None:
        """Take the reference's log-probs of every response, once for the whole run, in the order of the file: a resumed
        run finds the same. `score`: a batch → fp32 [L] a response, of the reference."""
        self._reference = []
        for first in range(0, len(self._encoded), ROWS_SCORED):
            part = self._encoded[first : first + ROWS_SCORED]
            prompts = [prompt for prompt, _, _ in part for _ in range(2)]
            found = score(sequence_batch(prompts, [ids for _, chosen, rejected in part for ids in (chosen, rejected)]))
            self._reference += [found[i : i + 2] for i in range(0, len(found), 2)]

    def draw_for_training(self, rows: Sequence[int], step: int, wave: int) -> list[PromptGroup]:
        """A group for each row; nothing is drawn, and of `wave` nothing depends."""
        return [self._group(int(row), step) for row in rows]

    def _group(self, row: int, step: int) -> PromptGroup:
        preference, (prompt, *responses) = self._preferences[row], self._encoded[row]
        return PromptGroup(
            prompt_id=preference.prompt.id,
            text=str(preference.prompt.text),
            answer="",
            prompt_tokens=prompt,
            completions=[
                Completion(i, ids, np.zeros(len(ids), np.float32), "stop", np.full(len(ids), NOT_DRAWN, np.int32))
                for i, ids in enumerate(responses)
            ],
            responses=[preference.chosen, preference.rejected],
            accuracies=np.array([True, False]),
            rewards=np.array([1.0, -1.0], np.float32),
            step=step,
            reference_logprobs=list(self._reference[row]) if self._reference else [],
        )
