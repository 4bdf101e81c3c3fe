import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.data.prompt_template import TEMPLATES, apply_template, bare_question
from dapo_megatron.data.prompts import Message, Prompt
from dapo_megatron.errors import RequestError


def test_the_published_wording():
    prompt = apply_template(Prompt(0, "What is 1+1?", "2"), "dapo-math")
    assert prompt.text == (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 1+1?\n\nRemember to put your "
        'answer on its own line after "Answer:".'
    )
    assert apply_template(prompt, "dapo-math") == prompt  # a file that wears it already is not wrapped twice


def test_the_last_user_turn_is_dressed():
    turns = (Message("system", "s"), Message("user", "{x}"), Message("assistant", "a"), Message("user", "b"))
    prompt = apply_template(Prompt(3, "s\n\n{x}\n\na\n\nb", "2", turns), "Q: {prompt}\nA:")
    assert [turn.content for turn in prompt.messages] == ["s", "{x}", "a", "Q: b\nA:"]
    assert prompt.text == "s\n\n{x}\n\na\n\nQ: b\nA:"
    with pytest.raises(RequestError, match=r"prompt 3: data.prompt_template needs a turn of role user"):
        apply_template(Prompt(3, "s", "2", turns[:1]), "Q: {prompt}")


@pytest.mark.parametrize("template", ["no place", "{prompt} {prompt}", "dapo-maths"])
def test_bad_templates_are_refused(template: str):
    with pytest.raises(RequestError, match=r"data.prompt_template=.* must hold {prompt} once, or .* dapo-math"):
        apply_template(Prompt(0, "a", "1"), template)


@given(st.text(min_size=1), st.sampled_from([*TEMPLATES, "A question, think well: {prompt} ?"]))
def test_putting_on_and_taking_off(text: str, template: str):
    dressed = apply_template(Prompt(0, text, "1"), template)
    if text.strip():
        assert apply_template(dressed, template) == dressed
        assert bare_question(dressed.text, template) == bare_question(text, template)


@given(st.text(min_size=1), st.sampled_from(["Q {prompt} ?", "{prompt}", "1+{prompt}"]))
def test_what_looks_like_a_short_template_may_be_the_question(text: str, template: str):
    dressed = apply_template(Prompt(0, text, "1"), template)
    assert dressed.text == template.replace("{prompt}", text.strip())
    assert bare_question(dressed.text, template) == bare_question(dressed.text)


def test_white_space_and_known_instructions_do_not_matter():
    aime = "Find  $x$.\n Let's think step by step and output the final answer within \\boxed{}."
    assert bare_question(aime) == bare_question("Find $x$.") == "Find $x$."
    assert bare_question("find $x$.") != "Find $x$."
    dressed = apply_template(Prompt(0, aime, "2"), "dapo-math").text
    assert "Find  $x$.\n\nRemember" in dressed and "boxed" not in dressed  # one instruction, not two
