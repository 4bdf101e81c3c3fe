"""A judge on an engine of the run's own: how it is started, asked and ended, with stand-ins for vLLM's server; and a
run with the real one."""

import json
import math
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dapo_megatron import judge_assembly
from dapo_megatron.config import check_recipe
from dapo_megatron.config.architecture import architecture_from_dict
from dapo_megatron.config.load import build_recipe
from dapo_megatron.config.reward import Judge, Reward
from dapo_megatron.data.prompts import Prompt, encode_prompt
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.judge_assembly import JudgeEngine, check_judge_engine, judge_engine_settings, judging, plain_template
from dapo_megatron.rewards.grader import Grader
from dapo_megatron.rewards.judge_prompt import PROMPT, Case, render
from dapo_megatron.rewards.judge_records import read_judged
from dapo_megatron.rewards.verdicts import TOP, p_yes
from dapo_megatron.rollout import judge_engine
from dapo_megatron.rollout.judge_engine import judge_command
from dapo_megatron.scratch import scratch_config
from dapo_megatron.worker import JUDGING_SLACK_S, judging_limit
from tests.command_line import RECIPE, ROOT, SMALL, command, environment
from tests.rewards.judges import write_judge
from tests.tiny_models import load_model

CPU = torch.device("cpu")
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # vLLM's CPU attention has no 16

# P(YES) of the answer "seven" is 0.9, of others 0.2; 401 without the secret, and to whatever is no question
SERVER = """
import http.server, json, math, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"] or 0)) or "{}")
        known = self.headers["x-engine-secret"] == os.environ["DAPO_MEGATRON_ENGINE_SECRET"]
        right = self.path == "/health" or self.path == "/v1/chat/completions" and body["model"] == "judge"
        p = 0.9 if 'answer: "seven"' in str(body.get("messages", [{}])[0].get("content")) else 0.2
        top = [{"token": "YES", "logprob": math.log(p)}, {"token": "NO", "logprob": math.log(1 - p)}]
        found = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
        self.send_response(200 if known and right else 401); self.end_headers()
        self.wfile.write(json.dumps(found).encode())
    do_GET = do_POST = do
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_judge(tmp_path_factory.mktemp("judge"), num_hidden_layers=2, **HEADS)


@pytest.fixture
def stand_in(monkeypatch):
    """vLLM's server is a small Python server, or whatever `code` says."""

    def use(code: str = SERVER) -> None:
        monkeypatch.setattr(
            judge_engine, "judge_command", lambda *given: [sys.executable, "-c", code, given[-2], str(given[-1])]
        )

    return use


def settings(folder: Path, **changes: object) -> Judge:
    return Judge(**{"model": str(folder), "engine": "vllm", "retries": 0, **changes})


def recipe_of(judge: dict, **sections: dict):
    shape = {"hidden": 64, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn": 64, "tied": True}
    model = {"scratch": {"tokenizer": "arithmetic", **shape}}
    given = {"run": {"directory": "d", "steps": 1}, "model": model, "data": {"generate": {}}, **sections}
    return build_recipe({**given, "reward": {"grader": "judge", "judge": judge}})


def test_it_judges_behind_a_secret_and_ends_with_all_its_children(folder: Path, stand_in, tmp_path: Path):
    stand_in()
    reward = Reward(grader="judge", wrong=0.0, judge=settings(folder))
    with JudgeEngine(reward.judge, CPU, threads=1, logs=tmp_path) as engine:
        family = [psutil.Process(engine.process.pid), *psutil.Process(engine.process.pid).children(recursive=True)]
        assert len(family) == 2 and (tmp_path / "judge.log").exists()
        with Grader(reward, judge=engine.judge) as grader:
            right, rewards = grader.score(["Answer: seven", "Answer: six", "Answer: 7"], ["7"] * 3, ["q"] * 3)
            assert right.tolist() == [True, False, True] and rewards == pytest.approx([0.9, 0.2, 1.0])
            assert (grader.metrics()["judge/judged"], grader.metrics()["judge/fallbacks"]) == (2, 0)
            # it dies in the middle of the run: the rule decides, and that is counted
            engine.process.stop()
            grader.begin_step()
            right, _ = grader.score(["Answer: seven", "Answer: 7"], ["7"] * 2, ["q"] * 2)
            assert right.tolist() == [False, True]
            assert (grader.metrics()["judge/unreachable"], grader.metrics()["judge/judged"]) == (1, 0)
    assert psutil.wait_procs(family, timeout=5)[1] == []


@pytest.mark.parametrize(
    ("code", "limit_s", "told"),
    [
        (
            "print('no such model'); raise SystemExit(0)",
            30.0,
            r"(?s)reward\.judge\.vllm: .* ended with code 0.*no such",
        ),
        ("import time; time.sleep(60)", 1.0, r"was not ready within reward\.judge\.vllm\.start_limit_s=1"),
    ],
)
def test_one_that_does_not_start_is_told_and_ended(
    folder: Path, stand_in, tmp_path: Path, code: str, limit_s: float, told: str
):
    stand_in(code)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RunError, match=told):
        JudgeEngine(settings(folder, vllm={"start_limit_s": limit_s}), CPU, threads=1, logs=tmp_path)
    assert set(psutil.Process().children(recursive=True)) <= before


def test_the_command(folder: Path):
    engine = judge_engine_settings(settings(folder, tokens_per_batch=99, concurrency=5), None, threads=1)
    words = judge_command(engine, None, TOP, "127.0.0.1", 8123)
    pairs = dict(pairwise(words))
    assert (pairs["--max-model-len"], pairs["--max-num-seqs"], pairs["--dtype"]) == ("100", "5", "float32")
    assert pairs["--model"] == str(folder) and pairs["--max-logprobs"] == "20" and "--enforce-eager" in words
    # it has weights and a tokenizer of its own, and nothing is sent to it
    assert not {"--load-format", "--skip-tokenizer-init", "--weight-transfer-config", "--chat-template"} & set(words)
    assert judge_engine_settings(settings(folder), None, threads=1).max_model_len == 2048, "the model's positions"
    engine = judge_engine_settings(settings(folder, vllm={"gpu_memory_share": 0.4}), ("3",), threads=1)
    words = judge_command(engine, "{{ x }}", TOP, "127.0.0.1", 1)
    pairs = dict(pairwise(words))
    assert (pairs["--gpu-memory-utilization"], pairs["--dtype"], pairs["--chat-template"]) == ("0.4", "auto", "{{ x }}")


@pytest.mark.parametrize("opens", [False, True])
def test_a_plain_text_has_the_tokens_of_a_prompt_without_a_chat_template(folder: Path, opens: bool):
    tokenizer = load_tokenizer(folder)
    if opens:
        from tokenizers.processors import TemplateProcessing

        tokenizer.bos_token = "~~end~~"
        mark = ("~~end~~", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="~~end~~ $A", special_tokens=[mark])
    turns = [{"role": "user", "content": "Is {{ it }} right?\n Reply:"}]
    text = tokenizer.apply_chat_template(turns, chat_template=plain_template(tokenizer), tokenize=False)
    plain = encode_prompt(tokenizer, Prompt(0, turns[0]["content"], ""), False).tolist()
    assert tokenizer.encode(text, add_special_tokens=False) == plain and (plain[0] == 3) == opens


@pytest.mark.parametrize(
    ("judge", "sections", "told"),
    [
        ({"url": "http://h/v1"}, {}, "reward.judge.engine=vllm starts a server of the run's own"),
        ({"engine": "embedded", "vllm": {"tensor": 2}}, {}, "reward.judge.vllm.tensor=2 is a setting of"),
    ],
)
def test_settings_that_do_not_go_together(judge: dict, sections: dict, told: str):
    recipe = recipe_of({"model": "m", "engine": "vllm", **judge}, **sections)
    shape = scratch_config(recipe.model.scratch, vocabulary=64, eos_token=1)
    with pytest.raises(RequestError) as refused:
        check_recipe(recipe, architecture_from_dict(shape, "model"))
    assert told in str(refused.value)


def test_what_this_machine_cannot_start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judge_assembly, "check_vllm_version", lambda: None)
    check_judge_engine(recipe_of({"model": str(folder), "engine": "vllm"}), cpu=True)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4}))
    with pytest.raises(RequestError, match=r"no attention for head_dim=16.*reward\.judge\.engine=embedded"):
        check_judge_engine(recipe_of({"model": str(tmp_path), "engine": "vllm"}), cpu=True)
    beside = {"model": str(folder), "engine": "vllm"}
    with pytest.raises(RequestError, match=r"of one GPU exceed it; use rollout\.gpu_memory_share=0\.70 or less"):
        check_judge_engine(recipe_of(beside, rollout={"engine": "vllm"}), cpu=False)
    check_judge_engine(recipe_of({**beside, "vllm": {"device": 4}}, rollout={"engine": "vllm"}), cpu=False)
    check_judge_engine(recipe_of(beside), cpu=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = settings(folder, vllm={"device": 1, "tensor": 2})
    with pytest.raises(RequestError, match=r"needs GPUs 1 to 2 and this machine shows 2"):
        JudgeEngine(chosen, torch.device("cuda", 0), threads=1, logs=tmp_path)


def test_others_wait_while_it_starts_and_only_recipes_that_want_it_have_it(folder: Path, stand_in, tmp_path: Path):
    stand_in()
    late = settings(folder, limit_s=1.0, vllm={"start_limit_s": 2000.0})
    assert judging_limit(Reward(grader="judge", judge=late)) == 2000 + JUDGING_SLACK_S
    with judging(recipe_of({"model": str(folder)}), CPU, tmp_path) as judge:
        assert judge is None
    before = set(psutil.Process().children(recursive=True))
    with judging(recipe_of({"model": str(folder), "engine": "vllm"}), CPU, tmp_path) as judge:
        assert judge.ask([Case("q", "seven", "7")]).p_yes_B == pytest.approx([0.9])
    assert set(psutil.Process().children(recursive=True)) <= before


def is_server(process: psutil.Process) -> bool:
    try:
        return "dapo_megatron.rollout.vllm_server" in process.cmdline()
    except psutil.Error:  # it has ended
        return False


@pytest.mark.slow
def test_a_run_with_a_real_engine_which_dies_with_it(folder: Path, tmp_path: Path):
    pytest.importorskip("vllm")
    run, collected = tmp_path / "run", tmp_path / "collected.parquet"
    judge = (f"model={folder}", "engine=vllm", "rule_first=false", f"collect={collected}")
    given = (
        "train", RECIPE, *SMALL, f"run.directory={run}", "parallel.tensor=1", "parallel.pipeline=1", "run.steps=1000",
        "evaluation.every=0", "checkpoint.every=1", "reward.grader=judge", *(f"reward.judge.{word}" for word in judge),
    )  # fmt: skip
    launcher = subprocess.Popen(command(*given), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not collected.exists():
            assert launcher.poll() is None and time.monotonic() < deadline, (run / "engines" / "judge.log").read_text()
            time.sleep(0.2)
        family = psutil.Process(launcher.pid).children(recursive=True)
        assert any(is_server(process) for process in family)
    finally:
        launcher.kill()
        launcher.wait()
    assert psutil.wait_procs(family, timeout=10)[1] == []

    rows = read_judged(collected)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in metrics if "judge/judged" in line]
    assert found[0]["judge/judged"] > 0 and found[0]["judge/fallbacks"] == 0
    # what it said is what transformers makes of the same prompt
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    for row in rows[:8]:
        prompt = Prompt(0, render(row.case, PROMPT), "")
        ids = torch.tensor(encode_prompt(tokenizer, prompt, True).tolist())[None]
        with torch.no_grad():
            top = torch.log_softmax(model(ids).logits[0, -1].double(), -1).topk(TOP)
        words = [tokenizer.decode([token]) for token in top.indices.tolist()]
        expected = p_yes(zip(words, top.values.tolist(), strict=True))
        assert row.p_yes == pytest.approx(expected, abs=1e-3) and not math.isnan(row.p_yes)
    assert len(rows) >= 4 and np.ptp([row.p_yes for row in rows]) > 0
