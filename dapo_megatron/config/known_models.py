"""The shapes of published models, so that a recipe can be planned where their folders are not.

Source: the config.json of each model's base folder (Qwen2.5: table of the technical report, arXiv 2412.15115; Qwen3:
arXiv 2505.09388). Of Qwen3-32B no base model is published: its row is the instruct model's, whose end token,
<|im_end|>, is of no account here. A folder that `model.path` names is read all the same and must agree (`check_known`).
"""

from collections.abc import Mapping
from types import MappingProxyType

from dapo_megatron.config.architecture import Architecture, Family
from dapo_megatron.errors import RequestError

COMPARED = ("family", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied")
"""What decides sizes; a folder may differ in the rest (instruct and base models differ in positions and eps)."""

_ROWS: tuple[tuple[str, Family, int, int, int, int, int, int, int, bool, int], ...] = (
    # name, family, layers, hidden, heads, kv heads, head_dim, ffn, vocabulary rows, tied, positions
    ("qwen2.5-0.5b", "qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, 32768),
    ("qwen2.5-1.5b", "qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, 131072),
    ("qwen2.5-3b", "qwen2", 36, 2048, 16, 2, 128, 11008, 151936, True, 32768),
    ("qwen2.5-7b", "qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, 131072),
    ("qwen2.5-14b", "qwen2", 48, 5120, 40, 8, 128, 13824, 152064, False, 131072),
    ("qwen2.5-32b", "qwen2", 64, 5120, 40, 8, 128, 27648, 152064, False, 131072),
    ("qwen2.5-72b", "qwen2", 80, 8192, 64, 8, 128, 29568, 152064, False, 131072),
    ("qwen3-8b", "qwen3", 36, 4096, 32, 8, 128, 12288, 151936, False, 32768),
    ("qwen3-14b", "qwen3", 40, 5120, 40, 8, 128, 17408, 151936, False, 32768),
    ("qwen3-32b", "qwen3", 64, 5120, 64, 8, 128, 25600, 151936, False, 40960),
)


def _architecture(row: tuple) -> Architecture:
    _, family, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, tied, positions = row
    return Architecture(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        tied=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rms_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_positions=positions,
        sliding_window=None,
        eos_token_ids=(151643,),
        init_std=0.02,
        torch_dtype="bfloat16",
    )


KNOWN_MODELS: Mapping[str, Architecture] = MappingProxyType({row[0]: _architecture(row) for row in _ROWS})
"""Name as `model.architecture` takes it → architecture."""


def check_known(name: str, found: Architecture, folder: str) -> None:
    """Refuse a folder whose model has other sizes than the one that the recipe was planned for.

    Raises:
        RequestError: each size that differs, one a line.
    """
    planned = KNOWN_MODELS[name]
    problems = [
        f"model.architecture={name} has {key}={getattr(planned, key)} and {folder} has {getattr(found, key)}; "
        "use the model that the recipe was planned for, or model.architecture=null"
        for key in COMPARED
        if getattr(planned, key) != getattr(found, key)
    ]
    if problems:
        raise RequestError("\n".join(problems))
