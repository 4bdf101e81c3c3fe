"""vLLM inside this process, behind the rollout protocol: for short tests, and to look at weights where they lie.

Starts in seconds, but cannot die alone and computes only while `collect` runs: runs use servers.
"""

import os
import time
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from dapo_megatron.data.completions import Completion
from dapo_megatron.errors import RunError
from dapo_megatron.rollout.engine import PartialCompletion, RolloutRequest
from dapo_megatron.rollout.launcher import CPU_BATCHED_TOKENS, EngineSettings, engine_environment
from dapo_megatron.rollout.vllm_client import sampling_parameters
from dapo_megatron.rollout.vllm_plugin import BACKEND


class InProcessEngine:
    """One engine of tensor size 1, on a CPU; changes the environment of this process as `launcher.py` does a server's.

    Args:
        settings: as for a server; `tensor` must be 1.
        stop_tokens: ends of sequence; drawn ones are part of the completion.
    """

    def __init__(self, settings: EngineSettings, *, stop_tokens: Collection[int]) -> None:
        if settings.tensor != 1 or settings.devices is not None:
            raise RunError("rollout: an engine in this process has tensor size 1 and runs on the CPU")
        os.environ.update(engine_environment(settings, "of no use without a server"))
        from vllm import LLM

        self._llm = LLM(
            model=str(settings.model),
            load_format="dummy",
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_sequences,
            max_num_batched_tokens=max(settings.max_model_len, CPU_BATCHED_TOKENS),
            enable_chunked_prefill=False,
            enforce_eager=True,
            skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            weight_transfer_config={"backend": BACKEND},
            disable_log_stats=True,
        )
        self._engine = self._llm.llm_engine
        self._stops = sorted(stop_tokens)
        self._running: dict[str, PartialCompletion] = {}
        self._done: list[Completion] = []
        self._version: int | None = None
        self._paused = False

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The engine's parameters by vLLM's names: write into them, then `update_weights`."""
        model = self._engine.model_executor.driver_worker.worker.model_runner.model
        return {name: parameter.data for name, parameter in model.named_parameters()}

    def call(self, method: str, **values: object) -> None:
        """Call a method of the worker, e.g. `init_weight_transfer_engine(init_info=…)`."""
        self._engine.collective_rpc(method, kwargs=values)

    def submit(self, requests: Sequence[RolloutRequest]) -> list[int]:
        """Queue requests; they are worked on inside `collect`.

        Raises:
            RunError: the engine has no weights yet.
        """
        from vllm import SamplingParams

        if self._version is None:
            raise RunError("rollout: the engine has no weights yet")
        for request in requests:
            parameters = SamplingParams(**sampling_parameters(request, self._stops))
            prompt = {"prompt_token_ids": request.prompt_tokens.tolist()}
            self._engine.add_request(str(request.ticket), prompt, parameters)
            self._running[str(request.ticket)] = PartialCompletion(request)
        return [request.ticket for request in requests]

    def collect(self, until: int | None = None, *, time_limit_s: float) -> list[Completion]:
        """Compute until at least `until` completions are there (None: all).

        Raises:
            RunError: not done within the time limit, or the engine is paused and cannot go on.
        """
        deadline = time.monotonic() + time_limit_s
        out = len(self._running) + len(self._done)
        wanted = out if until is None else min(until, out)
        while len(self._done) < wanted:
            if self._paused or time.monotonic() > deadline:
                why = "the engine is paused" if self._paused else f"rollout.time_limit_s={time_limit_s:.0f} is over"
                raise RunError(f"rollout: {len(self._running)} requests unfinished: {why}")
            self.step()
        done, self._done = self._done, []
        return done

    def step(self) -> None:
        """One token for every running request."""
        for output in self._engine.step():
            running, choice = self._running[output.request_id], output.outputs[0]
            new = range(len(running.tokens), len(choice.token_ids))
            running.tokens += [choice.token_ids[i] for i in new]
            running.logprobs += [choice.logprobs[i][choice.token_ids[i]].logprob for i in new]
            running.versions += [self._version for _ in new]
            if output.finished:
                del self._running[output.request_id]
                self._done.append(running.completion(choice.finish_reason))

    def abort(self, tickets: Collection[int]) -> list[Completion]:
        """Take requests back; returns what they have produced so far."""
        names = [name for ticket in tickets if (name := str(ticket)) in self._running]
        self._engine.abort_request(names)
        return [self._running.pop(name).completion("abort") for name in names]

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def update_weights(self, version: int) -> None:
        """Tokens from now on belong to `version`; what was cached under the old weights is dropped."""
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(str(version))
        self._version = version
