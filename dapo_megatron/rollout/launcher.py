"""vLLM servers as child processes: started, watched, stopped; they die with the process that started them."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dapo_megatron.config import Recipe
from dapo_megatron.errors import RunError
from dapo_megatron.launch import die_with_parent, free_port
from dapo_megatron.rollout.vllm_plugin import BACKEND, ENGINE_MARK
from dapo_megatron.rollout.vllm_secret import HEADER, VARIABLE

STOP_S = 10.0  # between SIGTERM and SIGKILL
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
CPU_BATCHED_TOKENS = 4096  # prompt tokens a CPU engine takes in at once
TAIL_BYTES = 4000  # of the log, shown when an engine fails
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy between learner and engines
WORLD_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_PLUGINS")


@dataclass(frozen=True)
class EngineSettings:
    """How to start one engine.

    model: a Hugging Face folder; only config.json is read and weights come over the bridge, unless `load_weights`.
    dtype: "float32", "bfloat16" or "float16". max_model_len: prompt and response (tokens). max_sequences: at once.
    devices: CUDA devices as CUDA_VISIBLE_DEVICES names them, the first `tensor` are the engine's; None on a CPU.
    memory_share: of each GPU; kv_cache_gib and threads (of a worker): on a CPU.
    sleep: whether the engine can give its GPU memory away between rollouts.
    """

    model: Path
    dtype: str
    tensor: int
    max_model_len: int
    max_sequences: int
    devices: tuple[str, ...] | None = None
    memory_share: float = 0.85
    kv_cache_gib: int = 1
    sleep: bool = False
    threads: int = 1
    load_weights: bool = False


def engine_settings(recipe: Recipe, model: Path, devices: tuple[str, ...] | None) -> EngineSettings:
    """How the recipe wants its engines. `devices`: see EngineSettings."""
    rollout = recipe.rollout
    return EngineSettings(
        model=model,
        dtype=DTYPES[recipe.model.dtype],
        tensor=rollout.tensor,
        max_model_len=recipe.data.max_prompt_length + rollout.max_response_length,
        max_sequences=rollout.max_batch_sequences,
        devices=devices,
        memory_share=rollout.gpu_memory_share,
        kv_cache_gib=rollout.cpu_kv_cache_gib,
        sleep=devices is not None and rollout.placement == "colocated" and not rollout.servers,
        threads=recipe.learner.threads,
    )


def engine_command(settings: EngineSettings, host: str, port: int) -> list[str]:
    """The command line of vLLM's own server. It holds no secret: command lines can be read by others."""
    command = [sys.executable, "-m", "dapo_megatron.rollout.vllm_server"]
    options = {
        "--model": str(settings.model),
        "--load-format": "auto" if settings.load_weights else "dummy",
        "--host": host,
        "--port": str(port),
        "--dtype": settings.dtype,
        "--tensor-parallel-size": str(settings.tensor),
        "--max-model-len": str(settings.max_model_len),
        "--max-num-seqs": str(settings.max_sequences),
        "--logprobs-mode": "processed_logprobs",  # of softmax(logits / T), as the learner takes them
        "--generation-config": "vllm",  # no sampling defaults from the model's folder
        "--weight-transfer-config": f'{{"backend": "{BACKEND}"}}',
        "--middleware": "dapo_megatron.rollout.vllm_secret.RequireSecret",
        "--uvicorn-log-level": "warning",
    }
    # samples of a prompt, continuations of a prefix and branches of a tree share what is computed once
    flags = ["--skip-tokenizer-init", "--enable-scale-out", "--enable-prefix-caching"]
    if settings.sleep and settings.devices is not None:
        flags.append("--enable-sleep-mode")
    return [*command, *(word for pair in options.items() for word in pair), *flags, *device_options(settings)]


def device_options(settings: EngineSettings) -> list[str]:
    """The words of a server's command line that depend on where it runs."""
    if settings.devices is not None:
        return ["--gpu-memory-utilization", str(settings.memory_share)]
    backend = "mp" if settings.tensor > 1 else "uni"
    batched = str(max(settings.max_model_len, CPU_BATCHED_TOKENS))
    # vLLM would rewind the random numbers of a prompt cut in two, which a CPU generator cannot
    flags = ["--enforce-eager", "--no-enable-chunked-prefill"]
    return [*flags, "--max-num-batched-tokens", batched, "--distributed-executor-backend", backend]


def engine_environment(settings: EngineSettings, secret: str, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of an engine: no variables of the learner's world, its devices, the secret."""
    environment = {name: value for name, value in base.items() if name not in WORLD_VARIABLES}
    # without .pyc files vLLM's imports take minutes
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.update(
        {
            ENGINE_MARK: "1",
            VARIABLE: secret,
            "VLLM_SERVER_DEV_MODE": "1",  # the routes for weights, pause and sleep
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # forked children would not be known to `vllm_server.py`
            "VLLM_LOGGING_LEVEL": base.get("VLLM_LOGGING_LEVEL", "WARNING"),
        }
    )
    if settings.devices is None:
        environment.update(
            {
                "OMP_NUM_THREADS": str(settings.threads),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
            }
        )
        if settings.tensor == 1:  # the engine's process is the worker: on few cores each polling process costs
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(settings.devices)
    return environment


class RunningEngine:
    """A server that somebody started."""

    def __init__(self, address: str, secret: str) -> None:
        self.address, self._secret = address.rstrip("/"), secret

    def exit_code(self) -> int | None:
        """None while it runs, and where that cannot be known."""
        return None

    def answers(self) -> bool:
        """Whether /health says yes.

        Raises:
            RunError: it refuses the secret.
        """
        request = urllib.request.Request(f"{self.address}/health", headers={HEADER: self._secret})
        try:
            with _DIRECT.open(request, timeout=5.0) as response:
                return response.status == 200
        except urllib.error.HTTPError as error:
            if error.code == 401:
                raise RunError(
                    f"rollout: the engine at {self.address} was started with another secret; {VARIABLE} must be the "
                    "same for engine and run"
                ) from None
            return False
        except OSError:  # refused or late
            return False

    def tail(self) -> str:
        """What there is to say about its state."""
        return "it was started elsewhere (rollout.servers); look there"


class ServerProcess(RunningEngine):
    """A server of ours. Start it from a thread that lives as long as the server shall: the thread's death kills it.

    `command`: (host, port) → its command line.
    """

    def __init__(
        self,
        command: Callable[[str, int], list[str]],
        environment: Mapping[str, str],
        *,
        secret: str,
        log: Path,
        host: str = "127.0.0.1",
    ) -> None:
        port = free_port(host)
        super().__init__(f"http://{host}:{port}", secret)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                command(host, port),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, killed as a whole
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs. Any end is a failure: vLLM's server exits with 0 when its engine dies."""
        return self._process.poll()

    def tail(self) -> str:
        """The end of its log."""
        with open(self.log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return f"the end of {self.log}:\n{file.read().decode(errors='replace')}"

    def stop(self) -> None:
        """End the server and all its children."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):  # nobody of the group is left
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)


class EngineProcess(ServerProcess):
    """A rollout engine of ours."""

    def __init__(self, settings: EngineSettings, *, secret: str, log: Path, host: str = "127.0.0.1") -> None:
        environment = engine_environment(settings, secret)
        super().__init__(partial(engine_command, settings), environment, secret=secret, log=log, host=host)


def still_starting(
    engines: Sequence[RunningEngine], time_limit_s: float, deadline: float, section: str = "rollout"
) -> list[RunningEngine]:
    """Those that do not answer yet. `deadline` (of time.monotonic) is when `time_limit_s` is over. `section`: of the
    recipe, whose start_limit_s this is.

    Raises:
        RunError: one ended, refuses the secret, or is not ready in time; shows the end of its log.
    """
    for engine in engines:
        if (code := engine.exit_code()) is not None:
            raise RunError(
                f"{section}: the engine at {engine.address} ended with code {code} while starting; {engine.tail()}"
            )
    waiting = [engine for engine in engines if not engine.answers()]
    if waiting and time.monotonic() > deadline:
        raise RunError(
            f"{section}: the engine at {waiting[0].address} was not ready within {section}.start_limit_s="
            f"{time_limit_s:.0f}; {waiting[0].tail()}"
        )
    return waiting


def wait_until_ready(engines: Sequence[RunningEngine], time_limit_s: float, section: str = "rollout") -> None:
    """Wait until all engines answer. `section`: as in `still_starting`.

    Raises:
        RunError: as `still_starting`.
    """
    deadline = time.monotonic() + time_limit_s
    waiting = list(engines)
    while waiting := still_starting(waiting, time_limit_s, deadline, section):
        time.sleep(0.25)
