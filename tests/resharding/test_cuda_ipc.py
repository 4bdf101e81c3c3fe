"""Weights of a GPU shown to another process, with a stand-in for the driver: what is said, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from dapo_megatron.errors import RunError
from dapo_megatron.resharding import shared_memory

# what torch.multiprocessing sends along, in its order: device, handle, bytes, offset, counter, its offset, event, wait
SHARED = (0, b"\x00han\xffdle", 64, 512, b"counter\x80", 8, b"event\xfe", True)


@pytest.fixture
def cards(monkeypatch):
    """Names the GPUs that this process sees, in its own order."""

    def see(*names: str) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=names[i]))

    return see


def exported() -> dict:
    """The description of a storage on GPU 0 as it arrives at a worker."""
    return json.loads(json.dumps(shared_memory._share_cuda("w", SimpleNamespace(_share_cuda_=lambda: SHARED))))


def test_a_handle_arrives_as_it_was_and_is_opened_on_the_same_card(cards, monkeypatch):
    opened = []
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", lambda *how: opened.append(how) or "storage")
    cards("GPU-a", "GPU-b")
    how = exported()
    cards("GPU-b", "GPU-a")  # the worker counts its cards in another order
    assert shared_memory._open_cuda(how) == "storage"
    assert opened == [(1, *SHARED[1:])]


def test_a_card_that_the_worker_does_not_see_is_named(cards):
    cards("GPU-a")
    how = exported()
    cards("GPU-b", "GPU-c")
    with pytest.raises(
        RunError, match=r"lie on GPU GPU-a, .* \(it sees GPU-b, GPU-c\); .*rollout\.placement=disaggregated"
    ):
        shared_memory._open_cuda(how)


def test_expandable_segments_are_told_with_a_way_round(cards):
    def fails():
        raise RuntimeError("cudaIpcGetMemHandle: invalid argument\nmore lines")

    with pytest.raises(RunError, match=r"memory of w cannot be shared .*invalid argument\).*take expandable_segments"):
        shared_memory._share_cuda("w", SimpleNamespace(_share_cuda_=fails))


def test_a_handle_that_cannot_be_opened_is_told(cards, monkeypatch):
    def fails(*_):
        raise RuntimeError("peer access is not supported")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", fails)
    cards("GPU-a")
    with pytest.raises(RunError, match=r"cannot be opened \(peer access is not supported\)"):
        shared_memory._open_cuda(exported())
