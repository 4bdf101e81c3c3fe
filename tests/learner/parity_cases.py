"""Run on ranks: logits of the learner under many layouts against transformers."""

from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from dapo_megatron.data.records import sequence_batch
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.reductions import sum_over_world
from tests.learner.layouts import build
from tests.tiny_models import load_model

LENGTHS = (23, 7, 40, 12, 2, 31)
VOCAB = 100


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in LENGTHS]


def logit_gaps(payload: dict) -> dict[str, float]:
    """ "model layout form" → max |learner − transformers| over all real tokens and vocabulary columns."""
    gaps = {}
    for model_name, folder in payload["models"].items():
        with torch.no_grad():
            reference = [load_model(folder)(tokens[None]).logits[0] for tokens in sequences()]
        for layout in payload["layouts"]:
            learner = build(folder, layout)
            for form, found in (
                ("packed", _packed(learner, 512)),
                ("one a pack", _packed(learner, max(LENGTHS))),
                ("unpacked", _unpacked(learner)),
            ):
                gap = max(float((a - b).abs().max()) for a, b in zip(found, reference, strict=True))
                gaps[f"{model_name} {layout} {form}"] = gap
    return gaps


def rotary_frequencies(payload: dict) -> dict[str, list[float] | float]:
    """Inverse frequencies (radians a position) that the learner and transformers turn heads by, and the largest gap of
    their logits."""
    learner, reference = build(payload["model"], "tp1pp1"), load_model(payload["model"])
    with torch.no_grad():
        expected = [reference(tokens[None]).logits[0] for tokens in sequences()]
    return {
        "learner": learner.models[0].rotary_pos_emb.inv_freq.tolist(),
        "transformers": reference.model.rotary_emb.inv_freq.tolist(),
        "gap": max(float((a - b).abs().max()) for a, b in zip(_packed(learner, 512), expected, strict=True)),
    }


def _whole_rows(logits_TV: torch.Tensor) -> torch.Tensor:
    """Vocabulary columns of all tensor-parallel ranks side by side, padding cut off."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(logits_TV) for _ in range(group.size())]
    dist.all_gather(parts, logits_TV.contiguous(), group=group)
    return torch.cat(parts, dim=1)[:, :VOCAB]


def _packed(learner: Learner, budget: int) -> list[torch.Tensor]:
    learner.tokens_per_micro_batch = budget
    tokens = sequences()
    batch = sequence_batch([t[:1].numpy() for t in tokens], [t[1:].numpy() for t in tokens])
    flat, starts = torch.zeros(sum(LENGTHS), VOCAB), [0, *accumulate(LENGTHS)]

    def keep(logits_TV, packed):
        logits_TV = _whole_rows(logits_TV.detach())
        for (sequence, _), first in zip(packed.responses, packed.cu_seqlens.tolist(), strict=False):
            rows = slice(starts[sequence], starts[sequence + 1])
            flat[rows] = logits_TV[first : first + LENGTHS[sequence]]
        return logits_TV.new_zeros(())

    learner.forward_backward(learner.packs(batch, range(len(tokens))), keep, forward_only=True)
    return list(sum_over_world(flat).split(list(LENGTHS)))


def _unpacked(learner: Learner) -> list[torch.Tensor]:
    """[1, S] inputs without packing parameters, right-padded to one length."""
    padded = [torch.cat([t, torch.zeros(max(LENGTHS) - len(t), dtype=torch.long)]) for t in sequences()]
    kept: list[torch.Tensor] = []

    def forward_step(iterator, model):
        tokens = next(iterator)

        def finish(logits):
            kept.append(_whole_rows(logits[0].detach()))
            return logits.new_zeros(()), torch.zeros((), dtype=torch.int), {}

        return model(tokens[None], torch.arange(len(tokens))[None], None), finish

    iterators = [iter(padded) for _ in learner.chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=learner.chunks,
        num_microbatches=len(padded),
        seq_length=max(LENGTHS),
        micro_batch_size=1,
        forward_only=True,
    )
    rows = [kept[i] if kept else torch.zeros(len(t), VOCAB) for i, t in enumerate(padded)]
    # every data-parallel rank ran all sequences here, so the sum counts each as often
    whole = [sum_over_world(r) / learner.layout.data for r in rows]
    return [w[:n] for w, n in zip(whole, LENGTHS, strict=True)]
