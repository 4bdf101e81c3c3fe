"""The methods of a recipe: the names it may choose from, and which of them go together. No torch."""

from collections.abc import Iterator, Mapping

from dapo_megatron.algorithms.extensions import load_extensions
from dapo_megatron.algorithms.registry import SelectionSettings, advantages, policy_losses, token_selections
from dapo_megatron.algorithms.token_selection import STATISTICS
from dapo_megatron.config import Recipe
from dapo_megatron.config.algorithm import Algorithm
from dapo_megatron.config.problems import nearest_name
from dapo_megatron.config.shape import SHAPES
from dapo_megatron.errors import RequestError
from dapo_megatron.rewards.grader import GRADERS

READ_BY = {"cispo": "cispo", "kl_cov": "kl-cov", "dpo": "dpo"}  # sections of one policy loss
REFERENCES = {
    "fixed": "what algorithm.kl and dpo measure from stays the policy before its first rollout step",
    "periodic": "it becomes the policy after every reference.every-th step",
    "ema": "it follows the policy as a moving average of its weights (reference.decay)",
}
OURS = ("clip", "gspo", "cispo", "kl-cov", "dpo")


def check_methods(recipe: Recipe) -> None:
    """Load `algorithm.extensions`, then refuse unknown names and combinations that make no sense.

    Raises:
        RequestError: every broken rule, one a line.
    """
    load_extensions(recipe.algorithm.extensions)
    problems = [*_advantage(recipe), *_policy_loss(recipe), *_token_selection(recipe), *_pairs(recipe)]
    problems += _unread(recipe.algorithm)
    if problems:
        raise RequestError("\n".join(problems))


def selection_settings(algorithm: Algorithm) -> SelectionSettings:
    """What a recipe says of token selection, and of KL-Cov's penalties, for `algorithms/token_selection.py`."""
    selection = algorithm.token_selection
    return SelectionSettings(
        kind=selection.kind,
        ratio=selection.ratio,
        threshold=selection.threshold,
        cov_ratio=selection.cov_ratio,
        cov_low=selection.cov_low,
        cov_high=selection.cov_high,
        penalised=algorithm.kl_cov.ratio if algorithm.policy_loss == "kl-cov" else 0.0,
    )


def list_methods() -> str:
    """Every method that is registered, a line each, under the setting that chooses it."""
    lines: list[str] = []
    registered = (
        ("advantage", advantages()),
        ("policy_loss", policy_losses()),
        ("token_selection.kind", token_selections()),
    )
    for setting, methods in registered:
        lines.append(f"algorithm.{setting}")
        lines += [f"  {name:<15} {method.description}" for name, method in methods.items()]
    named = (
        ("algorithm.statistics", STATISTICS),
        ("algorithm.reference.kind", REFERENCES),
        ("rollout.shape", SHAPES),
        ("reward.grader", GRADERS),
    )
    for setting, kinds in named:
        lines.append(setting)
        lines += [f"  {name:<15} {description}" for name, description in kinds.items()]
    return "\n".join(lines)


def _advantage(recipe: Recipe) -> Iterator[str]:
    name, samples = recipe.algorithm.advantage, recipe.rollout.samples_per_prompt
    method = advantages().get(name)
    if method is None:
        yield _unknown("advantage", name, advantages())
        return
    if samples < method.least_samples:
        yield (
            f"rollout.samples_per_prompt={samples} is too few for algorithm.advantage={name}, which compares the "
            f"responses to one prompt: alone, every advantage is 0; use {method.least_samples} or more"
        )
    elif samples < 2 and recipe.algorithm.dynamic_sampling.enabled:
        yield (
            f"rollout.samples_per_prompt={samples} leaves dynamic sampling without a mixed group; use 2 or more, or "
            "algorithm.dynamic_sampling.enabled=false"
        )


def _policy_loss(recipe: Recipe) -> Iterator[str]:
    algorithm = recipe.algorithm
    name, aggregation = algorithm.policy_loss, algorithm.loss_aggregation
    method = policy_losses().get(name)
    if method is None:
        yield _unknown("policy_loss", name, policy_losses())
        return
    if aggregation not in method.aggregations:
        yield (
            f"algorithm.loss_aggregation={aggregation} does not go with algorithm.policy_loss={name}"
            f"{f': {method.reason}' if method.reason else ''}; use {' or '.join(method.aggregations)}"
        )
    if algorithm.eps_dual is not None and not method.dual_clip:
        having = ", ".join(n for n, m in policy_losses().items() if m.dual_clip)
        yield (
            f"algorithm.eps_dual={algorithm.eps_dual} means nothing to algorithm.policy_loss={name}; use null, or a "
            f"policy_loss that has a dual clip: {having}"
        )


def _token_selection(recipe: Recipe) -> Iterator[str]:
    algorithm = recipe.algorithm
    selection = algorithm.token_selection
    if selection.kind not in token_selections():
        yield _unknown("token_selection.kind", selection.kind, token_selections())
        return
    if selection.kind == "clip-cov" and selection.cov_low >= selection.cov_high:
        yield (
            f"algorithm.token_selection.cov_low={selection.cov_low} must be less than cov_high={selection.cov_high}: "
            "nothing lies between them; use 1.0 and 5.0"
        )
    if selection.kind == "clip-cov" and algorithm.policy_loss == "kl-cov":
        yield (
            "algorithm.token_selection.kind=clip-cov takes the gradient from tokens that algorithm.policy_loss=kl-cov "
            "would hold back by a penalty; use one of the two"
        )
    if selection.kind != "none" and algorithm.policy_loss == "gspo":
        yield (
            f"algorithm.token_selection.kind={selection.kind} would take tokens out of the mean that is the ratio of "
            "algorithm.policy_loss=gspo; use policy_loss=clip, or kind=none"
        )
    looks = selection.kind != "none" or algorithm.policy_loss == "kl-cov" or algorithm.compares_pairs
    if algorithm.statistics != "old" and not looks:
        yield (
            f"algorithm.statistics={algorithm.statistics} is looked at by algorithm.token_selection and by "
            "policy_loss=kl-cov or dpo only, and none is chosen; use old"
        )


def _pairs(recipe: Recipe) -> Iterator[str]:
    algorithm, rollout = recipe.algorithm, recipe.rollout
    samples, from_file = rollout.samples_per_prompt, rollout.shape == "preferences"
    if from_file and not algorithm.compares_pairs:
        yield (
            f"algorithm.policy_loss={algorithm.policy_loss} learns from responses that the policy drew, and "
            "rollout.shape=preferences takes them from a file; use policy_loss=dpo, or shape=independent"
        )
    if from_file and samples != 2:
        yield f"rollout.samples_per_prompt={samples}, and a row of rollout.shape=preferences has two responses; use 2"
    if not algorithm.compares_pairs:
        return
    if samples < 2 and not from_file:
        yield f"rollout.samples_per_prompt={samples} makes no pair for algorithm.policy_loss=dpo; use 2 or more"
    for setting, value, off in (
        ("kl.coefficient", algorithm.kl.coefficient, 0.0),
        ("token_selection.kind", algorithm.token_selection.kind, "none"),
        ("entropy_coefficient", algorithm.entropy_coefficient, 0.0),
        ("adaptive_entropy.target", algorithm.adaptive_entropy.target, None),
        ("importance_bound", algorithm.importance_bound, None),
        ("whiten", str(algorithm.whiten).lower(), "false"),
    ):
        if value != off:
            yield (
                f"algorithm.{setting}={value} does not go with algorithm.policy_loss=dpo, whose loss is of whole "
                f"responses beside the reference's; use {'null' if off is None else off}"
            )
    for setting in ("advantage", "loss_aggregation"):
        value, default = getattr(algorithm, setting), Algorithm.model_fields[setting].default
        if value != default:
            yield (
                f"algorithm.{setting}={value} would not act: algorithm.policy_loss=dpo is a mean over pairs, made by "
                f"which reward is higher; use {default}"
            )
    sampling = algorithm.dynamic_sampling
    updates = rollout.prompts_per_step // algorithm.mini_batch_prompts
    if algorithm.statistics == "micro_batch":
        yield "algorithm.statistics=micro_batch means nothing to algorithm.policy_loss=dpo; use current"
    if algorithm.statistics == "old" and (updates > 1 or (sampling.enabled and sampling.keep_surplus)):
        why = (
            f"the old policy is the present one in the first of {updates} updates alone"
            if updates > 1
            else "groups kept from an earlier step have an older policy's log-probs"
        )
        yield (
            f"algorithm.statistics=old does not go with algorithm.policy_loss=dpo here: {why}; use statistics=current"
            + (f", or mini_batch_prompts={rollout.prompts_per_step}" if updates > 1 else ", or keep_surplus=false")
        )


def _unread(algorithm: Algorithm) -> Iterator[str]:
    name, changed = algorithm.policy_loss, algorithm.changed()
    for section, reader in READ_BY.items():
        if section == "cispo" and name not in OURS:
            continue  # a loss of one's own may look at `clips_low`
        if name != reader and section in changed:
            yield (
                f"algorithm.{section} is a section of algorithm.policy_loss={reader}; with policy_loss={name} "
                "leave it out"
            )


def _unknown(setting: str, name: str, known: Mapping[str, object]) -> str:
    near = nearest_name(name, list(known))
    hint = f"; did you mean {near}?" if near else ";"
    return (
        f"algorithm.{setting}={name} is not registered{hint} use {', '.join(known)}, or name the file that registers "
        "it in algorithm.extensions"
    )
