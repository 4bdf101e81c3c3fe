"""`dapo-megatron plan RECIPE`, with and without --resharding, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.command_line import RECIPE, ROOT, environment, run_command
from tests.resharding.qwen32b import SECTIONS, write_config


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    model = write_config(folder / "model")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SECTIONS, "model": {"path": str(model)}}))
    return recipe


def planned(*arguments: object) -> dict:
    done = run_command("plan", *arguments, "--resharding", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_papers_model_needs_its_config_alone(paper):
    found = planned(paper, "resharding.transport=group", "--link-gbps", 100, "--link-gbps", 400)
    assert found["bytes_total"] == found["bytes_minimum"] == 1048591990784 and found["ratio"] == 1
    assert len(found["bytes_per_destination_rank"]) == 128
    assert sum(found["bytes_per_destination_rank"]) == found["bytes_total"]
    assert found["destination_ranks"] == list(range(128, 256))
    assert found["packed_bytes"] == 0 and found["plan_seconds"] > 0
    assert found["direct_messages"] == 128 * (64 * 4 + 2) < found["messages"]
    seconds = found["seconds_at_gbps"]
    assert set(seconds) == {"100", "400"} and seconds["100"] == pytest.approx(4 * seconds["400"])
    assert seconds["400"] == pytest.approx(max(found["sent"]["most"], found["received"]["most"]) * 8 / 400e9)
    assert found["crossing"] is None


def test_engines_on_the_learners_nodes_get_what_a_node_lacks_once(paper):
    """A node holds one of four stages of the learner and two engines of 4."""
    found = planned(paper, "rollout.tensor=4", "--link-gbps", 400)
    crossing = found["crossing"]
    assert crossing["machines"] == 16
    # norms and the like go to each worker's device
    assert crossing["bytes_minimum"] < crossing["bytes_crossing"] < 1.001 * crossing["bytes_minimum"]
    parameters = 2 * 152064 * 5120 + 64 * ((5120 + 2 * 1024) * 5121 + 5120 * 5120 + 3 * 27648 * 5120 + 2 * 5120) + 5120
    assert crossing["bytes_minimum"] == 16 // 4 * 3 * 2 * parameters
    assert crossing["bytes_on_devices"] + crossing["bytes_beside"] == found["bytes_total"] == found["bytes_minimum"]
    assert crossing["received"]["most"] < 1.02 * crossing["received"]["mean"]
    slot = (256 << 20) // 3
    assert crossing["busiest_rank_bytes"] / slot <= crossing["rounds"] < 1.2 * crossing["busiest_rank_bytes"] / slot + 4
    assert found["seconds_at_gbps"]["400"] == pytest.approx(crossing["busiest_rank_bytes"] * 8 / 400e9)


def test_an_engine_that_would_leave_its_node_is_refused(paper):
    done = run_command("plan", paper, "hardware.gpus_per_node=4")
    assert done.returncode == 2 and "use rollout.tensor=4" in done.stderr and "Traceback" not in done.stderr


def test_engines_and_their_size_come_from_the_recipe(paper):
    found = planned(paper, "rollout.tensor=4", "rollout.engines=3", "model.dtype=fp32")
    assert found["target"] == "vllm: 3 x tensor 4" and found["dtype"] == "fp32"
    assert found["destination_ranks"] == list(range(128, 140))
    assert found["bytes_total"] == found["bytes_minimum"] and found["packed_bytes"] > 0


def test_the_embedded_engine_gets_what_its_rank_lacks():
    found = planned(RECIPE)
    assert found["destination_ranks"] == [0, 1, 2, 3] and found["target"].startswith("hf")
    assert found["bytes_total"] == found["bytes_minimum"] > 0
    layer = 128 * (128 + 2 * 64) + 256 + 128 * 128 + 3 * 128 * 384 + 2 * 128
    assert found["bytes_total"] + found["bytes_copied"] == 4 * 4 * (4 * layer + 2 * 64 * 128 + 128)  # fp32, four ranks


def test_a_table_for_people():
    done = run_command("plan", RECIPE, "--resharding", "--link-gbps", 25)
    assert done.returncode == 0, done.stderr
    for text in ("4 ranks: tensor 2 x pipeline 2 x data 1", "ratio 1.0000", "links of 25 Gbit/s", "messages"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("parallel.tensor=3",), "the nearest layout that fits: parallel.tensor=4"),
        (("--resharding", "rollout.engine=vllm", "rollout.tensor=3"), "rollout.tensor=3 does not divide 4 attention"),
        (("--resharding", "parallel.tensor=3"), "parallel.tensor=3 does not divide 4 attention heads"),
        (("--resharding", "model.scratch=", "model.path=nowhere"), "model folder nowhere does not exist"),
        (("--resharding", "--link-gbps", "0"), "--link-gbps"),
    ],
)
def test_a_wrong_request_is_refused(arguments, told):
    done = run_command("plan", RECIPE, *arguments)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_planning_imports_neither_torch_nor_megatron(paper):
    program = (
        "import sys\nfrom dapo_megatron.cli import app\n"
        f"app(['plan', {str(paper)!r}, '--resharding', '--json'], standalone_mode=False)\n"
        f"app(['plan', {str(RECIPE)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'vllm'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr


def test_what_does_not_fit_is_told_on_both_channels():
    recipe = ROOT / "recipes" / "gpu" / "qwen2.5-32b-dapo-paper.yaml"
    done = run_command("plan", recipe, "learner.recompute=none", "--mean-response", 5000, "--json")
    assert done.returncode == 2 and "the nearest layout that fits: learner.recompute=full" in done.stderr
    found = json.loads(done.stdout)
    assert not found["fits"] and found["suggestion"] == {"learner.recompute": "full"}
    assert found["memory_by_phase"]["learn"] > found["card_bytes"] > found["memory_by_phase"]["rollout"]
    assert found["tokens_per_step"] == 8192 * 5256 and found["bottleneck"].startswith("rollout")
    assert set(found["seconds"]) == {"rollout", "score", "update", "reshard", "step"}
    assert len(found["ranks"]) == 128 and found["gpu_hours"] > 0
