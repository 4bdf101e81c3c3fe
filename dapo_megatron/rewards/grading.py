"""Is a response right? The rule first; where it cannot tell, mathematics."""

from dapo_megatron.rewards.equivalence import equivalent
from dapo_megatron.rewards.equivalence import load as load_mathematics
from dapo_megatron.rewards.rule import compare, extract_answer


def grade(response: str, answer: str) -> bool:
    """True when the response's final answer equals the reference.

    The rule (`rule.compare`) decides integers and equal texts; its verdict on two integers is final. What it leaves
    open (fractions, decimals, tuples, intervals, sets, expressions) `equivalent` decides. No answer, or an empty one,
    is never right. Runs in the calling process without a time limit; `GraderPool` adds one.
    """
    given = extract_answer(response)
    if given is None:
        return False
    verdict = compare(given, answer)
    return equivalent(given, answer) if verdict is None else verdict


# a grader pool calls it in each worker before the first item, so that no item pays for the import
grade.prepare = load_mathematics
