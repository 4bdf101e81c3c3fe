"""Buffers and shards hold every parameter once."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dapo_megatron.planning.weights import Parameter, buffer_of, shard_elements

anywhere = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # also on busy cores
parameters = st.lists(
    st.builds(
        Parameter,
        name=st.just("weight"),
        shape=st.tuples(st.integers(1, 300)),
        shared=st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=12,
)


@anywhere
@given(parameters=parameters, data_parallel=st.integers(1, 12), distributed=st.booleans())
def test_every_parameter_has_a_place_of_its_own(parameters, data_parallel, distributed):
    buffer = buffer_of(parameters, data_parallel=data_parallel, distributed=distributed)
    sizes = [stop - start for start, stop in buffer.spans]
    assert sizes == [p.elements for p in reversed(parameters)]
    ends = [0, *(edge for span in buffer.spans for edge in span), buffer.elements]
    assert ends == sorted(ends)
    assert buffer.buckets[0][0] == 0 and buffer.buckets[-1][1] == buffer.elements
    if not distributed:
        assert buffer.elements == sum(sizes) and len(buffer.buckets) == 1
        return
    for start, stop in buffer.buckets:
        assert (stop - start) % data_parallel == 0 and stop % 128 == 0
    for parameter, (start, stop) in zip(reversed(parameters), buffer.spans, strict=True):
        assert start % 64 == 0
        inside = [bucket for bucket in buffer.buckets if bucket[0] <= start and stop <= bucket[1]]
        assert len(inside) == 1
        if parameter.shared:
            assert inside[0][0] == start


@anywhere
@given(parameters=parameters, data_parallel=st.integers(1, 12))
def test_shards_cover_the_parameters_and_no_padding(parameters, data_parallel):
    buffer = buffer_of(parameters, data_parallel=data_parallel, distributed=True)
    shards = shard_elements(buffer, data_parallel)
    assert len(shards) == data_parallel and min(shards) >= 0
    assert sum(shards) == sum(p.elements for p in parameters)
    assert max(shards) <= buffer.elements // data_parallel
