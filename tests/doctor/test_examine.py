"""What the doctor says of machines that are made up, word by word, and of this one."""

import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from dapo_megatron.config.load import build_recipe
from dapo_megatron.doctor.command import examine
from dapo_megatron.doctor.facts import find_apex, gather
from dapo_megatron.doctor.findings import FLASH_PIN, TE_PIN, TRITON_PIN, Finding, judge
from dapo_megatron.doctor.machine import Disk, Distribution, Imported, Machine, this_machine
from dapo_megatron.doctor.needs import Needs
from tests.command_line import ROOT, run_command
from tests.doctor.machines import BASE, GIB, VLLM_REQUIRES, cpu_machine, h100_node, machine, node_with_wrong_apex

GOLDEN = Path(__file__).parent / "golden"
TINY = ROOT / "recipes" / "tiny-arithmetic-cpu.yaml"
MACHINES = {
    "cpu-with-vllm": cpu_machine(vllm=True),
    "cpu-without-vllm": cpu_machine(vllm=False),
    "h100-node": h100_node(),
    "wrong-apex": node_with_wrong_apex(),
}


def tiny(*overrides: str):
    return build_recipe(yaml.safe_load(TINY.read_text(encoding="utf-8")), overrides)


def findings(of: Machine, needs: Needs | None = None) -> dict[str, list[Finding]]:
    """By subject."""
    found: dict[str, list[Finding]] = {}
    for finding in judge(gather(of, "runs"), needs or Needs()):
        found.setdefault(finding.subject, []).append(finding)
    return found


@pytest.mark.parametrize("name", MACHINES)
def test_the_page_of_a_machine(name, capsys):
    code = examine(None, None, json_wanted=False, machine=MACHINES[name])
    page = capsys.readouterr().out
    if os.environ.get("WRITE_GOLDEN"):
        (GOLDEN / f"{name}.txt").write_text(page, encoding="utf-8")
    assert page == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert code == 0


def test_a_recipe_that_needs_what_is_not_there_is_told_by_setting(capsys):
    recipe = tiny("rollout.engine=vllm", "learner.device=cuda", "model.layer_spec=transformer_engine")
    assert examine(recipe, "r.yaml", json_wanted=True, machine=cpu_machine(vllm=False)) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["usable"], told["recipe"]) == (False, "r.yaml")
    missing = {f["subject"]: f["needed_by"] for f in told["findings"] if f["kind"] == "missing"}
    assert missing == {
        "GPU": "learner.device=cuda",
        "TransformerEngine": "model.layer_spec=transformer_engine",
        "vLLM": "rollout.engine=vllm",
    }
    assert examine(tiny(), "r.yaml", json_wanted=True, machine=cpu_machine(vllm=False)) == 0


def test_json_has_the_documented_keys(capsys):
    examine(None, None, json_wanted=True, machine=h100_node(distributions=BASE))
    told = json.loads(capsys.readouterr().out)
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    for key in [*told, *told["cuda"], *told["machine"], *told["findings"][0]]:
        assert f"`{key}`" in text, f"docs/doctor.md does not name {key}"
    assert told["schema"] == 1
    assert len(told["cuda"]["gpus"]) == len(told["infiniband"]) == 8


@pytest.mark.parametrize(
    ("changes", "subject", "kind", "words"),
    [
        ({"gpus": "H100, 81559, 9.0, 550.54.14\n"}, "torch + driver", "bad", "580"),
        ({"torch": {"cuda": "12.8", "gpus": 8}}, "torch + TransformerEngine", "bad", "linked against CUDA 13"),
        ({"errors": {"transformer_engine.pytorch": "ImportError: a symbol"}}, "TransformerEngine", "bad", "a symbol"),
        ({"errors": {"flash_attn": "ImportError: x"}}, "FlashAttention", "warning", "cannot be imported"),
        ({"torch": {"cuda": None, "gpus": 0}}, "torch", "warning", "CPU build"),
        ({"torch": {"cuda": "13.0", "gpus": 0}}, "GPU", "warning", "torch sees none"),
        ({"disks": {"/dev/shm": Disk("tmpfs", 64 << 20, 64 << 20)}}, "/dev/shm", "warning", "64.0 MiB"),
        ({"limits": {"nofile": 1024, "memlock": -1}}, "ulimit -n", "warning", "1024 open files"),
        ({"limits": {"memlock": 65536}}, "ulimit -l", "bad", "64.0 KiB"),
        ({"disks": {"runs": Disk("tmpfs", GIB, GIB)}}, "run folder", "warning", "memory"),
        ({"gpus": "H100, 81559, 9.0, 580.95.05\n" * 9}, "GPU", "warning", "8 of 9"),
    ],
)  # fmt: skip
def test_trouble_on_a_node_is_named(changes, subject, kind, words):
    sound = findings(h100_node())
    assert not [f for group in sound.values() for f in group if f.kind != "cost"]
    (found,) = [f for f in findings(h100_node(**changes)).get(subject, []) if f.kind != "cost"]
    assert found.kind == kind
    assert words in found.text


@pytest.mark.parametrize(
    ("changed", "subject", "kind", "words"),
    [
        ({"torch": "2.12.1"}, "vLLM + torch", "bad", "needs torch ==2.13.0; 2.12.1 is installed"),
        ({"transformers": "5.23.0"}, "vLLM + transformers", "bad", "5.23.0"),
        ({"megatron-core": "0.17.1"}, "dapo-megatron + megatron-core", "bad", "==0.16.1"),
        ({"transformer-engine": "2.20.2"}, "megatron-core + TransformerEngine", "warning", "<2.12.0,>=2.9.0a0"),
        ({"flash-attn": "2.8.3.post2"}, "TransformerEngine + FlashAttention", "warning", "later than 2.8.3"),
        ({"vllm": "0.33.0"}, "vLLM", "warning", "0.32.*"),
    ],
)
def test_versions_that_do_not_go_together_are_named(changed, subject, kind, words):
    node = h100_node()
    requires = {"vllm": VLLM_REQUIRES}

    def distribution(name: str) -> Distribution | None:
        found = node.distribution(name)
        return (
            replace(found, version=changed[name], requires=requires.get(name, found.requires))
            if name in changed
            else found
        )

    (found,) = findings(replace(node, distribution=distribution))[subject]
    assert found.kind == kind
    assert words in found.text


def test_vllm_of_another_version_is_bad_where_the_recipe_starts_it():
    node = machine({**BASE, "vllm": Distribution("0.33.0")})
    (found,) = findings(node, Needs(packages={"vLLM": "rollout.engine=vllm"}))["vLLM"]
    assert (found.kind, found.needed_by) == ("bad", "rollout.engine=vllm")


def test_a_run_of_several_nodes_wants_fabric_and_a_shared_disk():
    node = h100_node(disks={"runs": Disk("ext4", 90 * GIB, 80 * GIB)}, files={})
    found = findings(node, Needs(world=128, disk=100 * GIB))
    assert "TCP" in found["InfiniBand"][0].text and found["InfiniBand"][0].kind == "warning"
    assert sorted((f.kind, f.text.split()[0]) for f in found["run folder"]) == [("bad", "80.0"), ("warning", "ext4")]
    assert findings(node, Needs(world=8))["InfiniBand"][0].kind == "cost"


def test_apex_is_told_apart_by_what_is_inside():
    nvidia = h100_node()
    assert (find_apex(nvidia).kind, find_apex(nvidia).fused) == ("nvidia", True)
    assert find_apex(node_with_wrong_apex()).kind == "unrelated"
    assert find_apex(cpu_machine(vllm=True)).kind == "none"
    bare = h100_node(folders={"apex": "/venv/apex"})
    assert not find_apex(bare).fused
    assert "no FusedAdam" in findings(bare)["Apex"][0].text
    for finding in findings(node_with_wrong_apex())["Apex"]:
        assert "git+https://github.com/NVIDIA/apex" in finding.install
        assert finding.install.startswith("pip uninstall apex;")


def test_modules_are_imported_in_a_process_of_their_own(tmp_path, monkeypatch):
    for name, text in {
        "sound_part": "print('noise')",
        "broken_part": "raise ImportError('undefined symbol: x')",
        "fatal_part": "import os; os._exit(7)",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = this_machine().imports(["broken_part", "fatal_part", "sound_part"])
    assert found == {
        "broken_part": Imported("ImportError: undefined symbol: x"),
        "fatal_part": Imported("importing it ended the process (exit code 7)"),
        "sound_part": Imported(None),
    }


def test_install_lines_name_the_pinned_versions():
    pins = dict(
        line.split("==") for line in (ROOT / "requirements" / "cuda-h100.txt").read_text().splitlines() if "==" in line
    )
    assert pins["transformer-engine"] == TE_PIN
    assert pins["triton"] == TRITON_PIN
    assert FLASH_PIN == "2.8.3"  # the newest that TransformerEngine 2.11 takes


def test_this_machine():
    done = run_command("doctor", "--json", time_limit_s=600)
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["usable"] else 1)
    for name in ("torch", "megatron-core", "transformers", "triton"):
        assert told["packages"][name] == version(name)
    assert told["imports"]["torch"] is None
    assert told["machine"]["cores"] == os.cpu_count()
    assert told["machine"]["run_folder"]["free"] > 0
