"""The final answer of a response in the form in which answers are counted: what a majority votes on."""

from dapo_megatron.rewards.rule import _normalise, extract_answer


def final_answer(response: str) -> str | None:
    """The final answer, normalised as the rule grader does: "025", "25." and "$25$" are one answer. None when the
    response gives none."""
    given = extract_answer(response)
    return None if given is None else _normalise(given)[1] or None
