"""Embedded engines on a tiny model, and what transformers says about their output."""

from pathlib import Path

import numpy as np
import torch

from dapo_megatron.data.completions import Completion
from dapo_megatron.rollout.engine import RolloutRequest
from dapo_megatron.rollout.hf_engine import HFEngine
from tests.tiny_models import load_model

VOCAB = 100


def start_engine(folder: Path, *, stop: tuple[int, ...] = (), batch: int = 16, version: int = 0) -> HFEngine:
    """An engine that holds the folder's weights as policy `version`."""
    engine = HFEngine(
        folder, dtype=torch.float32, device=torch.device("cpu"), stop_tokens=stop, max_batch_sequences=batch
    )
    set_weights(engine, load_model(folder))
    engine.update_weights(version)
    return engine


def set_weights(engine: HFEngine, model: torch.nn.Module) -> None:
    """Overwrite the engine's parameters, as resharding does."""
    given = dict(model.named_parameters())
    assert set(given) == set(engine.weights)
    for name, tensor in engine.weights.items():
        tensor.copy_(given[name].detach())


def request(ticket: int, prompt: list[int], new: int, **options: object) -> RolloutRequest:
    """A request whose seed is its ticket unless told."""
    return RolloutRequest(ticket, np.array(prompt, np.int32), **{"seed": ticket, "max_new_tokens": new, **options})


def requests(count: int, *, seed: int = 0, **options: object) -> list[RolloutRequest]:
    """Prompts of 1 to 12 tokens and responses of up to 1 to 14, so that rows finish at different times."""
    generator = np.random.default_rng(seed)
    return [
        request(
            i,
            generator.integers(0, VOCAB, generator.integers(1, 13)).tolist(),
            int(generator.integers(1, 15)),
            **options,
        )
        for i in range(count)
    ]


def generate(engine: HFEngine, wanted: list[RolloutRequest]) -> dict[int, Completion]:
    """All completions by ticket."""
    assert engine.submit(wanted) == [r.ticket for r in wanted]
    done = engine.collect(time_limit_s=120)
    assert sorted(c.ticket for c in done) == sorted(r.ticket for r in wanted)
    return {c.ticket: c for c in done}


@torch.no_grad()
def logprob_table(model: torch.nn.Module, sequence: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / T) [L, V] of one sequence without cache, padding or batch, fp64."""
    return torch.log_softmax(model(torch.tensor([sequence])).logits[0].double() / temperature, dim=-1)


def same(a: Completion, b: Completion) -> bool:
    """Equal tokens, reason and versions, log-probs equal up to fp32 rounding."""
    return (
        a.tokens.tolist() == b.tokens.tolist()
        and a.finish_reason == b.finish_reason
        and a.policy_versions.tolist() == b.policy_versions.tolist()
        and np.allclose(a.logprobs, b.logprobs, atol=2e-5, rtol=0)
    )
