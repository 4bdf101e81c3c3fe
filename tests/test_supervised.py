"""The weights of worked examples."""

import numpy as np

from dapo_megatron.data.prompts import Example
from dapo_megatron.supervised import weighted_batch


def test_weights_are_those_of_the_rows_that_predict_the_response():
    def ids(count: int) -> np.ndarray:
        return np.arange(count, dtype=np.int32)

    batch = weighted_batch([Example(ids(3), ids(2), 0.25), Example(ids(1), ids(3)), Example(ids(2), ids(1), 2.0)])
    assert batch.loss_weights_T.tolist() == [0, 0, 0.25, 0.25, 0, 1, 1, 1, 0, 0, 2, 0]
