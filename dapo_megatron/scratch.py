"""A Hugging Face folder with random weights, for models that are trained from nothing."""

import json
import shutil
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dapo_megatron.config import Architecture
from dapo_megatron.config.architecture import architecture_from_dict
from dapo_megatron.config.model import Scratch
from dapo_megatron.data.arithmetic import build_tokenizer
from dapo_megatron.data.tokenizer import load_tokenizer, vocabulary_size
from dapo_megatron.errors import RequestError
from dapo_megatron.files import atomic_path, write_text_atomically
from dapo_megatron.resharding.hf_layout import SINGLE, TOKENIZER_FILES, canonical_tensors

ARITHMETIC = "arithmetic"  # the tokenizer of the generated task
MODEL_CLASS = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def vocabulary_of(scratch: Scratch) -> int:
    """Tokens of the tokenizer. Raises RequestError where its folder cannot be read."""
    if scratch.tokenizer != ARITHMETIC:
        return vocabulary_size(scratch.tokenizer)
    with TemporaryDirectory() as folder:
        return build_tokenizer(Path(folder))


def scratch_config(scratch: Scratch, *, vocabulary: int, eos_token: int) -> dict:
    """The config.json of the model: vocabulary rows are rounded up to `vocab_multiple`."""
    rows = -(-vocabulary // scratch.vocab_multiple) * scratch.vocab_multiple
    config = {
        "architectures": [MODEL_CLASS[scratch.family]],
        "model_type": scratch.family,
        "hidden_size": scratch.hidden,
        "num_hidden_layers": scratch.layers,
        "num_attention_heads": scratch.heads,
        "num_key_value_heads": scratch.kv_heads,
        "head_dim": scratch.head_dim,
        "intermediate_size": scratch.ffn,
        "vocab_size": rows,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": scratch.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": scratch.rope_theta},
        "max_position_embeddings": scratch.max_positions,
        "tie_word_embeddings": scratch.tied,
        "initializer_range": scratch.init_std,
        "eos_token_id": eos_token,
        "torch_dtype": "float32",
    }
    if scratch.family == "qwen2":
        config |= {"use_sliding_window": False}
    return config


def random_weights(architecture: Architecture, *, std: float, seed: int) -> dict[str, np.ndarray]:
    """fp32 by name: norms 1, biases 0, matrices normal(0, std), those that end a residual branch normal(0,
    std/√(2·layers)).

    Every tensor has a random stream of its own, keyed by (seed, name).
    """
    weights = {}
    for name, shape in canonical_tensors(architecture).items():
        if name.endswith("norm.weight"):
            weights[name] = np.ones(shape, np.float32)
        elif name.endswith(".bias"):
            weights[name] = np.zeros(shape, np.float32)
        else:
            ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std / (2 * architecture.layers) ** 0.5 if ends_branch else std
            draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
            weights[name] = (draw.standard_normal(shape) * scale).astype(np.float32)
    return weights


def build_scratch_model(folder: Path, scratch: Scratch, *, seed: int) -> None:
    """Write config.json, tokenizer and model.safetensors into `folder`.

    Raises:
        RequestError: the tokenizer's folder cannot be read, or names no end of sequence.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if scratch.tokenizer == ARITHMETIC:
        vocabulary = build_tokenizer(folder)
        tokens = {t["content"]: t["id"] for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
        eos_token = tokens["<eos>"]
    else:
        vocabulary, eos_token = _copy_tokenizer(Path(scratch.tokenizer), folder)
    config = scratch_config(scratch, vocabulary=vocabulary, eos_token=eos_token)
    write_text_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    architecture = architecture_from_dict(config, str(folder / "config.json"))
    with atomic_path(folder / SINGLE) as path:
        save_file(random_weights(architecture, std=scratch.init_std, seed=seed), path, metadata={"format": "pt"})


def _copy_tokenizer(source: Path, folder: Path) -> tuple[int, int]:
    """(vocabulary size, end of sequence) of the tokenizer that is copied."""
    eos_token = load_tokenizer(source).eos_token_id
    if eos_token is None:
        raise RequestError(f"model.scratch.tokenizer={source} names no end-of-sequence token; set eos_token there")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return vocabulary_size(source), eos_token
