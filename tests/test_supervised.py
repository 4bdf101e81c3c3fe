"""The weights of worked examples."""

import numpy as np

from dapo_megatron.data.prompts import Example
from dapo_megatron.supervised import weighted_batch


def test_the_weight_of_an_example_is_that_of_each_response_token():
    def ids(count: int) -> np.ndarray:
        return np.arange(count, dtype=np.int32)

    batch = weighted_batch([Example(ids(3), ids(2), 0.25), Example(ids(1), ids(3)), Example(ids(2), ids(1), 2.0)])
    assert [weights.tolist() for weights in batch.loss_weights] == [[0.25, 0.25], [1, 1, 1], [2]]
