"""What rollouts bring back: completions, and the groups of them that share a prompt."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

NOT_DRAWN = -1  # the policy version of text that comes from a file

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Completion:
    """tokens int32 [L], end of sequence included if it was drawn; logprobs fp32 [L] of log softmax(logits / T), before
    top-p.

    finish_reason: "stop" at an end-of-sequence token, "length" at max_new_tokens, "abort" when taken back.
    policy_versions int32 [L]: the version whose weights produced each token; NOT_DRAWN where no policy drew the
    response, whose log-probs mean nothing then.
    """

    ticket: int
    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    policy_versions: np.ndarray


@dataclass(frozen=True)
class SegmentCounts:
    """What a rollout shape with segments did for one group.

    segments: of its responses that are not filtered, a shared one once; dropped: those of them whose advantage is 0.
    continuations: drawn to estimate values. generated: tokens drawn, for values too. repeated: tokens of its rows that
    are another row's, and go through the learner again.
    """

    segments: int
    dropped: int
    continuations: int
    generated: int
    repeated: int


@dataclass
class PromptGroup:
    """A prompt's G completions with their scores: accuracies bool [G], rewards fp32 [G] (shaping included).

    step: the rollout step that drew them. old_logprobs, entropies: fp32 [L] each, of the policy that drew the group,
    taken by the learner before that policy's first update; a group kept for a later step carries them along, in others
    they are empty. reference_logprobs: fp32 [L] each, of the reference policy; empty without one.

    advantages, weights: fp32 [L] each, of a rollout shape that values segments; weight 0 or 1, in one row of the group
    for a token that rows share. Empty where advantages follow from rewards; `counts` is None then.
    """

    prompt_id: int
    text: str
    answer: str
    prompt_tokens: np.ndarray
    completions: list[Completion]
    responses: list[str] = field(default_factory=list)
    accuracies: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    rewards: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    step: int = 0
    old_logprobs: list[np.ndarray] = field(default_factory=list)
    entropies: list[np.ndarray] = field(default_factory=list)
    reference_logprobs: list[np.ndarray] = field(default_factory=list)
    advantages: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    counts: SegmentCounts | None = None

    @property
    def drawn(self) -> bool:
        """Whether a policy drew its completions, which come from a file otherwise."""
        return not any(len(c.tokens) and c.policy_versions[0] == NOT_DRAWN for c in self.completions)

    @property
    def generated_tokens(self) -> int:
        """Tokens drawn for the group; 0 where its completions come from a file."""
        if self.counts is not None:
            return self.counts.generated
        return sum(len(c.tokens) for c in self.completions) if self.drawn else 0
