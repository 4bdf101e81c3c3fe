"""What stands around a question: templates that are put on, and known wordings that are taken off for comparing."""

from dataclasses import replace

from dapo_megatron.data.prompts import Message, Prompt
from dapo_megatron.errors import RequestError

PLACE = "{prompt}"

TEMPLATES = {
    # the published wording of DAPO-Math-17k
    "dapo-math": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
        "{prompt}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
}

# a shorter wording could be the question's own
_LEAST_CHARACTERS = 20

# instructions that published evaluation files carry behind their questions
_KNOWN = (*TEMPLATES.values(), "{prompt} Let's think step by step and output the final answer within \\boxed{}.")


def template_text(template: str) -> str:
    """The text of `data.prompt_template`, given by name or as text with {prompt}.

    Raises:
        RequestError: no known name and not exactly one {prompt}.
    """
    text = TEMPLATES.get(template, template)
    if text.count(PLACE) != 1:
        raise RequestError(
            f"data.prompt_template={template!r} must hold {PLACE} once, or be one of the names {', '.join(TEMPLATES)}"
        )
    return text


def apply_template(prompt: Prompt, template: str) -> Prompt:
    """The prompt inside a template; of a conversation, its last user turn.

    White space around the question goes, and so do known instructions that published files carry around it. A question
    that wears the template already, one of 20 characters or more, is left as it is.

    Raises:
        RequestError: as `template_text`; a conversation without a user turn.
    """
    wording = template_text(template)
    if prompt.messages is None:
        return replace(prompt, text=_dressed(prompt.text, wording))
    turns = list(prompt.messages)
    places = [i for i, turn in enumerate(turns) if turn.role == "user"]
    if not places:
        raise RequestError(f"prompt {prompt.id}: data.prompt_template needs a turn of role user; set it to null")
    turns[places[-1]] = Message("user", _dressed(turns[places[-1]].content, wording))
    return replace(prompt, text="\n\n".join(turn.content for turn in turns), messages=tuple(turns))


def bare_question(text: str, template: str | None = None) -> str:
    """The question for comparing: without `template` and the known wordings, every run of white space one blank.

    Templates of fewer than 20 characters are not taken off.
    """
    wordings = [" ".join(wording.split()) for wording in ((template_text(template),) if template else ()) + _KNOWN]
    text = " ".join(text.split())
    for wording in wordings:
        text = _undressed(text, wording)
    return text


def _dressed(text: str, wording: str) -> str:
    bare = text.strip()
    if _undressed(bare, wording.strip()) != bare:
        return text
    for known in _KNOWN:
        bare = _undressed(bare, known)
    return wording.replace(PLACE, bare)


def _undressed(text: str, wording: str) -> str:
    before, after = wording.split(PLACE)
    if len(before) + len(after) < _LEAST_CHARACTERS:
        return text
    if len(text) > len(before) + len(after) and text.startswith(before) and text.endswith(after):
        return text[len(before) : len(text) - len(after)].strip()
    return text
