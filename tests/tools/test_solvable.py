"""The solvable task: every response is listed, its probability exact, and the masses those of a count by hand."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.errors import RunError
from tests.command_line import run_command
from tests.tiny_models import write_model
from tools.ladder_table import Rung
from tools.placed_recipes import placed_recipes
from tools.solvable import METHODS, RECIPES, Row, draw_curves, read_space, rows_csv, score_run, table_markdown
from tools.solvable_exact import Masses, every_response, masses, response_logprobs
from tools.solvable_task import LETTERS, MOST_TOKENS, PAIRS, PROMPTS, is_right, reward, write_task

VOCABULARY, END, MOST = 4, 1, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    changes = {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
    folder = write_model(tmp_path_factory.mktemp("model") / "qwen2", "qwen2", tied=False, **changes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, local_files_only=True).eval()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solvable")
    write_task(folder)
    return folder


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.data())
def test_every_response_is_listed_once(vocabulary, most, data):
    end = data.draw(st.integers(0, vocabulary - 1))
    found = every_response(vocabulary, end, most)
    drawable = {
        response
        for length in range(1, most + 1)
        for response in product(range(vocabulary), repeat=length)
        if end not in response[:-1] and (response[-1] == end or length == most)
    }
    assert len(found) == len(drawable) and set(found) == drawable


def test_probabilities_are_those_of_whole_sequences_and_sum_to_one(model):
    prompts = [[2, 3], [0], [3, 3, 2]]
    responses = every_response(VOCABULARY, END, MOST)
    found_PR = response_logprobs(model, prompts, end=END, most_tokens=MOST)
    assert found_PR.dtype == torch.float64 and found_PR.shape == (3, len(responses))
    assert (found_PR.exp().sum(1) - 1).abs().max() < 1e-12
    assert found_PR.exp().std() > 1e-3
    for prompt, found_R in zip(prompts, found_PR, strict=True):
        for response, found in zip(responses, found_R.tolist(), strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            alone = sum(row.double().log_softmax(-1)[t].item() for row, t in zip(logits, response, strict=True))
            assert math.isclose(found, alone, abs_tol=1e-10)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_masses_are_those_counted_one_by_one(prompts, responses, seed):
    rng = np.random.default_rng(seed)
    p, start = rng.dirichlet(np.ones(responses), (2, prompts))
    right, chosen, rejected = rng.random((3, prompts, responses)) < 0.5
    cut, rewards = rng.random(responses) < 0.5, rng.normal(size=(prompts, responses))
    found = masses(
        *(torch.tensor(np.log(each)) for each in (p, start)),
        rewards_PR=torch.tensor(rewards),
        right_PR=torch.tensor(right),
        chosen_PR=torch.tensor(chosen),
        rejected_PR=torch.tensor(rejected),
        cut_R=torch.tensor(cut),
    )
    wanted = dict.fromkeys(vars(found), 0.0)
    for i in range(prompts):
        for j in range(responses):
            share, outside = p[i, j] / prompts, not chosen[i, j] and not rejected[i, j]
            wanted["reward"] += share * rewards[i, j]
            wanted["right"] += share if right[i, j] else 0.0
            wanted["outside"] += share if outside else 0.0
            wanted["outside_wrong"] += share if outside and not right[i, j] else 0.0
            wanted["chosen"] += share if chosen[i, j] else 0.0
            wanted["rejected"] += share if rejected[i, j] else 0.0
            wanted["cut"] += share if cut[j] else 0.0
            wanted["kl"] += share * math.log(p[i, j] / start[i, j])
    assert vars(found) == pytest.approx(wanted, abs=1e-12)


def test_the_task_is_what_it_says(task, tmp_path):
    write_task(tmp_path)
    for name in ("pairs.jsonl", "prompts.jsonl", "warm.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (task / name).read_bytes()
    assert is_right("bc", "abc") and is_right("bc", "fff")
    assert not any(is_right("bc", text) for text in ("abd", "d", "abca", "ab7", "", "abc\n"))
    assert reward(responses=["abc", "a"], answers=["d", "d"], prompts=["bc", "bc"]) == [1.0, -1.0]
    space = read_space(task)
    responses = every_response(len(LETTERS) + 1, space.end, MOST_TOKENS)
    assert len(responses) == 1 + 6 + 36 + 216 + 6**4
    right, chosen, rejected, cut = (
        space.sets[name] for name in ("right_PR", "chosen_PR", "rejected_PR", "cut_R")
    )  # fmt: skip
    assert right.shape == (len(PROMPTS), len(responses)) and int(cut.sum()) == 6**4
    # of all three letters a sixth is right, and no response that is cut or short
    assert right.sum(1).tolist() == [36] * len(PROMPTS)
    for i, response in enumerate(responses):
        if right[:, i].any():
            assert len(response) == 4 and response[-1] == space.end
    assert not (chosen & rejected).any() and not (chosen & ~right).any() and not (rejected & right).any()
    for held in (chosen, rejected):
        assert int(held.sum(1).min()) >= 2 and int(held.sum(1).max()) <= PAIRS


def rows() -> list[Row]:
    def at(method: Rung, seed: int, step: int, value: float) -> Row:
        return Row(method, seed, step, Masses(*[value] * 8))

    return [at(m, s, step, 0.1 * step + 0.01 * s) for m in METHODS[::-1] for s in (1, 2) for step in (0, 2, 1)]


def test_table_rows_and_curves(tmp_path):
    lines = table_markdown(rows()).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["start", *(method.name for method in METHODS)]
    assert lines[2].split("|")[2:4] == [" 2 ", " 0.015 ± 0.007 "]
    # after the last step
    assert lines[3].split("|")[2:4] == [" 2 ", " 0.215 ± 0.007 "]
    falling = [Row(METHODS[0], 1, step, Masses(*[value] * 8)) for step, value in ((0, 0.2), (1, 0.7), (2, 0.1))]
    last, most = table_markdown(falling).splitlines()[3].split("|")[-3:-1]
    assert (last.strip(), most.strip()) == ("0.100", "0.700")
    assert rows_csv(rows()).splitlines()[0].startswith("method,seed,step,reward,right,outside")
    assert len(rows_csv(rows()).splitlines()) == 1 + len(rows())
    draw_curves(rows(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_without_its_start_is_refused(task, tmp_path):
    (tmp_path / "checkpoints" / "step-000005").mkdir(parents=True)
    with pytest.raises(RunError, match="the checkpoint of step 0 is gone"):
        score_run(tmp_path, METHODS[0], 1, read_space(task))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_trained_cell_is_scored_from_its_checkpoints(task, tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "data").symlink_to(task)
    recipe = placed_recipes(RECIPES, METHODS, tmp_path) / "dpo.yaml"
    stages = f"[{{data: {task}/warm.jsonl, steps: 4, batch_sequences: 16, learning_rate: 3.0e-3}}]"
    run = tmp_path / "run"
    changes = [f"run.directory={run}", "run.steps=1", "monitoring.tensorboard=false", f"supervised.stages={stages}"]
    result = run_command("train", str(recipe), *changes, time_limit_s=400)
    assert result.returncode == 0, result.stdout + result.stderr
    space = read_space(task)
    start, after = score_run(run, METHODS[0], 1, space)
    assert (start.step, after.step) == (0, 1) and start.masses.kl == 0 < after.masses.kl
    # a step of DPO puts the pairs further apart
    before, now = (row.masses.chosen - row.masses.rejected for row in (start, after))
    assert now > before
    # the start is what the run kept as its reference
    reference = AutoModelForCausalLM.from_pretrained(run / "reference", dtype=torch.float64, local_files_only=True)
    kept = response_logprobs(reference.eval(), space.prompt_tokens, end=space.end, most_tokens=MOST_TOKENS)
    assert (kept.exp().sum(1) - 1).abs().max() < 1e-12
    assert masses(kept, kept, **space.sets) == start.masses
