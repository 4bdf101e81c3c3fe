"""What a GPU that learner and engines take turns on still holds of either side after each switch."""

import torch


def held_on_card(device: torch.device, phase: str) -> dict[str, float]:
    """Metrics of this rank's GPU as `phase` begins, GiB; nothing on a CPU.

    memory/{phase}/learner_gib: what this process's allocator keeps; memory/{phase}/others_gib: what else is not free,
    an engine's memory and every process's CUDA context.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return {f"memory/{phase}/learner_gib": own / 2**30, f"memory/{phase}/others_gib": (total - free - own) / 2**30}
