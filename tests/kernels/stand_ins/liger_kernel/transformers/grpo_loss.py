import torch


def triton_grpo_loss(
    logits, old_logp, ref_logp, completion_ids, advantages, completion_mask=None, temperature=0.9, beta=0.04,
    eps_low=0.2, eps_high=0.4, inplace=True, loss_type="dapo", reduce=False, delta=None,
):  # fmt: skip
    """logits [B, L + 1, V], of which the last row is unused; one advantage a sequence; the mean over the mask."""
    assert ref_logp is None and beta == 0.0 and inplace and loss_type == "dapo" and reduce
    log_softmax = torch.log_softmax(logits[:, :-1].float() / temperature, -1)
    logp = log_softmax.gather(-1, completion_ids[..., None]).squeeze(-1)
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.minimum(bounded * advantages[:, None], clipped * advantages[:, None])
    return (loss * completion_mask).sum() / completion_mask.sum(), [completion_mask.new_zeros(())]
