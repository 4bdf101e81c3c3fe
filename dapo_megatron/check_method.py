"""`check-method`: does a recipe's method give the same update however the work is cut?

A tiny model with random weights makes one rollout step of it, again and again: in one micro-batch, in several, with the
sequences in another order, and over two ranks. Losses and gradient norms must agree. It takes no model and no data.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dapo_megatron.algorithms.advantage_rules import advantages_of
from dapo_megatron.algorithms.registry import GroupRewards, SelectionSettings, TokenValues
from dapo_megatron.algorithms.token_selection import kept_tokens
from dapo_megatron.config import Recipe
from dapo_megatron.config.architecture import architecture_from_dict
from dapo_megatron.config.load import dump_recipe
from dapo_megatron.config.model import Scratch
from dapo_megatron.config.shape import SEGMENTED
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.launch import start_ranks
from dapo_megatron.methods import check_methods, selection_settings
from dapo_megatron.resharding.hf_layout import SINGLE
from dapo_megatron.scratch import random_weights, scratch_config

PROMPTS, MINI_BATCH, RESPONSE, VOCABULARY = 4, 2, 24, 64
MOST_SAMPLES = 8
TIME_LIMIT_S = 300  # of the ranks of one world
TOLERANCE = 1e-4  # of fp32 sums in another order, a hundredfold
MODEL = Scratch(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, max_positions=64, init_std=0.3)


@dataclass(frozen=True)
class Cut:
    """A way to do the step. `share`: tokens of a micro-batch as a share of the mini-batch's; `backwards`: the prompts
    of each mini-batch in reverse order."""

    name: str
    world: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    share: float = 1.0
    backwards: bool = False


CUTS = (
    Cut("one micro-batch"),
    Cut("two micro-batches", share=0.6),
    Cut("four micro-batches", share=0.3),
    Cut("prompts in reverse order", share=0.6, backwards=True),
    Cut("data parallel 2", world=2, share=0.6),
    Cut("tensor parallel 2", world=2, tensor=2),
    Cut("pipeline parallel 2", world=2, pipeline=2, share=0.6),
    Cut("context parallel 2", world=2, context=2, share=0.6),
)


@dataclass(frozen=True)
class Outcome:
    """Of one cut: loss and gradient norm of each update, trained tokens of the step."""

    losses: list[float]
    norms: list[float]
    tokens: int


def check_method(recipe: Recipe, tell: Callable[[str], None]) -> None:
    """Check the recipe's advantage rule, then its policy loss and token selection together; `tell` gets the lines.

    Raises:
        RequestError: the methods are unknown or do not go together, or need a critic or rollouts.
        RunError: an update differs between two cuts, the rule depends on the order of responses, a method raised, or a
            world took more than TIME_LIMIT_S.
    """
    check_methods(recipe)
    if recipe.algorithm.advantage == "gae":
        raise RequestError(
            "algorithm.advantage=gae needs a critic, and check-method trains none; use another advantage to check the "
            "policy loss and the token selection"
        )
    if recipe.rollout.shape in SEGMENTED:
        raise RequestError(
            f"rollout.shape={recipe.rollout.shape} values segments by rollouts, and check-method makes none; use "
            "independent to check the policy loss and the token selection"
        )
    small = small_recipe(recipe)
    algorithm = small.algorithm
    check_advantage(algorithm.advantage, small.rollout.samples_per_prompt, algorithm.advantage_epsilon)
    check_selection(selection_settings(algorithm))
    tell(
        f"advantage={algorithm.advantage} policy_loss={algorithm.policy_loss} "
        f"token_selection={algorithm.token_selection.kind} statistics={algorithm.statistics}"
    )
    with TemporaryDirectory() as name:
        outcomes = run_cuts(small, Path(name))
    for cut, outcome in zip(CUTS, outcomes, strict=True):
        losses, norms = ("  ".join(f"{n: .6e}" for n in numbers) for numbers in (outcome.losses, outcome.norms))
        same = "" if gap(outcome, outcomes[0]) <= TOLERANCE else "   DIFFERS"
        tell(f"  {cut.name:<26} loss {losses}   gradient norm {norms}   tokens {outcome.tokens}{same}")
    judge(outcomes, small)


def judge(outcomes: Sequence[Outcome], recipe: Recipe) -> None:
    """Raises RunError where an outcome is not the first one's."""
    first = outcomes[0]
    for cut, outcome in zip(CUTS, outcomes, strict=True):
        if gap(outcome, first) <= TOLERANCE:
            continue
        algorithm = recipe.algorithm
        if algorithm.statistics == "micro_batch":
            raise RunError(
                f"algorithm.statistics=micro_batch counts in each micro-batch alone, so the update changes with the "
                f"layout ({cut.name}: loss {outcome.losses}, {CUTS[0].name}: {first.losses}); use old or current"
            )
        raise RunError(
            f"algorithm.policy_loss={algorithm.policy_loss} is not layout-invariant: {cut.name} gives losses "
            f"{outcome.losses} and gradient norms {outcome.norms}, {CUTS[0].name} {first.losses} and {first.norms}. A "
            "policy loss may look at a token and at its whole sequence (TokenBatch.mean_of_sequence), not at sums, "
            "means or extremes over the tokens it is given, which are those of one micro-batch on one rank"
        )


def gap(outcome: Outcome, first: Outcome) -> float:
    """Largest relative difference of losses (of those below 0.01 the absolute one, in hundredths) and of norms."""
    if outcome.tokens != first.tokens or len(outcome.losses) != len(first.losses):
        return float("inf")
    ours, theirs = (np.array([one.losses, one.norms]) for one in (outcome, first))
    if not np.isfinite(ours).all():
        return float("inf")
    floor = np.array([[1e-2], [1e-6]])
    return float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), floor)).max(initial=0.0))


def check_advantage(name: str, samples: int, epsilon: float) -> None:
    """Raises RunError where a response's advantage changes with the order of the responses, or from call to call."""
    rng = np.random.default_rng(0)
    for rewards in (rng.normal(size=samples), np.where(np.arange(samples) == 0, 1.0, -1.0)):
        lengths, order = rng.integers(2, RESPONSE, samples), rng.permutation(samples)
        found = advantages_of(name, GroupRewards(rewards, lengths, epsilon))
        again = advantages_of(name, GroupRewards(rewards, lengths, epsilon))
        moved = advantages_of(name, GroupRewards(rewards[order], lengths[order], epsilon))
        if not np.array_equal(found, again):
            raise RunError(f"algorithm.advantage={name} gave {found.tolist()}, then {again.tolist()} for equal rewards")
        if not np.allclose(moved, found[order], rtol=1e-4, atol=1e-6):
            raise RunError(
                f"algorithm.advantage={name} depends on the order of the responses: rewards {rewards.tolist()} give "
                f"{found.tolist()}, in the order {order.tolist()} they give {moved.tolist()}"
            )


def check_selection(settings: SelectionSettings) -> None:
    """Raises RunError where a token's choice changes with the order of the responses, or from call to call."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, RESPONSE, MOST_SAMPLES)
    count = int(lengths.sum())
    samples_N = np.repeat(np.arange(MOST_SAMPLES), lengths)
    values = TokenValues(
        logprobs_N=-rng.exponential(1, count).astype(np.float32),
        entropies_N=rng.exponential(1, count).astype(np.float32),
        advantages_N=rng.normal(size=MOST_SAMPLES).astype(np.float32)[samples_N],
        clipped_N=np.zeros(count, bool),
        samples_N=samples_N,
        positions_N=np.concatenate([np.arange(length) for length in lengths]),
    )
    order = np.argsort(-samples_N, kind="stable")  # the responses in reverse order
    found = kept_tokens(values, settings, (1, 2, 3))
    told = f"algorithm.token_selection.kind={settings.kind}"
    if not np.array_equal(found, kept_tokens(values, settings, (1, 2, 3))):
        raise RunError(
            f"{told} chose {int(found.sum())} of {count} tokens, then others from the same ones: no two ranks would "
            "agree; draw random numbers by TokenValues.uniform"
        )
    if not np.array_equal(found[order], kept_tokens(values.only(order), settings, (1, 2, 3))):
        raise RunError(
            f"{told} depends on the order of the responses: with the same ones in reverse order it chose other tokens; "
            "a selection may look at a token's numbers, its place in its response, counts and quantiles over all tokens"
        )


def small_recipe(recipe: Recipe) -> Recipe:
    """The recipe's algorithm and temperature on a tiny model, fp32, on CPU ranks."""
    algorithm = recipe.algorithm.model_dump() | {"mini_batch_prompts": MINI_BATCH}
    algorithm["extensions"] = [str(Path(file).resolve()) for file in recipe.algorithm.extensions]
    return Recipe.model_validate(
        {
            "run": {"directory": "check-method", "seed": recipe.run.seed},
            "model": {"scratch": MODEL.model_dump(), "dtype": "fp32"},
            "rollout": {
                "samples_per_prompt": min(recipe.rollout.samples_per_prompt, MOST_SAMPLES),
                "prompts_per_step": PROMPTS,
                "max_response_length": RESPONSE,
                "temperature": recipe.rollout.temperature,
            },
            "algorithm": algorithm,
            "optimizer": {"distributed": False, "gradient_clip": 1e9, "weight_decay": 0.0},
            "learner": {"device": "cpu", "fused_linear_loss": recipe.learner.fused_linear_loss},
        }
    )


def run_cuts(recipe: Recipe, folder: Path) -> list[Outcome]:
    """An outcome a cut, from one world of each size, in `folder`."""
    from safetensors.numpy import save_file

    config = scratch_config(MODEL, vocabulary=VOCABULARY, eos_token=0)
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(architecture_from_dict(config, "check-method"), std=MODEL.init_std, seed=0)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    outcomes: dict[str, Outcome] = {}
    for world in sorted({cut.world for cut in CUTS}):
        cuts = [cut for cut in CUTS if cut.world == world]
        (folder / "cuts.json").write_text(json.dumps([asdict(cut) for cut in cuts]))
        code = start_ranks([sys.executable, "-m", "dapo_megatron.check_method_ranks", str(folder)], world)
        if code:
            raise RunError(f"a world of {world} did not end well, exit code {code}: see what it says above")
        found = json.loads((folder / "outcomes.json").read_text())
        outcomes |= {cut.name: Outcome(**one) for cut, one in zip(cuts, found, strict=True)}
    return [outcomes[cut.name] for cut in CUTS]
