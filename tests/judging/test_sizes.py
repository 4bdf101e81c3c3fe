"""Students by training size: nested balanced cases, known truths, cells that train a recipe, table and picture."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from dapo_megatron.config import load_recipe
from dapo_megatron.data.prompts import Prompt
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.judging.agreement import expected_calibration_error
from dapo_megatron.judging.known_cases import known_cases
from dapo_megatron.judging.sizes import HEADINGS, Student, nested, students
from dapo_megatron.rewards.judge_prompt import Case
from dapo_megatron.rewards.judge_records import Judged, read_judged, write_judged
from tests.rewards.judges import write_judge
from tools import judge_sizes
from tools.judge_cases import cases as write_cases

STAGE = "{data: d.jsonl, steps: 2, batch_sequences: 4, learning_rate: 1.0e-3}"


def judged(count: int) -> list[Judged]:
    return [Judged(Case(f"q{i}", f"a{i}", "r"), 0.8 if i % 3 else 0.1) for i in range(count)]


def test_a_larger_set_holds_the_smaller_ones_and_all_are_balanced():
    found = nested(judged(60), [4, 16, 40], seed=3)
    assert {size: len(rows) for size, rows in found.items()} == {4: 4, 16: 16, 40: 40}
    for small, large in ((4, 16), (16, 40)):
        assert {row.case for row in found[small]} < {row.case for row in found[large]}
    for size, rows in found.items():
        assert sum(row.verdict == "YES" for row in rows) == size // 2 and len({row.case for row in rows}) == size
    assert found == nested(judged(60), [4, 16, 40], seed=3) != nested(judged(60), [4, 16, 40], seed=4)


@pytest.mark.parametrize(
    ("targets", "sizes", "message"),
    [
        (["hard"], [7], "half of the cases are YES; use 8"),
        (["hard"], [0], "use 2"),
        (["both"], [4], "--targets both must be hard or soft"),
        (["hard"], [44], r"--sizes 44 exceeds the 40 cases that are left of 60 .* use 40 or less"),
    ],
)
def test_wrong_cells_are_refused(targets: list[str], sizes: list[int], message: str):
    with pytest.raises(RequestError, match=message):
        nested(judged(60), [cell.size for cell in students(targets, sizes)], seed=0)


def test_known_cases_have_a_calibrated_teacher():
    prompts = [Prompt(i, f"question {i}", f"reference {i % 50}") for i in range(1500)]
    prompts.append(Prompt(1500, "long", "word " * 40))
    found = known_cases(prompts, seed=1, sharpness=2.0)
    assert len(found) == 3000 and sum(known.right for known in found) == 1500
    for known in found:
        case = known.judged.case
        assert known.right == (f"{case.reference}|" in f"{case.answer} I think|".replace(" I think", "")), case
    p_B, right_B = (np.array([read(k) for k in found]) for read in (lambda k: k.judged.p_yes, lambda k: k.right))
    assert expected_calibration_error(p_B, right_B) < 0.03
    phi = 0.5 * (1 + math.erf(1.0 / math.sqrt(2)))  # Φ(d / 2)
    assert ((p_B > 0.5) == right_B).mean() == pytest.approx(phi, abs=0.03)
    with pytest.raises(RequestError, match=r"2 of 2 questions .* not two different ones"):
        known_cases([Prompt(0, "a", "x"), Prompt(1, "b", " x ")], seed=0)


class FakeTrain:
    """Training that leaves a judge of random weights. `calls`: arguments; `code`: what it ends with."""

    def __init__(self, judge: Path) -> None:
        self.judge, self.calls, self.code = judge, [], 0

    def __call__(self, arguments: list[str], log: Path, *, limit_s: float) -> int:
        self.calls.append(arguments)
        folder = Path(next(word for word in arguments if word.startswith("run.directory=")).partition("=")[2])
        if not self.code:
            shutil.copytree(self.judge, folder / "hf", dirs_exist_ok=True)
        return self.code


def test_cells_are_trained_kept_and_held_to_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"What is {i} + 1?", "answer": f"the {i + 1}"} for i in range(40)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_cases(questions, tmp_path / "cases", held_out_share=0.25)
    collected, held = tmp_path / "cases" / "collected.parquet", tmp_path / "cases" / "held-out.jsonl"
    assert len(read_judged(collected)) == 60

    fake = FakeTrain(write_judge(tmp_path / "judge", num_hidden_layers=1))
    monkeypatch.setattr(judge_sizes, "run_train", fake)
    out, template = tmp_path / "out", ["data.chat_template=true"]
    given = {"cases": held, "output": out, "truth_column": "right", "override": template}
    judge_sizes.sizes([collected], sizes=[4, 16], targets=["hard", "soft"], **given)
    assert len(fake.calls) == 4
    for call, cell in zip(fake.calls, students(["hard", "soft"], [4, 16]), strict=True):
        recipe = load_recipe(call[0], [word for word in call[1:] if word != "--overwrite"])
        (stage,) = recipe.supervised.stages
        assert (stage.data, stage.weight_column) == (str(out / cell.name / "train.jsonl"), "weight")
        assert stage.steps == 100 and recipe.run.directory == str(out / cell.name / "run")
        lines = [json.loads(line) for line in Path(stage.data).read_text().splitlines()]
        assert len({line["prompt"] for line in lines}) == cell.size and len(lines) <= 2 * cell.size
        assert all(line["weight"] == 1 for line in lines) == (cell.targets == "hard")
    report = json.loads((out / "sizes.json").read_text())
    assert set(report["judges"]) == {"teacher", "hard-4", "soft-4", "hard-16", "soft-16"} and report["cases"] == 20
    assert report["hostile"]["soft-16"]["cases"] == 84 and report["judges"]["teacher"]["quality"]["accuracy"] < 1
    table = [line.strip("| \n").split(" | ") for line in (out / "sizes.md").read_text().splitlines()]
    assert table[0] == list(HEADINGS) and [row[0] for row in table[2:]] == ["rule", "teacher", *["hard", "soft"] * 2]
    assert table[4][2] == f"{report['judges']['hard-4']['quality']['accuracy']:.3f}"
    assert (out / "sizes.png").read_bytes()[:4] == b"\x89PNG" and table[5][0] in capsys.readouterr().out

    # finished cells are kept, those of other settings are not
    judge_sizes.sizes([collected], sizes=[4], targets=["hard"], **given)
    assert len(fake.calls) == 4
    fake.code = 3
    with pytest.raises(RunError, match=r"training hard-4 ended with code 3; log: .*train\.log"):
        judge_sizes.sizes([collected], sizes=[4], targets=["hard"], **(given | {"override": [*template, "run.seed=1"]}))
    assert len(fake.calls) == 5 and not (out / "hard-4" / "done.json").exists()
    write_judged(tmp_path / "again.parquet", read_judged(collected)[:8])
    with pytest.raises(RequestError, match=r"8 of the cases in --cases .* are learned from; hold others out"):
        judge_sizes.sizes([collected], sizes=[4], targets=["hard"], cases=tmp_path / "again.parquet", output=out)


def test_a_students_recipe_has_one_stage(tmp_path: Path):
    (tmp_path / "two.yaml").write_text(
        f"run: {{directory: d, steps: 0}}\nmodel: {{path: m}}\nsupervised: {{stages: [{STAGE}, {STAGE}]}}\n"
    )
    with pytest.raises(RequestError, match="has 2 supervised stages"):
        judge_sizes.train_settings(tmp_path / "two.yaml", tmp_path, tmp_path / "t.jsonl", [])
    assert Student("soft", 8).name == "soft-8"
