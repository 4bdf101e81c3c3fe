"""Every response that a small policy can give, with its exact probability; the mass of any set of them, in fp64."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masses:
    """What a policy does on average over the prompts, exactly; shares of probability but for reward and kl (nats).

    right: right responses. outside: those that no pair of their prompt holds; outside_wrong: the wrong ones of these.
    chosen, rejected: those that a pair holds. cut: those without an end. kl: Σ p log(p / p₀), p₀ the policy's at the
    start.
    """

    reward: float
    right: float
    outside: float
    outside_wrong: float
    chosen: float
    rejected: float
    cut: float
    kl: float


def every_response(vocabulary: int, end: int, most_tokens: int) -> list[tuple[int, ...]]:
    """All token sequences that a policy can draw: up to `most_tokens` tokens with `end` behind, or cut without it.

    Shorter ones first, those of a length in lexicographic order.
    """
    others = [token for token in range(vocabulary) if token != end]
    ended = [(*prefix, end) for length in range(most_tokens) for prefix in product(others, repeat=length)]
    return ended + list(product(others, repeat=most_tokens))


@torch.no_grad()
def response_logprobs(model, prompt_tokens: Sequence[Sequence[int]], *, end: int, most_tokens: int) -> Tensor:
    """log P(response | prompt), fp64 [prompts, responses], the responses as `every_response` lists them.

    Every prefix is run once, all of a length together. `model`: a causal language model of transformers in fp64; its
    whole vocabulary counts, with numbers of no token too.
    """
    vocabulary = model.config.vocab_size
    others = torch.tensor([token for token in range(vocabulary) if token != end])
    rows = []
    for prompt in prompt_tokens:
        prefixes = torch.tensor([list(prompt)])
        so_far = torch.zeros(1, dtype=torch.float64)
        ended = []
        for left in reversed(range(most_tokens)):
            after = so_far[:, None] + model(input_ids=prefixes).logits[:, -1].double().log_softmax(-1)
            ended.append(after[:, end])
            so_far = after[:, others].flatten()
            if left:
                prefixes = torch.cat(
                    [prefixes.repeat_interleave(len(others), 0), others.repeat(len(prefixes))[:, None]], 1
                )
        rows.append(torch.cat([*ended, so_far]))
    return torch.stack(rows)


def masses(
    logprobs_PR: Tensor,
    start_PR: Tensor,
    *,
    rewards_PR: Tensor,
    right_PR: Tensor,
    chosen_PR: Tensor,
    rejected_PR: Tensor,
    cut_R: Tensor,
) -> Masses:
    """The masses of a policy with these log-probs, mean over prompts. Sets are bool; `start_PR`: the start's."""
    p_PR = logprobs_PR.exp()
    outside_PR = ~(chosen_PR | rejected_PR)
    terms = {
        "reward": p_PR * rewards_PR,
        "right": p_PR * right_PR,
        "outside": p_PR * outside_PR,
        "outside_wrong": p_PR * (outside_PR & ~right_PR),
        "chosen": p_PR * chosen_PR,
        "rejected": p_PR * rejected_PR,
        "cut": p_PR * cut_R,
        "kl": p_PR * (logprobs_PR - start_PR),
    }
    return Masses(**{name: float(values.sum(1).mean()) for name, values in terms.items()})
