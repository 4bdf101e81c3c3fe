"""Published models by name: in a recipe, and beside a folder."""

import json

import pytest

from dapo_megatron.config.known_models import KNOWN_MODELS
from dapo_megatron.config.load import build_recipe
from dapo_megatron.errors import RequestError
from dapo_megatron.prepare import planned_architecture
from tests.resharding.qwen32b import CONFIG, qwen32b


def recipe(**model: object):
    return build_recipe({"run": {"directory": "runs/x"}, "model": model})


def test_a_name_stands_for_a_folder_that_is_not_there():
    settings = recipe(path="nowhere", architecture="qwen2.5-32b")
    found = planned_architecture(settings, folder_needed=False)
    for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied", "qkv_bias", "rope_theta"):
        assert getattr(found, key) == getattr(qwen32b(), key)
    with pytest.raises(RequestError, match="model folder nowhere does not exist"):
        planned_architecture(settings)


def test_a_folder_that_is_there_must_agree(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for needed in (True, False):
        found = planned_architecture(recipe(path=str(tmp_path), architecture="qwen2.5-32b"), folder_needed=needed)
        assert found == qwen32b()  # what the folder says, its eps too
        with pytest.raises(RequestError, match=r"model.architecture=qwen2.5-14b has layers=48 and .* has 64"):
            planned_architecture(recipe(path=str(tmp_path), architecture="qwen2.5-14b"), folder_needed=needed)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"path": "x", "architecture": "Qwen2.5-32B"}, "is not known; use qwen2.5-32b or null"),
        ({"path": "x", "architecture": "qwen2.5-33b"}, "use .*qwen2.5-32b.* or null"),
        ({"path": "x", "architecture": "gpt"}, "use qwen2.5-0.5b, "),
        (
            {"architecture": "qwen3-8b", "scratch": dict(hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn=8)},
            "with scratch use null",
        ),
    ],
)
def test_wrong_names_are_refused(model, told):
    with pytest.raises(RequestError, match=told):
        recipe(**model)


def test_heads_of_known_models_divide():
    for a in KNOWN_MODELS.values():
        assert a.heads % a.kv_heads == 0 and a.head_dim % 2 == 0 and a.vocab % 64 == 0
