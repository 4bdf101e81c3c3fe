"""Run on ranks: vLLM's own models, built and loaded by vLLM, beside what the layout says about them."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from dapo_megatron.config import read_architecture
from dapo_megatron.resharding.vllm_layout import vllm_layout, vllm_local_shapes
from tests.resharding.worlds import PADDING, numbered

FIRST_RANK = 3  # any: the layout's rank numbers start here


def compare(payload: dict) -> list[list[str]]:
    """What differs between vLLM and the layout, a list of sentences for each model folder; of all ranks."""
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    tensor, rank = dist.get_world_size(), dist.get_rank()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(tensor, rank, "env://", 0, "gloo")
        initialize_model_parallel(tensor_model_parallel_size=tensor)
    found = []
    for folder in payload["folders"]:
        told: list = [None] * tensor
        dist.all_gather_object(told, _differences(Path(folder), tensor, rank))
        found.append([f"worker {r}: {text}" for r, texts in enumerate(told) for text in texts])
    return found


def _differences(folder: Path, tensor: int, worker: int) -> list[str]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    a = read_architecture(folder)
    arguments = EngineArgs(
        str(folder), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64,
        tensor_parallel_size=tensor, distributed_executor_backend="mp",
    )  # fmt: skip
    model = initialize_model(arguments.create_engine_config())
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    expected = vllm_local_shapes(a, tensor)
    texts = [
        f"{name}: vLLM {shapes.get(name)}, layout {expected.get(name)}"
        for name in sorted(shapes.keys() | expected.keys())
        if shapes.get(name) != expected.get(name)
    ]
    if texts:
        return texts
    whole = numbered(a)
    model.load_weights((name, tensor.float()) for name, tensor in whole.items())
    rank = FIRST_RANK + 2 * tensor + worker  # of the third engine
    mine = {name: torch.full(shape, PADDING) for name, shape in expected.items()}
    for p in vllm_layout(a, engines=3, tensor=tensor, first_rank=FIRST_RANK).placements[rank]:
        inside = tuple(slice(o, o + n) for o, n in zip(p.offset, p.shape, strict=True))
        mine[p.key][inside] = whole[p.name][tuple(slice(*edge) for edge in p.box)]
    for name, tensor_ in mine.items():
        held = tensor_ != PADDING
        if not torch.equal(parameters[name].detach()[held].long(), tensor_[held]):
            texts.append(f"{name}: other elements than the layout says")
        if (~held).any() and "embed" not in name and "lm_head" not in name:
            texts.append(f"{name}: {int((~held).sum())} elements in no placement")
    return texts
