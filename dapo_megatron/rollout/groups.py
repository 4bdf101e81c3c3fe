"""Prompts → scored groups: draw G completions a prompt, decode, grade, shape."""

from collections.abc import Sequence

import numpy as np

from dapo_megatron.agreement import from_rank_zero
from dapo_megatron.config import Recipe
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.data.prompt_template import bare_question
from dapo_megatron.data.prompts import Prompt
from dapo_megatron.rewards.grader import Grader
from dapo_megatron.rewards.overlong import overlong_penalties
from dapo_megatron.rollout.dispatcher import Dispatcher
from dapo_megatron.rollout.engine import RolloutRequest, sample_seed
from dapo_megatron.rollout.server_dispatcher import ServerDispatcher


class GroupSampler:
    """Draws groups for training and evaluation alike; called by every rank in step.

    Args:
        prompts: the data set; `token_ids[i]` are the prompt tokens of prompts[i].
        dispatcher: None in a run that learns from files and draws nothing.
        grader: on rank 0, None elsewhere; its verdicts are made known to all ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer,
        prompts: Sequence[Prompt],
        token_ids: Sequence[np.ndarray],
        dispatcher: Dispatcher | ServerDispatcher | None,
        grader: Grader | None,
    ) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.prompts, self.token_ids = prompts, token_ids
        self.dispatcher, self.grader = dispatcher, grader

    def draw(
        self,
        rows: Sequence[int],
        *,
        samples: int,
        temperature: float,
        top_p: float,
        seed_key: tuple[int, ...],
        collect: bool = False,
    ) -> list[PromptGroup]:
        """One group of `samples` completions a prompt row, graded; rewards without overlong shaping.

        Sample j of the i-th row has the seed (seed_key, i, j): it depends neither on the other rows nor on the number
        of engines. `collect`: see `Grader.score`.
        """
        requests = [
            RolloutRequest(
                ticket=i * samples + j,
                prompt_tokens=self.token_ids[row],
                seed=sample_seed(*seed_key, i, j),
                max_new_tokens=self.recipe.rollout.max_response_length,
                temperature=temperature,
                top_p=top_p,
            )
            for i, row in enumerate(rows)
            for j in range(samples)
        ]
        completions = self.dispatcher.generate(requests, group=samples)
        responses = self.tokenizer.batch_decode([c.tokens.tolist() for c in completions], skip_special_tokens=True)
        drawn = [self.prompts[row] for row in rows for _ in range(samples)]
        right, rewards = self._grade(responses, [p.answer for p in drawn], [self._asked(p) for p in drawn], collect)
        groups = []
        for i, row in enumerate(rows):
            part = slice(i * samples, (i + 1) * samples)
            groups.append(
                PromptGroup(
                    prompt_id=self.prompts[row].id,
                    text=str(self.prompts[row].text),
                    answer=self.prompts[row].answer,
                    prompt_tokens=self.token_ids[row],
                    completions=completions[part],
                    responses=responses[part],
                    accuracies=right[part],
                    rewards=rewards[part],
                )
            )
        return groups

    def draw_for_training(self, rows: Sequence[int], step: int, wave: int) -> list[PromptGroup]:
        """Groups of a rollout step: overlong shaping added; rewards permuted over all responses if `reward.shuffle`."""
        recipe = self.recipe
        groups = self.draw(
            rows,
            samples=recipe.rollout.samples_per_prompt,
            temperature=recipe.rollout.temperature,
            top_p=recipe.rollout.top_p,
            seed_key=(recipe.run.seed, 1, step, wave),
            collect=True,
        )
        for group in groups:
            group.step = step
        overlong = recipe.reward.overlong
        for group in groups if overlong.max_length is not None else ():
            lengths = [len(c.tokens) for c in group.completions]
            group.rewards = group.rewards + overlong_penalties(
                lengths, overlong.max_length, overlong.cache_length
            ).astype(np.float32)
        if recipe.reward.shuffle:
            _shuffle_scores(groups, np.random.default_rng([recipe.run.seed, 2, step, wave]))
        return groups

    def _asked(self, prompt: Prompt) -> str:
        """What the grader is told of a prompt: a judge the question alone, others all of it."""
        if self.recipe.reward.method == "judge":
            return bare_question(prompt.question, self.recipe.data.prompt_template)
        return str(prompt.text)

    def _grade(
        self, responses: list[str], answers: list[str], prompts: list[str], collect: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        scores = None
        if self.grader is not None:
            scores = self.grader.score(responses, answers, prompts, collect=collect)
        return from_rank_zero(scores, self.dispatcher.world)


def _shuffle_scores(groups: list[PromptGroup], rng: np.random.Generator) -> None:
    """Control experiment: scores lose their connection to the responses, their distribution stays."""
    rewards = np.concatenate([g.rewards for g in groups])
    accuracies = np.concatenate([g.accuracies for g in groups])
    order = rng.permutation(len(rewards))
    start = 0
    for group in groups:
        part = order[start : start + len(group.rewards)]
        group.rewards, group.accuracies = rewards[part], accuracies[part]
        start += len(part)
