"""Converted checkpoints and the learner: what one writes the other reads, with the same bits."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dapo_megatron.conversion.command import convert
from dapo_megatron.conversion.options import Options
from dapo_megatron.conversion.sources import open_megatron
from dapo_megatron.errors import RequestError
from dapo_megatron.learner.checkpoint import load_checkpoint
from dapo_megatron.learner.manifest import CRITIC, read_state, write_manifest
from dapo_megatron.resharding.layout import whole
from tests.learner.batches import random_batch, save_batch
from tests.ranks import run_ranks
from tests.tiny_models import write_model

pytestmark = pytest.mark.distributed
CASES = "tests.conversion.learner_cases"
FAMILIES = [("qwen2", True, "bf16"), ("llama", False, "fp32"), ("qwen3", True, "fp32")]
KINDS = [("bf16", True), ("fp32", True), ("bf16", False)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    made = random_batch([(5, 20), (9, 7), (3, 11)], seed=7)
    return save_batch(made, tmp_path_factory.mktemp("batch") / "batch.safetensors")


@pytest.mark.slow
def test_a_learner_loads_what_was_streamed(tmp_path, batch, monkeypatch):
    """At layouts other than the written one; tensors are in many small pieces."""
    monkeypatch.setattr(Options, "piece_bytes", 3000)
    cases = []
    for family, tied, dtype in FAMILIES:
        model = write_model(tmp_path / family, family, tied=tied, dtype=DTYPES[dtype])
        other = write_model(tmp_path / f"{family}-other", family, tied=tied, seed=1)
        settings = ["parallel.tensor=4", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]
        convert("hf-to-megatron", model, tmp_path / f"{family}-shards", settings)
        cases.append(
            {
                "model": str(model),
                "other": str(other),
                "checkpoint": str(tmp_path / f"{family}-shards"),
                "dtype": dtype,
                "layouts": ["tp2pp2", "tp2pp2vpp2"] if family == "qwen2" else ["tp2pp2"],
            }
        )
    assert run_ranks(4, f"{CASES}:same_as_from_hugging_face", {"batch": batch, "cases": cases}) == []
    alone = {**cases[1], "batch": batch}
    assert run_ranks(4, f"{CASES}:load_with_megatron_alone", alone) == []


def test_checkpoints_of_a_training_run(tmp_path, batch, monkeypatch, capsys):
    """A learner's checkpoints, optimizer state included: to Hugging Face, and into other layouts."""
    monkeypatch.setattr(Options, "piece_bytes", 3000)
    model = write_model(tmp_path / "model", "qwen2", tied=True)
    other = write_model(tmp_path / "other", "qwen2", tied=True, seed=1)
    payload = {"model": str(model), "other": str(other), "batch": batch, "out": str(tmp_path), "kinds": KINDS}
    run_ranks(4, f"{CASES}:write_trained", payload)
    for dtype, distributed in KINDS:
        name = f"{dtype}-{distributed}"
        add_a_critic(tmp_path / name)
        convert("megatron-to-hf", tmp_path / name, tmp_path / f"{name}-hf")
        found = load_file(tmp_path / f"{name}-hf" / "model.safetensors")
        expected = load_file(tmp_path / f"{name}.safetensors")
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key].to(DTYPES[dtype])) for key in expected), name
        assert "optimizer state is left behind" in capsys.readouterr().out
        convert("megatron-to-megatron", tmp_path / name, tmp_path / f"{name}-converted", ["parallel.tensor=4"])
        told = capsys.readouterr().out
        assert "optimizer state is carried over" in told and "groups kept for the next step are left behind" in told
        assert "the critic is left behind" in told and not (tmp_path / f"{name}-converted" / CRITIC).exists()
        with pytest.raises(RequestError, match="holds no critic: its run had none, or it was converted"):
            load_checkpoint(tmp_path / f"{name}-converted", None, CRITIC)
        state = read_state(tmp_path / name)
        del state["critic_updates"]
        del state["layout"]  # that of random states, which are not converted: the run goes on as at another layout
        assert read_state(tmp_path / f"{name}-converted") == state
    light, options = tmp_path / "light", Options(weights_only=True, dtype="fp32")
    with pytest.raises(RequestError, match="--weights-only"):
        convert("megatron-to-megatron", tmp_path / "bf16-True", light, options=Options(dtype="fp32"))
    convert("megatron-to-megatron", tmp_path / "bf16-True", light, ["parallel.pipeline=2"], options)
    assert not open_megatron(light).optimizer_tensors
    assert torch.load(light / "shards" / "common.pt", weights_only=True) == {}
    compare_with_the_learners(tmp_path / "plain", model, tmp_path / "streamed")
    norms = run_ranks(4, f"{CASES}:continue_converted", {**payload, "layout": "tp1pp2"})
    for name, (original, converted, equal) in norms.items():
        assert original == converted and equal, name


def add_a_critic(folder: Path) -> None:
    """As a run with one leaves it, as far as a conversion looks at it."""
    (folder / CRITIC).mkdir()
    (folder / CRITIC / "metadata.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps(read_state(folder) | {"critic_updates": 2}))
    write_manifest(folder)


def compare_with_the_learners(written: Path, model: Path, streamed: Path) -> None:
    """A checkpoint streamed from the model's folder holds what the learner's own holds: names, shapes, dtypes,
    elements, objects, and the files beside them."""
    convert("hf-to-megatron", model, streamed, ["parallel.tensor=2", "parallel.pipeline=2"], Options(dtype="bf16"))
    ours, theirs = open_megatron(streamed), open_megatron(written)
    assert set(ours.files.tensors) == set(theirs.files.tensors)
    for name, tensor in theirs.files.tensors.items():
        mine = ours.files.tensors[name]
        assert (mine.shape, mine.dtype) == (tensor.shape, tensor.dtype), name
        box = whole(tensor.shape)
        assert torch.equal(ours.files.read(name, box), theirs.files.read(name, box)), name
    assert set(ours.objects) == set(theirs.objects)
    for source in (ours, theirs):
        assert all(torch.load(io.BytesIO(source.object_bytes(n)), weights_only=True) == [None] for n in source.objects)
    names = [{p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} for root in (streamed, written)]
    shards = [
        {name for name in found if not name.endswith(".distcp") and not name.startswith("random/")} for found in names
    ]
    assert shards[0] == shards[1]
    for name in ("shards/metadata.json", "state.json"):
        assert (streamed / name).read_text() == (written / name).read_text()
    assert torch.load(streamed / "shards" / "common.pt", weights_only=True) == {}
    assert torch.load(written / "shards" / "common.pt", weights_only=True) == {}
