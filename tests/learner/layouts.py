"""Learners under many layouts, built inside a world of test ranks."""

from pathlib import Path

import torch
import torch.distributed as dist

from dapo_megatron.config import Layout, read_architecture
from dapo_megatron.config.architecture import critic_of
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.learner.distributed import form_groups
from dapo_megatron.learner.learner import Learner


def layout_of(name: str, layers: int, vocab: int) -> Layout:
    """ "tp2pp2vpp2sp" → the Layout of the present world; what is not named is 1, data parallelism takes the rest."""
    sizes = {"tp": 1, "pp": 1, "vpp": 1}
    rest = name.removesuffix("sp")
    for key in ("vpp", "pp", "tp"):
        if key in rest:
            rest, _, size = rest.rpartition(key)
            sizes[key] = int(size)
    world = dist.get_world_size()
    return Layout(
        world=world,
        tensor=sizes["tp"],
        pipeline=sizes["pp"],
        virtual_pipeline=sizes["vpp"],
        context=1,
        data=world // (sizes["tp"] * sizes["pp"]),
        sequence_parallel=name.endswith("sp"),
        layers_per_chunk=layers // (sizes["pp"] * sizes["vpp"]),
        mini_batch_prompts=1,
        updates_per_step=1,
        responses_per_step=1,
        padded_vocab=-(-vocab // 64) * 64,
    )


def build(
    folder: str,
    name: str,
    *,
    budget: int = 512,
    train: Optimizer | None = None,
    critic: bool = False,
    groups: bool = True,
    **options: object,
) -> Learner:
    """A learner, or a critic, with the folder's weights under the named layout, fp32; `groups`: whether the layout's
    are formed, not so for a second model beside one."""
    architecture = read_architecture(Path(folder))
    architecture = critic_of(architecture) if critic else architecture
    layout = layout_of(name, architecture.layers, architecture.vocab)
    if groups:
        form_groups(layout, seed=0, time_limit_s=120)
    return Learner(
        architecture,
        layout,
        device=torch.device("cpu"),
        layer_spec="local",
        tokens_per_micro_batch=budget,
        weights=Path(folder),
        optimizer=train,
        **{"dtype": torch.float32, **options},
    )
