"""Run on ranks: one leaves without a word."""

import os

import torch
import torch.distributed as dist

from dapo_megatron.worker import lost_rank


def left_alone(payload: dict) -> dict:
    """What the rank that stays is told, and whether it is understood."""
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 1:
        os._exit(0)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return {"told": str(error), "understood": lost_rank(error)}
    return {"told": "nothing"}
