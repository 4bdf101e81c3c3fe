"""Real megatron modules, gradient buffers and optimizer of recipes, on the meta device in a fake world: their sizes.

Layers of TransformerEngine are megatron's around a stand-in that has the parameters of a committed table.

Run as a program with one JSON list of cases on standard input; a process of its own, for it leaves megatron and torch
believing in devices that do not exist.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dapo_megatron.config import Architecture, Layout, Recipe, derive_layout, load_recipe
from dapo_megatron.config.architecture import critic_of
from dapo_megatron.learner import megatron_cpu
from tests.planning import te_stand_in

te_stand_in.install()  # before megatron looks for the package
megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from dapo_megatron.learner.model import DTYPES, build_chunks, transformer_config  # noqa: E402
from dapo_megatron.learner.optimizer import build_optimizer  # noqa: E402
from dapo_megatron.prepare import planned_architecture  # noqa: E402
from dapo_megatron.resharding.megatron_layout import megatron_layout  # noqa: E402

TYPE_NAMES = {torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float32: "torch.cuda.FloatTensor"}


def built(recipe: Recipe, a: Architecture, layout: Layout, spec: str) -> dict[str, Any]:
    """Sizes of every (pipeline, tensor) position, each once, at a data-parallel rank that changes with it."""
    placements = megatron_layout(a, layout, layer_spec=spec).placements
    positions, whole = [], 0
    for pipeline in range(layout.pipeline):
        for tensor in range(layout.tensor):
            data = (layout.data - 1) * (tensor % 2) if layout.tensor > 1 else layout.data - 1
            rank = tensor + layout.tensor * (data + layout.data * pipeline)
            found = _rank(recipe, a, layout, rank, spec)
            assert found.pop("keys") == sorted({p.key for p in placements[rank]})
            whole += found.pop("own") if tensor else found.pop("own") + found.pop("shared_by_all")
            found.pop("shared_by_all", None)
            positions.append({"pipeline": pipeline, "tensor": tensor, "data": data, **found})
    return {"positions": positions, "whole": whole - (layout.padded_vocab - a.vocab) * a.hidden * _vocabularies(a)}


def _vocabularies(a: Architecture) -> int:
    return 1 if a.tied or a.value_head else 2


def _rank(recipe: Recipe, a: Architecture, layout: Layout, rank: int, spec: str) -> dict[str, Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,  # theirs are real
    )
    model_parallel_cuda_manual_seed(0)
    dtype = DTYPES[recipe.model.dtype]
    config = transformer_config(a, layout, dtype=dtype, layer_spec=spec)
    if spec != "local":
        config.use_cpu_initialization = False  # as on a GPU: TransformerEngine's modules then keep their own parameters
    with torch.device("meta"):
        models = build_chunks(config, a, layout, layer_spec=spec)
        wrapped = [Float16Module(config, m) if dtype is torch.bfloat16 else m for m in models]
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=recipe.optimizer.distributed, overlap_grad_reduce=False
        )
        chunks = [DistributedDataParallel(config, ddp, m, disable_bucketing=i > 0) for i, m in enumerate(wrapped)]
        optimizer = build_optimizer(recipe.optimizer, chunks, dtype=dtype)
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        for part in parts:
            part.init_state_fn(part.optimizer, part.config)
    named = {f"chunk{v}.{name}": p for v, m in enumerate(models) for name, p in m.named_parameters()}
    assert {p.device.type for p in named.values()} == {"meta"}
    copies = [p for p in named.values() if getattr(p, "shared", False)]  # the last stage's of a tied embedding
    cut = [p for p in named.values() if getattr(p, "tensor_model_parallel", False)]
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in named.values()}
    found = {
        "keys": sorted(named),
        "own": sum(p.numel() for p in cut if not any(p is c for c in copies)),
        "shared_by_all": sum(p.numel() for p in named.values() if not any(p is c for c in (*cut, *copies))),
        "parameters": sum(storages.values()),
        "gradients": sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers),
        "optimizer": sum(_optimizer_bytes(part, named.values()) for part in parts),
    }
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found


def _optimizer_bytes(part: Any, parameters: Any) -> int:
    """Main parameters that are not the model's own memory, and all moments."""
    own = {p.untyped_storage()._cdata for p in parameters}
    total = 0
    for group in part.optimizer.param_groups:
        for main in group["params"]:
            total += 0 if main.untyped_storage()._cdata in own else main.numel() * main.element_size()
            state = part.optimizer.state[main]
            total += sum(state[name].numel() * state[name].element_size() for name in ("exp_avg", "exp_avg_sq"))
    return total


def main() -> None:
    torch.cuda.current_device = lambda: torch.device("meta")
    for name in ("get_data_parallel_group_gloo", "get_expert_data_parallel_group_gloo"):  # for checkpoints alone
        setattr(parallel_state, name, lambda *args, **kwargs: None)
    cast = torch.Tensor.type
    torch.Tensor.type = lambda self, dtype=None, **options: (
        TYPE_NAMES[self.dtype] if dtype is None else cast(self, dtype, **options)
    )
    results = []
    for case in json.load(sys.stdin):
        started = time.perf_counter()
        recipe = load_recipe(Path(case["recipe"]), case["overrides"])
        a = planned_architecture(recipe, folder_needed=False)
        a = critic_of(a) if case["critic"] else a
        found = built(recipe, a, derive_layout(recipe, a), case["spec"])
        results.append({**found, "seconds": time.perf_counter() - started})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
