"""Token selection where a data-parallel rank has nothing to do."""

import numpy as np
import pytest

from dapo_megatron.token_choice import choose_tokens
from tests.learner.batches import random_batch
from tests.method_cases import recipe


class TwoRanks:
    """Stands in for a learner of two data-parallel ranks, the second of which got no sequence."""

    def packing(self, batch, sequences):
        return [[list(sequences)], [[]]]

    def score(self, batch):
        rng = np.random.default_rng(0)
        return tuple([rng.normal(size=len(r)).astype(np.float32) for r in batch.responses] for _ in range(2))


@pytest.mark.parametrize("lengths", [[(4, 20)], [(4, 20), (3, 15)]])
def test_an_empty_micro_batch_chooses_nothing(lengths):
    batch = random_batch(lengths, seed=3)
    rows = range(len(lengths))
    found = []
    for statistics in ("micro_batch", "current"):
        name = "high-entropy, micro_batch"
        algorithm = recipe(name).algorithm.model_copy(update={"statistics": statistics})
        found.append(choose_tokens(TwoRanks(), batch, rows, rows, [], algorithm, (0, 0, 0)))
    assert found[0].kept_tokens == found[1].kept_tokens > 0 and found[0].trained == found[1].trained
    assert all((a == b).all() for a, b in zip(found[0].kept, found[1].kept, strict=True))
