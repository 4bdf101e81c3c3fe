"""The whole learner step (forward, loss, backward, optimizer) on packed sequences, beside transformers with a torch
loss on the same batch: tokens a second, model FLOP utilisation, peak memory.

    python tools/bench_learner.py [--shape tiny 0.5b 7b] [--layers N] [--tokens N] [--recompute none|full] [--output F]

Sequences are as DAPO makes them: prompt and response lengths are log-normal. Weights are random, the same on both sides
and never downloaded. The losses of the first two steps and the first gradient norm of every contender must agree with
ours, or nothing is compared. On a GPU: the shapes of Qwen2.5-0.5B and 7B in bf16, the latter with as many layers as
fit; without one the tiny shape in fp32, which says nothing about a GPU.
"""

import argparse
import gc
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "kernels" / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measure import Ceilings, Timing, ceilings, conditions, file_name, timed, write_table  # noqa: E402
from torch import Tensor  # noqa: E402

from dapo_megatron.config import Architecture, Layout  # noqa: E402
from dapo_megatron.config.architecture import architecture_from_dict  # noqa: E402
from dapo_megatron.config.optimizer import Optimizer  # noqa: E402
from dapo_megatron.data.records import SequenceBatch, repeated, sequence_batch  # noqa: E402
from dapo_megatron.errors import RequestError, RunError  # noqa: E402
from dapo_megatron.launch import World  # noqa: E402
from dapo_megatron.learner.distributed import choose_device, join_world, leave_world  # noqa: E402
from dapo_megatron.learner.learner import Learner  # noqa: E402
from dapo_megatron.learner.losses import policy_loss  # noqa: E402
from dapo_megatron.learner.parallel_groups import form_groups  # noqa: E402
from dapo_megatron.resharding.hf_layout import canonical_tensors  # noqa: E402
from dapo_megatron.resharding.transport import local_view  # noqa: E402

CLIP = {"eps_low": 0.2, "eps_high": 0.28, "eps_dual": 10.0}
OPTIMIZER = Optimizer(learning_rate=1e-5, weight_decay=0.1)
INIT_STD = 0.02
MFU_WANTED, SPEED_UP_WANTED = 0.45, 1.5  # of the 7B shape at 16,384 tokens on one H200
# a learner in bf16: weight 2, gradient 4, main weight 4, moments 8; transformers holds both gradients for a moment
STATE_BYTES = 20
# rows of an eager loss: bf16 logits and gradient, fp32 logits, log-softmax and gradient
EAGER_LOGIT_BYTES = 16
# largest |difference| of losses, and of the gradient norm relative to ours
AGREEMENT = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 5e-2)}


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model and the lengths it trains on: medians of prompt and response, the longest sequence, tokens of a
    micro-batch."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool
    prompt: int
    response: int
    longest: int
    tokens: int


SHAPES = {
    "tiny": Shape(128, 4, 4, 2, 384, 512, True, 24, 96, 512, 2048),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936, True, 160, 1200, 8192, 16384),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, False, 160, 1200, 8192, 16384),
}


@dataclass(frozen=True)
class Task:
    """What every contender is given; `batch.old_logprobs` are set by the first of them."""

    name: str
    config: dict
    architecture: Architecture
    batch: SequenceBatch
    tokens: int
    dtype: torch.dtype
    device: torch.device
    recompute: str

    @property
    def denominator(self) -> float:
        return self.batch.weight_sum


def model_config(shape: Shape, layers: int) -> dict:
    """config.json of a Qwen2 model."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": shape.hidden,
        "num_hidden_layers": layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn, "vocab_size": shape.vocab, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": shape.longest, "tie_word_embeddings": shape.tied, "use_sliding_window": False,
        "initializer_range": INIT_STD, "eos_token_id": 1, "torch_dtype": "bfloat16",
    }  # fmt: skip


def draw(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """fp32 weights that depend on the name alone: norms about 1, all else normal(0, 0.02)."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator, device=device) * INIT_STD
    return noise + 1 if name.endswith("norm.weight") else noise


def packed_lengths(shape: Shape, tokens: int, seed: int = 0) -> list[tuple[int, int]]:
    """(prompt, response) tokens of sequences that together fill `tokens`: log-normal about the medians (σ 0.4 and 0.7,
    as the responses of a group spread), cut at the longest."""
    random = np.random.default_rng(seed)
    lengths: list[tuple[int, int]] = []
    left = tokens
    while left >= 8:
        prompt = min(int(shape.prompt * math.exp(0.4 * random.standard_normal())) + 1, left // 2)
        response = min(int(shape.response * math.exp(0.7 * random.standard_normal())) + 1, left - prompt)
        response = min(response, shape.longest - prompt)
        lengths.append((prompt, response))
        left -= prompt + response
    return lengths


def build_batch(shape: Shape, tokens: int) -> SequenceBatch:
    """Random tokens; one advantage a sequence, mean 0 as group advantages have."""
    random = np.random.default_rng(1)
    lengths = packed_lengths(shape, tokens)
    parts = [[random.integers(0, shape.vocab, n, dtype=np.int32) for n in pair] for pair in lengths]
    batch = sequence_batch(*zip(*parts, strict=True))
    advantages = random.standard_normal(len(lengths)).astype(np.float32)
    advantages -= advantages.mean()
    batch.advantages = [repeated(a, len(r)) for a, r in zip(advantages, batch.responses, strict=True)]
    return batch


def flop_of_a_step(architecture: Architecture, lengths: Sequence[int]) -> float:
    """6 · parameters · tokens + causal attention, 6 · Σ L² · heads · head_dim a layer (its two products, half a square
    each, forward and twice backward). Parameters that multiply: an embedding that is only looked up does not, a tied
    one does once. What is skipped (prompt rows in the head) counts, what is recomputed does not."""
    shapes = canonical_tensors(architecture)
    matrices = sum(math.prod(s) for n, s in shapes.items() if n != "model.embed_tokens.weight" or architecture.tied)
    attention = 6.0 * sum(length**2 for length in lengths) * architecture.heads * architecture.head_dim
    return 6.0 * matrices * sum(lengths) + architecture.layers * attention


def layers_that_fit(shape: Shape, tokens: int, memory_bytes: float, recompute: str) -> int:
    """Layers at which both sides should fit into 90 % of the memory, at least one: states of the parameters, an eager
    loss, and about 31 hidden + 8 ffn bytes a token and layer for what the backward pass needs."""
    embeddings = (1 if shape.tied else 2) * shape.vocab * shape.hidden
    head_dim = shape.hidden // shape.heads
    layer = shape.hidden * (2 * shape.hidden + 2 * shape.kv_heads * head_dim + 3 * shape.ffn)
    kept = tokens * (2 * shape.hidden if recompute == "full" else 31 * shape.hidden + 8 * shape.ffn)
    fixed = embeddings * STATE_BYTES + tokens * shape.vocab * EAGER_LOGIT_BYTES
    return max(1, min(shape.layers, int((0.9 * memory_bytes - fixed) // (layer * STATE_BYTES + kept))))


def our_step(task: Task, loss_kernel: str, fused: bool) -> Callable[[], tuple[float, float]]:
    """(loss, gradient norm) of one update by our learner."""
    rows = task.architecture.vocab
    layout = Layout(
        world=1, tensor=1, pipeline=1, virtual_pipeline=1, context=1, data=1, sequence_parallel=False,
        layers_per_chunk=task.architecture.layers, mini_batch_prompts=1, updates_per_step=1, responses_per_step=1,
        padded_vocab=-(-rows // 64) * 64,
    )  # fmt: skip
    form_groups(layout, seed=0, time_limit_s=300)
    learner = Learner(
        task.architecture, layout, dtype=task.dtype, device=task.device, layer_spec="local",
        tokens_per_micro_batch=task.tokens, recompute=task.recompute, optimizer=OPTIMIZER, loss_kernel=loss_kernel,
        fused_linear_loss=fused,
    )  # fmt: skip
    fill(learner, task)
    if not any(values.any() for values in task.batch.old_logprobs):
        noise = np.random.default_rng(2)
        logprobs, _ = learner.score(task.batch)
        task.batch.old_logprobs = [
            values + np.float32(0.05) * noise.standard_normal(len(values), dtype=np.float32) for values in logprobs
        ]
    loss = policy_loss(learner.head, denominator=task.denominator, entropy_coefficient=0.0, **CLIP)

    def step() -> tuple[float, float]:
        sums = learner.gradients(task.batch, range(len(task.batch)), loss)
        return float(sums[0]), learner.step(OPTIMIZER.learning_rate, OPTIMIZER.weight_decay)

    return step


def fill(learner: Learner, task: Task) -> None:
    """The drawn weights into the learner's shards, and from there into the optimizer's main weights."""
    weights, whole, name = learner.weights, torch.empty(0), ""
    for tensor in weights.values():
        tensor.zero_()  # padded vocabulary rows
    for placement in sorted(learner.weight_layout.placements[0], key=lambda p: p.name):
        if placement.name != name:
            name = placement.name
            whole = draw(name, tuple(learner.weight_layout.shapes[name]), task.device)
        part = whole[tuple(slice(a, b) for a, b in placement.box)]
        local_view(weights, placement.key, placement.offset, placement.shape).copy_(part)
    learner.optimizer.reload_model_params()


def their_step(task: Task, attention: str) -> Callable[[], tuple[float, float]]:
    """(loss, gradient norm) of one update by transformers."""
    from learner_peer import TransformersStep

    from dapo_megatron.data.packing import pack

    peer = TransformersStep(
        task.config, lambda name, shape: draw(name, shape, task.device), dtype=task.dtype, device=task.device,
        attention=attention, recompute=task.recompute == "full", optimizer=OPTIMIZER,
    )  # fmt: skip

    def step() -> tuple[float, float]:
        packed = pack(task.batch, range(len(task.batch)), length=sum(task.batch.lengths), device=task.device)
        return peer.step(packed, task.denominator, CLIP)

    return step


def contenders(device: torch.device) -> Iterator[tuple[str, str, Callable[[Task], Callable[[], tuple[float, float]]]]]:
    """(side, settings, what builds its step)."""
    from learner_peer import attentions

    for kernel in ("torch", "triton") if device.type == "cuda" else ("torch",):
        for fused in (False, True):
            settings = f"loss_kernel={kernel} fused_linear_loss={str(fused).lower()}"
            yield "ours", settings, lambda task, k=kernel, f=fused: our_step(task, k, f)
    for attention in attentions(device):
        yield "transformers", f"attention={attention}, torch loss", lambda task, a=attention: their_step(task, a)


def measured(task: Task, repeats: int) -> list[dict]:
    """One record a contender; of one that does not fit into memory only its name.

    Raises:
        RunError: a contender computes something else.
    """
    found: list[dict] = []
    for side, settings, build in contenders(task.device):
        record = {"side": side, "settings": settings}
        step = None
        try:
            step = build(task)
            first, norm = step()
            second, _ = step()
            timing = timed(lambda _: (), step, repeats=repeats, warm_up=1)
            peak = torch.cuda.max_memory_allocated() if task.device.type == "cuda" else float("nan")
            record |= {"losses": (first, second), "norm": norm, "timing": timing, "peak_bytes": peak}
            told = f"{timing.median_s * 1e3:.1f} ms, losses {first:.6f} and {second:.6f}, gradient norm {norm:.6f}"
            print(f"{side} {settings}: {told}", flush=True)
        except torch.OutOfMemoryError:
            print(f"{side} {settings}: out of memory")
        del step
        gc.collect()
        if task.device.type == "cuda":
            torch.cuda.empty_cache()
        found.append(record)
    check_agreement(found, task.dtype)
    return found


def check_agreement(found: list[dict], dtype: torch.dtype) -> None:
    """Every contender's losses and gradient norm against the first one's.

    Raises:
        RunError: one differs by more than rounding; nothing may be compared then.
    """
    done = [record for record in found if "losses" in record]
    loss_gap, norm_gap = AGREEMENT[dtype]
    for record in done:
        wanted, wanted_norm = done[0]["losses"], done[0]["norm"]
        gap = max(abs(a - b) for a, b in zip(record["losses"], wanted, strict=True))
        if not (gap <= loss_gap and abs(record["norm"] / wanted_norm - 1) <= norm_gap):
            raise RunError(
                f"{record['side']} ({record['settings']}) has losses {record['losses']} and gradient norm "
                f"{record['norm']:.6f}, ours {wanted} and {wanted_norm:.6f}: they do not compute the same, so no "
                "comparison is made"
            )


def report(task: Task, found: list[dict], limits: Ceilings, facts: dict[str, str]) -> list[dict[str, object]]:
    """Print the table; returns rows for the CSV."""
    flop, tokens = flop_of_a_step(task.architecture, task.batch.lengths), sum(task.batch.lengths)
    timings: dict[str, list[Timing]] = {}
    for record in found:
        timings.setdefault(record["side"], []).extend([record["timing"]] if "timing" in record else [])
    best_peer = min((t.median_s for t in timings["transformers"]), default=math.nan)
    heading = ("by", "settings", "median ms", "p20–p80", "tokens/s", "MFU", "peak GiB", "× best peer", "loss", "norm")
    print("{:<14}{:<46}{:>10}{:>20}{:>10}{:>7}{:>10}{:>12}{:>12}{:>10}".format(*heading))
    rows = []
    for record in found:
        if "timing" not in record:
            continue
        t, peak = record["timing"], record["peak_bytes"]
        row = {
            "shape": task.name, "layers": task.architecture.layers, "dtype": str(task.dtype).removeprefix("torch."),
            "recompute": task.recompute, "tokens": tokens, "sequences": len(task.batch), "by": record["side"],
            "settings": record["settings"], "median_ms": f"{t.median_s * 1e3:.2f}", "p20_ms": f"{t.p20_s * 1e3:.2f}",
            "p80_ms": f"{t.p80_s * 1e3:.2f}", "tokens_per_s": f"{tokens / t.median_s:.0f}",
            "model_flop_utilisation": f"{flop / t.median_s / limits.matmul_flop_per_s:.4f}",
            "peak_GiB": "" if math.isnan(peak) else f"{peak / 2**30:.2f}",
            "times_best_peer": f"{best_peer / t.median_s:.3f}", "first_loss": f"{record['losses'][0]:.6f}",
            "gradient_norm": f"{record['norm']:.6f}", "matmul_TFLOP_per_s": f"{limits.matmul_flop_per_s / 1e12:.4f}",
        }  # fmt: skip
        rows.append(facts | row)
        print(
            f"{row['by']:<14}{row['settings']:<46}{row['median_ms']:>10}{row['p20_ms'] + '–' + row['p80_ms']:>20}"
            f"{row['tokens_per_s']:>10}{row['model_flop_utilisation']:>7.5}{row['peak_GiB']:>10}"
            f"{row['times_best_peer']:>12}{row['first_loss']:>12}{row['gradient_norm']:>10}"
        )
    ours = min((t.median_s for t in timings["ours"]), default=math.nan)
    if task.device.type == "cuda" and task.name == "7b":
        utilisation, speed_up = flop / ours / limits.matmul_flop_per_s, best_peer / ours
        for value, wanted, what in (
            (utilisation, MFU_WANTED, "of the matmul rate"), (speed_up, SPEED_UP_WANTED, "× the best peer's tokens/s"),
        ):  # fmt: skip
            print(f"{'reached' if value >= wanted else 'MISSED'}: {value:.2f} {what}, wanted {wanted}")
    return rows


def run(options: argparse.Namespace) -> None:
    device = choose_device("auto", 0)
    on_gpu = device.type == "cuda"
    names = options.shape or (["0.5b", "7b"] if on_gpu else ["tiny"])
    if not on_gpu and names != ["tiny"]:
        raise RequestError(f"--shape {' '.join(names)} needs a GPU, and torch sees none; use --shape tiny")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    join_world(World(0, 1, 0), device=device, time_limit_s=600)
    limits, facts = ceilings(device, dtype), conditions(device)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"matmul rate of this run: {limits.matmul_flop_per_s / 1e12:.3f} TFLOP/s")
    if not on_gpu:
        print("no GPU: this is the CPU, the tiny shape, fp32 and the torch kernels; it says nothing about a GPU")
    options.output.mkdir(parents=True, exist_ok=True)
    table = options.output / f"learner-{file_name(facts)}.csv"
    rows = []
    for name in names:
        shape = SHAPES[name]
        tokens = options.tokens or shape.tokens
        memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else math.inf
        fitting = shape.layers if math.isinf(memory) else layers_that_fit(shape, tokens, memory, options.recompute)
        layers = options.layers or fitting
        config = model_config(shape, layers)
        architecture = architecture_from_dict(config, f"shape {name}")
        batch = build_batch(shape, tokens)
        task = Task(name, config, architecture, batch, tokens, dtype, device, options.recompute)
        print(
            f"\n{name}: {layers} of {shape.layers} layers, {len(batch)} sequences, {sum(batch.lengths)} tokens "
            f"(longest {max(batch.lengths)}), {batch.weight_sum:.0f} trained, "
            f"recompute {options.recompute}"
        )
        rows += report(task, measured(task, options.repeats), limits, facts)
        if rows:
            write_table(rows, table)  # after every shape: the next one may fail
            print(f"written: {table}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default: tiny on a CPU, 0.5b and 7b on a GPU")
    parser.add_argument("--layers", type=int, help="default: all, or as many as fit")
    parser.add_argument("--tokens", type=int, help="tokens of the batch; default: 2,048 or 16,384")
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=ROOT / "kernels" / "benchmarks" / "results")
    try:
        run(parser.parse_args())
    except (RequestError, RunError) as problem:
        print(problem, file=sys.stderr)
        return 2 if isinstance(problem, RequestError) else 1
    finally:
        leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())
