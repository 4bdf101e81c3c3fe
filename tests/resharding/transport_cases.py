"""Run on ranks: plans carried out over gloo, and peers that stay silent."""

import torch
import torch.distributed as dist

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.hf_layout import whole_layout
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.plan import Plan, make_plan
from dapo_megatron.resharding.transport import Transport
from tests.resharding.collectives import Collectives
from tests.resharding.worlds import PADDING, architecture, layout_for, numbered, shards


def transport(
    plan: Plan, *, bucket_bytes: int, window: int, dtype: torch.dtype = torch.float32, **options
) -> Transport:
    return Transport(
        plan, dist.get_rank(), dtype=dtype, device=torch.device("cpu"), bucket_bytes=bucket_bytes, window=window,
        **{"time_limit_s": 60, **options},
    )  # fmt: skip


def move(payload: dict) -> list[dict]:
    """One dictionary a case: "wrong" elements, bytes "sent", "planned" and "copied", "messages", bytes that passed
    through "collectives"; of all ranks."""
    return [_move(case) for case in payload["cases"]]


def _move(case: dict) -> dict:
    a = architecture(case["family"], tied=case["tied"])
    first, rank = layout_for(a, *case["source"]), dist.get_rank()
    source = megatron_layout(a, first)
    mine = shards(a, first, numbered(a))[rank]
    if case["target"] == "whole":
        target = whole_layout(a, range(first.world))
        wanted = numbered(a)
    else:
        second = layout_for(a, *case["target"])
        target = megatron_layout(a, second)
        wanted = shards(a, second, numbered(a))[rank]
    plan = make_plan(source, target)
    dtype = getattr(torch, case["dtype"])
    carrier = transport(plan, bucket_bytes=case["bucket_bytes"], window=case["window"], dtype=dtype)
    totals = torch.zeros(6, dtype=torch.float64)
    # twice: the same plan serves every policy version
    for version in (0, 1):
        weights = {key: tensor.to(dtype) + version for key, tensor in mine.items()}
        into = {key: torch.full(tensor.shape, -7).to(dtype) for key, tensor in wanted.items()}
        with Collectives() as passed:
            report = carrier.run(weights, into)
        wrong = sum(
            int((into[key] != torch.where(t == PADDING, -7, t + version).to(dtype)).sum()) for key, t in wanted.items()
        )
        seen = [sum(passed.bytes.values()), passed.sent["send"]]
        totals += torch.tensor(
            [wrong, report.bytes_sent, report.messages_sent, report.bytes_copied, *seen], dtype=torch.float64
        )
    dist.all_reduce(totals)
    wrong, sent, messages, copied, collectives, seen = (int(n) for n in totals)
    return {
        "wrong": wrong,
        "sent": sent // 2,
        "messages": messages // 2,
        "planned": plan.elements_moved * dtype.itemsize,
        "copied": copied // 2,
        "collectives": collectives,
        "seen": seen // 2,
        "all": sum(m.elements for m in plan.moves) * dtype.itemsize,
    }


def silence(payload: dict) -> list[str]:
    """What rank 0 is told when rank 1 neither sends nor receives."""
    a = architecture()
    store = dist.distributed_c10d._get_default_store()
    told = []
    for giver, taker in ((1, 0), (0, 1)):
        group = dist.new_group([0, 1])
        plan = make_plan(whole_layout(a, [giver]), whole_layout(a, [taker]))
        carrier = transport(plan, bucket_bytes=1 << 20, window=8, time_limit_s=payload["time_limit_s"], group=group)
        if dist.get_rank() == 0:
            weights = {name: t.float() for name, t in numbered(a).items()}
            try:
                carrier.run(weights, weights)
                told.append("no error")
            except RunError as error:
                told.append(str(error))
            store.set(f"given up {giver}", "yes")
        else:
            store.wait([f"given up {giver}"])  # alive, yet silent
    return told
