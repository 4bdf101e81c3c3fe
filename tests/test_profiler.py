"""Traces: of the chosen steps and ranks alone, with the phases in them; refused where only a GPU could record."""

import gzip
import json

import pytest
import torch

from dapo_megatron.config.check import profile_problem
from dapo_megatron.config.load import build_recipe
from dapo_megatron.config.profile import Profile
from dapo_megatron.errors import RequestError
from dapo_megatron.phases import Phases
from dapo_megatron.profiler import Profiler

CPU = torch.device("cpu")


def events(path) -> set[str]:
    with gzip.open(path) as file:
        return {event.get("name") for event in json.load(file)["traceEvents"]}


def work(phases: Phases) -> None:
    with phases.mark("learn"), phases.own("optimizer"):
        torch.ones(8, 8) @ torch.ones(8, 8)


def test_only_chosen_steps_are_recorded_also_one_that_fails(tmp_path):
    phases = Phases()
    profiler = Profiler(Profile(steps=[2, 4], ranks=[3]), phases, rank=3, device=CPU, folder=tmp_path / "profile")
    for step in (1, 2, 3):
        with profiler.step(step):
            work(phases)
    with pytest.raises(ZeroDivisionError), profiler.step(4):
        work(phases)
        _ = 1 / 0
    names = [f"step-00000{step}-rank-00003.json.gz" for step in (2, 4)]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names
    for name in names:
        assert {"learn", "optimizer", "aten::mm"} <= events(tmp_path / "profile" / name)
    assert phases.marks == []


def test_other_ranks_record_nothing(tmp_path):
    phases = Phases()
    profiler = Profiler(Profile(steps=[2]), phases, rank=1, device=CPU, folder=tmp_path / "profile")
    with profiler.step(2):
        work(phases)
    assert not (tmp_path / "profile").exists()


def test_what_only_a_gpu_has_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(RequestError, match=r"profile\.memory=true and profile\.nvtx=true needs a GPU"):
        Profiler(Profile(memory=True, nvtx=True), Phases(), rank=0, device=CPU, folder=tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_and_kernels_of_a_gpu_are_recorded(tmp_path):
    phases, device = Phases(), torch.device("cuda")
    profiler = Profiler(Profile(steps=[1], memory=True, nvtx=True), phases, rank=0, device=device, folder=tmp_path)
    with profiler.step(1), phases.own("optimizer"):
        torch.ones(512, 512, device=device) @ torch.ones(512, 512, device=device)
        torch.cuda.synchronize()
    assert "cudaLaunchKernel" in events(tmp_path / "step-000001-rank-00000.json.gz")
    assert (tmp_path / "step-000001-rank-00000.memory.pickle").stat().st_size > 1000


def test_a_rank_that_is_not_there_is_refused_before_launch():
    recipe = build_recipe(
        {"run": {"directory": "out"}, "model": {"path": "hf"}, "profile": {"steps": [3], "ranks": [8]}}
    )
    assert profile_problem(recipe, 8) == "profile.ranks=[8] names rank 8 of a world of 8; use 0..7"
    assert profile_problem(recipe, 9) is None
