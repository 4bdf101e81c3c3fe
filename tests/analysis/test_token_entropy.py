"""Entropies of responses beside those of whole logits in fp64, text by text; recorded texts of every form."""

import json

import numpy as np
import pytest
import torch

from dapo_megatron.analysis import token_entropy
from dapo_megatron.analysis.recorded_texts import read_texts
from dapo_megatron.analysis.token_entropy import TokenizedText, response_entropies
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.scoring_model import load_model
from tests.analysis.models import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("entropy") / "model", seed=3)


def test_entropies_are_those_of_the_whole_logits(folder, monkeypatch):
    monkeypatch.setattr(token_entropy, "TOKENS_PER_BATCH", 40)
    monkeypatch.setattr(token_entropy, "MOST_LOGITS", 5 * 64)
    rng = np.random.default_rng(0)
    texts = [TokenizedText(*(rng.integers(0, 20, n) for n in sizes)) for sizes in ((3, 9), (1, 1), (7, 4), (2, 20))]
    found = response_entropies(str(folder), texts, torch.device("cpu"), "model")
    model, expected = load_model("AutoModelForCausalLM", str(folder), torch.device("cpu"), "model"), []
    for text in texts:
        ids = torch.tensor(np.concatenate([text.prompt, text.response]))[None]
        probabilities = torch.softmax(model(ids).logits[0].double(), -1).detach().numpy()
        rows = probabilities[len(text.prompt) - 1 : -1]
        expected += [-sum(p * np.log(p) for p in row if p > 0) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    assert len(found) == 34 and np.ptp(found) > 0.1


def test_a_folder_that_is_no_language_model_is_told(tmp_path):
    with pytest.raises(RunError, match="MODEL there cannot be loaded"):
        response_entropies(str(tmp_path), [], torch.device("cpu"), "MODEL there")


def test_recorded_rows_become_prompts_and_responses(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    rows = [
        {"prompt": "1+2=", "response": "3", "step": 4},
        {"prompt": "2+2=", "responses": [{"text": "4;", "right": True}, "5", ""]},
        {"text": "3+3=6"},
    ]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        (tokenizer.decode(t.prompt), tokenizer.decode(t.response))
        for t in read_texts(file, tokenizer, chat_template=False)
    ]
    assert found == [("1+2=", "3"), ("2+2=", "4;"), ("2+2=", "5"), ("3", "+3=6")]
    assert len(read_texts(file, tokenizer, chat_template=False, limit=1)) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "1+2="}, "line 1: a row needs prompt and response"),
        ({"prompt": "1+2=", "response": ""}, "no response has a token"),
        ({"prompt": "1+2=", "response": 3}, "column response: must be text, not int 3"),
        ({"prompt": "1+2=", "responses": "3"}, "column responses: must be a list"),
        ({"prompt": "1+2=", "responses": [{"right": True}]}, "column responses: must be text, not NoneType"),
        ({"prompt": " ", "response": "3"}, "the prompt is empty"),
    ],
)
def test_rows_without_a_response_are_refused(folder, tmp_path, row, said):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(RequestError, match=said):
        read_texts(file, load_tokenizer(folder), chat_template=False)
