"""The learner takes the same steps whatever computes its loss."""

import pytest
import torch

from tests.learner.batches import random_batch, save_batch
from tests.learner.kernel_cases import VARIANTS
from tests.ranks import run_ranks
from tests.tiny_models import write_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def batch_file(tmp_path_factory):
    batch = random_batch([(5, 12), (9, 30), (3, 21), (11, 7), (6, 40)], seed=3, old=(-4.6, 0.3))
    return save_batch(batch, tmp_path_factory.mktemp("batch") / "batch.safetensors")


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("world", "layouts"), [(2, ["tp2pp1", "tp2pp1sp", "tp1pp2"]), (4, ["tp2pp2sp"])])
def test_the_same_steps_with_every_kernel(batch_file, tmp_path, monkeypatch, tied, world, layouts):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = str(write_model(tmp_path / "model", "qwen2", tied=tied))
    payload = {"model": model, "layouts": layouts, "batch": batch_file}
    report = run_ranks(world, "tests.learner.kernel_cases:five_steps", payload, fresh=True)
    assert len(report) == len(layouts) + ("tp2pp1" in layouts)
    for case, found in report.items():
        assert set(found) == set(VARIANTS)
        wanted = found["torch"]
        assert wanted["moved"] > 0.01, "five steps that move nothing would agree too"
        for variant, numbers in found.items():
            assert (numbers["launches"] > 0) == ("triton" in variant), (case, variant)
            assert numbers["fused"] == ("fused" in variant) or "pp2" in case  # rank 0 has no head there
            assert numbers["norms"] == pytest.approx(wanted["norms"], rel=1e-4), (case, variant)
            for name in ("logprobs", "entropy"):
                gap = (torch.tensor(numbers[name]) - torch.tensor(wanted[name])).abs().max()
                assert gap <= 1e-5, (case, variant, name, float(gap))


def test_triton_without_a_gpu_is_refused_in_one_line(tmp_path):
    pytest.importorskip("triton")
    payload = {"model": str(write_model(tmp_path / "model", "qwen2", tied=True))}
    message = run_ranks(1, "tests.learner.kernel_cases:triton_without_a_gpu", payload)
    assert message.startswith("learner.loss_kernel=triton cannot run here") and "use 'auto' or 'torch'" in message


def test_bad_input_noticed_on_the_device_stops_the_run(tmp_path, batch_file):
    payload = {"model": str(write_model(tmp_path / "model", "qwen2", tied=True)), "batch": batch_file}
    message = run_ranks(1, "tests.learner.kernel_cases:flagged_step", payload)
    assert "a target lies outside the vocabulary" in message
