"""Triton kernels on rows of vocab-parallel logits x, [N, V_local].

Everything is in bits: with k = log2(e)/T and B = max_j k·x_j as rounded, d_j = k·x_j − B in one fused multiply-add, so
that nothing is rounded at the size of x and |x| of 1e4 costs no digits. The statistics of a shard, fp32:

    (B, S = Σ 2^d_j, d_y or −inf where another rank owns y, W = Σ 2^d_j·d_j)

Ranks are brought to one B by adding the difference of theirs to d. Then the row's whole is l = ln 2·d_y − ln S,
H = ln S − ln 2·W/S, and with u_j = d_j − log2 S = log2 p_j its gradient under ∂/∂l = g_l and ∂/∂H = g_h is

    dx_j = (1/T)·[ g_l·(1[j=y] − p_j) − g_h·p_j·(log p_j + H) ] = g_l/T·1[j=y] − 2^u_j·(c_1 + c_2·u_j)

with c_1 = (g_l + g_h·H)/T and c_2 = g_h·ln 2/T. A tile is [ROWS, VECS, LANES, VEC]: VEC neighbours are one 16-byte
load, a thread holds VECS of these, and all of them are reduced within the thread to one maximum and one rescaling, so
the loop over columns needs one exponential an element and no barrier; lanes meet after the loop. The target's column
is looked for in its own tile alone. No atomics. Row offsets are 64-bit.

A number of columns arrives as `column_units` × UNIT: a multiple the compiler can see keeps loads 16 bytes wide without
a compilation for each size. Nothing is specialised on N, V or the alignment of a per-row vector.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1000.0)  # bits: 2^−1000 is 0 as 2^−inf is, but a product of the two with 0 is 0 as well
INFINITY = tl.constexpr(float("inf"))
LOG_RATIO_LIMIT = tl.constexpr(20.0)


@triton.jit
def _row_numbers(rows, ROWS: tl.constexpr, BACKWARDS: tl.constexpr):
    """This program's rows, int64 [ROWS], and which of them exist. BACKWARDS, the first programs take the last rows:
    those that the kernel before has left in the cache."""
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < rows


@triton.jit
def _tile_columns(start, VECS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns of a tile, int32 [1, VECS, LANES, VEC]."""
    vector = tl.arange(0, VECS)[None, :, None, None] * (LANES * VEC)
    lane = tl.arange(0, LANES)[None, None, :, None] * VEC
    return start + vector + lane + tl.arange(0, VEC)[None, None, None, :]


@triton.jit
def _of_rows(value):
    """[ROWS] → [ROWS, 1, 1, 1]"""
    return value[:, None, None, None]


@triton.jit
def _load_tile(logits_ptr, row_offset, live, column, columns, valid, PADDED: tl.constexpr):
    """x as fp32 [ROWS, VECS, LANES, VEC]; −inf in dead rows, beyond the row and in padded columns."""
    mask = _of_rows(live) & (column < columns)
    x = tl.load(logits_ptr + _of_rows(row_offset) + column, mask=mask, other=float("-inf")).to(tl.float32)
    if PADDED:  # a select, not a load mask: the loads stay wide whatever the true vocabulary
        x = tl.where(column < valid, x, float("-inf"))
    return x


@triton.jit
def _asked(mask_ptr, row, exists):
    """Rows that count: those whose weight or mask is above 0 (a NaN is not)."""
    if mask_ptr is not None:
        exists = exists & (tl.load(mask_ptr + row, mask=exists, other=0).to(tl.float32) > 0)
    return exists


@triton.jit
def _number(pointer, number, row, exists, stride):
    """[ROWS] fp32: the rows' own, `stride` apart, or the one `number` where no pointer is given."""
    if pointer is None:  # no early return: the compiler would go on and add to nothing
        numbers = tl.where(exists, number, 1.0).to(tl.float32)
    else:
        numbers = tl.load(pointer + row * stride, mask=exists, other=1.0)
    return numbers


# everything but the logits and their gradient: N, V and where a per-row vector starts must not cause a compilation
_UNSPECIALISED = [
    "targets_ptr", "mask_ptr", "inverse_temperature_ptr", "statistics_ptr", "parts_ptr", "old_ptr", "advantages_ptr",
    "reference_ptr", "denominator_ptr", "terms_ptr", "values_ptr", "clips_ptr", "flags_ptr", "g_l_ptr", "g_h_ptr",
    "logprobs_ptr", "entropy_ptr", "largest_ptr", "total_ptr",
    "scale_ptr", "rows", "values_stride", "column_units", "valid", "first", "vocabulary", "temperature_stride",
]  # fmt: skip


@triton.jit
def _or_zero(bits):
    """0 for −inf: −inf − −inf is a NaN."""
    return tl.where(bits == float("-inf"), 0.0, bits)


@triton.jit
def _row_statistics(
    logits_ptr, row, asked, local_target, inverse_temperature, columns, valid,
    ROWS: tl.constexpr, VECS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """(B, S, d_y, W) of the header, [ROWS] each; local_target is −1 where another rank owns it. Rows not asked for are
    not read and get (−inf, 0, −inf, 0)."""
    offset = row * columns
    k = tl.where(asked, inverse_temperature, 1.0) * LOG2E
    at = logits_ptr + offset + local_target
    target = tl.load(at, mask=asked & (local_target >= 0), other=float("-inf")).to(tl.float32)
    largest = tl.full([ROWS, LANES], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, LANES], tl.float32)
    weighted = tl.zeros([ROWS, LANES], tl.float32)
    end = columns * tl.max(asked.to(tl.int32), axis=0)  # no trip at all where no row counts
    for start in range(0, end, VECS * LANES * VEC):
        x = _load_tile(logits_ptr, offset, asked, _tile_columns(start, VECS, LANES, VEC), columns, valid, PADDED)
        new = tl.maximum(largest, tl.max(tl.max(x, axis=3), axis=1) * k[:, None])
        base = _or_zero(new)
        step = tl.maximum(largest - base, NOTHING)
        shrink = tl.exp2(step)
        d = tl.fma(x, _of_rows(k), -base[:, None, :, None])
        e = tl.exp2(d)
        moved = tl.sum(tl.sum(e * tl.maximum(d, NOTHING), axis=3), axis=1)
        weighted = (weighted + total * step) * shrink + moved
        total = total * shrink + tl.sum(tl.sum(e, axis=3), axis=1)
        largest = new

    row_largest = tl.max(largest, axis=1)
    base = _or_zero(row_largest)
    step = tl.maximum(largest - base[:, None], NOTHING)
    shrink = tl.exp2(step)
    row_weighted = tl.sum((weighted + total * step) * shrink, axis=1)
    row_total = tl.sum(total * shrink, axis=1)
    return row_largest, row_total, tl.fma(target, k, -base), row_weighted


@triton.jit(do_not_specialize=_UNSPECIALISED)
def row_statistics_kernel(
    logits_ptr, targets_ptr, mask_ptr, inverse_temperature_ptr, statistics_ptr,
    rows, column_units, valid, first, temperature_stride, inverse_temperature,
    ROWS: tl.constexpr, VECS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """statistics [N, 4] of the header, one read of the logits."""
    row, exists = _row_numbers(rows, ROWS, False)
    asked = _asked(mask_ptr, row, exists)
    inverse_temperature = _number(inverse_temperature_ptr, inverse_temperature, row, exists, temperature_stride)
    local = tl.load(targets_ptr + row, mask=asked, other=-1).to(tl.int64) - first
    local = tl.where((local >= 0) & (local < valid), local, -1).to(tl.int32)
    largest, total, target, weighted = _row_statistics(
        logits_ptr, row, asked, local, inverse_temperature, column_units * UNIT, valid, ROWS, VECS, LANES, VEC, PADDED
    )
    out = statistics_ptr + row * 4
    tl.store(out, largest, mask=exists)
    tl.store(out + 1, total, mask=exists)
    tl.store(out + 2, target, mask=exists)
    tl.store(out + 3, weighted, mask=exists)


@triton.jit
def _merge_ranks(parts_ptr, row, asked, rows, RANKS: tl.constexpr, RANKS_POWER: tl.constexpr):
    """(B, S, d_y, W) of whole rows from the parts [RANKS, N, 4] of every rank."""
    rank = tl.arange(0, RANKS_POWER)[:, None]
    inside = (rank < RANKS) & asked[None, :]
    part = parts_ptr + (rank.to(tl.int64) * rows + row[None, :]) * 4
    largest = tl.load(part, mask=inside, other=float("-inf"))
    sums = tl.load(part + 1, mask=inside, other=0.0)
    target = tl.load(part + 2, mask=inside, other=float("-inf"))
    weighted = tl.load(part + 3, mask=inside, other=0.0)
    whole = tl.max(largest, axis=0)
    # a rank with nothing but −inf has sum 0 and must not turn 0 × −inf into a NaN
    step = tl.where(sums == 0, 0.0, largest - whole[None, :])
    shrink = tl.exp2(step)
    total = tl.sum(sums * shrink, axis=0)
    return whole, total, tl.max(target + step, axis=0), tl.sum((weighted + sums * step) * shrink, axis=0)


@triton.jit
def _finish(largest, total, target, weighted, asked, target_known, flags_ptr, row):
    """(S, l, H) of whole rows.

    Rows with a NaN, a +inf or nothing but −inf are NaN throughout and set flag 1; a target outside the vocabulary makes
    l NaN and sets flag 0. Stores race on purpose: every writer writes 1.
    """
    sound = (total > 0) & (largest > float("-inf")) & (largest < INFINITY)  # a NaN total is not > 0
    total = tl.where(sound, total, float("nan"))
    tl.store(flags_ptr + 1 + row * 0, 1, mask=asked & (sound == 0))
    tl.store(flags_ptr + row * 0, 1, mask=asked & (target_known == 0))
    log_sum = tl.log(total)
    entropy = log_sum - tl.where(sound, weighted, 0.0) / total * LN2
    logprob = tl.where(sound, target, 0.0) * LN2 - log_sum
    return total, tl.where(target_known, logprob, float("nan")), entropy


@triton.jit
def _write_gradient(
    logits_ptr, gradient_ptr, row, exists, local_target, largest, total, entropy, inverse_temperature, g_l, g_h,
    columns, valid,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    PADDED: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """dx of the header, from the last column to the first: the last tiles may still be in the cache. Rows whose g_l and
    g_h are 0 are written as zeros and not read."""
    live = exists & ((g_l != 0) | (g_h != 0))  # a NaN is alive
    offset = row * columns
    inverse_temperature = tl.where(live, inverse_temperature, 1.0)
    k = _of_rows(inverse_temperature * LOG2E)
    base = _of_rows(tl.where(live, largest, 0.0))
    log2_sum = _of_rows(tl.log(tl.where(live, total, 1.0)) * LOG2E)
    of_target = _of_rows(tl.where(live, g_l * inverse_temperature, 0.0))
    c_2 = tl.where(live, g_h * inverse_temperature, 0.0)
    minus_c_1 = -of_target - _of_rows(c_2 * tl.where(live, entropy, 0.0))
    minus_c_2 = _of_rows(c_2 * -LN2)
    TILE: tl.constexpr = VECS * LANES * VEC
    last = (columns - 1) // TILE * TILE
    for passed in range(0, columns, TILE):
        start = last - passed
        column = _tile_columns(start, VECS, LANES, VEC)
        u = tl.fma(_load_tile(logits_ptr, offset, live, column, columns, valid, PADDED), k, -base) - log2_sum
        minus_c = minus_c_1
        if ENTROPY:
            minus_c = tl.fma(tl.maximum(u, NOTHING), minus_c_2, minus_c_1)
        g = tl.exp2(u) * minus_c
        here = (local_target >= start) & (local_target < start + TILE)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            g += tl.where(column == _of_rows(local_target), of_target, 0.0)
        mask = _of_rows(exists) & (column < columns)
        at = gradient_ptr + _of_rows(offset) + column
        tl.store(at, g.to(gradient_ptr.dtype.element_ty), mask=mask, eviction_policy=EVICTION)


@triton.jit
def _known_target(targets_ptr, row, asked, vocabulary, first, valid):
    """(target inside the vocabulary, its column on this rank or −1)."""
    target = tl.load(targets_ptr + row, mask=asked, other=-1).to(tl.int64)
    known = (target >= 0) & (target < vocabulary)
    local = target - first
    owned = known & (local >= 0) & (local < valid)
    return known, tl.where(owned, local, -1).to(tl.int32)


@triton.jit
def _divergence(logprob, reference, KL: tl.constexpr):
    """k2 (KL = 2) or k3 (KL = 3) of Δ = clamp(l − ref, −20, 20) and its derivative by l, 0 where the clamp is active;
    NaN stays NaN."""
    log_ratio = logprob - reference
    delta = tl.minimum(tl.maximum(log_ratio, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT)
    delta = tl.where(log_ratio != log_ratio, log_ratio, delta)
    if KL == 2:
        value = 0.5 * delta * delta
        slope = delta
    else:
        # e^(−Δ) − 1 + Δ loses its digits near 0: six terms of its series there
        series = 1 / 6 - delta * (1 / 24 - delta * (1 / 120 - delta * (1 / 720 - delta * (1 / 5040))))
        series = delta * delta * (0.5 - delta * series)
        value = tl.where(tl.abs(delta) < 0.125, series, tl.exp(-delta) - 1.0 + delta)
        slope = delta - value
    return value, tl.where(delta == log_ratio, slope, tl.where(log_ratio != log_ratio, log_ratio, 0.0))


@triton.jit(do_not_specialize=_UNSPECIALISED)
def clipped_loss_kernel(
    logits_ptr, gradient_ptr, parts_ptr, targets_ptr, mask_ptr, old_ptr, advantages_ptr, reference_ptr, denominator_ptr,
    inverse_temperature_ptr, terms_ptr, values_ptr, clips_ptr, flags_ptr,
    rows, values_stride, column_units, valid, first, vocabulary, temperature_stride, inverse_temperature, denominator,
    lowest_ratio, highest_ratio, dual_ratio, entropy_coefficient, kl_coefficient,
    RANKS: tl.constexpr, RANKS_POWER: tl.constexpr, GRADIENT: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr,
    ROWS: tl.constexpr, VECS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Per row w·(L − β_H·H + β·k)/denominator → terms [N]; (l, ratio, H) → values [3, N]; (low, high, dual) → clips
    [3, N] uint8, both with rows `values_stride` apart; with GRADIENT its derivative → gradient [N, V_local], which may
    be the logits themselves.

    RANKS = 0: no parts are given, the whole vocabulary is here; the statistics are taken first, and the gradient meets
    what they have left in the cache. `mask_ptr` holds the weights w; KL names the estimator k, 0 for none. A weight
    that is negative or NaN, a denominator or temperature that is not above 0 sets flag 2 and makes the row's term NaN.
    """
    columns = column_units * UNIT
    row, exists = _row_numbers(rows, ROWS, True)
    weight = tl.load(mask_ptr + row, mask=exists, other=0).to(tl.float32)
    asked = exists & (weight > 0)
    inverse_temperature = _number(inverse_temperature_ptr, inverse_temperature, row, exists, temperature_stride)
    denominator = _number(denominator_ptr, denominator, row, exists, 0)
    warm = (inverse_temperature > 0) & (inverse_temperature < INFINITY)
    settings_sound = (denominator > 0) & (weight >= 0) & (warm | (asked == 0))
    tl.store(flags_ptr + 2 + row * 0, 1, mask=exists & (settings_sound == 0))
    known, local_target = _known_target(targets_ptr, row, asked, vocabulary, first, valid)
    if RANKS == 0:
        largest, total, target, weighted = _row_statistics(
            logits_ptr, row, asked, local_target, inverse_temperature, columns, valid, ROWS, VECS, LANES, VEC, PADDED
        )
        tl.debug_barrier()  # every thread has read the target's logit before one writes a gradient over it
    else:
        largest, total, target, weighted = _merge_ranks(parts_ptr, row, asked, rows, RANKS, RANKS_POWER)
    total, logprob, entropy = _finish(largest, total, target, weighted, asked, known, flags_ptr, row)
    w = tl.where(asked, weight / denominator, 0.0)
    w = tl.where(settings_sound | (exists == 0), w, float("nan"))
    logprob = tl.where(asked, logprob, 0.0)
    entropy = tl.where(asked, entropy, 0.0)
    old = tl.load(old_ptr + row, mask=asked, other=0).to(tl.float32)
    advantage = tl.load(advantages_ptr + row, mask=asked, other=0).to(tl.float32)

    log_ratio = logprob - old
    moves = (log_ratio >= -LOG_RATIO_LIMIT) & (log_ratio <= LOG_RATIO_LIMIT)
    is_nan = log_ratio != log_ratio  # min and max would drop it
    ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT))
    ratio = tl.where(is_nan, log_ratio, ratio)
    low = (advantage < 0) & (ratio < lowest_ratio)
    high = (advantage > 0) & (ratio > highest_ratio)
    dual = (advantage < 0) & (ratio > dual_ratio)
    effective = tl.where(dual, dual_ratio, tl.where(low, lowest_ratio, tl.where(high, highest_ratio, ratio)))
    token_loss = -effective * advantage - entropy_coefficient * entropy
    if KL:
        reference = tl.load(reference_ptr + row, mask=asked, other=0).to(tl.float32)
        divergence, kl_slope = _divergence(logprob, reference, KL)
        token_loss += kl_coefficient * divergence
    tl.store(terms_ptr + row, w * token_loss, mask=exists)
    n = values_stride.to(tl.int64)
    tl.store(values_ptr + row, logprob, mask=exists)
    tl.store(values_ptr + n + row, tl.where(asked, ratio, 0.0), mask=exists)
    tl.store(values_ptr + 2 * n + row, entropy, mask=exists)
    tl.store(clips_ptr + row, (asked & low).to(tl.uint8), mask=exists)
    tl.store(clips_ptr + n + row, (asked & high).to(tl.uint8), mask=exists)
    tl.store(clips_ptr + 2 * n + row, (asked & dual).to(tl.uint8), mask=exists)
    if GRADIENT:
        flows = (moves | is_nan) & (low == 0) & (high == 0) & (dual == 0)
        g_l = tl.where(flows, -w * advantage * ratio, 0.0)
        if KL:
            g_l += w * kl_coefficient * kl_slope
        g_h = -w * entropy_coefficient
        _write_gradient(
            logits_ptr, gradient_ptr, row, exists, local_target, largest, total, entropy, inverse_temperature,
            g_l, g_h, columns, valid, ENTROPY, ROWS, VECS, LANES, VEC, PADDED, "evict_first" if RANKS == 0 else "",
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def logprobs_kernel(
    logits_ptr, parts_ptr, targets_ptr, mask_ptr, inverse_temperature_ptr,
    logprobs_ptr, entropy_ptr, largest_ptr, total_ptr, flags_ptr,
    rows, column_units, valid, first, vocabulary, temperature_stride, inverse_temperature,
    RANKS: tl.constexpr, RANKS_POWER: tl.constexpr,
    ROWS: tl.constexpr, VECS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """l, H, B and S of whole rows, [N] each, from all ranks' parts, or RANKS = 0 from the logits; l = H = 0 on rows not
    asked for. A temperature not above 0 sets flag 2."""
    row, exists = _row_numbers(rows, ROWS, False)
    asked = _asked(mask_ptr, row, exists)
    inverse_temperature = _number(inverse_temperature_ptr, inverse_temperature, row, exists, temperature_stride)
    sound = (inverse_temperature > 0) & (inverse_temperature < INFINITY)
    tl.store(flags_ptr + 2 + row * 0, 1, mask=asked & (sound == 0))
    known, local_target = _known_target(targets_ptr, row, asked, vocabulary, first, valid)
    if RANKS == 0:
        largest, total, target, weighted = _row_statistics(
            logits_ptr, row, asked, local_target, inverse_temperature, column_units * UNIT, valid,
            ROWS, VECS, LANES, VEC, PADDED,
        )  # fmt: skip
    else:
        largest, total, target, weighted = _merge_ranks(parts_ptr, row, asked, rows, RANKS, RANKS_POWER)
    total, logprob, entropy = _finish(largest, total, target, weighted, asked, known, flags_ptr, row)
    tl.store(logprobs_ptr + row, tl.where(asked, tl.where(sound, logprob, float("nan")), 0.0), mask=exists)
    tl.store(entropy_ptr + row, tl.where(asked, tl.where(sound, entropy, float("nan")), 0.0), mask=exists)
    tl.store(largest_ptr + row, tl.where(asked, largest, 0.0), mask=exists)
    tl.store(total_ptr + row, tl.where(asked, total, 1.0), mask=exists)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def row_gradient_kernel(
    logits_ptr, gradient_ptr, entropy_ptr, largest_ptr, total_ptr, targets_ptr, mask_ptr, g_l_ptr, g_h_ptr,
    inverse_temperature_ptr,
    rows, column_units, valid, first, vocabulary, temperature_stride, inverse_temperature,
    ROWS: tl.constexpr, VECS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """The gradient of rows under the cotangents g_l, g_h [N] → gradient [N, V_local], which may be the logits
    themselves; H, B and S as `logprobs_kernel` left them."""
    columns = column_units * UNIT
    row, exists = _row_numbers(rows, ROWS, True)
    asked = _asked(mask_ptr, row, exists)
    inverse_temperature = _number(inverse_temperature_ptr, inverse_temperature, row, exists, temperature_stride)
    _, local_target = _known_target(targets_ptr, row, asked, vocabulary, first, valid)
    entropy = tl.load(entropy_ptr + row, mask=asked, other=0.0)
    largest = tl.load(largest_ptr + row, mask=asked, other=0.0)
    total = tl.load(total_ptr + row, mask=asked, other=1.0)
    g_l = tl.load(g_l_ptr + row, mask=asked, other=0.0).to(tl.float32)
    g_h = tl.load(g_h_ptr + row, mask=asked, other=0.0).to(tl.float32)
    _write_gradient(
        logits_ptr, gradient_ptr, row, exists, local_target, largest, total, entropy, inverse_temperature,
        g_l, g_h, columns, valid, True, ROWS, VECS, LANES, VEC, PADDED, "",
    )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def scale_rows_kernel(
    gradient_ptr, scale_ptr, rows, column_units,
    ROWS: tl.constexpr, VECS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """gradient [N, V_local] ← scale · gradient, in place; untouched, and not read, where scale is 1. Of any number of
    programs: a few are sooner done with nothing to do."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        columns = column_units * UNIT
        for first_row in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
            row = tl.arange(0, ROWS).to(tl.int64) + first_row
            exists = row < rows
            offset = row * columns
            for start in range(0, columns, VECS * LANES * VEC):
                column = _tile_columns(start, VECS, LANES, VEC)
                mask = _of_rows(exists) & (column < columns)
                at = gradient_ptr + _of_rows(offset) + column
                g = tl.load(at, mask=mask, other=0.0).to(tl.float32) * scale
                tl.store(at, g.to(gradient_ptr.dtype.element_ty), mask=mask)
