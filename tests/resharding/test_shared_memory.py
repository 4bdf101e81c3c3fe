import os
import resource

import pytest
import torch

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.hf_layout import whole_layout
from dapo_megatron.resharding.plan import make_plan
from dapo_megatron.resharding.shared_memory import Puller, export_tensors, open_export
from tests.resharding.bridge_cases import LEARNERS, PLACES
from tests.resharding.places import run_places
from tests.resharding.worlds import architecture, numbered

CASES = "tests.resharding.bridge_cases"


@pytest.mark.distributed
def test_workers_pull_every_element_from_the_learners_memory_and_see_what_changes_there():
    dtypes = ["float32", "bfloat16"]
    outcomes = run_places(PLACES, f"{CASES}:pulled", {"dtypes": dtypes})
    for number in range(len(dtypes)):
        found = [outcome.result[number] for outcome in outcomes]
        assert [f["wrong"] for f in found] == [0] * PLACES
        assert sum(f["received"] for f in found[LEARNERS:]) == found[0]["minimum"]
        assert all(f["fresh"] == 0 for f in found[LEARNERS:])
        assert all(f["valid"] for f in found[:LEARNERS])


@pytest.mark.distributed
def test_views_of_one_flat_buffer_stay_views_and_a_killed_exporter_leaves_nothing():
    killed, reader = run_places(2, f"{CASES}:exporter_and_reader", {})
    assert killed.status == -9
    found = dict(reader.result)
    assert "cannot be opened" in found.pop("told")
    assert found == {"storages": 1, "before": True, "after": True, "still readable": True, "left": []}


def test_an_export_is_no_longer_valid_when_a_tensor_lies_elsewhere():
    tensors = {"a": torch.zeros(4), "b": torch.nn.Parameter(torch.zeros(6))}
    export = export_tensors(tensors)
    assert export.still_valid(tensors) and export.still_valid(dict(reversed(tensors.items())))
    assert not export.still_valid({"a": tensors["a"]})
    assert not export.still_valid({**tensors, "a": tensors["a"].view(2, 2)})
    tensors["b"].data = torch.zeros(6)
    assert not export.still_valid(tensors)
    assert export_tensors(tensors).still_valid(tensors)


def test_what_is_exported_lies_outside_dev_shm_and_stays_there_when_it_is_exported_again():
    tensors = {"a": torch.arange(4.0)}
    first = export_tensors(tensors)
    how = first.describe()["storages"][0]
    assert os.readlink(f"/proc/self/fd/{how['fd']}").startswith("/memfd:")
    second = export_tensors(tensors)
    assert first.describe() == second.describe() and first.still_valid(tensors)


def test_memory_shared_by_other_means_is_moved_and_empty_tensors_pass():
    tensors = {"a": torch.arange(4.0).share_memory_(), "b": torch.zeros(0, 3)}
    opened = open_export(export_tensors(tensors).describe())
    tensors["a"][0] = 9
    assert opened["a"].tolist() == [9, 1, 2, 3] and opened["b"].shape == (0, 3)


def test_a_file_number_that_is_used_again_is_not_taken_for_weights():
    tensors = {"a": torch.arange(4.0)}
    described = export_tensors(tensors).describe()
    del tensors
    number = described["storages"][0]["fd"]
    other = os.memfd_create("other")
    os.truncate(other, 16)
    if other != number:
        os.dup2(other, number)
        os.close(other)
    with pytest.raises(RunError, match="keeps its weights elsewhere"):
        open_export(described)
    os.close(number)


def test_too_many_open_files_are_an_error_with_a_way_round():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        with pytest.raises(RunError, match=r"32 bytes .* for t\d+ cannot .* resharding\.transport=group"):
            export_tensors({f"t{i}": torch.zeros(8) for i in range(60)})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "source, target, allowed",
    [
        (torch.float32, torch.bfloat16, True),
        (torch.float16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float16, False),
        (torch.bfloat16, torch.float16, False),
        (torch.float64, torch.float32, False),
        (torch.int64, torch.float32, False),
        (torch.float32, torch.int64, False),
        (torch.int64, torch.int64, True),
    ],
)
def test_dtypes_that_would_lose_range_are_refused_by_name(source, target, allowed):
    a = architecture()
    plan = make_plan(whole_layout(a, [0]), whole_layout(a, [1]))
    held = {name: tensor.to(source) for name, tensor in numbered(a).items()}
    into = {name: torch.zeros(tensor.shape, dtype=target) for name, tensor in held.items()}
    if allowed:
        transfer = Puller(plan, 1, {0: held}, into, dtype=target).run()
        assert transfer.bytes_received == sum(t.nbytes for t in into.values())
        assert all(torch.equal(into[name], held[name].to(target)) for name in held)
        return
    with pytest.raises(RunError, match=r"model\.embed_tokens\.weight is .* would lose range"):
        Puller(plan, 1, {0: held}, into, dtype=target).run()


def test_missing_and_misshapen_tensors_are_named():
    a = architecture()
    plan = make_plan(whole_layout(a, [0]), whole_layout(a, [1]))
    held = {name: tensor.float() for name, tensor in numbered(a).items()}
    into = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
    with pytest.raises(RunError, match=r"place 0 has no tensor model\.norm\.weight"):
        Puller(plan, 1, {0: {k: v for k, v in held.items() if k != "model.norm.weight"}}, into, dtype=torch.float32)
    with pytest.raises(RunError, match=r"place 0 has no tensor"):
        Puller(plan, 1, {}, into, dtype=torch.float32)
    with pytest.raises(RunError, match=r"place 1: model\.norm\.weight has shape \(2,\)"):
        Puller(plan, 1, {0: held}, {**into, "model.norm.weight": torch.zeros(2)}, dtype=torch.float32)
    with pytest.raises(RunError, match=r"of place 1 is torch\.float32, expected was torch\.bfloat16"):
        Puller(plan, 1, {0: held}, into, dtype=torch.bfloat16)
