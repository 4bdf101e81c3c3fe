import threading
import types

import pytest

from dapo_megatron.errors import RequestError
from dapo_megatron.monitoring import check_trackers, open_trackers, read_metrics, trackers

OFF = {"tensorboard": False, "wandb": False, "mlflow": False}


def opened(folder, warnings, **on):
    settings = {"project": "p", "name": "n", "config": {"a": {"b": 1, "c": [1, 2]}, "d": None}, "warn": warnings.append}
    return open_trackers(folder, **{**OFF, **on}, **settings)


def close(all_trackers):
    for tracker in all_trackers:
        tracker.close()


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda name: True)


def test_json_lines_are_always_written_and_supervised_ones_apart(tmp_path):
    warnings = []
    found = opened(tmp_path, warnings)
    (tracker,) = found
    tracker.log({"supervised_step": 1, "loss/supervised": 2.0}, 1)
    tracker.log({"step": 1, "reward/mean": 0.5, "grad_norm": float("nan")}, 1)
    tracker.log({"reward/mean": 0.75}, 2)
    close(found)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/mean": 0.5, "grad_norm": None},
        {"step": 2, "reward/mean": 0.75},
    ]
    assert read_metrics(tmp_path / "supervised.jsonl") == [{"supervised_step": 1, "loss/supervised": 2.0}]
    assert warnings == []


def test_missing_packages_are_refused_together_before_anything_opens(tmp_path, nothing_installed):
    with pytest.raises(RequestError) as refusal:
        opened(tmp_path / "run", [], wandb=True, mlflow=True)
    assert str(refusal.value).splitlines() == [
        "monitoring.wandb=true but wandb is not installed; pip install wandb, or set it to false",
        "monitoring.mlflow=true but mlflow is not installed; pip install mlflow, or set it to false",
    ]
    assert not (tmp_path / "run").exists()


def test_what_is_switched_off_need_not_be_installed(nothing_installed):
    check_trackers(**OFF)


def test_a_folder_named_like_the_package_is_not_the_package(tmp_path, monkeypatch):
    package = "dapo_megatron_absent_package"
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._is_installed(package)
    (tmp_path / package).mkdir()
    assert not trackers._is_installed(package)
    (tmp_path / package / "__init__.py").touch()
    trackers.importlib.invalidate_caches()
    assert trackers._is_installed(package)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_numbers_and_a_resumed_run_replaces_its_later_steps(tmp_path):
    from dapo_megatron.monitoring import truncate_after

    warnings = []
    first = opened(tmp_path, warnings, tensorboard=True)
    for tracker in first:
        tracker.log({"supervised_step": 8, "loss": 3.0}, 8)
        tracker.log({"supervised_step": 9, "loss": 2.0}, 9)
        for step in (1, 2, 3):
            tracker.log({"step": step, "reward/mean": float(step), "grad_norm": None, "note": "text"}, step)
    close(first)
    truncate_after(tmp_path / "metrics.jsonl", 1)
    second = opened(tmp_path, warnings, tensorboard=True)
    for tracker in second:
        tracker.log({"supervised_step": 9, "loss": 1.5}, 9)
        tracker.log({"step": 2, "reward/mean": 20.0}, 2)
    close(second)
    assert warnings == []
    assert scalars(tmp_path / "tensorboard") == {"reward/mean": [(1, 1.0), (2, 20.0)]}
    assert scalars(tmp_path / "tensorboard" / "supervised") == {"loss": [(8, 3.0), (9, 1.5)]}


class FakeRun:
    def __init__(self, identifier):
        self.id, self.logged, self.axes, self.finished = identifier, [], {}, 0

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch, all_installed):
    """A stand-in with the calls of W&B that are used; `runs` are those it handed out."""
    module = types.ModuleType("wandb")
    module.runs, module.asked = [], []
    module.Settings = lambda **settings: settings

    def init(**settings):
        module.asked.append(settings)
        module.runs.append(FakeRun(settings["id"] or f"new-{len(module.runs)}"))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(trackers.sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_step_on_its_own_axis_and_the_run_continues(tmp_path, wandb):
    warnings = []
    for _ in range(2):
        found = opened(tmp_path, warnings, wandb=True)
        for tracker in found:
            tracker.log({"supervised_step": 4, "loss": 2.0}, 4)
            tracker.log({"step": 1, "reward/mean": 0.5, "grad_norm": None}, 1)
        close(found)
    assert warnings == []
    run = wandb.runs[0]
    assert run.logged == [{"supervised_step": 4, "supervised/loss": 2.0}, {"step": 1, "reward/mean": 0.5}]
    assert run.axes["*"] == "step" and run.axes["supervised/*"] == "supervised_step"
    assert run.finished == 1
    assert [asked["id"] for asked in wandb.asked] == [None, "new-0"]
    assert wandb.asked[0]["project"] == "p" and wandb.asked[0]["config"]["a"] == {"b": 1, "c": [1, 2]}


def test_a_tracker_that_does_not_open_is_left_out_with_one_line(tmp_path, wandb):
    def refuse(**settings):
        raise OSError("no\nnetwork")

    wandb.init = refuse
    warnings = []
    found = opened(tmp_path, warnings, wandb=True)
    assert len(found) == 1
    assert warnings == ["wandb did not start and is left out: no network"]


def test_a_tracker_that_fails_is_closed_with_one_line_and_the_others_go_on(tmp_path, wandb):
    warnings = []
    found = opened(tmp_path, warnings, wandb=True)
    failed = threading.Event()

    def fail(values):
        failed.set()
        raise RuntimeError("server said 500\nand more")

    wandb.runs[0].log = fail
    for tracker in found:
        tracker.log({"step": 1}, 1)
    assert failed.wait(10)
    found[1]._tracker._thread.join(10)
    for step in (2, 3, 4):
        for tracker in found:
            tracker.log({"step": step}, step)
    close(found)
    assert warnings == ["wandb failed at step 2 and is closed; training goes on: server said 500 and more"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert wandb.runs[0].finished == 1


def test_a_failure_after_the_last_step_is_told_when_closing(tmp_path, wandb):
    warnings = []
    found = opened(tmp_path, warnings, wandb=True)

    def fail():
        raise RuntimeError("upload broke")

    wandb.runs[0].finish = fail
    close(found)
    close(found)
    assert warnings == ["wandb did not close cleanly: upload broke"]


def test_a_server_that_hangs_neither_delays_a_step_nor_the_end(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_LIMIT_S", 0.05)
    monkeypatch.setattr(trackers, "QUEUE_STEPS", 3)
    warnings = []
    found = opened(tmp_path, warnings, wandb=True)
    go_on = threading.Event()
    wandb.runs[0].log = lambda values: go_on.wait(60)
    try:
        for step in range(1, 9):
            for tracker in found:
                tracker.log({"step": step}, step)
        close(found)
    finally:
        go_on.set()
    (warning,) = warnings
    assert "wait to be sent" in warning and "training goes on" in warning
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8


def test_a_server_that_hangs_at_the_end_is_left_behind(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_LIMIT_S", 0.05)
    warnings = []
    found = opened(tmp_path, warnings, wandb=True)
    go_on = threading.Event()
    wandb.runs[0].finish = lambda: go_on.wait(60)
    try:
        close(found)
    finally:
        go_on.set()
    assert warnings == ["wandb did not close cleanly: it did not end within 0.05 s"]


class FakeMlflowClient:
    calls: list = []  # noqa: RUF012

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"experiment of {name}"

    def create_run(self, experiment_id, run_name):
        self.calls.append(("create", experiment_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-1"))

    def update_run(self, run_id, status):
        self.calls.append(("update", run_id, status))

    def log_batch(self, run_id, metrics=(), params=()):
        self.calls += [("metric", *metric) for metric in metrics] + [("param", *param) for param in params]

    def set_terminated(self, run_id):
        self.calls.append(("end", run_id))


def test_mlflow_gets_parameters_once_and_metrics_by_step(tmp_path, monkeypatch, all_installed):
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    client = FakeMlflowClient()
    client.calls = []
    module.MlflowClient = lambda: client
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    entities.Param = lambda key, value: (key, value)
    monkeypatch.setitem(trackers.sys.modules, "mlflow", module)
    monkeypatch.setitem(trackers.sys.modules, "mlflow.entities", entities)
    warnings = []
    for _ in range(2):
        found = opened(tmp_path, warnings, mlflow=True)
        for tracker in found:
            tracker.log({"supervised_step": 4, "loss": 2.0}, 4)
            tracker.log({"step": 1, "reward/mean": 0.5}, 1)
        close(found)
    assert warnings == []
    logged = [("metric", "supervised/loss", 2.0, 4), ("metric", "reward/mean", 0.5, 1), ("end", "run-1")]
    assert client.calls == [
        ("create", "experiment of p", "n"),
        ("param", "a.b", "1"),
        ("param", "a.c", "[1, 2]"),
        ("param", "d", "None"),
        *logged,
        ("update", "run-1", "RUNNING"),
        *logged,
    ]


def test_a_metrics_file_that_cannot_be_written_does_not_stop_training(tmp_path):
    warnings = []
    found = opened(tmp_path, warnings)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()  # appending fails now
    for step in (1, 2):
        found[0].log({"step": step}, step)
    close(found)
    (warning,) = warnings
    assert warning.startswith("metrics.jsonl failed at step 1 and is closed; training goes on:")
