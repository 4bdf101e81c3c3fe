"""The learner beside itself with other layers, and beside vLLM."""

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dapo_megatron.config import Layout, derive_layout
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.data.records import SequenceBatch, sequence_batch
from dapo_megatron.doctor.parity_model import VOCABULARY, Trial, random_batch, read_tiny, tiny_recipe
from dapo_megatron.doctor.te_parameters import VERSION, differences
from dapo_megatron.doctor.verdict import Measurement, Skipped
from dapo_megatron.evaluation_engine import open_engine
from dapo_megatron.launch import World
from dapo_megatron.learner.distributed import join_world, leave_world
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.losses import supervised_loss
from dapo_megatron.learner.model import HAVE_TE
from dapo_megatron.learner.parallel_groups import form_groups
from dapo_megatron.rollout.engine import RolloutRequest
from dapo_megatron.rollout.vllm_plugin import vllm_version
from dapo_megatron.weight_sync import whole_on_rank_zero

TIMES = 3.0  # as far from fp32 as this many times what bf16 costs the local layers
FLOOR = 1e-5  # fp32's own distance, where bf16 plays no part
FP32_NATS = 1e-4  # mean |Δ log-prob| of two fp32 forward passes of the tiny model, fivefold
LIMIT_S = 120.0  # of collectives, in a world of one


@contextmanager
def world_of_one(layout: Layout, device: torch.device):
    """Process group and megatron's groups of a single rank."""
    join_world(World(0, 1, 0), device=device, time_limit_s=LIMIT_S)
    try:
        form_groups(layout, seed=0, time_limit_s=LIMIT_S)
        yield
    finally:
        leave_world()


def parameters(device: torch.device) -> Measurement:
    """How many of TransformerEngine's modules have other parameters than the committed table says.

    Raises:
        Skipped: no TransformerEngine that megatron can import, or no GPU.
    """
    _check_usable(device)
    import transformer_engine.pytorch

    found = differences(transformer_engine.pytorch, device)
    told = f"modules of TransformerEngine differ from the table of {VERSION}" + "".join(f"; {line}" for line in found)
    return Measurement(len(found), 0, told)


def layers(trial: Trial, folder: Path, device: torch.device) -> Measurement:
    """How much further from fp32 TransformerEngine's layers are than the local ones, both in bf16.

    Raises:
        Skipped: as `parameters`.
    """
    _check_usable(device)
    return layer_gap(trial, folder, device, candidate="transformer_engine")


def _check_usable(device: torch.device) -> None:
    if not HAVE_TE:
        raise Skipped("TransformerEngine is not installed, or megatron cannot import it")
    if device.type != "cuda":
        raise Skipped("TransformerEngine needs a GPU")


def layer_gap(trial: Trial, folder: Path, device: torch.device, *, candidate: str) -> Measurement:
    """The larger ratio of log-probs and of gradients: distance(candidate bf16, fp32) / distance(local bf16, fp32).

    Distances: of log-probs max |Δ| over tokens; of gradients max over tensors of |Δ|₂ / |fp32|₂.
    """
    layout = derive_layout(tiny_recipe(trial, folder), read_tiny(folder))
    batch = random_batch(np.random.default_rng(2))
    with world_of_one(layout, device):
        exact = _outputs(trial, folder, layout, device, batch, "local", torch.float32)
        local = _outputs(trial, folder, layout, device, batch, "local", torch.bfloat16)
        found = _outputs(trial, folder, layout, device, batch, candidate, torch.bfloat16)
    ratios = [distance(found, exact) / max(distance(local, exact), FLOOR) for distance in (_logprob_gap, _gradient_gap)]
    what = "times the distance of the local layers from fp32, both in bf16; log-probs {:.2f}, gradients {:.2f}"
    return Measurement(float(np.max(ratios)), TIMES, what.format(*ratios))


Outputs = tuple[list[np.ndarray], dict[str, Tensor]]


def _logprob_gap(ours: Outputs, exact: Outputs) -> float:
    return float(max(np.abs(a - b).max() for a, b in zip(ours[0], exact[0], strict=True)))


def _gradient_gap(ours: Outputs, exact: Outputs) -> float:
    gaps = [float((ours[1][name] - whole).norm() / whole.norm()) for name, whole in exact[1].items()]
    return float(np.max(gaps))  # keeps a NaN


def _outputs(
    trial: Trial,
    folder: Path,
    layout: Layout,
    device: torch.device,
    batch: SequenceBatch,
    spec: str,
    dtype: torch.dtype,
) -> Outputs:
    """Log-probs of the batch, and the canonical gradients of its likelihood."""
    learner = _learner(trial, folder, layout, device, spec, dtype, Optimizer(distributed=False))
    logprobs, _ = learner.score(batch)
    learner.gradients(batch, range(len(batch)), supervised_loss(learner.head, denominator=batch.weight_sum))
    local = {f"chunk{v}.{n}": p.main_grad for v, m in enumerate(learner.models) for n, p in m.named_parameters()}
    names = list(learner.weight_layout.shapes)
    whole = whole_on_rank_zero(learner, local, names, dtype=torch.float32, time_limit_s=LIMIT_S)
    return logprobs, {name: gradient.cpu() for name, gradient in whole.items()}


def _learner(
    trial: Trial,
    folder: Path,
    layout: Layout,
    device: torch.device,
    spec: str,
    dtype: torch.dtype,
    optimizer: Optimizer | None,
) -> Learner:
    return Learner(
        read_tiny(folder), layout, dtype=dtype, device=device, layer_spec=spec, tokens_per_micro_batch=512,
        temperature=trial.temperature, weights=folder, optimizer=optimizer,
    )  # fmt: skip


def engine(trial: Trial, folder: Path, device: torch.device) -> Measurement:
    """Mean |log π by vLLM − by the learner| over tokens that vLLM draws, in nats: fp32 on a CPU, bf16 on a GPU.

    In bf16 the bound is TIMES what bf16 costs the learner itself on these tokens.

    Raises:
        Skipped: vLLM is not installed.
    """
    if vllm_version() is None:
        raise Skipped("vLLM is not installed")
    architecture = read_tiny(folder)
    bf16 = device.type == "cuda"
    source = _rounded(folder) if bf16 else folder
    recipe = tiny_recipe(trial, source, rollout={"engine": "vllm"}, model={"dtype": "bf16" if bf16 else "fp32"})
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCABULARY, int(n), dtype=np.int32) for n in rng.integers(3, 60, 8)]
    requests = [
        RolloutRequest(i, prompt, seed=i, max_new_tokens=32, temperature=trial.temperature)
        for i, prompt in enumerate(prompts)
    ]
    layout = derive_layout(recipe, architecture)
    with world_of_one(layout, device):
        logs = folder / "engines"
        with open_engine(recipe, architecture, source, stop_tokens=(), longest_prompt=64, logs=logs) as dispatcher:
            drawn = dispatcher.generate(requests)
        batch = sequence_batch(prompts, [completion.tokens for completion in drawn])
        dtypes = (torch.bfloat16, torch.float32) if bf16 else (torch.float32,)
        scores = [_learner(trial, source, layout, device, "local", d, None).score(batch)[0] for d in dtypes]
    gap = mean_gap(scores[0], [completion.logprobs for completion in drawn])
    bound = TIMES * mean_gap(scores[0], scores[1]) + FP32_NATS if bf16 else FP32_NATS
    tokens = sum(len(completion.tokens) for completion in drawn)
    return Measurement(gap, bound, f"nats a token, mean over {tokens} tokens, {'bf16' if bf16 else 'fp32'}")


def mean_gap(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Mean |difference| over all tokens."""
    return float(np.abs(np.concatenate(list(ours)) - np.concatenate(list(theirs))).mean())


def _rounded(folder: Path) -> Path:
    """The model in bf16, which is the dtype its engine then takes."""
    from safetensors.torch import load_file, save_file

    from dapo_megatron.resharding.hf_layout import SINGLE

    target = folder / "bf16"
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / SINGLE).items()}
    save_file(weights, target / SINGLE, metadata={"format": "pt"})
    return target
