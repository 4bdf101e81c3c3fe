import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dapo_megatron.config import Architecture, read_architecture
from dapo_megatron.errors import RequestError
from dapo_megatron.resharding.hf_layout import canonical_tensors, check_checkpoint, read_headers
from tests.resharding.worlds import architecture
from tests.tiny_models import write_model

INDEX = "model.safetensors.index.json"


def tensors_of(a: Architecture) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in canonical_tensors(a).items()}


def write_single(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_pieces(folder: Path, tensors: dict[str, torch.Tensor], pieces: int) -> Path:
    weight_map = {}
    for i in range(pieces):
        part = {name: tensors[name] for name in sorted(tensors)[i::pieces]}
        save_file(part, folder / f"part-{i}.safetensors")
        weight_map.update(dict.fromkeys(part, f"part-{i}.safetensors"))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_that_transformers_writes(tmp_path, family, tied):
    folder = write_model(tmp_path / "model", family, tied=tied)
    a = read_architecture(folder)
    check_checkpoint(folder, a)
    found = {name: shape for name, (_, _, shape) in read_headers(folder).items()}
    assert found == canonical_tensors(a)


def test_a_folder_of_several_files(tmp_path):
    a = architecture()
    check_checkpoint(write_pieces(tmp_path, tensors_of(a), 3), a)
    headers = read_headers(tmp_path)
    assert {path.name for path, _, _ in headers.values()} == {f"part-{i}.safetensors" for i in range(3)}
    assert {dtype for _, dtype, _ in headers.values()} == {"F32"}


def test_missing_tensors_are_named(tmp_path):
    a, tensors = architecture(), tensors_of(architecture())
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    with pytest.raises(RequestError, match=r"lacks model\.layers\.1\.self_attn\.q_proj\.bias$"):
        check_checkpoint(write_single(tmp_path, tensors), a)


def test_many_missing_tensors_are_counted(tmp_path):
    a, shallow = architecture(layers=2), architecture(layers=1)
    gone = len(canonical_tensors(a)) - len(canonical_tensors(shallow))
    with pytest.raises(RequestError, match=f"lacks .* and {gone - 3} more"):
        check_checkpoint(write_single(tmp_path, tensors_of(shallow)), a)


def test_tensors_that_the_architecture_does_not_know_are_named(tmp_path):
    a, tensors = architecture(), tensors_of(architecture())
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(4)
    with pytest.raises(RequestError, match=r"holds model\.layers\.0\.self_attn\.q_norm\.weight, unknown to this qwen2"):
        check_checkpoint(write_single(tmp_path, tensors), a)


def test_another_shape_is_named_with_both(tmp_path):
    a, tensors = architecture(), tensors_of(architecture())
    tensors["model.norm.weight"] = torch.zeros(7)
    with pytest.raises(RequestError, match=r"model\.norm\.weight has shape \(7,\); config\.json asks for \(6,\)"):
        check_checkpoint(write_single(tmp_path, tensors), a)


def test_copies_that_old_exporters_wrote_along_are_let_through(tmp_path):
    tied = architecture(tied=True)
    tensors = tensors_of(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    check_checkpoint(write_single(tmp_path, tensors), tied)
    tensors["lm_head.weight"][-1, -1] += 1
    with pytest.raises(RequestError, match=r"lm_head\.weight differs .* tie_word_embeddings=true"):
        check_checkpoint(write_single(tmp_path, tensors), tied)


@pytest.mark.parametrize(
    ("file", "says"), [("model-00001-of-00002.safetensors", "index"), ("pytorch_model.bin", "save_pretrained")]
)
def test_what_is_there_in_place_of_weights_is_told(tmp_path, file, says):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(RequestError, match=f"holds neither .*; .*{says}"):
        check_checkpoint(tmp_path, architecture())


def test_a_missing_file_of_the_index_is_named(tmp_path):
    a = architecture()
    (write_pieces(tmp_path, tensors_of(a), 2) / "part-1.safetensors").unlink()
    with pytest.raises(RequestError, match=r"names part-1\.safetensors, which is missing"):
        check_checkpoint(tmp_path, a)


@pytest.mark.parametrize("kept", [0, 4, 8, 20, -1])
def test_a_file_cut_short_is_refused(tmp_path, kept):
    a = architecture()
    file = write_single(tmp_path, tensors_of(a)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RequestError, match=r"model\.safetensors is .*cut short"):
        check_checkpoint(tmp_path, a)


def test_bytes_behind_the_last_tensor_are_refused(tmp_path):
    a = architecture()
    file = write_single(tmp_path, tensors_of(a)) / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(RequestError, match=r"model\.safetensors"):
        check_checkpoint(tmp_path, a)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe\xfd",
        b"[]",
        b"7",
        b"null",
        b'{"w": 3}',
        b'{"w": {"dtype": "F32", "shape": [1]}}',
        b'{"w": {"dtype": "F32", "data_offsets": [0, 0]}}',
        b'{"w": {"dtype": "F32", "shape": 1, "data_offsets": [0, 0]}}',
        b'{"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, "x"]}}',
        b'{"w": {"dtype": "F32", "shape": [0], "data_offsets": []}}',
        b"[" * 100_000,
    ],
    ids=lambda header: header[:48].decode("latin-1"),
)
def test_damaged_headers_are_refused(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(RequestError, match=r"model\.safetensors"):
        read_headers(tmp_path)


def test_a_header_that_claims_to_be_enormous_is_refused_without_reading_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(RequestError, match="cut short"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}', '{"weight_map": {"w": 3}}', "[" * 100_000],
)
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(RequestError, match="index"):
        read_headers(tmp_path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/hostname"])
def test_an_index_cannot_point_out_of_its_folder(tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(RequestError, match="index"):
        read_headers(folder)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(RequestError, match=r"holds neither model\.safetensors nor"):
        check_checkpoint(tmp_path, architecture())
