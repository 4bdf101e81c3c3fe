"""The judge of a recipe on a vLLM engine of the run's own (`reward.judge.engine=vllm`). No torch before it starts."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dapo_megatron.config import Recipe
from dapo_megatron.config.check import CPU_HEAD_DIMS
from dapo_megatron.config.reward import Judge, Reward
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.judge_server import JudgeServer, Place
from dapo_megatron.rewards.judge_tokens import control_tokens, without
from dapo_megatron.rewards.model_folder import read_config
from dapo_megatron.rewards.verdicts import TOP
from dapo_megatron.rollout.judge_engine import NAME, PLAIN, start_judge_engine
from dapo_megatron.rollout.launcher import EngineSettings, wait_until_ready
from dapo_megatron.rollout.vllm_plugin import check_vllm_version
from dapo_megatron.rollout.vllm_secret import HEADER, make_secret

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class JudgeEngine:
    """The engine of a judge, ready to be asked through `judge`; a context manager that leaves no process behind.

    Start it from a thread that lives as long as the engine shall.

    Raises:
        RequestError: this machine does not have the devices.
        RunError: it could not be started, ended, or was not ready within reward.judge.vllm.start_limit_s.
    """

    def __init__(self, settings: Judge, device: "torch.device", *, threads: int, logs: Path) -> None:
        tokenizer = load_tokenizer(settings.model)
        engine = judge_engine_settings(settings, _devices(settings, device), threads=threads)
        template = None if settings.chat_template else plain_template(tokenizer)
        secret = make_secret()
        try:
            self.process = start_judge_engine(
                engine, chat_template=template, log_probs=TOP, secret=secret, log=logs / "judge.log"
            )
        except OSError as error:
            raise RunError(f"reward.judge.engine=vllm cannot be started: {error}") from error
        try:
            wait_until_ready([self.process], settings.vllm.start_limit_s, "reward.judge.vllm")
        except BaseException:
            self.close()
            raise
        marks = control_tokens(tokenizer).values()
        place = Place(
            f"{self.process.address}/v1",
            NAME,
            f"the engine of reward.judge.model={settings.model} (log: {self.process.log})",
            headers={HEADER: secret},
            clean=lambda part: without(part, marks),
        )
        self.judge = JudgeServer(settings, place)

    def close(self) -> None:
        """End the server and its children."""
        self.process.stop()

    def __enter__(self) -> "JudgeEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def judged_by_engine(reward: Reward) -> bool:
    """Whether the recipe's judge needs an engine of its own."""
    return reward.method == "judge" and reward.judge.engine == "vllm"


def judge_engine_settings(settings: Judge, devices: tuple[str, ...] | None, *, threads: int) -> EngineSettings:
    """How its engine is started: in fp32 on a CPU (`devices`: None), else in the folder's own dtype."""
    positions = (
        read_config(Path(settings.model), f"reward.judge.model={settings.model}").get("max_position_embeddings")
        or math.inf
    )
    return EngineSettings(
        model=Path(settings.model),
        dtype="float32" if devices is None else "auto",
        tensor=settings.vllm.tensor,
        max_model_len=int(min(positions, settings.tokens_per_batch + 1)),  # and the token of the answer
        max_sequences=settings.concurrency,
        devices=devices,
        memory_share=settings.vllm.gpu_memory_share,
        kv_cache_gib=settings.vllm.cpu_kv_cache_gib,
        threads=threads,
        load_weights=True,
    )


def plain_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A chat template for `chat_template: false`: the text, behind a BOS token where the tokenizer puts one."""
    opened = tokenizer.bos_token_id is not None and tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + PLAIN if opened else PLAIN


def check_judge_engine(recipe: Recipe, *, cpu: bool) -> None:
    """What can be refused before anything starts; `check_judge` has found the folder sound.

    Raises:
        RequestError: vLLM missing or untested; on a CPU heads that its attention lacks; on a GPU shares of one device
            that exceed it.
    """
    judge, rollout = recipe.reward.judge, recipe.rollout
    check_vllm_version()
    if cpu:
        config = read_config(Path(judge.model), f"reward.judge.model={judge.model}")
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        size = config.get("head_dim") or (hidden // heads if heads and hidden else None)
        if size is not None and size not in CPU_HEAD_DIMS:
            raise RequestError(
                f"reward.judge.model={judge.model}: vLLM on a CPU has no attention for head_dim={size}; it has "
                f"{', '.join(map(str, CPU_HEAD_DIMS))}; use reward.judge.engine=embedded"
            )
        return
    shares = judge.vllm.gpu_memory_share + rollout.gpu_memory_share
    if judge.vllm.device is None and rollout.beside_learner and shares > 1:
        raise RequestError(
            f"reward.judge.vllm.gpu_memory_share={judge.vllm.gpu_memory_share} and rollout.gpu_memory_share="
            f"{rollout.gpu_memory_share} of one GPU exceed it; use rollout.gpu_memory_share="
            f"{1 - judge.vllm.gpu_memory_share:.2f} or less, or reward.judge.vllm.device of a GPU that is free"
        )


@contextmanager
def judging(recipe: Recipe, device: "torch.device", logs: Path) -> Iterator[JudgeServer | None]:
    """For commands of one process: the judge on its engine, ended behind; None where the recipe needs none."""
    if not judged_by_engine(recipe.reward):
        yield None
        return
    with JudgeEngine(recipe.reward.judge, device, threads=recipe.learner.threads, logs=logs) as engine:
        yield engine.judge


def _devices(settings: Judge, device: "torch.device") -> tuple[str, ...] | None:
    """The names of its GPUs, None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    from dapo_megatron.rollout.vllm_engines import visible_devices

    size, there = settings.vllm.tensor, torch.cuda.device_count()
    first = (device.index or 0) if settings.vllm.device is None else settings.vllm.device
    if first + size > there:
        raise RequestError(
            f"reward.judge.vllm.tensor={size} needs GPUs {first} to {first + size - 1} and this machine shows {there}; "
            "use a smaller reward.judge.vllm.tensor or reward.judge.vllm.device"
        )
    return visible_devices(there)[first : first + size]
