"""A generative verifier beside the rule: a language model looks at what the rule does not find right.

    P = P(YES) / (P(YES) + P(NO)) of the judge's first token on (question, final answer, reference)
    value = P, or 1 where P > 0.5 else 0      (arXiv 2503.23829: soft and binary)
    reward = wrong + (right − wrong) · value, z-scored where asked for;   accuracy = right by the rule, or P > 0.5

Where the judge says nothing, the rule's verdict is the value.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dapo_megatron.config.reward import Judge, Reward
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.judge_prompt import Case, check_wording, shown_answer
from dapo_megatron.rewards.judge_records import Judged, JudgeRecords, check_collect
from dapo_megatron.rewards.judge_server import JudgeServer, check_server
from dapo_megatron.rewards.judge_tokens import spelling_tokens
from dapo_megatron.rewards.model_folder import check_judge_folder
from dapo_megatron.rewards.pool import GraderPool, Scores
from dapo_megatron.rewards.verdicts import Judging, Opinions

if TYPE_CHECKING:
    import torch


class JudgeReward:
    """Rewards by `judge` and the rule in `pool`, which the caller closes.

    Raises:
        RequestError: as `JudgeRecords`.
    """

    def __init__(self, reward: Reward, judge: Judging, pool: GraderPool) -> None:
        self._reward, self._settings = reward, reward.judge
        self._judge, self._pool = judge, pool
        self._records = None if reward.judge.collect is None else JudgeRecords(Path(reward.judge.collect))
        self.begin_step()

    def begin_step(self) -> None:
        """Count anew."""
        self._counts = dict.fromkeys(("judged", "no_verdict", "unreachable"), 0)
        self._p_sum = self._agreed = 0.0

    def metrics(self) -> dict[str, float]:
        """`judge/…` since `begin_step`, in responses.

        judged: with a verdict. no_verdict: the reply was neither YES nor NO. unreachable: no reply. fallbacks: both.
        p_yes: mean P(YES), agreement: share of verdicts equal to the rule's; absent where none is judged. With
        `rule_first` the judge sees what the rule finds wrong, and agreement is the share of NO.
        """
        counts = {f"judge/{name}": float(count) for name, count in self._counts.items()}
        counts["judge/fallbacks"] = counts["judge/no_verdict"] + counts["judge/unreachable"]
        judged = self._counts["judged"]
        if not judged:
            return counts
        return counts | {"judge/p_yes": self._p_sum / judged, "judge/agreement": self._agreed / judged}

    def write_records(self) -> None:
        """Bring `reward.judge.collect` up to date; as `JudgeRecords.write`."""
        if self._records is not None:
            self._records.write()

    def score(
        self, responses: Sequence[str], answers: Sequence[str], questions: Sequence[str], *, collect: bool = False
    ) -> Scores:
        """right and reward of B responses. An empty response is wrong and not judged.

        Args:
            collect: verdicts go into `reward.judge.collect`, where there is one.

        Raises:
            RunError: as the judge, or as the pool; no verdict under `fallback: stop`.
        """
        settings = self._settings
        rule_B = self._pool.score(responses, answers).right_B
        shown = [shown_answer(response, settings.answer_characters) for response in responses]
        asked = [i for i in range(len(shown)) if shown[i] and not (settings.rule_first and rule_B[i])]
        cases = [Case(questions[i], shown[i], answers[i]) for i in asked]
        p_yes_B = np.full(len(shown), np.nan)
        p_yes_B[asked] = self._judged(cases, rule_B[asked], collect)
        value_B = np.where(np.isnan(p_yes_B), rule_B, p_yes_B if settings.mode == "soft" else p_yes_B > 0.5)
        rewards_B = self._reward.wrong + (self._reward.right - self._reward.wrong) * value_B.astype(np.float64)
        if settings.normalise == "z-score":
            rewards_B = z_scores(rewards_B)
        return Scores(rule_B | (p_yes_B > 0.5), rewards_B)

    def _judged(self, cases: list[Case], rule_A: np.ndarray, collect: bool) -> np.ndarray:
        """P(YES) of the cases that are asked, NaN without a verdict; equal ones are asked once."""
        if not cases:
            return np.empty(0)
        distinct = list(dict.fromkeys(cases))
        opinions = self._judge.ask(distinct)
        place = {case: i for i, case in enumerate(distinct)}
        index = [place[case] for case in cases]
        p_yes_A, reached_A = opinions.p_yes_B[index], opinions.reached_B[index]
        verdict_A = ~np.isnan(p_yes_A)
        if self._settings.fallback == "stop" and not verdict_A.all():
            raise RunError(_without_verdict(opinions, cases[int(np.flatnonzero(~verdict_A)[0])]))
        if collect and self._records is not None:
            found = zip(distinct, opinions.p_yes_B.tolist(), strict=True)
            self._records.add(Judged(case, p_yes) for case, p_yes in found if p_yes == p_yes)
        self._counts["judged"] += int(verdict_A.sum())
        self._counts["no_verdict"] += int((reached_A & ~verdict_A).sum())
        self._counts["unreachable"] += int((~reached_A).sum())
        self._p_sum += float(p_yes_A[verdict_A].sum())
        self._agreed += float(((p_yes_A > 0.5) == rule_A)[verdict_A].sum())
        return p_yes_A


def z_scores(rewards_B: np.ndarray) -> np.ndarray:
    """(R − mean) / std (of the population) over B rewards; 0 where all are equal."""
    if rewards_B.size == 0 or (rewards_B == rewards_B[0]).all():
        return np.zeros_like(rewards_B)
    return (rewards_B - rewards_B.mean()) / rewards_B.std()


def open_judge(settings: Judge, device: "torch.device | None") -> Judging:
    """The judge of a recipe that needs no engine of its own; a folder's model lies on `device`, None = the CPU."""
    if settings.url is not None:
        return JudgeServer(settings)
    import torch

    from dapo_megatron.rewards.judge_model import JudgeModel

    return JudgeModel(settings, device or torch.device("cpu"))


def check_judge(settings: Judge) -> None:
    """What can be refused of a judge before anything starts; no torch.

    Raises:
        RequestError: no model, a folder that holds none, an address that is none, a key that is not there, a wording
            without places, a tokenizer that cannot tell YES from NO, a file to collect into that holds something else.
    """
    if settings.url is None and settings.model is None:
        raise RequestError("reward.grader=judge needs reward.judge.model, a folder with a language model, or .url")
    if settings.collect is not None:
        check_collect(Path(settings.collect))
    if settings.prompt is not None:
        check_wording(settings.prompt)
    if settings.url is not None:
        check_server(settings)
    else:
        check_judge_folder(settings)
        spelling_tokens(load_tokenizer(settings.model), f"reward.judge.model={settings.model}")


def _without_verdict(opinions: Opinions, case: Case) -> str:
    said = opinions.trouble or "the reply is neither YES nor NO"
    return (
        f"reward.judge has no verdict on the final answer {case.answer[:60]!r}: {said}; with "
        "reward.judge.fallback=rule the rule would decide"
    )
