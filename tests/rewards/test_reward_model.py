"""Scores of a tiny sequence classifier with random weights."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron.config.reward import Reward, RewardModel
from dapo_megatron.data.arithmetic import build_tokenizer
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.grader import Grader, check_grader
from dapo_megatron.rewards.reward_model import ModelReward
from dapo_megatron.rewards.scoring_model import batches

TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'user' %}1:{% else %}2:{% endif %}{{ turn.content }};{% endfor %}"
)
PROMPTS = ["1+1=", "2+2=", "1+1=", "9-4="]
RESPONSES = ["Answer: 2", "4", "", "9-4=5; Answer: 5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, num_labels=1, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    build_tokenizer(folder)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"chat_template": TEMPLATE}))
    return folder


def by_hand(folder: Path, text: str) -> float:
    """The score of one text: the head on the last token's hidden state."""
    from transformers import Qwen2ForSequenceClassification

    model = Qwen2ForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    ids = torch.tensor([load_tokenizer(folder).encode(text)])
    with torch.no_grad():
        return model.score(model.model(input_ids=ids).last_hidden_state[0, -1]).item()


def model_reward(folder: Path, **settings) -> ModelReward:
    return ModelReward(RewardModel(path=str(folder), **settings), torch.device("cpu"))


def test_scores_are_those_of_the_last_token_of_prompt_and_response(folder: Path):
    expected = [by_hand(folder, f"1:{p};2:{r};") for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert len({round(score, 3) for score in expected}) == 4
    threshold = sorted(expected)[1]
    for tokens in (16384, 30, 1):  # all in one batch, some, one each
        scores = model_reward(folder, threshold=threshold + 1e-4, tokens_per_batch=max(tokens, 30)).score(
            RESPONSES, PROMPTS
        )
        assert scores.rewards_B == pytest.approx(expected, abs=1e-4)
        assert scores.right_B.tolist() == [score > threshold + 1e-4 for score in expected]
    plain = model_reward(folder, chat_template=False).score(RESPONSES, PROMPTS).rewards_B
    assert plain == pytest.approx([by_hand(folder, p + r) for p, r in zip(PROMPTS, RESPONSES, strict=True)], abs=1e-4)


def test_scale_bound_and_length(folder: Path):
    scores = model_reward(folder).score(RESPONSES, PROMPTS).rewards_B
    bound = float(np.median(np.abs(scores))) * 3
    cut = model_reward(folder, scale=3.0, bound=bound).score(RESPONSES, PROMPTS)
    assert cut.rewards_B == pytest.approx(np.clip(3 * scores, -bound, bound), abs=1e-4)
    assert cut.right_B.tolist() == (scores > 0).tolist()  # of the model's own score
    short = model_reward(folder, chat_template=False, max_length=3).score(["7-1"], ["9-8=1;"]).rewards_B
    assert short == pytest.approx([by_hand(folder, "7-1")], abs=1e-4)
    long = model_reward(folder, chat_template=False).score(["7-1" * 100], ["9"]).rewards_B  # 64 positions
    assert long == pytest.approx([by_hand(folder, ("7-1" * 100)[-64:])], abs=1e-4)


def test_a_model_without_padding_scores_one_by_one(folder: Path, tmp_path: Path):
    bare = shutil.copytree(folder, tmp_path / "bare")
    for name, key in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        settings = json.loads((bare / name).read_text())
        del settings[key]
        (bare / name).write_text(json.dumps(settings))
    with_padding = model_reward(folder).score(RESPONSES, PROMPTS).rewards_B
    assert model_reward(bare).score(RESPONSES, PROMPTS).rewards_B == pytest.approx(with_padding, abs=1e-4)


def test_the_grader_of_a_recipe(folder: Path):
    reward = Reward(grader="model", model=RewardModel(path=str(folder)))
    check_grader(reward)
    with Grader(reward) as grader:
        right, rewards = grader.score(RESPONSES, ["?"] * 4, PROMPTS)
        assert rewards.dtype == np.float32 and right.dtype == bool
        assert rewards == pytest.approx(model_reward(folder).score(RESPONSES, PROMPTS).rewards_B, abs=1e-5)
        assert set(grader.metrics().values()) == {0.0} and grader.failures == 0
        assert grader.score([], [], [])[1].shape == (0,)


def test_a_score_that_is_not_finite_ends_the_run_with_words(folder: Path, tmp_path: Path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding[load_tokenizer(folder).encode("7")[0]] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    model = model_reward(broken)
    assert np.isfinite(model.score(["1"], ["1"]).rewards_B).all()
    with pytest.raises(RunError, match=r"reward\.model\.path=.*broken scored nan for the response '7' \(8 tokens"):
        model.score(["1", "7", "7+"], ["1"] * 3)


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path):
    headless = shutil.copytree(folder, tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"has no weights for score\.weight"):
        model_reward(headless)
    (headless / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match="cannot be loaded"):
        model_reward(headless)


def test_a_model_that_does_not_fit_ends_the_run_with_words(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import Qwen2ForSequenceClassification

    def full(model, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 100 GiB")

    monkeypatch.setattr(Qwen2ForSequenceClassification, "to", full)
    with pytest.raises(RunError, match=r"reward\.model\.path=.*: cpu has no memory .* rollout\.gpu_memory_share"):
        model_reward(folder)


def test_what_is_no_reward_model_is_refused_before_launch(folder: Path, tmp_path: Path):
    def refused(path: Path | None, message: str, **settings) -> None:
        model = RewardModel(path=None if path is None else str(path), **settings)
        with pytest.raises(RequestError, match=message):
            check_grader(Reward(grader="model", model=model))

    def changed(name: str, file: str = "config.json", **changes) -> Path:
        copy = shutil.copytree(folder, tmp_path / name)
        settings = json.loads((copy / file).read_text()) | changes
        (copy / file).write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
        return copy

    refused(None, r"reward\.grader=model needs reward\.model\.path")
    refused(tmp_path / "gone", "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no config\.json")
    refused(changed("causal", architectures=["Qwen2ForCausalLM"]), "is no sequence classifier")
    refused(changed("three", id2label={"0": "a", "1": "b", "2": "c"}), "has num_labels=3")
    refused(changed("two", id2label=None), "has num_labels=2")
    refused(changed("narrow", vocab_size=10), "ids up to 19 and its model 10 vocabulary rows")
    refused(changed("plain", "tokenizer_config.json", chat_template=None), r"use reward\.model\.chat_template=false")
    check_grader(Reward(grader="model", model=RewardModel(path=str(tmp_path / "plain"), chat_template=False)))
    mute = changed("mute")
    (mute / "tokenizer.json").unlink()
    refused(mute, "has no tokenizer that can be read")
    bare = changed("bare")
    (bare / "model.safetensors").unlink()
    refused(bare, r"has no \.safetensors file")


def test_batches_hold_each_sequence_once_within_the_limit():
    lengths = [5, 1, 9, 3, 3, 20]
    found = list(batches(lengths, 10))
    assert sorted(i for batch in found for i in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 10 for batch in found)
    assert len(found) < 6
    assert [len(batch) for batch in batches(lengths, 1000, alone=True)] == [1] * 6
    assert list(batches([], 10)) == []
