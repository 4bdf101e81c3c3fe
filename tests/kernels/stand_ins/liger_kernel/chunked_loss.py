from liger_kernel.transformers.grpo_loss import triton_grpo_loss


class LigerFusedLinearGRPOLoss:
    def __init__(
        self, beta=0.04, compiled=True, use_ref_model=True, chunk_size=1, epsilon_low=0.2, epsilon_high=0.2,
        loss_type="dapo", temperature=1.0, delta=None,
    ):  # fmt: skip
        assert beta == 0.0 and not use_ref_model and chunk_size >= 1 and not compiled
        self.options = {"eps_low": epsilon_low, "eps_high": epsilon_high, "loss_type": loss_type, "delta": delta}
        self.options |= {"temperature": temperature, "beta": beta}

    def __call__(
        self, _input, lin_weight, selected_token_ids, attention_mask, advantages, *, old_per_token_logps=None
    ):  # fmt: skip
        logits = _input @ lin_weight.t()
        logits = logits[:, [*range(logits.shape[1]), -1]]  # the other form has an unused last row
        return triton_grpo_loss(
            logits, old_per_token_logps, None, selected_token_ids, advantages, attention_mask, reduce=True,
            **self.options,
        )  # fmt: skip
