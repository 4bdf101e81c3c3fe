"""Every way to call an op, compiled for sm_90 as the op itself launches it: on tensors without values, each launch a
compilation. Run as a module (TRITON_INTERPRET unset): prints one JSON object, way → kernels compiled."""

import json
from unittest import mock

import torch
from dapo_kernels import (
    clipped_policy_loss,
    linear_chunks,
    linear_clipped_policy_loss,
    linear_logprobs_and_entropy,
    logprobs,
    logprobs_and_entropy,
    policy_loss,
    triton_rows,
)

from tests.kernels.ahead_of_time import activate

CARD = torch.device("meta")
ROWS, COLUMNS, WIDTH = 48, 256, 16
CLIP = {"eps_low": 0.2, "eps_high": 0.28}
KL = {"reference_logprobs": torch.ones(ROWS, device=CARD), "kl_coefficient": 0.1}


def ways() -> dict[str, dict]:
    """name → options of the clipped losses, those of log-probs among them."""
    numbers = torch.ones(1, device=CARD)
    return {
        "plain": {"denominator": 3.0},
        "a tensor to divide by": {"denominator": numbers},
        "a tensor as temperature": {"denominator": 3.0, "temperature": numbers.reshape(())},
        "a temperature a row": {"denominator": 3.0, "temperature": torch.ones(ROWS, device=CARD)},
        "entropy, dual clip": {"denominator": 3.0, "entropy_coefficient": 0.1, "eps_dual": 3.0},
        "k2": {"denominator": 3.0, "kl_estimator": "k2", **KL},
        "k3": {"denominator": 3.0, "kl_estimator": "k3", **KL},
        "padded": {"denominator": 3.0, "vocab_size": COLUMNS - 3},
    }


def vectors(dtype: torch.dtype) -> list[torch.Tensor]:
    """targets, old log-probs, advantages, weights."""
    return [torch.zeros(ROWS, dtype=torch.int64, device=CARD), *torch.ones(3, ROWS, dtype=dtype, device=CARD)]


def call_all(options: dict, dtype: torch.dtype, vector_dtype: torch.dtype) -> None:
    of_logprobs = {key: value for key, value in options.items() if key in ("temperature", "vocab_size")}
    targets, *rest = vectors(vector_dtype)
    logits = torch.empty(ROWS, COLUMNS, dtype=dtype, device=CARD).requires_grad_()
    hidden = torch.empty(ROWS, WIDTH, dtype=dtype, device=CARD).requires_grad_()
    weight = torch.empty(COLUMNS, WIDTH, dtype=dtype, device=CARD).requires_grad_()
    rows = torch.zeros(ROWS // 2, dtype=torch.int64, device=CARD)
    clipped_policy_loss(logits * 1, targets, *rest, **CLIP, **options).loss.backward()
    linear_clipped_policy_loss(hidden, weight, targets, *rest, rows=rows, **CLIP, **options).loss.backward()
    with torch.no_grad():
        clipped_policy_loss(logits, targets, *rest, **CLIP, **options)
    for mask in (None, rest[-1] > 0):
        found = logprobs_and_entropy(logits * 1, targets, row_mask=mask, **of_logprobs)
        (found.logprobs.sum() + found.entropy.sum()).backward()
    found = linear_logprobs_and_entropy(hidden, weight, targets, chunk_rows=ROWS // 2, **of_logprobs)
    (found.logprobs.sum() + found.entropy.sum()).backward()


def main() -> None:
    activate("sm_90")
    seen: set[str] = set()

    def compile_launch(kernel, tile, rows_of, *arguments, most_programs=0, **constants):
        assert arguments[0] is None or arguments[0].device == CARD
        kernel.warmup(*arguments, grid=(ROWS,), ROWS=tile.rows, **constants, num_warps=tile.warps)
        seen.add(kernel.__name__)

    report = {}
    with (
        mock.patch.object(triton_rows, "_launch", compile_launch),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
    ):
        for module in (logprobs, policy_loss, linear_chunks):
            mock.patch.object(module, "choose_implementation", lambda *_: "triton").start()
        for whole in (True, False):
            with mock.patch.object(triton_rows, "WHOLE_ROWS_AT_ONCE", whole):
                for name, options in ways().items():
                    if not whole and name not in ("plain", "a temperature a row", "entropy, dual clip"):
                        continue  # compiled within the whole already
                    seen.clear()
                    call_all(options, torch.bfloat16, torch.float32)
                    report[f"{name}, {'whole' if whole else 'a rank'}"] = sorted(seen)
                for dtype, vector_dtype in ((torch.float32, torch.bfloat16), (torch.float16, torch.float64)):
                    seen.clear()
                    call_all(ways()["plain"], dtype, vector_dtype)
                    report[f"{dtype} with {vector_dtype}, {'whole' if whole else 'a rank'}"] = sorted(seen)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
