"""The reference policy of a run, from which `algorithm.kl` and `policy_loss: dpo` measure.

It begins as the policy before its first rollout step: the model that the recipe names, after supervised stages if
there are any. Where it stays that, these stages' result is kept as RUN/reference, a Hugging Face folder, so that a
resumed run has the same reference at any layout; without stages the model folder itself is read again. A reference that
follows the policy (`algorithm.reference.kind`) is a part of every checkpoint instead.
"""

from functools import partial

from dapo_megatron.agreement import checked_on_rank_zero
from dapo_megatron.assemble import Run
from dapo_megatron.errors import RequestError
from dapo_megatron.learner.checkpoint import load_weights
from dapo_megatron.learner.manifest import REFERENCE, check_manifest, write_manifest
from dapo_megatron.learner.reference import ReferenceWeights
from dapo_megatron.rollout.preference_pairs import PreferencePairs
from dapo_megatron.weight_sync import export_hugging_face


def keep_reference(run: Run) -> ReferenceWeights | None:
    """Between warm start and rollouts: the reference, its log-probs of a preference file taken; None where the recipe
    has no use for one; collective.

    Raises:
        RequestError: what was kept is not there, or has changed.
    """
    reference = _find_reference(run) if run.recipe.algorithm.needs_reference else None
    if reference is not None and isinstance(run.training, PreferencePairs):
        with reference.in_place() as model:
            run.training.keep_reference(lambda batch: model.score(batch)[0])
    return reference


def move_reference(run: Run) -> dict[str, float]:
    """After the gradient updates of a step: let the reference follow. Returns `reference/moved`, as
    `ReferenceWeights.move` has it; nothing where it does not move; collective."""
    if run.reference is None or not run.reference.moves:
        return {}
    return {"reference/moved": run.reference.move(run.step + 1)}


def _find_reference(run: Run) -> ReferenceWeights:
    """Before the first rollout step the present policy, which is kept; a resumed run reads what was kept."""
    kept, settings = run.paths.run / "reference", run.recipe.algorithm.reference
    supervised = bool(run.recipe.supervised.stages)
    begin = partial(ReferenceWeights, run.learner, settings, resident=run.resident)
    if run.step and settings.moves:
        reference = begin()
        load_weights(run.resumed, run.learner, REFERENCE, reference.values)
        reference.settle()
        return reference
    if run.step == 0:
        if supervised and not settings.moves:
            limit = run.recipe.resharding.time_limit_s
            export_hugging_face(run.learner, kept, side_files=run.paths.model, time_limit_s=limit)
            if run.world.rank == 0:
                write_manifest(kept)
        return begin()
    if not supervised:
        return begin(folder=run.paths.model)
    try:
        checked_on_rank_zero(partial(check_manifest, kept), run.world.rank, run.world.size)
    except RequestError as refusal:
        kl = run.recipe.algorithm.kl.coefficient
        asks, instead = (f"kl.coefficient={kl}", "use coefficient=0, or ") if kl else ("policy_loss=dpo", "")
        raise RequestError(
            f"algorithm.{asks} needs the reference policy that this run began with: {refusal}; {instead}start anew "
            "with --overwrite"
        ) from None
    return begin(folder=kept)
