"""What the doctor's tests do on a rank."""

from pathlib import Path

import torch

from dapo_megatron.doctor import parity_learner
from dapo_megatron.doctor.parity_model import read_trial
from dapo_megatron.learner.distributed import leave_world

CANDIDATE = 2  # the third learner that a comparison of layers builds


def layers(payload: dict) -> list[list[float]]:
    """(number, bound) with the local layers in TransformerEngine's place: as they are, and with a wrong norm."""
    folder, device = Path(payload["folder"]), torch.device("cpu")
    leave_world()  # the part makes its own
    plain, built = parity_learner._learner, []

    def damaged(*arguments):
        learner = plain(*arguments)
        if len(built) == CANDIDATE:
            learner.weights["chunk0.decoder.layers.1.input_layernorm.weight"].mul_(1.1)
        built.append(learner)
        return learner

    found = []
    for build in (plain, damaged):
        parity_learner._learner = build
        measured = parity_learner.layer_gap(read_trial(folder), folder, device, candidate="local")
        found.append([measured.number, measured.bound])
    return found
