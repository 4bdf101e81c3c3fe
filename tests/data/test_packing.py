import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.data import packing
from dapo_megatron.data.packing import PADDING_PIECE, assign_micro_batches, pack, packed_length, packing_efficiency
from dapo_megatron.data.records import repeated, sequence_batch
from dapo_megatron.errors import RequestError

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


def batch_of(prompts: list[int], responses: list[int]):
    """Tokens 1, 2, 3 … through the whole batch; the numbers of a response follow from its tokens, and none is 0."""
    total = sum(prompts) + sum(responses)
    tokens = np.arange(1, total + 1, dtype=np.int32)
    cuts = np.cumsum([n for pair in zip(prompts, responses, strict=True) for n in pair])[:-1]
    parts = np.split(tokens, cuts)
    batch = sequence_batch(parts[0::2], parts[1::2])
    batch.loss_weights = [numbers_of(r, "loss_weights") for r in batch.responses]
    batch.advantages = [numbers_of(r, "advantages") for r in batch.responses]
    batch.old_logprobs = [numbers_of(r, "old_logprobs") for r in batch.responses]
    batch.reference_logprobs = [numbers_of(r, "reference_logprobs") for r in batch.responses]
    return batch


def numbers_of(tokens: np.ndarray, name: str) -> np.ndarray:
    scale, start = {
        "loss_weights": (0.5, 0), "advantages": (1, 1000), "old_logprobs": (-1, -2000), "reference_logprobs": (2, 0.5)
    }[name]  # fmt: skip
    return (scale * tokens + start).astype(np.float32)


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=8)


def test_a_mini_batch_is_planned_once_and_whoever_asked_may_change_the_answer(monkeypatch):
    planned, filled = [], packing._longest_first
    monkeypatch.setattr(packing, "_longest_first", lambda *given: planned.append(given) or filled(*given))
    settings = {"token_budget": 977, "data_parallel": 2}
    first = assign_micro_batches(list(range(1, 40)), **settings)
    expected, tries = [[list(m) for m in rank] for rank in first], len(planned)
    first[0][0].clear()
    first[1].pop()
    assert assign_micro_batches(tuple(range(1, 40)), **settings) == expected and len(planned) == tries > 0
    assert assign_micro_batches(range(1, 41), **settings) != expected and len(planned) > tries


@given(LENGTHS, st.integers(60, 200), st.integers(1, 5), st.integers(1, 4))
@settings(deadline=None, max_examples=200)
def test_assignment(lengths, budget, data_parallel, multiple_of):
    ranks = assign_micro_batches(lengths, token_budget=budget, data_parallel=data_parallel, multiple_of=multiple_of)
    assert sorted(i for rank in ranks for members in rank for i in members) == list(range(len(lengths)))
    assert len(ranks) == data_parallel
    counts = {len(rank) for rank in ranks}
    assert len(counts) == 1 and min(counts) >= 1 and min(counts) % multiple_of == 0
    loads = [[sum(lengths[i] for i in members) for members in rank] for rank in ranks]
    assert max(load for rank in loads for load in rank) <= budget
    # longest-first into the emptiest bin: fuller by at most one sequence
    flat = [load for rank in loads for load in rank]
    assert max(flat) - min(flat) <= max(lengths, default=0)
    again = assign_micro_batches(lengths, token_budget=budget, data_parallel=data_parallel, multiple_of=multiple_of)
    assert again == ranks
    bins = data_parallel * min(counts)
    assert packing_efficiency(lengths, ranks) == pytest.approx(
        sum(lengths) / (bins * max(flat)) if sum(lengths) else 1.0
    )


@given(LENGTHS, st.integers(60, 200), st.integers(1, 4))
@settings(deadline=None, max_examples=100)
def test_ranks_get_like_sums(lengths, budget, data_parallel):
    ranks = assign_micro_batches(lengths, token_budget=budget, data_parallel=data_parallel)
    sums = [sum(lengths[i] for members in rank for i in members) for rank in ranks]
    # the serpentine deal leaves at most the spread of one bin between two ranks
    assert max(sums) - min(sums) <= max(lengths, default=0)


def test_heavy_and_light_bins_alternate_over_ranks():
    # dealt in plain turns the ranks would get 15 and 13 tokens
    assert assign_micro_batches([9, 8, 6, 5], token_budget=9, data_parallel=2) == [[[0], [3]], [[1], [2]]]


def test_no_more_micro_batches_than_needed():
    # 4 x 30 tokens fit in two bins of 60 and in no fewer
    assert assign_micro_batches([30] * 4, token_budget=60) == [[[0, 2], [1, 3]]]
    assert [len(r) for r in assign_micro_batches([30] * 4, token_budget=60, multiple_of=3)] == [3]
    # the token count asks for 2 bins, yet 3 sequences of 40 need 3
    assert [len(r) for r in assign_micro_batches([40, 40, 40], token_budget=60)] == [3]


def test_more_bins_than_sequences():
    ranks = assign_micro_batches([5], token_budget=10, data_parallel=3, multiple_of=2)
    assert [len(rank) for rank in ranks] == [2, 2, 2]
    assert sorted(map(tuple, (members for rank in ranks for members in rank))) == [(), (), (), (), (), (0,)]
    assert assign_micro_batches([], token_budget=10, data_parallel=2) == [[[]], [[]]]


def test_a_sequence_beyond_the_budget_is_refused_with_the_value_that_works():
    with pytest.raises(RequestError, match=r"learner\.tokens_per_micro_batch=10 .* at least 11"):
        assign_micro_batches([3, 11], token_budget=10)
    assert assign_micro_batches([3, 11], token_budget=11) == [[[1], [0]]]


@given(SHAPES, st.one_of(st.integers(0, 8), st.integers(100, 400)), st.data())
@settings(deadline=None, max_examples=150)
def test_pack(shapes, spare, data):
    batch = batch_of(*map(list, zip(*shapes, strict=True)))
    chosen = data.draw(st.lists(st.sampled_from(range(len(shapes))), unique=True))
    lengths = [sum(shapes[i]) for i in chosen]
    used = sum(lengths)
    total = max(1, used + spare)
    packed = pack(batch, chosen, length=total)
    assert packed.tokens_T.numel() == total

    tokens = [t for i in chosen for t in (*batch.prompts[i].tolist(), *batch.responses[i].tolist())]
    assert packed.tokens_T.tolist() == tokens + [0] * (total - used) and packed.tokens_T.dtype == torch.int64
    # row t predicts token t + 1: the last rows of a prompt and of a response differ from their tokens by that
    trained = [(prompt - 1 <= p < prompt - 1 + response) for prompt, response in (shapes[i] for i in chosen)
               for p in range(prompt + response)]  # fmt: skip
    assert packed.trained.tolist() == [row for row, is_trained in enumerate(trained) if is_trained]
    predicted = packed.tokens_T[packed.trained + 1].numpy()
    for name in ("loss_weights", "advantages", "old_logprobs", "reference_logprobs"):
        values = getattr(packed, f"{name}_T")
        assert values.dtype == torch.float32 and len(values) == total
        assert np.array_equal(values[packed.trained].numpy(), numbers_of(predicted, name)), name
        assert int(values.count_nonzero()) == len(predicted), name
    assert [i for i, _ in packed.responses] == chosen
    for i, rows in packed.responses:
        assert packed.targets_T[rows].tolist() == batch.responses[i].tolist()

    whole_pieces, remainder = divmod(total - used, PADDING_PIECE)
    with_padding = lengths + [PADDING_PIECE] * whole_pieces + [remainder] * (remainder > 0)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.diff().tolist() == with_padding and packed.cu_seqlens[0] == 0
    assert packed.positions_T.tolist() == [p for n in with_padding for p in range(n)]
    assert packed.longest == max(with_padding)

    assert packed.targets_T.min() >= 0  # a target of a row of weight 0 may be any real token id
    assert packed.targets_T.numel() == total and packed.targets_T.dtype == packed.positions_T.dtype == torch.int64


def test_pack_of_nothing_is_padding_without_weight():
    packed = pack(batch_of([2], [3]), [], length=4)
    assert packed.tokens_T.tolist() == [0] * 4 and packed.cu_seqlens.tolist() == [0, 4]
    assert not packed.loss_weights_T.any() and packed.responses == () and packed.trained.tolist() == []


def test_a_pack_too_short_for_its_sequences_is_refused():
    with pytest.raises(ValueError, match="5 tokens do not fit into a pack of 4 rows"):
        pack(batch_of([2], [3]), [0], length=4)


@given(st.integers(0, 1000), st.integers(1, 64))
@settings(deadline=None)
def test_packed_length_is_the_least_multiple_that_holds_the_tokens(tokens, multiple_of):
    assert packed_length(tokens, multiple_of) == max(math.ceil(tokens / multiple_of), 1) * multiple_of


def test_a_batch_by_hand():
    batch = sequence_batch(
        [np.array([7, 8], np.int32), np.array([5], np.int32)], [np.array([9], np.int32), np.array([1, 2], np.int32)]
    )
    assert len(batch) == 2 and batch.lengths == [3, 3] and batch.length(1) == 3 and batch.weight_sum == 3.0
    packed = pack(batch, [0, 1], length=6)
    assert packed.tokens_T.tolist() == [7, 8, 9, 5, 1, 2] and packed.targets_T.tolist() == [8, 9, 5, 1, 2, 0]
    assert packed.loss_weights_T.tolist() == [0, 1, 0, 1, 1, 0]
    assert not packed.advantages_T.any() and not packed.old_logprobs_T.any() and packed.reference_logprobs_T is None
    assert packed.responses == ((0, slice(1, 2)), (1, slice(3, 5)))


def test_a_batch_takes_no_memory_of_its_own():
    response = np.arange(5, dtype=np.int32)
    batch = sequence_batch([response[:2]], [response])
    assert batch.responses[0] is response
    for values in (batch.loss_weights[0], batch.advantages[0], repeated(0.5, 9)):
        assert values.strides == (0,) and values.dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 2.0


def test_tokens_that_are_not_integers_are_refused():
    with pytest.raises(TypeError):
        pack(sequence_batch([np.array([1.5])], [np.array([2], np.int32)]), [0], length=2)
