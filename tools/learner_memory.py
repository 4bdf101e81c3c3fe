"""One rank's part of `plan_against_measured.py`: a real learner update on real text, and every byte of tensors that was
alive while it ran.

Bytes at rest are those of all storages that Python's tensors reach, each once. What an update adds is what torch's CPU
allocator hands out and takes back, by the profiler's record: tensors that only C++ holds are in it too. Outside: numpy
arrays, scratch of the matrix libraries, copies in gloo's threads, the allocator's own rounding.
"""

import dataclasses
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from dapo_megatron.config import Architecture, Layout, Recipe, derive_critic_layout
from dapo_megatron.config.architecture import critic_of
from dapo_megatron.data.arithmetic import worked_response
from dapo_megatron.data.packing import PackedBatch
from dapo_megatron.data.records import SequenceBatch, sequence_batch
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.losses import RowLoss, policy_loss, value_loss
from dapo_megatron.learner.model import DTYPES, choose_layer_spec
from dapo_megatron.learner.offload import OptimizerMemory
from dapo_megatron.learner.optimizer import parts
from dapo_megatron.learner.parallel_groups import form_groups, form_groups_beside

HEAD = ("head begins", "head ends", "head's gradient begins", "head's gradient ends")
OPTIMIZER = "optimizer begins"
COPIES = "c10d::reduce_scatter_tensor_coalesced_"  # gloo's copy of the gradients, after all backward passes
THREADS = "gloo:"  # what gloo's own threads copy; they give it back unseen
MARK = "mark: "
RATE_S = 0.3  # seconds over which a rate of the machine is measured


@dataclass(frozen=True)
class Allocation:
    """One step of the allocator: `size` bytes taken at `address`, given back where negative; the operations inside of
    which that was, outermost first."""

    at: int  # nanoseconds
    address: int
    size: int
    operations: tuple[str, ...]


@dataclass
class Trace:
    """What the allocator did between two moments, in order, and when which marks were passed."""

    steps: list[Allocation] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)

    def peak(self) -> tuple[int, dict[int, Allocation]]:
        """(the most bytes alive at once of those allocated since the beginning, what was alive then by address).

        An address that is handed out anew had been given back, seen or not.
        """
        most = total = 0
        at = -1
        alive: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            total -= alive.pop(step.address, 0)
            if step.size > 0:
                alive[step.address] = step.size
                total += step.size
            if total > most:
                most, at = total, i
        held: dict[int, Allocation] = {}
        for step in self.steps[: at + 1]:
            held.pop(step.address, None)
            if step.size > 0:
                held[step.address] = step
        return most, held

    def windows(self, begin: str, end: str) -> list[tuple[int, int]]:
        """(begin, end) of every pair of marks that follow each other."""
        found, opened = [], None
        for at, name in sorted(self.marks):
            if name == begin:
                opened = at
            elif name == end and opened is not None:
                found.append((opened, at))
                opened = None
        return found


@contextmanager
def traced() -> Iterator[Trace]:
    """Record the allocator and the marks inside the block; the trace is filled at its end."""
    trace = Trace()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield trace
    waiting = [(node, ()) for node in profiler.profiler.kineto_results.experimental_event_tree()]
    while waiting:
        node, inside = waiting.pop()
        if node.tag.name == "Allocation":
            found = node.extra_fields
            if not any(name.startswith(THREADS) for name in inside):
                trace.steps.append(Allocation(node.start_time_ns, found.ptr, found.alloc_size, inside))
            below = inside
        else:
            if node.name.startswith(MARK):
                trace.marks.append((node.start_time_ns, node.name.removeprefix(MARK)))
            below = (*inside, node.name)
        waiting += [(child, below) for child in node.children]
    trace.steps.sort(key=lambda step: step.at)


def mark(name: str) -> None:
    """A moment of the trace."""
    with record_function(MARK + name):
        pass


def storage_bytes(tensors: Any) -> int:
    """Bytes of the tensors' storages, each once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def tensors_at_rest() -> int:
    """Bytes of all storages that a tensor of Python's reaches."""
    gc.collect()
    return storage_bytes(x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.device.type == "cpu")


def state_of(learner: Learner) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer: what the plan counts to the byte."""
    weights = list(learner.weights.values())
    own = {w.untyped_storage()._cdata for w in weights}
    kept = []
    for part in parts(learner.optimizer):
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                state = part.optimizer.state[main]
                kept += [main, *(state[name] for name in ("exp_avg", "exp_avg_sq"))]
    return {
        "parameters": storage_bytes(weights),
        "gradients": storage_bytes(buffer.grad_data for chunk in learner.chunks for buffer in chunk.buffers),
        # fp32 main weights are the model's own memory
        "optimizer": sum(t.numel() * t.element_size() for t in kept if t.untyped_storage()._cdata not in own),
    }


def text_batch(lengths: list[tuple[int, int]], vocabulary: int, seed: int) -> SequenceBatch:
    """Questions and worked answers of the generated task, a byte a token: (prompt, response) tokens a sequence."""
    random = np.random.default_rng(seed)
    prompts, responses = [], []
    for prompt, response in lengths:
        text = b""
        while len(text) < prompt + response:
            digits = random.integers(1, 10, 6)
            question = "".join(f"{digit}+" for digit in digits)[:-1] + "="
            text += f"{question}{worked_response(question)}\n".encode()
        tokens = np.frombuffer(text[: prompt + response], np.uint8).astype(np.int32) % vocabulary
        prompts.append(tokens[:prompt])
        responses.append(tokens[prompt:])
    batch = sequence_batch(prompts, responses)
    batch.advantages = [np.full(len(r), random.choice([-1, 1]), np.float32) for r in responses]
    return batch


def watch_head(learner: Learner) -> None:
    """Mark when the output layer begins its work, and when its input's gradient is there."""

    def begins(_: Any, inputs: tuple) -> None:
        mark(HEAD[0])
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: mark(HEAD[3]))

    for model in learner.models:
        if model.post_process:
            model.output_layer.register_forward_pre_hook(begins)


def watched(loss: RowLoss) -> RowLoss:
    """The same loss, which marks its end and when its gradient begins."""

    def compute(output: Tensor, packed: PackedBatch) -> tuple[Tensor, Tensor]:
        value, sums = loss.compute(output, packed)
        mark(HEAD[1])
        if value.requires_grad:
            value.register_hook(lambda _: mark(HEAD[2]))
        return value, sums

    return dataclasses.replace(loss, compute=compute)


def build(recipe: Recipe, a: Architecture, layout: Layout, device: torch.device) -> Learner:
    """The recipe's learner with random weights, on the groups in force, its head watched."""
    learner = Learner(
        a,
        layout,
        dtype=DTYPES[recipe.model.dtype],
        device=device,
        layer_spec=choose_layer_spec(recipe.model.layer_spec, device),
        tokens_per_micro_batch=recipe.learner.tokens_per_micro_batch,
        temperature=recipe.rollout.temperature,
        recompute=recipe.learner.recompute,
        optimizer=recipe.optimizer,
        loss_kernel=recipe.learner.loss_kernel,
        fused_linear_loss=recipe.learner.fused_linear_loss,
    )
    for weight in learner.weights.values():
        torch.nn.init.normal_(weight, std=0.02)
    learner.optimizer.reload_model_params()
    watch_head(learner)
    return learner


def measure(
    recipe: Recipe, a: Architecture, layout: Layout, lengths: list[tuple[int, int]], *, explain: int = 0
) -> dict[str, Any]:
    """Bytes and seconds of one rollout step's learner work, after a first step that made the optimizer's state.

    Keys: rank; at_rest, peak (bytes); parts: parameters, gradients, optimizer, critic, and of the peak logits (output
    layer and loss made them), update (reduction and optimizer did) and activations (the rest); fullest: the phase of
    the peak; seconds a phase; rates of the machine while all ranks compute; sampling: bytes at rest while engines would
    sample, less copies in host memory; held: with `explain`, that many lines of what lies at the peak.
    """
    torch.set_num_threads(recipe.learner.threads)
    device, seed = torch.device("cpu"), recipe.run.seed
    limit_s = recipe.learner.time_limit_s
    form_groups(layout, seed=seed, time_limit_s=limit_s)
    learner, critic = build(recipe, a, layout, device), None
    if recipe.algorithm.advantage == "gae":
        own = derive_critic_layout(recipe, critic_of(a), layout.world)
        with form_groups_beside(own, seed=seed, time_limit_s=limit_s).in_force():
            critic = build(recipe, critic_of(a), own, device)
    batch = text_batch(lengths, a.vocab, seed)
    tokens = float(sum(response for _, response in lengths))
    algorithm, settings = recipe.algorithm, recipe.optimizer
    loss = watched(
        policy_loss(
            learner.head, denominator=tokens, eps_low=algorithm.eps_low, eps_high=algorithm.eps_high,
            eps_dual=algorithm.eps_dual, entropy_coefficient=0.0,
        )
    )  # fmt: skip
    worth = watched(value_loss(denominator=tokens, clip=recipe.critic.value_clip))

    def score() -> None:
        batch.old_logprobs, _ = learner.score(batch)

    def update() -> None:
        learner.gradients(batch, range(len(batch)), loss)
        mark(OPTIMIZER)
        learner.step(settings.learning_rate, settings.weight_decay)

    def learn_values() -> None:
        batch.old_values = critic.values(batch)
        batch.returns = [values + 1 for values in batch.old_values]
        critic.gradients(batch, range(len(batch)), worth)
        mark(OPTIMIZER)
        critic.step(recipe.critic.learning_rate, settings.weight_decay)

    phases: dict[str, Callable[[], None]] = {"score": score, "update": update}
    if critic is not None:
        phases["critic"] = learn_values
    memory = OptimizerMemory([learner, *([critic] if critic else [])], offload=recipe.learner.offload_optimizer)
    seconds = {}
    for _ in range(2):  # the first makes the optimizer's state
        for name, phase in phases.items():
            dist.barrier()
            with memory.on_device():
                started = time.perf_counter()
                phase()
                seconds[name] = time.perf_counter() - started
    host = sum(storage_bytes([buffer]) for buffer in memory._host._buffers)
    sampling = tensors_at_rest() - host
    with memory.on_device():
        rest = tensors_at_rest() - host
        state = {**state_of(learner), "critic": sum(state_of(critic).values()) if critic else 0}
        most, fullest, held, trace = 0, "", {}, Trace()
        for name, phase in phases.items():
            with traced() as found:
                phase()
            peak, alive = found.peak()
            if peak > most:
                most, fullest, held, trace = peak, name, alive, found
    of_head = [*trace.windows(HEAD[0], HEAD[1]), *trace.windows(HEAD[2], HEAD[3])]
    logits = sum(step.size for step in held.values() if any(a <= step.at <= b for a, b in of_head))
    begun = max((at for at, name in trace.marks if name == OPTIMIZER), default=0)
    update = sum(step.size for step in held.values() if step.at >= begun > 0 or COPIES in step.operations)
    made = rest + most - sum(state.values())  # buffers that stay from one micro-batch to the next are in it
    return {
        "rank": dist.get_rank(),
        "at_rest": rest,
        "peak": rest + most,
        "parts": {**state, "activations": made - logits - update, "logits": logits, "update": update},
        "fullest": fullest,
        "sampling": sampling,
        "seconds": seconds,
        "rates": machine_rates(recipe, a, layout),
        "held": told(held, explain),
    }


def told(held: dict[int, Allocation], most: int) -> list[str]:
    """What lies there by operation, largest first, `most` lines."""
    sums: Counter = Counter()
    for step in held.values():
        sums[step.size, " > ".join(name for name in step.operations if not name.startswith("autograd"))[-90:]] += 1
    lines = sorted(sums.items(), key=lambda item: -item[0][0] * item[1])[:most]
    return [f"{count:4d} x {size / 1e6:9.3f} MB  {name}" for (size, name), count in lines]


def machine_rates(recipe: Recipe, a: Architecture, layout: Layout) -> dict[str, float]:
    """products and sums of a feed-forward product a second, bytes a second of a copy, and of an all-reduce over all
    ranks (each way), while every rank does the same; 0 where there is one rank."""
    dtype = torch.bfloat16 if recipe.model.dtype == "bf16" else torch.float32
    rows = min(512, recipe.learner.tokens_per_micro_batch)
    left, right = torch.randn(rows, a.hidden).to(dtype), torch.randn(a.ffn, a.hidden).to(dtype)
    block = torch.ones(1 << 23)
    ways: dict[str, tuple[float, Callable[[], object]]] = {
        "products": (2.0 * rows * a.hidden * a.ffn, lambda: left @ right.T),
        "memory": (2.0 * block.nbytes, lambda: block.clone()),
    }
    rates = {name: _rate(work, run) for name, (work, run) in ways.items()}
    size, part = dist.get_world_size(), torch.ones(1 << 20)
    rates["link"] = 0.0
    if size > 1:
        dist.all_reduce(part)
        started = time.perf_counter()
        for _ in range(8):
            dist.all_reduce(part)
        rates["link"] = 8 * 2 * (size - 1) / size * part.nbytes / (time.perf_counter() - started)
    return rates


def _rate(work: float, run: Callable[[], object]) -> float:
    dist.barrier()
    run()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < RATE_S:
        run()
        count += 1
    return count * work / (time.perf_counter() - started)
