"""What a judge must know of its tokenizer: how YES and NO are spelled, and what no answer may become. No torch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dapo_megatron.errors import RequestError
from dapo_megatron.rewards.verdicts import SPELLINGS, word_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def spelling_tokens(tokenizer: "PreTrainedTokenizerBase", setting: str) -> dict[str, list[int]]:
    """Token ids that spell "YES" and "NO": whole spellings, else first pieces that start no spelling of the other.

    Raises:
        RequestError: a tokenizer that tells the two apart by no first token.
    """
    whole: dict[str, set[int]] = {"YES": set(), "NO": set()}
    first: dict[str, set[int]] = {"YES": set(), "NO": set()}
    for spelling in SPELLINGS:
        ids, word = tokenizer.encode(spelling, add_special_tokens=False), word_of(spelling)
        if not ids or tokenizer.unk_token_id in ids:
            continue
        first[word].add(ids[0])
        if len(ids) == 1:
            whole[word].add(ids[0])
    found = whole if all(whole.values()) else first
    alone = {word: sorted(found[word] - found[other]) for word, other in (("YES", "NO"), ("NO", "YES"))}
    if not all(alone.values()):
        raise RequestError(f"{setting}: its tokenizer has no tokens that tell YES from NO; use a model of English text")
    return alone


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """id → text of the special tokens, and of added ones that look like control marks."""
    marks = ("<", "[", "\uff5c")
    return {
        token: added.content
        for token, added in tokenizer.added_tokens_decoder.items()
        if len(added.content) > 1 and (added.special or added.content.lstrip().startswith(marks))
    }


def without(text: str, marks: Iterable[str]) -> str:
    """`text` with a blank behind the first character of each of the marks in it."""
    for mark in marks:
        if mark in text:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text
