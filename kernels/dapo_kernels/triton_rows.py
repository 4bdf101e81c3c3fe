"""Launches of the row kernels on tensors: the Triton side of every op. Importing it imports triton."""

from collections import Counter
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from dapo_kernels import row_kernels
from dapo_kernels.arguments import Shard
from dapo_kernels.device_errors import NonFiniteLogits, device_flags
from dapo_kernels.policy_loss import ClippedRows
from dapo_kernels.tuned import Tile, interpreter_tile, tile_for

INTERPRETED = bool(triton.knobs.runtime.interpret)
launches: Counter[str] = Counter()
"""Kernel name → launches in this process."""

KL_ESTIMATORS = {"k2": 2, "k3": 3}  # the number that the loss kernel is compiled for; 0 = none
WHOLE_ROWS_AT_ONCE = True
"""A vocabulary that is whole is done with in one kernel; else as a rank's part of one."""
PROGRAMS_OF_SCALE = 1024  # enough for every multiprocessor of a card; few, for mostly they have nothing to do
FINISH_ROWS = 256 if INTERPRETED else 32  # one row a thread of one warp

if INTERPRETED:
    from dapo_kernels.interpreter_arithmetic import mend

    mend()


class ClipSettings(NamedTuple):
    """1 − ε_low, 1 + ε_high, ε_dual (inf = off), β_H, and β with its estimator (`kl`)."""

    lowest_ratio: float
    highest_ratio: float
    dual_ratio: float
    entropy_coefficient: float
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"


class RowValues(NamedTuple):
    """l, H, B and S of rows, fp32 [N] each."""

    logprobs: Tensor
    entropy: Tensor
    largest: Tensor
    total: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> "RowValues":
        """Room for `count` rows."""
        return cls(*(torch.empty(count, dtype=torch.float32, device=device) for _ in cls._fields))

    def part(self, rows: slice) -> "RowValues":
        """These rows' share of the same memory."""
        return RowValues(*(vector[rows] for vector in self))


def statistics(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    inverse_temperature: float | Tensor,
    shard: Shard,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Statistics of every rank's part of each row, fp32 [ranks, N, 4]: one read of the logits, one all-gather.

    Raises:
        ValueError: on a CPU, a row asked for holds a NaN, a +inf or nothing but −inf.
    """
    own = torch.empty(logits.shape[0], 4, dtype=torch.float32, device=logits.device)
    tile = _tile(logits)
    _launch(
        row_kernels.row_statistics_kernel, tile, logits,
        logits, targets, mask, _tensor(inverse_temperature), own,
        logits.shape[0], _units(logits, tile)[0], shard.valid, shard.first, *_temperature(inverse_temperature),
        **_columns(logits, tile, shard),
    )  # fmt: skip
    parts = own[None]
    if group is not None:
        parts = own.new_empty(group.size(), *own.shape)
        dist.all_gather_into_tensor(parts.view(-1, 4), own, group=group)
    if logits.device.type == "cpu":
        sound = torch.isfinite(parts[..., 0].amax(0)) & torch.isfinite(parts[..., 1].sum(0))
        _refuse_on_cpu(~sound if mask is None else ~sound & (mask > 0))
    return parts


def logprobs(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    inverse_temperature: float | Tensor,
    shard: Shard,
    group: dist.ProcessGroup | None,
    into: RowValues | None = None,
) -> RowValues:
    """Values of whole rows, `into` what is given or new tensors; l = H = 0 on rows not asked for. One kernel where no
    group shares the vocabulary, else `statistics` and a second one.

    Raises:
        ValueError: as `statistics`.
    """
    count = logits.shape[0]
    rows = RowValues.empty(count, logits.device) if into is None else into
    if group is not None or not WHOLE_ROWS_AT_ONCE:
        return finish(
            statistics(logits, targets, mask, inverse_temperature, shard, group),
            targets, mask, inverse_temperature, shard, rows,
        )  # fmt: skip
    tile = _tile(logits)
    _launch(
        row_kernels.logprobs_kernel, tile, logits,
        logits, None, targets, mask, _tensor(inverse_temperature), *rows, device_flags(logits.device),
        count, _units(logits, tile)[0], shard.valid, shard.first, shard.vocabulary, *_temperature(inverse_temperature),
        RANKS=0, RANKS_POWER=1, **_columns(logits, tile, shard),
    )  # fmt: skip
    if logits.device.type == "cpu":
        _refuse_on_cpu(rows.entropy.isnan())
    return rows


def finish(
    parts: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    inverse_temperature: float | Tensor,
    shard: Shard,
    into: RowValues | None = None,
) -> RowValues:
    """As `logprobs`, from the parts [ranks, N, 4] of every rank."""
    ranks, count, _ = parts.shape
    rows = RowValues.empty(count, parts.device) if into is None else into
    _launch(
        row_kernels.logprobs_kernel, Tile(FINISH_ROWS, 1, 1, 1, 1), parts[0],
        None, parts, targets, mask, _tensor(inverse_temperature), *rows, device_flags(parts.device),
        count, 0, shard.valid, shard.first, shard.vocabulary, *_temperature(inverse_temperature),
        RANKS=ranks, RANKS_POWER=triton.next_power_of_2(ranks), VECS=1, LANES=1, VEC=1, UNIT=1, PADDED=False,
    )  # fmt: skip
    return rows


def gradient(
    logits: Tensor,
    out: Tensor,
    rows: RowValues,
    targets: Tensor,
    mask: Tensor | None,
    g_l: Tensor,
    g_h: Tensor,
    inverse_temperature: float | Tensor,
    shard: Shard,
) -> None:
    """∂/∂logits under the cotangents of (l, H) → `out` [N, V_local], which may be the logits themselves."""
    tile = _tile(logits)
    _launch(
        row_kernels.row_gradient_kernel, tile, logits,
        logits, out, *rows[1:], targets, mask, g_l.contiguous(), g_h.contiguous(), _tensor(inverse_temperature),
        logits.shape[0], _units(logits, tile)[0], shard.valid, shard.first, shard.vocabulary,
        *_temperature(inverse_temperature),
        **_columns(logits, tile, shard),
    )  # fmt: skip


def clipped_loss(
    logits: Tensor,
    out: Tensor | None,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    denominator: float | Tensor,
    inverse_temperature: float | Tensor,
    shard: Shard,
    group: dist.ProcessGroup | None,
    settings: ClipSettings,
    reference_logprobs: Tensor | None = None,
    into: ClippedRows | None = None,
) -> ClippedRows:
    """The clipped policy loss a row; its gradient → `out` (may be the logits), unless None.

    Where no group shares the vocabulary, one kernel takes the statistics of a row and goes over it again at once, while
    it is in the cache; else statistics of all rows and one all-gather come before.

    Args:
        denominator: a number, or a tensor of one.
        reference_logprobs: [N], read where settings.kl_coefficient > 0.
        into: where the rows' values go; new tensors if None.

    Raises:
        ValueError: as `statistics`; the logits may be overwritten then.
    """
    estimator = KL_ESTIMATORS[settings.kl_estimator] if settings.kl_coefficient else 0
    reference = reference_logprobs.contiguous() if estimator else None
    count = logits.shape[0]
    parts, ranks = None, 0
    if group is not None or not WHOLE_ROWS_AT_ONCE:
        parts = statistics(logits, targets, weights, inverse_temperature, shard, group)
        ranks = parts.shape[0]
    rows = ClippedRows.empty(count, torch.float32, logits.device) if into is None else into
    tile = _tile(logits, read_twice=parts is None and out is not None)
    if isinstance(denominator, Tensor):
        denominator_on_device, denominator = denominator.to(logits.device, torch.float32).reshape(1), 1.0
    else:
        denominator_on_device = None
    _launch(
        row_kernels.clipped_loss_kernel, tile, logits,
        logits, logits if out is None else out, parts, targets, weights, old_logprobs.contiguous(),
        advantages.contiguous(), reference, denominator_on_device, _tensor(inverse_temperature),
        rows.terms, rows.values, rows.clips.view(torch.uint8), device_flags(logits.device),
        count, rows.values.stride(0), _units(logits, tile)[0], shard.valid, shard.first, shard.vocabulary,
        *_temperature(inverse_temperature), float(denominator),
        *(float(setting) for setting in settings[:-1]),
        RANKS=ranks, RANKS_POWER=triton.next_power_of_2(max(1, ranks)),
        GRADIENT=out is not None, ENTROPY=settings.entropy_coefficient != 0, KL=estimator,
        **_columns(logits, tile, shard),
    )  # fmt: skip
    if parts is None and logits.device.type == "cpu":
        _refuse_on_cpu(rows.values[2].isnan() & (weights > 0))
    return rows


def scale(matrix: Tensor, factor: Tensor) -> None:
    """matrix [n, m] ← factor · matrix, in place; the device finds out by itself whether the factor is 1."""
    tile = _tile(matrix)
    units, unit = _units(matrix, tile)
    _launch(
        row_kernels.scale_rows_kernel, tile, matrix, matrix, factor.reshape(1), matrix.shape[0], units,
        VECS=tile.vectors, LANES=tile.lanes, VEC=tile.vector, UNIT=unit, most_programs=PROGRAMS_OF_SCALE,
    )  # fmt: skip


def _refuse_on_cpu(bad: Tensor) -> None:
    """NonFiniteLogits for the first row of `bad` [N]; the flag, which is for devices that must not be waited for, is
    taken back."""
    if bool(bad.any()):
        device_flags(bad.device).zero_()
        row = int(bad.nonzero()[0])
        raise NonFiniteLogits(f"logits row {row} holds a NaN, a +inf or nothing but −inf")


def _tile(matrix: Tensor, read_twice: bool = False) -> Tile:
    rows, columns = matrix.shape
    if matrix.device.type == "cpu":
        return interpreter_tile(rows, columns, matrix.element_size())
    capability, warp = torch.cuda.get_device_capability(matrix.device), 64 if torch.version.hip else 32
    return tile_for(capability, columns, matrix.element_size(), read_twice=read_twice, warp=warp)


def _units(matrix: Tensor, tile: Tile) -> tuple[int, int]:
    """(units a row, columns a unit): whole 16-byte vectors where the row divides into them, else single columns."""
    unit = tile.vector if matrix.shape[1] % tile.vector == 0 else 1
    return matrix.shape[1] // unit, unit


def _columns(logits: Tensor, tile: Tile, shard: Shard) -> dict[str, int | bool]:
    return {
        "VECS": tile.vectors,
        "LANES": tile.lanes,
        "VEC": tile.vector,
        "UNIT": _units(logits, tile)[1],
        "PADDED": shard.valid != logits.shape[1],
    }


def _tensor(number_or_rows: float | Tensor) -> Tensor | None:
    return number_or_rows if isinstance(number_or_rows, Tensor) else None


def _temperature(inverse: float | Tensor) -> tuple[int, float]:
    """(elements from row to row, the number) beside the tensor, if it is one."""
    return (inverse.dim(), 1.0) if isinstance(inverse, Tensor) else (0, float(inverse))


def _launch(kernel, tile: Tile, rows_of: Tensor, *arguments, most_programs: int = 1 << 31, **constants) -> None:
    rows = rows_of.shape[0]
    if rows == 0:
        return
    launches[kernel.__name__] += 1
    on_device = torch.cuda.device(rows_of.device) if rows_of.device.type == "cuda" else nullcontext()
    with on_device:
        programs = min(most_programs, triton.cdiv(rows, tile.rows))
        kernel[(programs,)](*arguments, ROWS=tile.rows, **constants, num_warps=tile.warps)
