"""From the recipe's section `reward` to rewards: which grader, and what its verdicts are worth."""

from collections.abc import Sequence
from types import TracebackType

import numpy as np

from dapo_megatron.config.reward import Reward
from dapo_megatron.rewards.custom import CustomReward
from dapo_megatron.rewards.grading import grade
from dapo_megatron.rewards.pool import GraderPool


class Grader:
    """Scores responses in worker processes; a context manager that leaves none behind.

    Raises:
        RequestError, RunError: as `GraderPool`.
    """

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._by_prompt = reward.custom is not None
        function = grade
        if reward.custom is not None:
            function = CustomReward(reward.custom, reward.custom_bound, reward.custom_threshold)
        self._pool = GraderPool(reward.workers, reward.time_limit_s, function, memory_limit_mib=reward.memory_limit_mib)

    @property
    def failures(self) -> int:
        """Items without a verdict since the start, counted as wrong."""
        return self._pool.failures

    def metrics(self) -> dict[str, float]:
        """`grader/…`: items without a verdict since the start, by cause, and all of them."""
        pool = self._pool
        return {
            "grader/timed_out": float(pool.timed_out),
            "grader/crashed": float(pool.crashed),
            "grader/out_of_memory": float(pool.out_of_memory),
            "grader/failures": float(pool.failures),
        }

    def score(
        self, responses: Sequence[str], answers: Sequence[str], prompts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(right bool [B], rewards fp32 [B]) of B responses.

        A grader of plain verdicts gives `reward.right` or `reward.wrong`; one of scores gives its own. An item without
        a verdict is wrong and has `reward.wrong`.

        Raises:
            RunError: as `GraderPool.score`.
        """
        more = (prompts,) if self._by_prompt else ()
        scores = self._pool.score(responses, answers, *more)
        verdicts_B = np.where(scores.right_B, self._reward.right, self._reward.wrong)
        rewards_B = np.where(np.isnan(scores.rewards_B), verdicts_B, scores.rewards_B)
        return scores.right_B, rewards_B.astype(np.float32)

    def close(self) -> None:
        """End every worker; a second call does nothing."""
        self._pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
