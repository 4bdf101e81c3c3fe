"""Tiny Hugging Face models with random weights, norms and biases included, so that no term of any formula is trivially
0 or 1."""

from pathlib import Path

import torch

SHAPES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,  # not a multiple of 64: the padded columns must not show
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def write_model(
    folder: Path, family: str, *, tied: bool, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> Path:
    """A `family` ("qwen2", "qwen3", "llama") model with the shapes above, saved by transformers itself."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPES, **changes}, tie_word_embeddings=tied, eos_token_id=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if name.endswith(("norm.weight", "bias")) else 0.15
            parameter.copy_(torch.randn_like(parameter) * scale + (1.0 if name.endswith("norm.weight") else 0.0))
    model.to(dtype).save_pretrained(folder)
    return folder


def write_critic(folder: Path, policy: Path, *, seed: int = 1) -> Path:
    """The policy's decoder with a random value head, saved by transformers as a token classifier of one label."""
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(seed)
    model = AutoModelForTokenClassification.from_pretrained(policy, num_labels=1, local_files_only=True)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn_like(model.score.weight) * 0.2)
        model.score.bias.fill_(0.3)
    model.save_pretrained(folder)
    return folder


def load_critic(folder: Path):
    """The critic as transformers reads it."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(folder, local_files_only=True).eval()


def load_model(folder: Path, dtype: torch.dtype = torch.float32):
    """The model as transformers reads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
