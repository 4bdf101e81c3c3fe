"""The reference policy of a run, from which `algorithm.kl` measures.

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
from dapo_megatron.weight_sync import export_hugging_face


def keep_reference(run: Run) -> ReferenceWeights | None:
    """Between warm start and rollouts: the reference, None without a KL term; collective.

    Before the first rollout step it is the present policy, and kept; a resumed run reads what was kept.

    Raises:
        RequestError: what was kept is not there, or has changed.
    """
    if run.recipe.algorithm.kl.coefficient == 0:
        return None
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
        raise RequestError(
            f"algorithm.kl.coefficient={run.recipe.algorithm.kl.coefficient} needs the reference policy that this run "
            f"began with: {refusal}; use coefficient=0, or start anew with --overwrite"
        ) from None
    return ReferenceWeights(run.learner, kept)
