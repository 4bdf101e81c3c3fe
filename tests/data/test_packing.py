import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.data.packing import PADDING_PIECE, assign_micro_batches, pack, packed_length, packing_efficiency
from dapo_megatron.data.records import offsets_of, sequence_batch
from dapo_megatron.errors import RequestError

LENGTHS = st.lists(st.integers(1, 60), max_size=40)
FLAT = ("tokens_T", "loss_weights_T", "advantages_T", "old_logprobs_T")


def batch_of(prompts: list[int], responses: list[int]):
    """Tokens 1, 2, 3 … through the whole batch; every other number distinct and never 0."""
    total = sum(prompts) + sum(responses)
    tokens = np.arange(1, total + 1, dtype=np.int32)
    cuts = np.cumsum([n for pair in zip(prompts, responses, strict=True) for n in pair])[:-1]
    parts = np.split(tokens, cuts)
    batch = sequence_batch(parts[0::2], parts[1::2])
    batch.advantages_T = torch.arange(total) + 1000.0
    batch.old_logprobs_T = -torch.arange(total) - 2000.0
    return batch


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=8)


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

    rows = packed.rows_T[:used]
    assert rows.tolist() == [r for i in chosen for r in range(*batch.offsets[i : i + 2].tolist())]
    assert (packed.rows_T[used:] == -1).all()
    for name in FLAT:
        values = getattr(packed, name)
        assert values.dtype == (torch.int64 if name == "tokens_T" else torch.float32)
        assert torch.equal(values[:used], getattr(batch, name)[rows].to(values.dtype)), name
        assert not values[used:].any(), name

    whole_pieces, remainder = divmod(total - used, PADDING_PIECE)
    with_padding = lengths + [PADDING_PIECE] * whole_pieces + [remainder] * (remainder > 0)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.diff().tolist() == with_padding and packed.cu_seqlens[0] == 0
    assert packed.positions_T.tolist() == [p for n in with_padding for p in range(n)]
    assert packed.longest == max(with_padding)

    # each row that is trained predicts the next token of its own sequence
    for row in packed.loss_weights_T.nonzero().squeeze(1).tolist():
        assert packed.targets_T[row] == batch.tokens_T[packed.rows_T[row] + 1]
        assert packed.rows_T[row + 1] == packed.rows_T[row] + 1
        assert packed.positions_T[row + 1] == packed.positions_T[row] + 1
    assert packed.loss_weights_T.sum() == sum(shapes[i][1] for i in chosen)
    assert packed.targets_T.min() >= 0  # a target of a row of weight 0 may be any real token id
    assert packed.targets_T.numel() == total and packed.targets_T.dtype == packed.positions_T.dtype == torch.int64


def test_pack_of_nothing_is_padding_without_weight():
    packed = pack(batch_of([2], [3]), [], length=4)
    assert packed.tokens_T.tolist() == [0] * 4 and packed.cu_seqlens.tolist() == [0, 4]
    assert not packed.loss_weights_T.any() and (packed.rows_T == -1).all()


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
    assert batch.tokens_T.tolist() == [7, 8, 9, 5, 1, 2] and batch.tokens_T.dtype == torch.int32
    assert batch.offsets.tolist() == [0, 3, 6] and batch.offsets.dtype == torch.int64
    assert batch.loss_weights_T.tolist() == [0, 1, 0, 1, 1, 0]
    assert len(batch) == 2 and batch.lengths.tolist() == [3, 3] and batch.rows(1) == slice(3, 6)


@given(SHAPES)
@settings(deadline=None, max_examples=60)
def test_weights_cover_exactly_the_rows_that_predict_response_tokens(shapes):
    prompts, responses = map(list, zip(*shapes, strict=True))
    batch = batch_of(prompts, responses)
    for b, (prompt, response) in enumerate(shapes):
        rows = batch.rows(b)
        trained = [0.0] * (prompt - 1) + [1.0] * response + [0.0]
        assert batch.loss_weights_T[rows].tolist() == trained


@given(SHAPES, st.data())
@settings(deadline=None, max_examples=60)
def test_select_copies_sequences_in_the_given_order(shapes, data):
    batch = batch_of(*map(list, zip(*shapes, strict=True)))
    chosen = data.draw(st.lists(st.sampled_from(range(len(shapes))), max_size=10))
    before = {name: tensor.clone() for name, tensor in batch.state().items()}
    part = batch.select(chosen)
    assert part.offsets.tolist() == [0, *np.cumsum([sum(shapes[i]) for i in chosen]).tolist()]
    for name in FLAT:
        for place, i in enumerate(chosen):
            assert torch.equal(getattr(part, name)[part.rows(place)], getattr(batch, name)[batch.rows(i)]), name
        getattr(part, name).zero_()  # a copy: the original stays
    assert all(torch.equal(tensor, before[name]) for name, tensor in batch.state().items())


def test_offsets_of_nothing():
    assert offsets_of([]).tolist() == [0]
