"""The recipe of a run: typed sections, their loading and checking, the model's shape, and what follows from both."""

from dapo_megatron.config.architecture import Architecture, read_architecture
from dapo_megatron.config.check import check_recipe
from dapo_megatron.config.derive import Layout, derive_critic_layout, derive_layout
from dapo_megatron.config.load import dump_recipe, load_recipe
from dapo_megatron.config.recipe import Recipe

__all__ = [
    "Architecture",
    "Layout",
    "Recipe",
    "check_recipe",
    "derive_critic_layout",
    "derive_layout",
    "dump_recipe",
    "load_recipe",
    "read_architecture",
]
