"""The ladder's recipes, and its tool on cells made here: what is run, what is kept, what is told."""

import csv
import io
import json
import re
import statistics
from pathlib import Path

import pytest

from dapo_megatron.config import dump_recipe, load_recipe
from dapo_megatron.errors import RequestError
from tools.ladder import RECIPES, RUNGS, START_OF_RUNGS, run_ladder, run_train
from tools.ladder_table import Cell, curve, draw_curves, effective_batch, rows_csv, table_markdown

# what each rung changes: setting, before, after
CHANGES = [
    {"algorithm.overlong_filtering": (False, True)},
    {"algorithm.eps_high": (0.2, 0.28)},
    {"reward.overlong.max_length": (None, 40), "reward.overlong.cache_length": (0, 8)},
    {"algorithm.loss_aggregation": ("sequence-mean", "token-mean")},
    {"algorithm.dynamic_sampling.enabled": (False, True)},
]


def flat(settings: dict, above: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in settings.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found


def rung_settings(name: str) -> dict[str, object]:
    settings = flat(load_recipe(RECIPES / f"{name}.yaml").model_dump())
    assert settings.pop("run.name") == name
    assert settings.pop("run.directory") == f"runs/ladder/{name}"
    return settings


def test_every_rung_changes_what_it_names_and_nothing_else():
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == [*(rung.recipe for rung in RUNGS), "base"]
    rungs = [rung_settings(rung.recipe) for rung in RUNGS]
    for before, after, change in zip(rungs[:-1], rungs[1:], CHANGES, strict=True):
        assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == change
    assert rungs[0]["algorithm.eps_low"] == rungs[0]["algorithm.eps_high"] == 0.2
    assert rungs[-1]["algorithm.eps_low"] == 0.2


class FakeTrain:
    """Stands in for `train`: leaves a run directory as a run does, and remembers what it was asked."""

    def __init__(self, fail: str = "") -> None:
        self.calls: list[str] = []
        self.fail = fail

    def __call__(self, arguments: list[str], log: Path) -> int:
        recipe = load_recipe(arguments[0], [a for a in arguments[1:] if not a.startswith("--")])
        run = Path(recipe.run.directory)
        self.calls.append(f"{run.parent.name}/{run.name} {arguments[-1]}")
        if self.fail and self.fail in self.calls[-1]:
            log.write_text("step 3/4\nmismatch alarm\n")
            return 1
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(dump_recipe(recipe))
        if run.name == "warm":
            manifest = run / START_OF_RUNGS
            manifest.parent.mkdir(parents=True)
            manifest.write_text("{}")
        write_metrics(run, recipe.run.seed, RUNGS_BY_NAME.get(run.name, 0), recipe.run.steps)
        return 0


RUNGS_BY_NAME = {rung.recipe: place for place, rung in enumerate(RUNGS)}
SETTINGS = ["run.steps=4", "rollout.prompts_per_step=8", "algorithm.mini_batch_prompts=4"]


def write_metrics(run: Path, seed: int, place: int, steps: int) -> None:
    accuracy = {"validation/accuracy": 0.25, "validation/accuracy_greedy": 0.5, "time/validation": 30.0}
    lines = [{"step": 0, **accuracy}]
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "groups/trained": 6.0 if place == 5 else 8.0,
            "groups/all_right": 0.125,
            "groups/all_wrong": 0.25,
            "entropy/mean": 0.1 * step,
            "response_length/mean": 20.0 + seed,
            "truncated_fraction": 0.5,
            "clip_fraction/low": 0.01,
            "clip_fraction/high": 0.02,
            "tokens/generated": 1000.0,
            "tokens/trained": 500.0,
            "time/step": 15.0,
        }
        if step % 2 == 0:
            line |= accuracy | {"validation/accuracy": 0.3 + 0.05 * place + 0.01 * seed * seed}
        lines.append(line)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    found, failures = run_ladder(tmp_path_factory.mktemp("ladder"), [0, 1, 2], SETTINGS, FakeTrain(), jobs=2)
    assert failures == [] and len(found) == 18
    return found


def test_one_warm_start_a_seed_then_all_its_rungs_once(tmp_path):
    train = FakeTrain()
    run_ladder(tmp_path, [3, 4], SETTINGS, train, jobs=1)
    for seed in (3, 4):
        assert train.calls.count(f"seed{seed}/warm --overwrite") == 1
        assert [call for call in train.calls if call.startswith(f"seed{seed}/") and "warm" not in call] == [
            f"seed{seed}/{rung.recipe} --resume" for rung in RUNGS
        ]
        # every rung began as the warm start
        assert all((tmp_path / f"seed{seed}" / rung.recipe / START_OF_RUNGS).is_file() for rung in RUNGS)
    again = FakeTrain()
    kept, _ = run_ladder(tmp_path, [3, 4], SETTINGS, again, jobs=1)
    assert again.calls == [] and len(kept) == 12


def test_a_cell_that_was_killed_goes_on_where_it_was(tmp_path):
    run_ladder(tmp_path, [0], SETTINGS, FakeTrain(), jobs=1)
    (tmp_path / "seed0" / "3-clip-higher.yaml").unlink()
    begun = tmp_path / "seed0" / "3-clip-higher" / "checkpoints" / "step-000002"
    begun.mkdir()
    train = FakeTrain()
    run_ladder(tmp_path, [0], SETTINGS, train, jobs=1)
    assert train.calls == ["seed0/3-clip-higher --resume"]
    assert begun.is_dir()


def test_a_cell_that_fails_is_told_and_the_others_go_on(tmp_path):
    cells, failures = run_ladder(tmp_path, [0, 1], SETTINGS, FakeTrain(fail="seed1/2-overlong"), jobs=2)
    assert len(cells) == 11 and len(failures) == 1
    assert failures[0].startswith("seed 1, + overlong filtering: exit code 1") and "mismatch alarm" in failures[0]
    assert "| + overlong filtering | 1 |" in table_markdown(cells)
    train = FakeTrain()
    assert len(run_ladder(tmp_path, [0, 1], SETTINGS, train, jobs=2)[0]) == 12
    assert train.calls == ["seed1/2-overlong-filtering --resume"]


def test_two_commands_do_not_share_a_cell(tmp_path):
    inner: list[str] = []

    def train(arguments: list[str], log: Path) -> int:
        if "6-dapo" in arguments[0]:
            inner.extend(run_ladder(tmp_path, [0], SETTINGS, FakeTrain(), jobs=1)[1])
        return FakeTrain()(arguments, log)

    cells, failures = run_ladder(tmp_path, [0], SETTINGS, train, jobs=1)
    assert len(cells) == 6 and failures == []
    assert len(inner) == 1 and "6-dapo: another command is at work on it" in inner[0]


def test_cells_of_other_settings_are_not_mixed_in(tmp_path):
    run_ladder(tmp_path, [0], SETTINGS, FakeTrain(), jobs=1)
    train = FakeTrain()
    cells, failures = run_ladder(tmp_path, [0], [*SETTINGS, "optimizer.learning_rate=0.5"], train, jobs=1)
    assert cells == [] and train.calls == [] and len(failures) == 6
    assert all("is of other settings" in failure for failure in failures)


def test_a_run_past_its_limit_is_ended(tmp_path):
    recipe = RECIPES / "1-naive-grpo.yaml"
    assert run_train([str(recipe), f"run.directory={tmp_path / 'run'}"], tmp_path / "run.log", limit_s=0.1) == 124
    assert run_train([str(recipe), "run.steps=-1"], tmp_path / "wrong.log", limit_s=300) == RequestError.exit_code
    assert "run.steps" in (tmp_path / "wrong.log").read_text()


def test_effective_batch_counts_mixed_groups():
    line = {"groups/trained": 6.0, "groups/all_right": 0.25, "groups/all_wrong": 0.5}
    assert effective_batch(line, 8, 4, replaced=False) == 6 * 0.25 / 8
    assert effective_batch(line, 8, 4, replaced=True) == 6 / 8
    assert effective_batch(line, 8, 1, replaced=False) is None  # one response is no group
    assert effective_batch({}, 8, 4, replaced=True) is None
    assert effective_batch({"groups/trained": 6.0}, 8, 4, replaced=False) is None  # pairs of a file are no drawn groups


def test_table_of_means_and_deviations(cells):
    rows = {
        line.split("|")[1].strip(): [entry.strip() for entry in line.split("|")[2:-1]]
        for line in table_markdown(cells).splitlines()
        if line.startswith("|")
    }
    assert rows["warm start"][:3] == ["3", "0.250 ± 0.000", "0.500 ± 0.000"]
    deviation = statistics.stdev([0.0, 0.01, 0.04])
    naive, dapo = rows["naive GRPO"], rows["+ dynamic sampling = DAPO"]
    assert naive[1] == f"{0.3 + 0.05 / 3:.3f} ± {deviation:.3f}"
    assert naive[2:] == [
        "0.500 ± 0.000",
        "0.250 ± 0.000",
        "21.0 ± 1.0",
        "0.500 ± 0.000",
        "0.62 ± 0.00",
        "4 ± 0",
        "2 ± 0",
        "2.5 ± 0.0",
    ]
    assert dapo[1] == f"{0.55 + 0.05 / 3:.3f} ± {deviation:.3f}" and dapo[6] == "0.75 ± 0.00"
    assert rows["accuracy, sampled"] == ["+0.250 · +0.250 · +0.250", "+0.250 ± 0.000"]
    assert rows["effective batch"][1] == "+0.12 ± 0.00"


def test_rows_hold_means_since_the_validation_before(cells):
    rows = list(csv.DictReader(io.StringIO(rows_csv(cells))))
    assert len(rows) == 18 * 3
    one = [row for row in rows if row["rung"] == "1-naive-grpo" and row["seed"] == "2"]
    assert [row["step"] for row in one] == ["0", "2", "4"]
    assert [row["accuracy"] for row in one] == ["0.2500", "0.3400", "0.3400"]
    assert [row["entropy"] for row in one] == ["", "0.1500", "0.3500"]
    assert [row["tokens_generated"] for row in one] == ["0", "2000", "4000"]


def test_curves_are_drawn(cells, tmp_path):
    assert curve(cells[0], "validation/accuracy") == {0: 0.25, 2: 0.3, 4: 0.3}
    assert curve(cells[0], "entropy/mean") == pytest.approx({1: 0.1, 2: 0.15, 3: 0.2, 4: 0.25})
    assert curve(cells[0], "tokens/trained") == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    draw_curves(cells, tmp_path / "ladder.png")
    content = (tmp_path / "ladder.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 300_000
    assert re.fullmatch(r"ladder\.png", *[path.name for path in tmp_path.iterdir()])
