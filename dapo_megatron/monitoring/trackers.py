"""Where metrics go: metrics.jsonl always; TensorBoard, Weights & Biases and MLflow when the recipe asks for them.

A tracker never stops training: one that fails is closed with a single warning line, and one that talks to a
server does so in a thread of its own, with a bounded queue and a time limit at the end.
"""

import importlib.util
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dapo_megatron.errors import RequestError
from dapo_megatron.files import write_text_atomically
from dapo_megatron.monitoring.metrics import MetricsFile, read_metrics

QUEUE_STEPS = 1024  # steps that may wait for a slow server before the tracker is given up
CLOSE_LIMIT_S = 30.0
START_LIMIT_S = 60
MLFLOW_PARAMETER_LENGTH = 250  # characters; every server version takes this many

Warn = Callable[[str], None]


class Tracker(Protocol):
    """One destination of metrics."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of a rollout step, or, when they carry the key supervised_step, of a supervised step."""

    def close(self) -> None:
        """Flush and end; a second call does nothing."""


def check_trackers(*, tensorboard: bool, wandb: bool, mlflow: bool) -> None:
    """Raise one RequestError naming every tracker that is asked for and not installed. Imports none of them."""
    wanted = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}
    missing = [name for name, on in wanted.items() if on and not _is_installed(name)]
    if missing:
        raise RequestError(
            "\n".join(
                f"monitoring.{name}=true but {name} is not installed; pip install {name}, or set it to false"
                for name in missing
            )
        )


def open_trackers(
    run_directory: Path,
    *,
    tensorboard: bool,
    wandb: bool,
    mlflow: bool,
    project: str,
    name: str,
    config: dict[str, Any],
    warn: Warn | None = None,
) -> list[Tracker]:
    """Open the JSON-lines tracker and those asked for; W&B and MLflow continue the run they hold for `run_directory`.

    `config` (nested) is recorded by all but JSON lines. `warn` gets one line for a tracker that does not open or fails
    later; by default it goes to standard error. When resuming, truncate metrics.jsonl first: TensorBoard then hides the
    steps that are run again. Raises RequestError as `check_trackers` does.
    """
    check_trackers(tensorboard=tensorboard, wandb=wandb, mlflow=mlflow)
    run_directory = Path(run_directory)
    warn = warn or _warn_on_stderr
    trackers: list[Tracker] = [_Guarded("metrics.jsonl", _JsonLines(run_directory), warn)]
    openers: dict[str, Callable[[], Tracker]] = {}
    if tensorboard:
        openers["tensorboard"] = lambda: _TensorBoard(run_directory, config)
    if wandb:
        openers["wandb"] = lambda: _Background(_Wandb(run_directory, project, name, config))
    if mlflow:
        openers["mlflow"] = lambda: _Background(_Mlflow(run_directory, project, name, config))
    for label, opener in openers.items():
        try:
            trackers.append(_Guarded(label, opener(), warn))
        except Exception as error:  # whatever a third party raises must not stop the run
            warn(f"{label} did not start and is left out: {_one_line(error)}")
    return trackers


class _JsonLines:
    """metrics.jsonl, and supervised.jsonl beside it for the lines that carry supervised_step."""

    def __init__(self, run_directory: Path) -> None:
        self._metrics = MetricsFile(run_directory / "metrics.jsonl")
        self._supervised_path = run_directory / "supervised.jsonl"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        rest = {key: value for key, value in metrics.items() if key != "step"}
        if "supervised_step" in rest:
            MetricsFile(self._supervised_path).append(rest)
        else:
            self._metrics.append({"step": step, **rest})

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, run_directory: Path, config: dict[str, Any]) -> None:
        self._folder = run_directory / "tensorboard"
        steps = [record["step"] for record in read_metrics(run_directory / "metrics.jsonl") if "step" in record]
        self._steps = self._writer(self._folder, purge_step=max(steps) + 1 if steps else None)
        self._supervised: Any = None
        self._steps.add_text("config", "\n".join(f"    {key}: {value}" for key, value in _flat(config).items()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        writer = self._steps
        if "supervised_step" in metrics:
            # a folder of its own: resuming purges by step number, and these count differently
            if self._supervised is None:  # what an earlier process wrote from here on is done again
                self._supervised = self._writer(self._folder / "supervised", purge_step=_axis(metrics, step)[1])
            writer = self._supervised
        step = _axis(metrics, step)[1]
        for key, value in _numbers(metrics).items():
            writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._steps.close()
        if self._supervised is not None:
            self._supervised.close()

    @staticmethod
    def _writer(folder: Path, purge_step: int | None = None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=str(folder), purge_step=purge_step, flush_secs=10)


class _Wandb:
    def __init__(self, run_directory: Path, project: str, name: str, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            name=name,
            dir=str(run_directory),
            config=config,
            id=_remembered(run_directory, "wandb"),
            resume="allow",
            # its capture of stdout would garble the live console
            settings=wandb.Settings(console="off", init_timeout=START_LIMIT_S, login_timeout=START_LIMIT_S),
        )
        _remember(run_directory, "wandb", self._run.id)
        # own step axes: W&B's counter only rises, while a resumed run steps back and supervised steps count apart
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("supervised_step")
        self._run.define_metric("supervised/*", step_metric="supervised_step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        axis, step = _axis(metrics, step)
        self._run.log({axis: step, **_prefixed(metrics)})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run_directory: Path, project: str, name: str, config: dict[str, Any]) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = mlflow.MlflowClient()
        self._run_id = _remembered(run_directory, "mlflow")
        if self._run_id is None:
            experiment = self._client.get_experiment_by_name(project)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
            self._run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
            _remember(run_directory, "mlflow", self._run_id)
            parameters = [Param(key, str(value)[:MLFLOW_PARAMETER_LENGTH]) for key, value in _flat(config).items()]
            for start in range(0, len(parameters), 100):  # the most a request may carry
                self._client.log_batch(self._run_id, params=parameters[start : start + 100])
        else:
            self._client.update_run(self._run_id, status="RUNNING")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        step = _axis(metrics, step)[1]
        points = [self._metric(key, value, now_ms, step) for key, value in _prefixed(metrics).items()]
        self._client.log_batch(self._run_id, metrics=points)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class _Background:
    """Runs a tracker's calls in a thread, so that a server that does not answer never delays a step."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._waiting: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(QUEUE_STEPS)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._waiting.put_nowait((dict(metrics), step))
        except queue.Full:
            raise TimeoutError(f"{QUEUE_STEPS} steps wait to be sent") from None

    def close(self) -> None:
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return  # already given up: the thread dies with the process
        self._thread.join(CLOSE_LIMIT_S)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise TimeoutError(f"it did not end within {CLOSE_LIMIT_S:g} s")

    def _work(self) -> None:
        try:
            while (item := self._waiting.get()) is not None:
                self._tracker.log(*item)
            self._tracker.close()
        except Exception as error:  # handed to the next call of log or close
            self._error = error
            _close_quietly(self._tracker)


class _Guarded:
    """Lets no failure of a tracker out: the first one closes it and gives one warning line."""

    def __init__(self, label: str, tracker: Tracker, warn: Warn) -> None:
        self._label = label
        self._tracker: Tracker | None = tracker
        self._warn = warn

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.log(metrics, step)
        except Exception as error:
            failed, self._tracker = self._tracker, None
            self._warn(f"{self._label} failed at step {step} and is closed; training goes on: {_one_line(error)}")
            _close_quietly(failed)

    def close(self) -> None:
        closing, self._tracker = self._tracker, None
        if closing is None:
            return
        try:
            closing.close()
        except Exception as error:
            self._warn(f"{self._label} did not close cleanly: {_one_line(error)}")


def _close_quietly(tracker: Tracker) -> None:
    try:
        tracker.close()
    except Exception:
        return  # its failure has been told already


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # a bare folder of that name (W&B leaves a ./wandb) is found as a namespace package, which has no origin
    return spec is not None and spec.origin is not None


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in metrics.items()
        if key not in ("step", "supervised_step") and (isinstance(value, int | float) or hasattr(value, "item"))
    }


def _axis(metrics: Mapping[str, Any], step: int) -> tuple[str, int]:
    if "supervised_step" in metrics:
        return "supervised_step", int(metrics["supervised_step"])
    return "step", step


def _prefixed(metrics: Mapping[str, Any]) -> dict[str, float]:
    prefix = "supervised/" if "supervised_step" in metrics else ""
    return {prefix + key: value for key, value in _numbers(metrics).items()}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _remembered(run_directory: Path, tracker: str) -> str | None:
    path = run_directory / f"{tracker}_run.json"
    if not path.exists():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["id"])


def _remember(run_directory: Path, tracker: str, identifier: str) -> None:
    write_text_atomically(run_directory / f"{tracker}_run.json", json.dumps({"id": identifier}) + "\n")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


def _warn_on_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
