"""From the probabilities of a judge's first token to P(YES)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dapo_megatron.rewards.judge_prompt import Case

TOP = 20
"""YES or NO must be among so many of the most probable first tokens; servers send no more."""

SPELLINGS = tuple(f"{blank}{word}" for blank in ("", " ") for word in ("YES", "Yes", "yes", "NO", "No", "no"))


@dataclass(frozen=True)
class Opinions:
    """Of B cases: p_yes_B float64 = P(YES) / (P(YES) + P(NO)), NaN without a verdict; reached_B: the judge replied.

    `trouble`: why the last case that was not reached has no reply.
    """

    p_yes_B: np.ndarray
    reached_B: np.ndarray
    trouble: str = ""


class Judging(Protocol):
    """A judge."""

    def ask(self, cases: list[Case]) -> Opinions:
        """One opinion a case, in order."""
        ...


def word_of(token: str) -> str | None:
    """ "YES" or "NO" for a token that spells it, in any case and with white space or its marks around; else None."""
    word = token.strip(" \t\n\u2581\u0120\u010a").upper()
    return word if word in ("YES", "NO") else None


def p_yes(tokens: Iterable[tuple[str, float]]) -> float:
    """P(YES) / (P(YES) + P(NO)) over (token, log-prob) of a first token, all spellings added up; NaN with neither."""
    mass = {"YES": 0.0, "NO": 0.0}
    for token, logprob in tokens:
        word = word_of(token)
        if word is not None:
            mass[word] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    return mass["YES"] / total if total > 0 else math.nan
