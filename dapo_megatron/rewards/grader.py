"""From the recipe's section `reward` to rewards: which grader, and what its verdicts are worth."""

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from dapo_megatron.config.reward import Reward
from dapo_megatron.errors import RequestError
from dapo_megatron.rewards.code_tests import CodeTests, check_code
from dapo_megatron.rewards.custom import CustomReward, check_custom
from dapo_megatron.rewards.grading import grade
from dapo_megatron.rewards.judge import JudgeReward, check_judge, open_judge
from dapo_megatron.rewards.model_folder import check_reward_model
from dapo_megatron.rewards.pool import GraderPool, Scores
from dapo_megatron.rewards.verdicts import Judging

if TYPE_CHECKING:
    import torch

GRADERS = {
    "rule": "R = right where the final answer equals the reference: as integer, as text, by mathematics (DAPO)",
    "code": "R by the test cases that a program passes",
    "model": "R = scale · score of a sequence classifier",
    "judge": "R by P(YES) of a language model on question, final answer and reference, beside the rule",
}
"""What `reward.grader` may be; `reward.custom` is one's own."""

CAUSES = ("timed_out", "crashed", "out_of_memory", "failures")  # of items without a verdict; the last is their sum
SPARE_S = 10.0  # of a program's tests, beyond the limits of each


class Grader:
    """Scores responses in worker processes, with a reward model or a judge; a context manager that leaves none behind.

    Args:
        device: where a reward model or a judge runs; None = the CPU.
        judge: the judge, where the caller has opened it: one on an engine of the run.

    Raises:
        RequestError, RunError: as `GraderPool`, as `ModelReward`, or as `open_judge`.
    """

    def __init__(self, reward: Reward, device: "torch.device | None" = None, *, judge: Judging | None = None) -> None:
        self._reward = reward
        self._pool = self._model = self._judge = None
        self._before = dict.fromkeys(CAUSES, 0)
        if reward.method == "model":
            import torch

            from dapo_megatron.rewards.reward_model import ModelReward

            self._model = ModelReward(reward.model, device or torch.device("cpu"))
            return
        if reward.method == "judge" and judge is None:
            judge = open_judge(reward.judge, device)
        self._pool = _pool(reward)
        if reward.method == "judge":
            self._judge = JudgeReward(reward, judge, self._pool)

    @property
    def failures(self) -> int:
        """Items without a verdict since the start of this process, counted as wrong."""
        return 0 if self._pool is None else self._pool.failures

    def metrics(self) -> dict[str, float]:
        """Since `begin_step`: `grader/…`, items without a verdict, by cause, and all of them; `judge/…`."""
        counts = {f"grader/{cause}": float(count - self._before[cause]) for cause, count in self._counts().items()}
        return counts if self._judge is None else counts | self._judge.metrics()

    def _counts(self) -> dict[str, int]:
        return {cause: getattr(self._pool, cause, 0) for cause in CAUSES}

    def begin_step(self) -> None:
        """Count anew."""
        self._before = self._counts()
        if self._judge is not None:
            self._judge.begin_step()

    def write_records(self) -> None:
        """Write what a judge was asked and said, where `reward.judge.collect` names a file."""
        if self._judge is not None:
            self._judge.write_records()

    def score(
        self, responses: Sequence[str], answers: Sequence[str], prompts: Sequence[str], *, collect: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(right bool [B], rewards fp32 [B]) of B responses.

        A grader of plain verdicts gives `reward.right` or `reward.wrong`; one of scores gives its own. An item without
        a verdict is wrong and has `reward.wrong`. `prompts`: what was asked; for a judge the bare questions. `collect`:
        a judge's verdicts are kept for `write_records`.

        Raises:
            RunError: as `GraderPool.score`, as `ModelReward.score`, or as `JudgeReward.score`.
        """
        scores = self._scores(responses, answers, prompts, collect)
        verdicts_B = np.where(scores.right_B, self._reward.right, self._reward.wrong)
        rewards_B = np.where(np.isnan(scores.rewards_B), verdicts_B, scores.rewards_B)
        return scores.right_B, rewards_B.astype(np.float32)

    def _scores(
        self, responses: Sequence[str], answers: Sequence[str], prompts: Sequence[str], collect: bool
    ) -> Scores:
        if self._model is not None:
            return self._model.score(responses, prompts)
        if self._judge is not None:
            return self._judge.score(responses, answers, prompts, collect=collect)
        return self._pool.score(responses, answers, *([prompts] if self._reward.method == "custom" else []))

    def close(self) -> None:
        """End every worker; a second call does nothing."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pool(reward: Reward) -> GraderPool:
    """The worker processes of a grader that is no model; a judge's apply the rule."""
    if reward.method == "code":
        code = reward.code
        tests = CodeTests(
            time_limit_s=code.time_limit_s,
            memory_limit_mib=code.memory_limit_mib,
            max_tests=code.max_tests,
            fraction=code.score == "fraction",
            right_reward=reward.right,
            wrong_reward=reward.wrong,
        )
        # a worker's limit of memory holds for what it starts anew, too
        memory = reward.memory_limit_mib + code.memory_limit_mib
        limit_s = code.max_tests * code.time_limit_s + SPARE_S
        return GraderPool(reward.workers, limit_s, tests, memory_limit_mib=memory, chunk_items=1)
    function = grade
    if reward.custom is not None:
        function = CustomReward(reward.custom, reward.custom_bound, reward.custom_threshold)
    return GraderPool(reward.workers, reward.time_limit_s, function, memory_limit_mib=reward.memory_limit_mib)


def check_grader(reward: Reward) -> None:
    """What can be refused of a grader before anything starts; no torch.

    Raises:
        RequestError: as `check_custom`, `check_reward_model` and `check_judge`; a machine that cannot confine programs.
    """
    if reward.method == "custom":
        check_custom(reward.custom)
    elif reward.method == "model":
        check_reward_model(reward.model)
    elif reward.method == "judge":
        check_judge(reward.judge)
    elif reward.method == "code":
        try:
            check_code()
        except OSError as error:
            raise RequestError(f"reward.grader=code cannot run programs on this machine: {error}") from None
