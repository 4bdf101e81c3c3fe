from dataclasses import dataclass

import pytest
import torch

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.hf_layout import whole_layout
from dapo_megatron.resharding.links import Link
from dapo_megatron.resharding.plan import make_plan
from dapo_megatron.resharding.transport import Transport
from tests.ranks import run_ranks
from tests.resharding.worlds import architecture, numbered


@dataclass
class Case:
    """(tensor, pipeline, virtual, data) on the source side; the same or "whole" on the target side."""

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int] | str
    bucket_bytes: int = 1 << 20
    window: int = 256
    dtype: str = "float32"
    family: str = "qwen2"
    tied: bool = False


CASES = {
    2: [
        Case((2, 1, 1, 1), "whole"),
        Case((2, 1, 1, 1), "whole", bucket_bytes=1, window=1),
        Case((1, 2, 2, 1), "whole", bucket_bytes=100, window=2, family="qwen3", tied=True),
        Case((1, 1, 1, 2), "whole"),
    ],
    4: [
        Case((4, 1, 1, 1), "whole"),
        Case((4, 1, 1, 1), "whole", bucket_bytes=1, window=1, family="llama"),
        Case((2, 2, 2, 1), "whole", bucket_bytes=64, window=3, tied=True),
        Case((2, 2, 2, 1), (4, 1, 1, 1), bucket_bytes=200, window=5),
        Case((1, 4, 1, 1), (2, 1, 1, 2), dtype="float64"),
        Case((2, 1, 1, 2), "whole"),
    ],
}


@pytest.mark.distributed
@pytest.mark.parametrize("world", CASES)
def test_every_element_arrives_and_no_byte_too_many_travels(world):
    cases = CASES[world]
    reports = run_ranks(world, "tests.resharding.transport_cases:move", {"cases": [vars(c) for c in cases]})
    assert len(reports) == len(cases)
    for case, found in zip(cases, reports, strict=True):
        assert found["wrong"] == 0, (case, found)
        assert found["sent"] == found["planned"], (case, found)
        # no gather, no broadcast: torch.distributed saw these sends, and nothing else
        assert found["seen"] == found["sent"] and found["collectives"] == 0, (case, found)
        assert found["sent"] + found["copied"] == found["all"], (case, found)
        replicated = case.source == (1, 1, 1, world)
        assert (found["messages"] == 0) == (found["sent"] == 0) == replicated, (case, found)
        if not replicated and case.bucket_bytes > 1000 and case.target == "whole" and case.source[0] == world:
            assert found["messages"] == world * (world - 1), (case, found)  # one message a pair
        if case.bucket_bytes == 1:
            assert found["messages"] > 4 * world, (case, found)


@pytest.mark.distributed
def test_a_silent_peer_is_named_when_its_time_is_up():
    # far below the time limit of the group itself, which must not be the one that fires
    told = run_ranks(2, "tests.resharding.transport_cases:silence", {"time_limit_s": 2}, time_limit_s=60)
    assert "place 0 waited 2 s for place 1 to send" in told[0]
    assert "place 0 waited 2 s for place 1 to receive" in told[1]


class NoLink:
    """Nothing may be posted on it."""

    def post(self, operations):
        raise AssertionError("posted")

    def close(self):
        pass


def lone_transport(place: int, dtype: torch.dtype, link: Link) -> Transport:
    """Place 0 gives whole tensors to place 1."""
    a = architecture()
    return Transport(
        make_plan(whole_layout(a, [0]), whole_layout(a, [1])), place, dtype=dtype, device=torch.device("cpu"),
        bucket_bytes=1 << 20, window=8, time_limit_s=1, link=link,
    )  # fmt: skip


@pytest.mark.parametrize(
    "place, lies_as, wire",
    [
        (0, torch.float32, torch.float16),
        (0, torch.bfloat16, torch.float16),
        (0, torch.float64, torch.bfloat16),
        (1, torch.float16, torch.float32),
        (1, torch.float16, torch.bfloat16),
    ],
)
def test_a_dtype_that_would_lose_range_is_refused_by_the_tensors_name_before_anything_is_sent(place, lies_as, wire):
    tensors = {name: tensor.to(lies_as) for name, tensor in numbered(architecture()).items()}
    with pytest.raises(RunError, match=r"model\.embed_tokens\.weight is \w+ and would lose range as (b?float16)"):
        lone_transport(place, wire, NoLink()).run(*((tensors, {}) if place == 0 else ({}, tensors)))


def test_tensors_that_are_missing_or_misshapen_are_named_before_anything_is_sent():
    tensors = {name: t.float() for name, t in numbered(architecture()).items()}
    with pytest.raises(RunError, match=r"place 0 has no source tensor model\.norm\.weight"):
        lone_transport(0, torch.float32, NoLink()).run({n: t for n, t in tensors.items() if "model.norm" not in n}, {})
    with pytest.raises(RunError, match=r"place 1 has no target tensor"):
        lone_transport(1, torch.float32, NoLink()).run({}, {})
    with pytest.raises(RunError, match=r"place 1: model\.norm\.weight has shape \(2,\)"):
        lone_transport(1, torch.float32, NoLink()).run({}, {**tensors, "model.norm.weight": torch.zeros(2)})
