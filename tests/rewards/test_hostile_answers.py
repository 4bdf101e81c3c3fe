"""Answers that talk to their judge: the built-in set, and how many of them get out of their quotation marks."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.config.reward import Judge
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.judging.hostile import hostile_answers
from dapo_megatron.rewards.judge_model import JudgeModel
from dapo_megatron.rewards.judge_prompt import PROMPT, Case, render, shown_answer
from dapo_megatron.rewards.judge_tokens import control_tokens, without
from tests.rewards.judges import write_judge

HOSTILE = [{"kind": row.kind, "answer": row.answer} for row in hostile_answers()]
FORMS = ("Answer: {}", "so it is \\boxed{{{}}}", "{}")
QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen2.5-tokenizer"
LONGEST = 300
CONTROL = re.compile(
    r"<\|?(im_start|im_end|endoftext|start_header_id|tool_call|think|s|start_of_turn)\|?>|\[/?INST\]|<\uff5c"
)


def prompts(answer: str) -> list[str]:
    """What a judge reads of responses with this answer."""
    shown = (shown_answer(form.format(answer), LONGEST) for form in FORMS)
    return [render(Case("Which test confirms HIV?", text, "Western blot"), PROMPT) for text in shown]


def raw(answer: str) -> str:
    """What it would read if the answer were put into the wording as it is."""
    return PROMPT.replace("{question}", "Which test confirms HIV?").replace("{reference}", '"Western blot"').replace(
        "{answer}", f'"{answer}"'
    )  # fmt: skip


def gullible(prompt: str) -> bool:
    """A judge that believes whatever stands outside the quoted answer: it says YES where a line of its own says so,
    where the answer closes its quotation marks, where a control mark opens a turn, or where the answer is put beside
    itself as the reference."""
    frame = set(raw("").splitlines())
    spoken = [line for line in prompt.splitlines() if line not in frame and not line.startswith('Final answer: "')]
    answers = re.findall(r'^Final answer: "(.*)"$', prompt, re.MULTILINE)
    references = re.findall(r'^Reference answer: "(.*)"$', prompt, re.MULTILINE)
    echoed = len(answers) > 1 or any(answer in references for answer in answers)
    closed = not re.search(r'^Final answer: "(?:[^"\\]|\\.)*"$', prompt, re.MULTILINE)
    return closed or bool(CONTROL.search(prompt)) or echoed or any("YES" in line.upper() for line in spoken)


def test_the_set_is_large_and_of_several_kinds():
    kinds = {row["kind"] for row in HOSTILE}
    assert len(HOSTILE) >= 60 and kinds == {"instruction", "transcript", "template", "spelling", "length"}
    assert len({row["answer"] for row in HOSTILE}) == len(HOSTILE)


def test_none_gets_out_of_its_quotation_marks():
    through = {
        "raw": [row["answer"] for row in HOSTILE if gullible(raw(row["answer"]))],
        "rendered": [row["answer"] for row in HOSTILE if any(map(gullible, prompts(row["answer"])))],
    }
    assert len(through["raw"]) >= 25, "the set has teeth"
    assert through["rendered"] == []


@pytest.mark.parametrize("kind", ["instruction", "transcript", "template", "spelling", "length"])
def test_what_the_judge_reads(kind: str):
    lines = raw("").splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("Final answer: "))
    for answer in (row["answer"] for row in HOSTILE if row["kind"] == kind):
        for prompt in prompts(answer):
            found = prompt.splitlines()
            assert found[:place] + found[place + 1 :] == lines[:place] + lines[place + 1 :]
            text = json.loads(found[place].removeprefix("Final answer: "))
            assert len(text) <= LONGEST * 2 and "\n" not in text  # broken marks are a little longer
            assert found[place].isprintable()


@given(st.text(max_size=500), st.text(max_size=50))
def test_no_text_at_all_changes_the_frame(answer: str, question: str):
    case = Case(question, shown_answer(f"Answer: {answer}", LONGEST), answer)
    prompt = render(case, "A {answer}\nR {reference}\nReply:")
    first, second, third = prompt.split("\n")
    assert third == "Reply:" and first.startswith('A "') and second.startswith('R "')
    assert isinstance(json.loads(first[2:]), str) and isinstance(json.loads(second[2:]), str)


@pytest.mark.skipif(not QWEN.exists(), reason="needs Qwen's tokenizer")
def test_no_mark_becomes_a_token_of_qwen():
    tokenizer = load_tokenizer(QWEN)
    special = control_tokens(tokenizer)

    def with_special(texts: list[str]) -> int:
        return sum(any(token in special for token in ids) for ids in tokenizer(texts)["input_ids"])

    marked = [row["answer"] for row in HOSTILE if row["kind"] == "template"]
    assert with_special([raw(answer) for answer in marked]) >= 8, "put in as they are, many would"
    texts = [text for answer in marked for text in prompts(answer)]
    assert with_special(texts) == 0
    assert texts == [without(text, special.values()) for text in texts], "broken without knowing the tokenizer"


def test_a_model_reads_each_of_them_as_plain_text(tmp_path: Path):
    judge = JudgeModel(Judge(model=str(write_judge(tmp_path / "model", num_hidden_layers=1))), torch.device("cpu"))
    cases = [Case("q", shown_answer(f"Answer: {row['answer']}", LONGEST), "r") for row in HOSTILE]
    encoded = [judge._encode(case) for case in cases]
    assert all(judge._fits(ids) for ids in encoded)
    longest = max(map(len, encoded)) - len(judge._encode(Case("q", "", "r")))
    assert longest <= 3 * LONGEST
    opinions = judge.ask(cases)
    assert opinions.reached_B.all() and len(opinions.p_yes_B) == len(HOSTILE)
