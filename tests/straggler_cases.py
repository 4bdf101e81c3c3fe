"""Run on ranks: one of four is slow, by a clock that the test moves; the others wait for it."""

import threading
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import Work

from dapo_megatron.monitoring import AlertBook
from dapo_megatron.phases import Phases
from dapo_megatron.stragglers import Stragglers

SECONDS = (1.0, 1.0, 8.0, 2.0)  # of each rank's own work; ranks 2 and 3 hold another stage, with more to do


class MovedClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def compared(payload: dict) -> dict:
    """The comparisons of six steps, made every second one, and the alerts that they lead to."""
    rank, clock = dist.get_rank(), MovedClock()
    phases = Phases(clock)
    real_wait = Work.wait

    def wait_for_the_slow_one(work: Work, *arguments: object) -> object:
        clock.now += max(SECONDS) - SECONDS[rank]
        return real_wait(work, *arguments)

    told: dict = {"reports": [], "alerts": []}
    book = AlertBook()
    with patch("socket.gethostname", lambda: f"n{rank}"):
        stragglers = Stragglers(phases, every=2, world=4, stage=rank // 2, device=torch.device("cpu"))
    with patch.object(Work, "wait", wait_for_the_slow_one), phases.counting_waits():
        for step in range(1, 7):
            with phases.own("forward_backward"):
                clock.now += SECONDS[rank]
                dist.all_reduce(torch.ones(1))
            saver = threading.Thread(target=lambda: dist.all_reduce(torch.ones(1)))
            saver.start()  # whose waits are its own affair
            saver.join()
            with patch.object(Work, "wait", real_wait):  # what a comparison costs is no work
                found = stragglers.report(step)
            if found:
                told["reports"].append(found)
            told["alerts"] += book.update({"step": step, **found})
    told["restored"] = Work.wait is real_wait
    return told
