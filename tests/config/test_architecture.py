"""config.json of the supported families, in both styles of rope, and everything that is refused."""

import json

import pytest

from dapo_megatron.config import read_architecture
from dapo_megatron.config.architecture import architecture_from_dict
from dapo_megatron.errors import RequestError

QWEN25_32B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27648,
    "max_position_embeddings": 131072,
    "max_window_layers": 64,
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
SMOLLM2 = {
    "model_type": "llama",
    "attention_bias": False,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
MISTRAL = {
    "model_type": "mistral",
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": [151645, 151643],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3 = SMOLLM2 | {
    "eos_token_id": [128001, 128008, 128009],
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def with_rope_parameters(settings: dict) -> dict:
    """The same model as transformers 5 writes it."""
    moved = {key: value for key, value in settings.items() if key not in ("rope_theta", "rope_scaling")}
    scaling = settings.get("rope_scaling") or {"rope_type": "default"}
    return moved | {"rope_parameters": scaling | {"rope_theta": settings["rope_theta"]}}


def without(settings: dict, *keys: str) -> dict:
    return {key: value for key, value in settings.items() if key not in keys}


@pytest.mark.parametrize("style", [dict, with_rope_parameters])
def test_qwen25(style):
    shape = architecture_from_dict(style(QWEN25_32B), "here")
    assert (shape.family, shape.layers, shape.hidden, shape.ffn) == ("qwen2", 64, 5120, 27648)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (40, 8, 128)
    assert (shape.vocab, shape.max_positions, shape.eos_token_ids) == (152064, 131072, (151643,))
    assert (shape.tied, shape.qkv_bias, shape.qk_norm) == (False, True, False)
    assert (shape.rms_eps, shape.rope_theta, shape.rope_scaling) == (1e-5, 1e6, None)
    assert shape.sliding_window is None  # the file has one that use_sliding_window switches off
    assert (shape.init_std, shape.torch_dtype) == (0.02, "bfloat16")


@pytest.mark.parametrize("style", [dict, with_rope_parameters])
def test_smollm2(style):
    shape = architecture_from_dict(style(SMOLLM2), "here")
    assert (shape.family, shape.tied, shape.qkv_bias, shape.qk_norm) == ("llama", True, False, False)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (9, 3, 64)
    assert (shape.rope_theta, shape.init_std, shape.eos_token_ids) == (1e5, 0.041666666666666664, (0,))


@pytest.mark.parametrize("style", [dict, with_rope_parameters])
def test_mistral_reads_as_llama_with_its_window(style):
    shape = architecture_from_dict(style(MISTRAL), "here")
    assert (shape.family, shape.qkv_bias, shape.sliding_window) == ("llama", False, 4096)
    assert shape.torch_dtype == "float32"
    assert architecture_from_dict(style(MISTRAL | {"sliding_window": None}), "here").sliding_window is None


def test_qwen3():
    shape = architecture_from_dict(QWEN3, "here")
    assert (shape.family, shape.tied, shape.qkv_bias, shape.qk_norm) == ("qwen3", True, False, True)
    assert shape.head_dim == 128  # not hidden / heads = 64
    assert (shape.eos_token_ids, shape.rope_theta, shape.torch_dtype) == ((151645, 151643), 1e6, "bfloat16")
    old = without(QWEN3, "rope_parameters") | {"rope_theta": 1000000, "rope_scaling": None}
    assert architecture_from_dict(old, "here") == shape
    for same in ({"type": "default"}, {"rope_type": "default", "rope_theta": 1000000}):
        assert architecture_from_dict(QWEN3 | {"rope_scaling": same}, "here") == shape


@pytest.mark.parametrize("style", [dict, with_rope_parameters])
def test_llama3_rope(style):
    shape = architecture_from_dict(style(LLAMA3), "here")
    assert shape.rope_theta == 5e5
    assert shape.rope_scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }
    assert shape.eos_token_ids == (128001, 128008, 128009)


def test_what_transformers_fills_in_may_be_absent():
    bare = without(
        SMOLLM2, "num_key_value_heads", "hidden_act", "initializer_range", "torch_dtype", "tie_word_embeddings"
    )
    shape = architecture_from_dict(bare | {"head_dim": None, "eos_token_id": None}, "here")
    assert (shape.kv_heads, shape.head_dim, shape.init_std) == (9, 64, 0.02)
    assert (shape.torch_dtype, shape.tied, shape.eos_token_ids) == ("float32", False, ())
    assert architecture_from_dict(without(QWEN3, "head_dim"), "here").head_dim == 128


def test_qwen2_has_its_biases_whatever_attention_bias_says():
    # transformers ignores the key there: q, k and v have a bias, o_proj has none
    assert architecture_from_dict(QWEN25_32B | {"attention_bias": True}, "here").qkv_bias is True


def test_a_file_transformers_wrote(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("Qwen2Config", "LlamaConfig", "MistralConfig", "Qwen3Config"):
        config = getattr(transformers, name)(
            hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
            rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )  # fmt: skip
        config.save_pretrained(tmp_path / name)
        shape = read_architecture(tmp_path / name)
        assert (shape.layers, shape.hidden, shape.ffn, shape.vocab) == (
            config.num_hidden_layers,
            96,
            config.intermediate_size,
            config.vocab_size,
        )
        assert (shape.heads, shape.kv_heads, shape.head_dim, shape.tied) == (6, 2, 16, True)
        assert (shape.rms_eps, shape.rope_theta, shape.sliding_window) == (
            1e-5,
            5000.0,
            config.sliding_window if name == "MistralConfig" else None,
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["lacks model_type", "llama, mistral, qwen2 or qwen3"]),
        ({"model_type": "gpt2"}, ['model_type="gpt2"', "llama, mistral, qwen2 or qwen3"]),
        ({"model_type": ["qwen2"]}, ['model_type=["qwen2"]']),
        ({"model_type": "qwen2_moe"}, ['model_type="qwen2_moe"', "not supported"]),
        (SMOLLM2 | {"hidden_act": "gelu"}, ['hidden_act="gelu"', "silu"]),
        (SMOLLM2 | {"mlp_bias": True}, ["mlp_bias=true"]),
        (SMOLLM2 | {"attention_bias": True}, ["attention_bias=true", "o_proj"]),
        (QWEN3 | {"attention_bias": True}, ["attention_bias=true", "o_proj"]),
        (QWEN25_32B | {"use_sliding_window": True}, ["use_sliding_window=true"]),
        (QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        (QWEN25_32B | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ['rope type "yarn"', "default or llama3"]),
        (QWEN25_32B | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ['rope type "linear"']),
        (QWEN3 | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, ['"dynamic"', "rope_parameters"]),
        (QWEN3 | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ["rope_theta is missing"]),
        (QWEN3 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_parameters and rope_scaling contradict"]),
        (SMOLLM2 | {"rope_scaling": 3}, ["rope_scaling=3", "object or null"]),
        (SMOLLM2 | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        (LLAMA3 | {"rope_scaling": LLAMA3["rope_scaling"] | {"low_freq_factor": 2}}, ["low_freq_factor=2", "with 1"]),
        (LLAMA3 | {"rope_scaling": LLAMA3["rope_scaling"] | {"high_freq_factor": 8}}, ["high_freq_factor=8", "with 4"]),
        (
            LLAMA3 | {"rope_scaling": LLAMA3["rope_scaling"] | {"original_max_position_embeddings": 4096}},
            ["original_max_position_embeddings=4096", "with 8192"],
        ),
        (LLAMA3 | {"rope_scaling": without(LLAMA3["rope_scaling"], "low_freq_factor")}, ["low_freq_factor is missing"]),
        (LLAMA3 | {"rope_scaling": without(LLAMA3["rope_scaling"], "factor")}, ["rope_scaling.factor is missing"]),
        (QWEN3 | {"num_experts": 8}, ["num_experts=8", "experts"]),
        (SMOLLM2 | {"num_local_experts": 4}, ["num_local_experts=4"]),
        (without(MISTRAL, "sliding_window"), ["sliding_window is missing", "null"]),
        (MISTRAL | {"sliding_window": "4096"}, ['sliding_window="4096"', "whole number"]),
        (SMOLLM2 | {"hidden_size": "576"}, ['hidden_size="576"', "whole number"]),
        (SMOLLM2 | {"hidden_size": 0}, ["hidden_size=0", "at least 1"]),
        (SMOLLM2 | {"hidden_size": True}, ["hidden_size=true"]),
        (SMOLLM2 | {"rms_norm_eps": 0}, ["rms_norm_eps=0", "more than 0"]),
        (SMOLLM2 | {"rms_norm_eps": float("nan")}, ["rms_norm_eps=NaN"]),
        (SMOLLM2 | {"tie_word_embeddings": "yes"}, ['tie_word_embeddings="yes"', "true or false"]),
        (SMOLLM2 | {"eos_token_id": "x"}, ['eos_token_id="x"']),
        (SMOLLM2 | {"eos_token_id": [1, -1]}, ["eos_token_id=[1, -1]"]),
        (SMOLLM2 | {"torch_dtype": 16}, ["torch_dtype=16"]),
        (SMOLLM2 | {"num_key_value_heads": 4}, ["num_key_value_heads=4", "num_attention_heads=9"]),
        (SMOLLM2 | {"hidden_size": 577}, ["head_dim is missing", "577"]),
        (SMOLLM2 | {"head_dim": 63}, ["head_dim=63", "even"]),
    ],
)
def test_refusals(settings, words):
    with pytest.raises(RequestError) as caught:
        architecture_from_dict(settings, "folder/config.json")
    told = str(caught.value)
    assert told.startswith("folder/config.json")
    assert "\n" not in told
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
    ],
)
def test_a_missing_key_is_named(key):
    with pytest.raises(RequestError) as caught:
        architecture_from_dict(without(QWEN25_32B, key), "here")
    assert str(caught.value).startswith(f"here: {key} is missing")
    assert "\n" not in str(caught.value)


def test_all_problems_of_a_file_are_told():
    with pytest.raises(RequestError) as caught:
        architecture_from_dict(without(SMOLLM2, "vocab_size", "rope_theta") | {"mlp_bias": True}, "here")
    assert len(str(caught.value).splitlines()) == 3


def test_reading_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_32B))
    assert read_architecture(tmp_path) == architecture_from_dict(QWEN25_32B, "here")
    assert read_architecture(str(tmp_path)).layers == 64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1,\n "b" 2}', ["line 2, column 6", "broken JSON"]),
        (b"[1]", ["expected a JSON object"]),
        (b'{"a": "\xff"}', ["not UTF-8"]),
        (b"[" * 100_000, ["nested too deeply"]),
    ],
)
def test_broken_files(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read_architecture(tmp_path)
    assert all(word in str(caught.value) for word in [str(tmp_path / "config.json"), *words])


def test_folders_without_a_model(tmp_path):
    with pytest.raises(RequestError, match=r"has no config\.json"):
        read_architecture(tmp_path)
    for absent in (tmp_path / "absent", tmp_path / "file" / "x"):
        (tmp_path / "file").touch()
        with pytest.raises(RequestError, match="does not exist"):
            read_architecture(absent)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(RequestError, match="cannot read"):
        read_architecture(tmp_path)
