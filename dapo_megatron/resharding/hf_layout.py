"""The canonical tensors of an architecture, and where they lie whole: Hugging Face files, a model in memory."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from dapo_megatron.config import Architecture
from dapo_megatron.errors import RequestError
from dapo_megatron.resharding.layout import Placement, WeightLayout, whole

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
SINGLE = "model.safetensors"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
PIECE = 1 << 24  # bytes compared at a time
VALUE_HEAD = ("score.weight", "score.bias")
ROTARY_BUFFER = "rotary_emb.inv_freq"  # old exporters wrote it along; follows from the architecture


def canonical_tensors(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face name → shape of every tensor. Tied embeddings have no lm_head.weight; a critic has VALUE_HEAD in its
    place, as a token classifier of one label."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab, a.hidden)}
    for i in range(a.layers):
        prefix = f"model.layers.{i}."
        shapes[prefix + "input_layernorm.weight"] = (a.hidden,)
        for letter, heads in (("q", a.heads), ("k", a.kv_heads), ("v", a.kv_heads)):
            shapes[f"{prefix}self_attn.{letter}_proj.weight"] = (heads * a.head_dim, a.hidden)
            if a.qkv_bias:
                shapes[f"{prefix}self_attn.{letter}_proj.bias"] = (heads * a.head_dim,)
        if a.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (a.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (a.head_dim,)
        shapes[prefix + "self_attn.o_proj.weight"] = (a.hidden, a.heads * a.head_dim)
        shapes[prefix + "post_attention_layernorm.weight"] = (a.hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (a.ffn, a.hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (a.ffn, a.hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (a.hidden, a.ffn)
    shapes["model.norm.weight"] = (a.hidden,)
    if a.value_head:
        shapes |= {"score.weight": (1, a.hidden), "score.bias": (1,)}
    elif not a.tied:
        shapes["lm_head.weight"] = (a.vocab, a.hidden)
    return shapes


def whole_layout(a: Architecture, ranks: Iterable[int], names: Iterable[str] | None = None) -> WeightLayout:
    """Every tensor (or those of `names`) whole on each of `ranks`, under its canonical name."""
    shapes = canonical_tensors(a)
    if names is not None:
        shapes = {name: shapes[name] for name in names}
    placements = tuple(Placement(name, whole(shape), name, (0,) * len(shape)) for name, shape in shapes.items())
    return WeightLayout(shapes, {rank: placements for rank in ranks})


def read_headers(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Tensor name → (file, dtype, shape) from the safetensors headers of a Hugging Face folder; reads no weights.

    Raises:
        RequestError: no safetensors file, an index that is not valid or points out of the folder, a file of the index
            missing, a header that is not valid or a file cut short.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        files = _files_of_index(folder / INDEX)
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise RequestError(f"{folder} holds neither {SINGLE} nor {INDEX}{_instead(folder)}")
    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise RequestError(f"{folder / INDEX} names {file}, which is missing")
        found.update({name: (path, dtype, shape) for name, (dtype, shape) in _header(path).items()})
    return found


def check_checkpoint(folder: Path, a: Architecture) -> None:
    """Compare the folder's tensors with what the architecture needs, by name and shape. Headers alone are read; but of
    a tied model with its output layer written along these two tensors, which must be one. A critic may begin without a
    value head, and with an output layer that it has no use for.

    Raises:
        RequestError: tensors missing, not needed, or of another shape; names the first few of each.
    """
    expected, found = canonical_tensors(a), read_headers(folder)
    extra = {name for name in found if name not in expected and not _is_derived(name, a)}
    problems = []
    if missing := sorted(set(expected) - set(found) - set(VALUE_HEAD)):
        problems.append(f"{folder} lacks {_some(missing)}")
    if extra:
        problems.append(f"{folder} holds {_some(sorted(extra))}, unknown to this {a.family} architecture")
    if a.tied and not a.value_head and OUTPUT in found and EMBEDDING in found and _copy_differs(found):
        problems.append(
            f"{folder}: {OUTPUT} differs from {EMBEDDING}, while config.json says tie_word_embeddings=true "
            f"(transformers would not tie them); set it to false there, or leave {OUTPUT} out"
        )
    for name in sorted(set(expected) & set(found)):
        if found[name][2] != expected[name]:
            problems.append(f"{folder}: {name} has shape {found[name][2]}; config.json asks for {expected[name]}")
    if problems:
        raise RequestError("\n".join(problems[:5]))


def _copy_differs(found: dict[str, tuple[Path, str, tuple[int, ...]]]) -> bool:
    """Whether the output layer beside a tied embedding has other bytes than the embedding."""
    (file, start, size), (other, other_start, other_size) = (
        (found[name][0], *_extent(found[name][0], name)) for name in (OUTPUT, EMBEDDING)
    )
    if size != other_size or found[OUTPUT][1:] != found[EMBEDDING][1:]:
        return True
    with open(file, "rb") as one, open(other, "rb") as two:
        one.seek(start)
        two.seek(other_start)
        pieces = (min(PIECE, size - at) for at in range(0, size, PIECE))
        return any(one.read(piece) != two.read(piece) for piece in pieces)


def _extent(path: Path, name: str) -> tuple[int, int]:
    """(first byte, bytes) of a tensor in a file whose header `_header` has found sound."""
    with open(path, "rb") as handle:
        length = struct.unpack("<Q", handle.read(8))[0]
        begin, end = json.loads(handle.read(length))[name]["data_offsets"]
    return 8 + length + begin, end - begin


def _instead(folder: Path) -> str:
    """What a folder without weights that can be read has in their place, for its message."""
    if any(folder.glob("model-*-of-*.safetensors")):
        return "; its files of weights need their index beside them"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return "; pickle files are not read: transformers' save_pretrained makes safetensors of them"
    return ""


def _is_derived(name: str, a: Architecture) -> bool:
    """Buffers and copies that old exporters wrote along and that carry nothing of their own."""
    return name.endswith(ROTARY_BUFFER) or ((a.tied or a.value_head) and name == OUTPUT)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _files_of_index(path: Path) -> list[str]:
    try:
        files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise RequestError(f"{path} is not a safetensors index: {type(error).__name__}: {error}") from None
    for file in files:
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise RequestError(f"{path} is not a safetensors index: {file!r} is not a file of its folder")
    return sorted(files)


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name → (dtype, shape) of one file, whose size must be what its header says."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= size - 8:
            raise RequestError(f"{path} is not a safetensors file or is cut short")
        text = handle.read(length)
    entries, end = {}, 0
    try:
        for name, entry in json.loads(text).items():
            if name != "__metadata__":
                entries[name] = (str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
                end = max(end, int(entry["data_offsets"][1]))
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise RequestError(f"{path} has a damaged safetensors header") from None
    if 8 + length + end > size:
        raise RequestError(f"{path} is cut short: {size} bytes where its header asks for {8 + length + end}")
    if 8 + length + end < size:
        raise RequestError(f"{path} is damaged: {size} bytes where its header asks for {8 + length + end}")
    return entries
