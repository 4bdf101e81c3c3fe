"""The reference policy of a run, from which `algorithm.kl` and `policy_loss: dpo` measure.

It is the policy before its first rollout step: the model that the recipe names, after supervised stages if there are
any. These stages' result is kept as RUN/reference, a Hugging Face folder, so that a resumed run has the same reference
at any layout; without stages the model folder itself is read again.
"""

from functools import partial

from dapo_megatron.agreement import checked_on_rank_zero
from dapo_megatron.assemble import Run
from dapo_megatron.errors import RequestError
from dapo_megatron.learner.manifest import check_manifest, write_manifest
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
        with reference.in_place():
            run.training.keep_reference(lambda batch: run.learner.score(batch)[0])
    return reference


def _find_reference(run: Run) -> ReferenceWeights:
    """Before the first rollout step the present policy, which is kept; a resumed run reads what was kept."""
    kept = run.paths.run / "reference"
    supervised = bool(run.recipe.supervised.stages)
    if run.step == 0:
        if supervised:
            limit = run.recipe.resharding.time_limit_s
            export_hugging_face(run.learner, kept, side_files=run.paths.model, time_limit_s=limit)
            if run.world.rank == 0:
                write_manifest(kept)
        return ReferenceWeights(run.learner)
    if not supervised:
        return ReferenceWeights(run.learner, run.paths.model)
    try:
        checked_on_rank_zero(partial(check_manifest, kept), run.world.rank, run.world.size)
    except RequestError as refusal:
        kl = run.recipe.algorithm.kl.coefficient
        asks, instead = (f"kl.coefficient={kl}", "use coefficient=0, or ") if kl else ("policy_loss=dpo", "")
        raise RequestError(
            f"algorithm.{asks} needs the reference policy that this run began with: {refusal}; {instead}start anew "
            "with --overwrite"
        ) from None
    return ReferenceWeights(run.learner, kept)
