"""Learners under many layouts, built inside a world of test ranks."""

from pathlib import Path

import torch
import torch.distributed as dist

from dapo_megatron.config import Layout, read_architecture
from dapo_megatron.config.architecture import critic_of
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.parallel_groups import form_groups, form_groups_beside, groups_in_force


def layout_of(name: str, layers: int, vocab: int) -> Layout:
    """ "tp2cp2pp2vpp2sp" → the Layout of the present world; what is not named is 1, data parallelism takes the rest."""
    sizes = {"tp": 1, "cp": 1, "pp": 1, "vpp": 1}
    rest = name.removesuffix("sp")
    for key in ("vpp", "pp", "cp", "tp"):
        if key in rest:
            rest, _, size = rest.rpartition(key)
            sizes[key] = int(size)
    world = dist.get_world_size()
    return Layout(
        world=world,
        tensor=sizes["tp"],
        pipeline=sizes["pp"],
        virtual_pipeline=sizes["vpp"],
        context=sizes["cp"],
        data=world // (sizes["tp"] * sizes["cp"] * sizes["pp"]),
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
    beside: bool = False,
    **options: object,
) -> Learner:
    """A learner, or a critic, with the folder's weights under the named layout, fp32. Earlier learners of another
    layout cannot be used any more, unless it is built `beside` them."""
    architecture = read_architecture(Path(folder))
    architecture = critic_of(architecture) if critic else architecture
    layout = layout_of(name, architecture.layers, architecture.vocab)
    present = groups_in_force()
    form = form_groups if present is None or not (beside or present.serve(layout)) else form_groups_beside
    with form(layout, seed=0, time_limit_s=120).in_force():
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
