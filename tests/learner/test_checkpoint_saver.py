"""Checkpoints written beside training on real ranks, and a hundred ways in which they may be damaged."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from dapo_megatron.errors import RequestError
from dapo_megatron.learner.manifest import check_manifest, newest_checkpoint, set_aside_later, tidy_up
from tests.learner.batches import random_batch, save_batch
from tests.learner.test_checkpoint import SHAPES
from tests.ranks import run_ranks
from tests.tiny_models import write_model

pytestmark = pytest.mark.distributed
DAMAGES = 100


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the ranks found, and where their runs are."""
    root = tmp_path_factory.mktemp("saver")
    model = write_model(root / "model", "qwen2", tied=True, num_hidden_layers=2)
    batch = save_batch(random_batch(SHAPES, seed=7), root / "batch.safetensors")
    payload = {"model": str(model), "batch": batch, "out": str(root)}
    return run_ranks(2, "tests.learner.saver_cases:save_beside_training", payload), root


@pytest.mark.parametrize("name", ["bf16", "data", "plain"])
def test_a_checkpoint_is_of_the_moment_it_was_asked_for(world, name):
    found, _ = world
    assert found[f"{name} does not wait"]
    assert found[f"{name} is of the moment"], "the update made while it was written shows in it"
    assert found[f"{name} continues exactly"] and found[f"{name} weights after"]


def test_groups_and_random_states_come_back(world):
    found, _ = world
    assert found["surplus"] == [0] and found["random"]


def test_the_newest_and_the_best_are_kept(world):
    found, _ = world
    assert found["kept"] == ["step-000001", "step-000003"], "keep=1, and step 1 is the best"
    assert found["saved once"]


@pytest.mark.parametrize("case", ["full on 1, True", "full on 0, True", "full on 1, False"])
def test_a_full_disk_is_told_on_every_rank_and_costs_no_older_checkpoint(world, case):
    found, _ = world
    told = found[case]
    assert told[0] == told[1]
    assert told[0].startswith("checkpoint step-000004 could not be written: File too large")
    assert "older checkpoints are untouched" in told[0] and "--resume" in told[0]
    assert found["left"] == [["step-000001", "step-000003"], "step-000003"]
    assert found["then"] == [["step-000001", "step-000004"], "step-000004"]


def test_no_rank_waits_for_one_that_cannot_begin(world):
    told = world[0]["nowhere to write"]
    assert told[0] == told[1] and world[0]["none gathers alone"]
    assert told[0].startswith("checkpoint step-000001 could not be written: NotADirectoryError")


def test_what_cannot_be_deleted_is_told_as_that(world):
    told, newest = world[0]["not deleted"]
    assert told[0] == told[1] and "step-000005 is whole" in told[0] and "Permission denied" in told[0]
    assert "could not be written" not in told[0] and "untouched" not in told[0]
    assert newest == "step-000005"


def damage(folder: Path, draw: random.Random) -> str:
    """Change a copy of a checkpoint, whose files are links, in one place; returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    way = draw.choice(("flip", "flip", "byte", "cut", "longer", "missing", "empty", "extra", "folder"))
    path.unlink()
    if way in ("flip", "byte"):
        place = draw.randrange(len(data))
        data[place] = (
            data[place] ^ (1 << draw.randrange(8)) if way == "flip" else (data[place] + 1 + draw.randrange(255)) % 256
        )
    elif way == "cut":
        del data[draw.randrange(len(data)) :]
    elif way == "longer":
        data += b"\n"
    elif way == "empty":
        data.clear()
    elif way == "extra":
        path.with_name(draw.choice(("more.tmp", ".hidden", "__9_0.distcp"))).write_bytes(bytes(data))
    if way == "folder":
        path.mkdir()
    elif way != "missing":
        path.write_bytes(bytes(data))
    return f"{way} {path.relative_to(folder)}"


def test_no_damaged_checkpoint_is_chosen(world, tmp_path):
    """100 copies, each damaged in one place: each is passed over for an older sound one, with a line."""
    sound = world[1] / "bf16" / "checkpoints" / "step-000001"
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(sound, checkpoints / "step-000001", copy_function=os.link)
    draw, ways = random.Random(0), set()
    for _ in range(DAMAGES):
        newer = checkpoints / "step-000002"
        shutil.copytree(sound, newer, copy_function=os.link)
        assert newest_checkpoint(tmp_path / "run") == (newer, [])
        what = damage(newer, draw)
        ways.add(what)
        chosen, lines = newest_checkpoint(tmp_path / "run")
        assert chosen == checkpoints / "step-000001", what
        assert len(lines) == 1 and lines[0].startswith("skipped a damaged checkpoint:") and "step-000002" in lines[0]
        with pytest.raises(RequestError, match="step-000002"):
            check_manifest(newer)
        shutil.rmtree(newer)
    assert {Path(what.split()[1]).name for what in ways} >= {"manifest.json", "state.json", ".metadata", "common.pt"}
    check_manifest(sound)  # the copies were links: the original is untouched


def test_every_byte_of_a_manifest_counts(world, tmp_path):
    folder = tmp_path / "step-000001"
    shutil.copytree(world[1] / "bf16" / "checkpoints" / "step-000001", folder, copy_function=os.link)
    manifest = folder / "manifest.json"
    data = manifest.read_bytes()
    manifest.unlink()
    draw = random.Random(1)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] = draw.choice([b for b in (9, 10, 13, 32, 48, 97, draw.randrange(256)) if b != data[place]])
        manifest.write_bytes(changed)
        with pytest.raises(RequestError, match=r"manifest\.json has changed"):
            check_manifest(folder)
    manifest.write_bytes(data + b" ")
    with pytest.raises(RequestError):
        check_manifest(folder)
    manifest.write_bytes(data)
    check_manifest(folder)


def test_what_a_killed_run_left_is_put_in_order(world, tmp_path):
    sound = world[1] / "bf16" / "checkpoints" / "step-000001"
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step-000003", "step-000007", ".step-000004.tmp", ".step-000005.replaced", ".step-000003.replaced"):
        shutil.copytree(sound, checkpoints / name)
    (checkpoints / "step-000007" / "state.json").write_text("{}")
    tidy_up(tmp_path / "run")
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000003", "step-000005", "step-000007"]
    chosen, lines = newest_checkpoint(tmp_path / "run")
    assert chosen.name == "step-000005" and len(lines) == 1
    set_aside_later(chosen)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["damaged-step-000007", "step-000003", "step-000005"]


def test_a_checkpoint_says_which_step_it_is_of(world):
    state = json.loads((world[1] / "plain" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["step"] == 4 and state["dtype"] == "F32"
