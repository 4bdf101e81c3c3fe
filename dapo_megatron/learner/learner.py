"""The learner: log-probabilities of sequences, gradients of a mini-batch, and optimizer steps, over all ranks of the
world.

Every rank calls every method with the same batch; each takes its own share of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from dapo_kernels import NonFiniteLogits, device_errors
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from dapo_megatron.config import Architecture, Layout
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.data.packing import PackedBatch, assign_micro_batches, pack, packed_length, sequence_rows
from dapo_megatron.data.records import SequenceBatch
from dapo_megatron.errors import RunError
from dapo_megatron.learner.context_parallel import plan_context
from dapo_megatron.learner.loss_kernel import choose_loss_kernel, take_output_layer
from dapo_megatron.learner.losses import Head, RowLoss, score_rows, value_rows
from dapo_megatron.learner.model import build_chunks, transformer_config
from dapo_megatron.learner.optimizer import build_optimizer, clip_and_update, reduced_norm, set_rates
from dapo_megatron.learner.parallel_groups import ParallelGroups, groups_in_force
from dapo_megatron.learner.reductions import largest_each, sum_over_world
from dapo_megatron.resharding.hf_files import read_placements
from dapo_megatron.resharding.hf_layout import VALUE_HEAD
from dapo_megatron.resharding.layout import WeightLayout
from dapo_megatron.resharding.megatron_layout import megatron_layout


class GradientNorm(NamedTuple):
    """`value`: the global norm (L2) before clipping, the same number on every rank; NaN where it is not finite on any.
    `noticed`: what went wrong on the way to it, in words, "" if nothing did."""

    value: float
    noticed: str = ""


class Learner:
    """A model in Megatron shards, its gradient buffers and its optimizer: a policy, or a critic, whose architecture has
    a value head and no `head`. The groups in force when it is built become its own: `layout` is what they were formed
    for, and every method works on them.

    Args:
        architecture, layout: the model and how it is cut.
        weights: a Hugging Face folder to start from; None leaves them unset, to be filled from a checkpoint. A value
            head that it lacks is 0.
        optimizer: None for a model that is only read (conversion, evaluation).
        loss_kernel: "auto", "triton" or "torch", for everything computed on logits.
        fused_linear_loss: never make the logits; the output layer's product belongs to the loss.

    Raises:
        RequestError: the loss kernel cannot run on this device.
    """

    def __init__(
        self,
        architecture: Architecture,
        layout: Layout,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layer_spec: str,
        tokens_per_micro_batch: int,
        temperature: float = 1.0,
        recompute: str = "none",
        weights: Path | None = None,
        optimizer: Optimizer | None = None,
        loss_kernel: str = "auto",
        fused_linear_loss: bool = False,
    ) -> None:
        self.architecture, self.layout, self.dtype, self.device = architecture, layout, dtype, device
        self.groups: ParallelGroups = groups_in_force()
        self.layer_spec = layer_spec
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.config = transformer_config(architecture, layout, dtype=dtype, layer_spec=layer_spec, recompute=recompute)
        self.models = build_chunks(self.config, architecture, layout, layer_spec=layer_spec)
        self.weight_layout: WeightLayout = megatron_layout(architecture, layout, layer_spec=layer_spec)
        self.head: Head | None = None
        if not architecture.value_head:
            self.head = Head(
                architecture.vocab,
                temperature,
                parallel_state.get_tensor_model_parallel_group(),
                implementation=choose_loss_kernel(loss_kernel, device, dtype),
                output_weight=take_output_layer(self.models[-1]) if fused_linear_loss else None,
                sequence_parallel=layout.sequence_parallel,
            )
        self._check_parameters()
        if weights is not None:
            placements = self.weight_layout.placements[torch.distributed.get_rank()]
            read_placements(weights, placements, self.weights, optional=VALUE_HEAD)
        wrapped = [Float16Module(self.config, m) if dtype is torch.bfloat16 else m for m in self.models]
        # megatron would hand out an fp32 copy of the bf16 logits, the largest tensor there is
        self._model_options = {"fp32_output": False} if dtype is torch.bfloat16 else {}
        self.phase: Callable[[str], AbstractContextManager] = nullcontext  # around what takes long, by name
        self.optimizer: MegatronOptimizer | None = None
        self._broken_logits = ""  # what the kernels said of this rank's mini-batch, on a CPU
        self.chunks: list[nn.Module] = wrapped
        if optimizer is not None:
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=optimizer.distributed, overlap_grad_reduce=False
            )
            self.chunks = [
                DistributedDataParallel(self.config, ddp, m, disable_bucketing=i > 0) for i, m in enumerate(wrapped)
            ]
            self.optimizer = build_optimizer(optimizer, self.chunks, dtype=dtype)
            self.config.grad_scale_func = self.optimizer.scale_loss
            self.config.finalize_model_grads_func = _finalize_undivided

    @property
    def stage(self) -> int:
        """This rank's pipeline stage."""
        with self.groups.in_force():
            return parallel_state.get_pipeline_model_parallel_rank()

    @property
    def weights(self) -> dict[str, Tensor]:
        """This rank's parameters under the keys of its layout, `chunk{v}.{parameter name}`."""
        return {f"chunk{v}.{name}": p.data for v, m in enumerate(self.models) for name, p in m.named_parameters()}

    @torch.no_grad()
    def score(self, batch: SequenceBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """log π of the response tokens, and entropies there, on every rank: fp32 [L] a sequence, of its own memory; 0
        where the loss weight is 0. No gradient."""
        logprobs, entropies = self._of_responses(batch, partial(score_rows, self.head), kinds=2)
        return logprobs, entropies

    @torch.no_grad()
    def values(self, batch: SequenceBatch) -> list[np.ndarray]:
        """A critic's value before each response token is drawn, on every rank: fp32 [L] a sequence; 0 where the loss
        weight is 0. No gradient."""
        return self._of_responses(batch, value_rows, kinds=1)[0]

    def _of_responses(
        self, batch: SequenceBatch, score: Callable[[Tensor, PackedBatch], Tensor], *, kinds: int
    ) -> list[list[np.ndarray]]:
        """`score` gives fp32 [kinds, T] of a micro-batch; returns, of each kind, a sequence's own numbers [L]."""
        starts = [0, *accumulate(len(response) for response in batch.responses)]
        flat = torch.zeros(kinds, starts[-1], device=self.device)  # Σ L columns

        def keep(output: Tensor, packed: PackedBatch) -> Tensor:
            scores = packed.whole(score(output, packed))
            for sequence, rows in packed.responses:
                flat[:, starts[sequence] : starts[sequence + 1]] = scores[:, rows]
            return output.new_zeros(())

        with self.groups.in_force():
            self.forward_backward(self.packs(batch, range(len(batch))), keep, forward_only=True)
            flat = sum_over_world(flat)
        return [
            # arrays of a sequence's size come from memory that earlier steps gave back, one of all would be fresh pages
            [values[start:stop].to("cpu", copy=True).numpy() for start, stop in pairwise(starts)]
            for values in flat
        ]

    def gradients(self, batch: SequenceBatch, sequences: Sequence[int], loss: RowLoss) -> Tensor:
        """Leave the gradient of the mini-batch's loss in the gradient buffers; returns the loss's sums, fp64 [K].

        Logits that are not finite make loss and gradient NaN, as on a GPU, where looking would mean waiting: ranks that
        know nothing of them are not left alone in the pipeline.
        """
        sums: list[Tensor] = []

        def keep_sums(logits_TV: Tensor, packed: PackedBatch) -> Tensor:
            try:
                value, terms = loss.compute(logits_TV, packed)
            except NonFiniteLogits as error:
                if packed.context > 1:  # the ranks that hold the other tokens may be in collectives of the loss
                    raise
                self._broken_logits = str(error)
                value = logits_TV.float().sum() * float("nan")
                terms = torch.full((loss.width,), float("nan"), dtype=torch.float64, device=self.device)
            sums.append(terms)
            return value

        with self.groups.in_force():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            self.forward_backward(self.packs(batch, sequences), keep_sums, forward_only=False)
            none = torch.zeros(loss.width, dtype=torch.float64, device=self.device)
            return sum_over_world(sum(sums, start=none)).cpu()

    def step(self, learning_rate: float, weight_decay: float) -> float:
        """One optimizer step from the gradient buffers; returns the gradient's global norm before clipping.

        Raises:
            RunError: as `gradient_norm` and `update`.
        """
        norm = self.gradient_norm()
        self.update(norm, learning_rate, weight_decay)
        return norm.value

    def gradient_norm(self) -> GradientNorm:
        """The norm of what is in the gradient buffers; nothing but gradients is touched. To be followed by `update`, or
        by the next `gradients`, and then it is as if there had been none.

        Raises:
            RunError: the loss kernels noticed input that no gradient can come of, on every rank alike.
        """
        with self.groups.in_force(), self.phase("optimizer"):
            norm = reduced_norm(self.optimizer)
        # on a GPU the kernels answer bad input with NaN and a flag; this is the one place that waits to read it
        noticed, broken = device_errors(), self._broken_logits
        self._broken_logits = ""
        own = noticed._replace(logits=noticed.logits or bool(broken))
        finite = math.isfinite(norm)
        # data-parallel ranks that hold whole gradients, and flags, may differ from rank to rank; decisions must not
        largest, other, *flags = largest_each([norm if finite else 0.0, not finite, *own], self.device)
        seen = type(noticed)(*(flag > 0 for flag in flags))
        if seen.target or seen.setting or seen.gradient_scale:
            raise RunError(
                f"the loss kernels refused a mini-batch: {seen}; the data or a loss is wrong", on_every_rank=True
            )
        told = broken or (str(seen) if seen else "")
        return GradientNorm(math.nan if other or seen.logits else largest, told)

    def update(self, norm: GradientNorm, learning_rate: float, weight_decay: float) -> None:
        """One optimizer step from gradients whose norm is known.

        Raises:
            RunError: the norm is not finite; weights and moments are as they were.
        """
        if not math.isfinite(norm.value):
            raise RunError(
                f"the gradient norm is {norm.value}{f' ({norm.noticed})' if norm.noticed else ''}: stopped before the "
                "damage spreads; resume from the last checkpoint",
                on_every_rank=True,
            )
        set_rates(self.optimizer, learning_rate, weight_decay)
        with self.groups.in_force(), self.phase("optimizer"):
            clip_and_update(self.optimizer, norm.value)

    def packing(self, batch: SequenceBatch, sequences: Sequence[int]) -> list[list[list[int]]]:
        """[data-parallel rank][micro-batch] → sequence numbers of the batch. Sequences without a trained token are left
        out: nothing is asked of them."""
        sequences = [s for s in sequences if batch.loss_weights[s].any()]
        context = self.layout.context
        assignment = assign_micro_batches(
            [sequence_rows(batch.length(s), context) for s in sequences],
            token_budget=sequence_rows(self.tokens_per_micro_batch, context),
            data_parallel=self.layout.data,
            multiple_of=self.layout.pipeline if self.layout.virtual_pipeline > 1 else 1,
        )
        return [[[sequences[i] for i in members] for members in rank] for rank in assignment]

    def packs(self, batch: SequenceBatch, sequences: Sequence[int]) -> list[PackedBatch]:
        """This data-parallel rank's micro-batches of the given sequences.

        Pipeline stages exchange tensors of one length: with variable ones megatron-core 0.16 confuses forward and
        backward shapes in an interleaved schedule of two stages, and hangs.
        """
        context = self.layout.context
        with self.groups.in_force():
            share = self.packing(batch, sequences)[parallel_state.get_data_parallel_rank()]
            place = (parallel_state.get_context_parallel_rank(), context)
        multiple = self.layout.tensor if context == 1 else math.lcm(self.layout.tensor * context, 2 * context)
        rows = [packed_length(sum(sequence_rows(batch.length(s), context) for s in m), multiple) for m in share]
        if self.layout.pipeline > 1:
            rows = [max(rows)] * len(rows)
        return [pack(batch, m, length=n, device=self.device, context=place) for m, n in zip(share, rows, strict=True)]

    def forward_backward(
        self, packs: list[PackedBatch], on_logits: Callable[[Tensor, PackedBatch], Tensor], *, forward_only: bool
    ) -> None:
        """One pipeline schedule over the micro-batches; on the last stage `on_logits` turns each into its loss."""

        def forward_step(iterator: Iterator[PackedBatch], model: nn.Module):
            packed = next(iterator)
            logits = model(
                packed.tokens_T[None],
                packed.positions_T[None],
                None,
                packed_seq_params=packed_params(packed, self.layer_spec),
                **self._model_options,
            )
            return logits, partial(finish, packed)

        def finish(packed: PackedBatch, logits_1TV: Tensor):
            try:
                value = on_logits(logits_1TV.squeeze(0), packed)
            except ValueError as error:  # a NaN in the logits, a target outside the vocabulary
                raise RunError(f"{error}; the run may have diverged: resume from an earlier checkpoint") from None
            # a 3-tuple under calculate_per_token_loss: megatron divides by nothing
            return value, torch.zeros((), dtype=torch.int, device=self.device), {}

        iterators = [iter(packs) for _ in self.chunks]
        with self.groups.in_force(), self.phase("forward_backward"):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(packs),
                seq_length=packs[0].length,  # the schedules divide it by the context-parallel size
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _check_parameters(self) -> None:
        """The layout must name exactly this rank's parameters, or weights would be lost or left unset."""
        expected = {p.key for p in self.weight_layout.placements[torch.distributed.get_rank()]}
        found = set(self.weights)
        if expected != found:
            raise RunError(
                f"the layout and the Megatron modules disagree: only in the layout {sorted(expected - found)[:3]}, "
                f"only in the modules {sorted(found - expected)[:3]}"
            )


def _finalize_undivided(model: list[nn.Module], _num_tokens: Tensor | None, **groups) -> None:
    """megatron's gradient reductions without its division: the loss already carries the one denominator."""
    finalize_model_grads(model, None, **groups)


def packed_params(packed: PackedBatch, layer_spec: str) -> PackedSeqParams:
    """What attention is told of a pack. Under context parallelism borders are the whole pack's: TransformerEngine cuts
    sequences into the same pieces and exchanges keys by itself, local layers have a plan."""
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=packed.cu_seqlens,
        cu_seqlens_kv=packed.cu_seqlens,
        max_seqlen_q=packed.longest,
        max_seqlen_kv=packed.longest,
    )
    if packed.context > 1 and layer_spec == "transformer_engine":
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = packed.cu_seqlens  # it insists; ends are no padding
    elif packed.context > 1:
        params.context_plan = plan_context(packed, parallel_state.get_context_parallel_group())
    return params
