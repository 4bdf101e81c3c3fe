"""Prompts → scored groups: draw G completions a prompt, decode, grade, shape."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import numpy as np

from dapo_megatron.agreement import done_on_rank_zero
from dapo_megatron.config import Recipe
from dapo_megatron.data.completions import Completion, PromptGroup
from dapo_megatron.data.prompt_template import bare_question
from dapo_megatron.data.prompts import Prompt
from dapo_megatron.rewards.grader import Grader
from dapo_megatron.rewards.overlong import overlong_penalties
from dapo_megatron.rollout.chain import value_chains
from dapo_megatron.rollout.dispatcher import Dispatcher
from dapo_megatron.rollout.dynamic_sampling import is_mixed
from dapo_megatron.rollout.engine import Fork, RolloutRequest, sample_seed
from dapo_megatron.rollout.server_dispatcher import ServerDispatcher
from dapo_megatron.rollout.tree import draw_trees, responses_of, value_tree

CONTINUATIONS, TREES = 5, 6  # streams of random numbers of a run seed: 1 samples, 2 shuffling, 3 and 4 evaluation


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
        fork: Fork | None = None,
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
                fork=fork,
            )
            for i, row in enumerate(rows)
            for j in range(samples)
        ]
        completions = self.dispatcher.generate(requests, group=samples)
        return self._graded(rows, [samples] * len(rows), completions, collect)

    def _graded(
        self, rows: Sequence[int], sizes: Sequence[int], completions: list[Completion], collect: bool
    ) -> list[PromptGroup]:
        """Groups of so many completions, end to end, with their verdicts."""
        drawn = [self.prompts[row] for row, size in zip(rows, sizes, strict=True) for _ in range(size)]
        responses, right, rewards = self._grade(drawn, [c.tokens for c in completions], collect)
        groups = []
        for row, size, end in zip(rows, sizes, accumulate(sizes), strict=True):
            part = slice(end - size, end)
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
        """Groups of a rollout step: overlong shaping added; rewards permuted over all responses if `reward.shuffle`;
        segments valued where `rollout.shape` has them."""
        recipe = self.recipe
        if recipe.rollout.shape == "tree":
            return self._draw_trees(rows, step, wave)
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
            group.rewards = self._shaped(group.rewards, [c.tokens for c in group.completions])
        if recipe.reward.shuffle:
            _shuffle_scores(groups, np.random.default_rng([recipe.run.seed, 2, step, wave]))
        if recipe.rollout.shape == "chain":
            self._value_chains(rows, groups, (recipe.run.seed, CONTINUATIONS, step, wave))
        return groups

    def _draw_trees(self, rows: Sequence[int], step: int, wave: int) -> list[PromptGroup]:
        recipe = self.recipe
        trees = draw_trees(
            [self.token_ids[row] for row in rows],
            recipe.rollout,
            generate=self._generate,
            seed_key=(recipe.run.seed, TREES, step, wave),
        )
        found = [responses_of(tree, overlong_filtering=recipe.algorithm.overlong_filtering) for tree in trees]
        completions = [c for _, completions in found for c in completions]
        groups = self._graded(rows, [len(tree_rows) for tree_rows, _ in found], completions, collect=True)
        for group, tree, (tree_rows, _) in zip(groups, trees, found, strict=True):
            group.step = step
            group.rewards = self._shaped(group.rewards, [c.tokens for c in group.completions])
            value_tree(group, tree, tree_rows, recipe.rollout, epsilon=recipe.algorithm.advantage_epsilon)
        return groups

    def _generate(self, requests: list[RolloutRequest], together: int) -> list[Completion]:
        return self.dispatcher.generate(requests, group=together)

    def _value_chains(self, rows: Sequence[int], groups: list[PromptGroup], seed_key: tuple[int, ...]) -> None:
        """Of the groups that dynamic sampling will keep: values of others would be drawn in vain."""

        def reward(numbers: Sequence[int], tokens: Sequence[np.ndarray]) -> np.ndarray:
            _, _, rewards = self._grade([self.prompts[rows[i]] for i in numbers], tokens, collect=False)
            return self._shaped(rewards, tokens)

        algorithm = self.recipe.algorithm
        sampling = algorithm.dynamic_sampling
        value_chains(
            {i: g for i, g in enumerate(groups) if not sampling.enabled or is_mixed(g, sampling.metric)},
            self.recipe.rollout,
            generate=self._generate,
            reward=reward,
            seed_key=seed_key,
            overlong_filtering=algorithm.overlong_filtering,
        )

    def _asked(self, prompt: Prompt) -> str:
        """What the grader is told of a prompt: a judge the question alone, others all of it."""
        if self.recipe.reward.method == "judge":
            return bare_question(prompt.question, self.recipe.data.prompt_template)
        return str(prompt.text)

    def _grade(
        self, prompts: Sequence[Prompt], tokens: Sequence[np.ndarray], collect: bool
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        """(texts, right or wrong, rewards) of responses, one a prompt.

        Raises:
            RunError: rank 0's grader could not, on every rank alike.
        """
        responses = self.tokenizer.batch_decode([t.tolist() for t in tokens], skip_special_tokens=True)
        score = None
        if self.grader is not None:
            asked, answers = [self._asked(p) for p in prompts], [p.answer for p in prompts]
            score = partial(self.grader.score, responses, answers, asked, collect=collect)
        return responses, *done_on_rank_zero(score, self.dispatcher.world)

    def _shaped(self, rewards: np.ndarray, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """With the punishment of long responses, where the recipe has one."""
        overlong = self.recipe.reward.overlong
        if overlong.max_length is None:
            return rewards
        penalties = overlong_penalties([len(t) for t in tokens], overlong.max_length, overlong.cache_length)
        return rewards + penalties.astype(np.float32)


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
