"""DAPO and its relatives on a Megatron-style model-parallel learner, from a laptop to many H100 nodes."""

__version__ = "0.1.0"
