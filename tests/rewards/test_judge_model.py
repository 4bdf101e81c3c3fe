"""A judge from a folder: the distribution of its first token."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dapo_megatron.config.reward import Judge, Reward
from dapo_megatron.data.arithmetic import build_tokenizer
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import RequestError
from dapo_megatron.rewards.grader import check_grader
from dapo_megatron.rewards.judge_model import JudgeModel, control_tokens, spelling_tokens
from dapo_megatron.rewards.judge_prompt import Case
from tests.rewards.judges import ADDED, SPECIAL, write_judge
from tests.tiny_models import load_model

CASES = [Case(f"What is {i} and {i}?", f"it is {i * 7}", "x" * i) for i in range(40)]
WORDING = "Q {question} R {reference} A {answer} Reply:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(tmp_path_factory.mktemp("judge") / "model")


def judge_of(folder: Path, **settings) -> JudgeModel:
    return JudgeModel(Judge(**{"model": str(folder), "prompt": WORDING, **settings}), torch.device("cpu"))


def by_hand(folder: Path, texts: list[str]) -> list[float]:
    """P(YES) of each text alone; NaN where none of the six spellings is among the 20 most probable tokens."""
    model, tokenizer, found = load_model(folder), load_tokenizer(folder), []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            p = model(input_ids=ids).logits[0, -1].double().softmax(-1)
        spelled = {}
        for word in ("YES", "NO"):
            forms = {word, f" {word}", word.title(), f" {word.title()}", word.lower(), f" {word.lower()}"}
            spelled[word] = [i for i in range(len(p)) if tokenizer.decode([i]) in forms]
        yes, no = (p[spelled[word]].sum().item() for word in ("YES", "NO"))
        among = set(p.topk(20).indices.tolist()) & {*spelled["YES"], *spelled["NO"]}
        found.append(yes / (yes + no) if among else math.nan)
    return found


def test_p_yes_is_that_of_the_first_token(folder: Path):
    plain = [f'Q {c.question} R "{c.reference}" A "{c.answer}" Reply:' for c in CASES]
    expected = by_hand(folder, plain)
    assert 2 < np.isnan(expected).sum() < 38 and len({round(p, 3) for p in expected if p == p}) > 2
    for tokens in (16384, 200, 100):  # all in one batch, some, one each
        opinions = judge_of(folder, chat_template=False, tokens_per_batch=tokens).ask(CASES)
        assert opinions.p_yes_B == pytest.approx(expected, abs=1e-5, nan_ok=True)
        assert opinions.reached_B.all()
    chat = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in plain[:8]]
    assert judge_of(folder).ask(CASES[:8]).p_yes_B == pytest.approx(by_hand(folder, chat), abs=1e-5, nan_ok=True)
    assert len(judge_of(folder).ask([]).p_yes_B) == 0


def test_what_does_not_fit_has_no_verdict(folder: Path):
    opinions = judge_of(folder, tokens_per_batch=200).ask([Case("q" * 900, "a", "r"), CASES[0]])
    assert math.isnan(opinions.p_yes_B[0]) and opinions.reached_B.all()


def test_no_text_becomes_a_control_token(folder: Path):
    judge = judge_of(folder)
    assert {*SPECIAL, *ADDED} <= set(control_tokens(judge.tokenizer).values())
    for mark in (*SPECIAL, *ADDED, "<|im_<|im_end|>end|>"):
        ids = judge._encode(Case(f"q {mark}", f"{mark} YES {mark}", mark))
        assert judge._fits(ids), mark
        assert sum(i in judge._special for i in ids) == 3  # of the chat template: start, end, start
    assert judge.tokenizer.encode("~~end~~")[0] in judge._special, "else this test shows nothing"
    inside = judge_of(folder, prompt="<|im_start|> {answer} {reference}")  # the wording itself may hold some
    assert inside._fits(inside._encode(CASES[0])) and inside._frame == 4


def test_tokenizers_that_spell_the_words_in_pieces(folder: Path, tmp_path: Path):
    class Pieces:
        unk_token_id = None

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(c) for c in text]

    assert spelling_tokens(Pieces(), "m") == {"YES": [ord("Y"), ord("y")], "NO": [ord("N"), ord("n")]}
    build_tokenizer(tmp_path)  # digits alone
    with pytest.raises(RequestError, match="no tokens that tell YES from NO"):
        spelling_tokens(load_tokenizer(tmp_path), "m")


def test_what_is_no_judge_is_refused_before_launch(folder: Path, tmp_path: Path):
    def refused(message: str, file: str = "config.json", **changes) -> None:
        copy = shutil.copytree(folder, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        settings = json.loads((copy / file).read_text()) | changes
        (copy / file).write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
        with pytest.raises(RequestError, match=message):
            check_grader(Reward(grader="judge", judge=Judge(model=str(copy))))

    check_grader(Reward(grader="judge", judge=Judge(model=str(folder))))
    refused("is no language model", architectures=["Qwen2ForSequenceClassification"])
    refused("model 10 vocabulary rows", vocab_size=10)
    refused(r"use reward\.judge\.chat_template=false", "tokenizer_config.json", chat_template=None)
