"""The process of one part of `doctor --parity`: `python -m dapo_megatron.doctor.parity_part PART FOLDER`.

Leaves PART.json: number, bound and text, or why it was skipped.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from dapo_megatron.doctor.parity_model import read_trial
from dapo_megatron.doctor.verdict import Measurement, Skipped
from dapo_megatron.errors import exit_with_message
from dapo_megatron.files import write_text_atomically


def measure(part: str, folder: Path) -> Measurement:
    """Run one part here.

    Raises:
        Skipped: it cannot run here.
    """
    import torch

    torch.set_num_threads(1)
    trial = read_trial(folder)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if part == "kernels":
        from dapo_megatron.doctor.parity_kernels import kernels

        return kernels(trial, device)
    if part == "reshard":
        from dapo_megatron.doctor.parity_reshard import reshard

        return reshard(folder)
    from dapo_megatron.doctor import parity_learner

    if part == "parameters":
        return parity_learner.parameters(device)
    return {"layers": parity_learner.layers, "engine": parity_learner.engine}[part](trial, folder, device)


def main(part: str, folder: Path) -> None:
    """Measure, and leave what was found."""
    try:
        told = asdict(measure(part, folder))
    except Skipped as reason:
        told = {"skipped": str(reason)}
    write_text_atomically(folder / f"{part}.json", json.dumps(told))


if __name__ == "__main__":
    with exit_with_message():
        main(sys.argv[1], Path(sys.argv[2]))
