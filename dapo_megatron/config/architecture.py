"""The shape of a model, read from a Hugging Face folder's config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dapo_megatron.config.problems import join_or, show
from dapo_megatron.errors import RequestError

Family = Literal["qwen2", "llama", "qwen3"]

FAMILIES: Mapping[str, Family] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type of config.json -> family; Mistral has Llama's layers."""

LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""The llama3 rope parameters that megatron-core (RotaryEmbedding._apply_scaling) fixes; `factor` alone is free."""

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Architecture:
    """A dense decoder of the Qwen2, Llama or Qwen3 family: RMSNorm, rotary embedding, grouped queries, SwiGLU."""

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int  # rows of the embedding, often more than the tokenizer has
    tied: bool  # output layer and embedding share weights
    qkv_bias: bool
    qk_norm: bool
    rms_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # None, or llama3 with rope_type, factor and LLAMA3_ROPE's keys
    max_positions: int
    sliding_window: int | None  # tokens that attention looks back; None = all
    eos_token_ids: tuple[int, ...]
    init_std: float
    torch_dtype: str  # of the stored weights, e.g. "bfloat16"
    value_head: bool = False  # a critic: one number a token in the place of logits


def critic_of(architecture: Architecture) -> Architecture:
    """The same decoder with a value head: without an output layer there is nothing to tie."""
    return replace(architecture, tied=False, value_head=True)


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture in `folder`/config.json.

    Raises RequestError: no such folder or file, broken JSON (line and column), and all that
    `architecture_from_dict` refuses.
    """
    path = Path(folder) / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not Path(folder).is_dir():
            raise RequestError(f"model folder {folder} does not exist; expected a local Hugging Face folder") from None
        raise RequestError(f"model folder {folder} has no config.json; expected a Hugging Face folder") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except RecursionError:
        raise RequestError(f"{path}: broken JSON: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(settings, dict):
        raise RequestError(f"{path}: expected a JSON object")
    return architecture_from_dict(settings, str(path))


def architecture_from_dict(settings: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that the keys and values of a config.json describe.

    Reads the style of transformers 4 (rope_theta, rope_scaling) and of 5 (rope_parameters). Optional, with the value
    that transformers gives them: num_key_value_heads (= heads), head_dim (hidden // heads; Qwen3 128),
    tie_word_embeddings (false), hidden_act (silu), initializer_range (0.02), eos_token_id (none), torch_dtype or dtype
    (float32).

    Raises RequestError, each line prefixed by `where`: unknown model_type; missing keys; wrong types; an activation
    other than silu; biases of the output projection or the feed-forward layer; rope other than default and the llama3
    that megatron-core builds; Qwen's sliding window; mixtures of experts; sizes that cannot go together.
    """
    model_type = settings.get("model_type")
    if model_type is None:
        raise RequestError(f"{where} lacks model_type; known are {join_or(sorted(FAMILIES))}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise RequestError(f"{where}: model_type={show(model_type)} is not supported; use {join_or(sorted(FAMILIES))}")
    reader = _Reader(settings)
    # keys are all read first, so that every missing or mistyped one is named at once
    layers, hidden, heads, ffn, vocab, max_positions = (reader.integer(key) for key in _SIZES)
    kv_heads = reader.integer("num_key_value_heads", heads)
    head_dim = reader.integer("head_dim", 128 if model_type == "qwen3" else hidden // heads)
    rms_eps = reader.number("rms_norm_eps")
    rope_theta, rope_scaling = _read_rope(reader)
    architecture = Architecture(
        family=FAMILIES[model_type],
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        tied=reader.truth("tie_word_embeddings"),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        rms_eps=rms_eps,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_positions=max_positions,
        sliding_window=_read_sliding_window(reader, model_type),
        eos_token_ids=_read_eos(reader),
        init_std=reader.number("initializer_range", 0.02),
        torch_dtype=_read_dtype(reader),
    )
    _refuse_unsupported(reader, model_type, architecture)
    if reader.problems:
        raise RequestError("\n".join(f"{where}: {problem}" for problem in reader.problems))
    return architecture


class _Reader:
    """Typed access to keys; a problem is noted and a harmless value returned, so that reading goes on."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.problems: list[str] = []

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.settings.get(key)
        if value is None:
            if default is None:
                self.problems.append(f"{key} is missing")
            return default or 1
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problems.append(f"{key}={show(value)}: expected a whole number of at least 1")
            return 1
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.settings.get(key)
        if value is None:
            if default is None:
                self.problems.append(f"{key} is missing")
            return default or 1.0
        return self.positive(key, value)

    def positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.problems.append(f"{key}={show(value)}: expected a number more than 0")
            return 1.0
        return float(value)

    def truth(self, key: str) -> bool:
        value = self.settings.get(key)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{key}={show(value)}: expected true or false")
        return value is True


def _rope_setting(rope: Mapping[str, Any], key: str) -> Any:
    """The setting, its kind under either of its names."""
    return rope.get("rope_type", rope.get("type", "default")) if key in ("rope_type", "type") else rope.get(key)


def _read_rope(reader: _Reader) -> tuple[float, dict[str, Any] | None]:
    settings = reader.settings
    place = "rope_parameters" if settings.get("rope_parameters") is not None else "rope_scaling"
    rope = settings.get(place)
    rope = {} if rope is None else rope
    if not isinstance(rope, Mapping):
        reader.problems.append(f"{place}={show(rope)}: expected an object or null")
        rope = {}
    older = settings.get("rope_scaling")
    older = older if place == "rope_parameters" and isinstance(older, Mapping) else {}
    # transformers lets the older key win
    if any(_rope_setting(rope, key) != _rope_setting(older, key) for key in older):
        reader.problems.append("rope_parameters and rope_scaling contradict each other; keep the one that is meant")
    theta = rope.get("rope_theta", settings.get("rope_theta"))
    if theta is None:
        # checkpoints differ by a factor of 100 here: a guess would run and be wrong
        reader.problems.append("rope_theta is missing (transformers would take 10000.0)")
        theta = 10000.0
    theta = reader.positive("rope_theta", theta)
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if partial not in (None, 1):
        reader.problems.append(f"partial_rotary_factor={show(partial)} is not supported; only 1 is")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        reader.problems.append(f"rope type {show(kind)} in {place} is not supported; use default or llama3")
        return theta, None
    for key, fixed in LLAMA3_ROPE.items():
        value = rope.get(key)
        if value != fixed:
            what = "is missing" if value is None else f"={show(value)} is not supported"
            reader.problems.append(f"{place}.{key}{' ' * (value is None)}{what}; llama3 rope is built with {fixed}")
    if rope.get("factor") is None:
        reader.problems.append(f"{place}.factor is missing")
        return theta, None
    return theta, {
        "rope_type": "llama3",
        "factor": reader.positive(f"{place}.factor", rope["factor"]),
        **LLAMA3_ROPE,
    }


def _read_sliding_window(reader: _Reader, model_type: str) -> int | None:
    settings = reader.settings
    if model_type.startswith("qwen"):
        kinds = settings.get("layer_types")
        if reader.truth("use_sliding_window"):
            reader.problems.append("use_sliding_window=true is not supported; only false is")
        elif isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
            reader.problems.append("layer_types other than full_attention are not supported")
        return None  # Qwen's files carry a window that use_sliding_window=false switches off
    if model_type == "mistral" and "sliding_window" not in settings:
        reader.problems.append("sliding_window is missing (transformers would take 4096); write null for none")
    if settings.get("sliding_window") is None:
        return None
    return reader.integer("sliding_window")


def _read_eos(reader: _Reader) -> tuple[int, ...]:
    value = reader.settings.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        reader.problems.append(f"eos_token_id={show(value)}: expected a token id, a list of them or null")
        return ()
    return tuple(ids)


def _read_dtype(reader: _Reader) -> str:
    value = reader.settings.get("torch_dtype")
    if value is None:
        value = reader.settings.get("dtype")
    if value is None:
        return "float32"
    if not isinstance(value, str):
        reader.problems.append(f"torch_dtype={show(value)}: expected text such as bfloat16")
    return str(value)


def _refuse_unsupported(reader: _Reader, model_type: str, shape: Architecture) -> None:
    settings, problems = reader.settings, reader.problems
    if settings.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act={show(settings['hidden_act'])} is not supported; only silu is")
    if reader.truth("mlp_bias"):
        problems.append("mlp_bias=true is not supported; only false is")
    if model_type != "qwen2" and reader.truth("attention_bias"):
        problems.append("attention_bias=true is not supported: it puts a bias on o_proj too; only false is")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if settings.get(key):
            problems.append(f"{key}={show(settings[key])}: mixtures of experts are not supported, only dense models")
    if problems:
        return  # sizes below may be stand-ins
    if shape.heads % shape.kv_heads:
        problems.append(f"num_key_value_heads={shape.kv_heads} does not divide num_attention_heads={shape.heads}")
    if settings.get("head_dim") is None and model_type != "qwen3" and shape.hidden % shape.heads:
        problems.append(
            f"head_dim is missing and hidden_size={shape.hidden} is no multiple of num_attention_heads={shape.heads}"
        )
    elif shape.head_dim % 2:
        problems.append(f"head_dim={shape.head_dim} is odd; rotary embedding needs an even one")
