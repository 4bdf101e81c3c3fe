"""Items whose answer is no integer → items that ask for one, by a language model, every reply verified."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapo_megatron.preparation import rewriting
from dapo_megatron.preparation.completers import Completer
from dapo_megatron.preparation.reply_journal import Replies, ReplyJournal, journal_key
from dapo_megatron.preparation.rewriting import Rejected, Rewritten
from dapo_megatron.preparation.selection import Drop, Item

BATCH = 64  # items asked for together; a killed run loses at most so many


def integerize(
    items: Sequence[Item],
    completer: Completer,
    journal: Path,
    *,
    batch: int = BATCH,
    tell: Callable[[str], None] | None = None,
) -> tuple[list[Item], list[Drop], dict[str, Any]]:
    """(rewritten items, dropped ones, {"integerize": counts}), in the order of `items`.

    Items that the journal holds are not asked again; what it lacks is asked in batches, each kept on disk before the
    next. counts: {items, asked, from_journal, rewritten, dropped: {reason: count}, model, journal}.

    Raises:
        RequestError: a journal of another model, a server that refuses.
        RunError: a model that answers nothing; what was finished is kept.
    """
    results: dict[int, Item | Drop] = {}
    waiting: list[int] = []
    remembered = 0
    replies = ReplyJournal(journal, completer.name)
    try:
        for i, item in enumerate(items):
            problem = rewriting.can_be_rewritten(item.prompt)
            if problem is not None:
                results[i] = Drop(item, rewriting.NO_NUMBER, problem)
            elif (known := replies.finished.get(_key(item))) is not None:
                results[i] = _result(item, known)
                remembered += 1
            else:
                waiting.append(i)
        for chosen in _batches(waiting, batch):
            for i, result in zip(chosen, _ask([items[i] for i in chosen], completer, replies), strict=True):
                results[i] = result
            replies.flush()
            if tell is not None:
                kept = sum(isinstance(result, Item) for result in results.values())
                tell(f"{len(results)} of {len(items)} items, {kept} rewritten")
    finally:
        replies.close()
    ordered = [results[i] for i in range(len(items))]
    kept = [result for result in ordered if isinstance(result, Item)]
    drops = [result for result in ordered if isinstance(result, Drop)]
    counts = {
        "items": len(items),
        "asked": len(waiting),
        "from_journal": remembered,
        "rewritten": len(kept),
        "dropped": dict(Counter(drop.reason for drop in drops).most_common()),
        "model": completer.name,
        "journal": str(journal),
    }
    return kept, drops, {"integerize": counts}


def _ask(items: Sequence[Item], completer: Completer, journal: ReplyJournal) -> list[Item | Drop]:
    """Two rounds of requests: rewrites, then an independent reply on each that holds."""
    firsts = completer.complete([rewriting.rewrite_request(item.prompt) for item in items])
    sound: list[tuple[int, Rewritten]] = []
    for i, (item, first) in enumerate(zip(items, firsts, strict=True)):
        if first is not None:
            try:
                sound.append((i, rewriting.read_rewrite(first, item.prompt)))
            except Rejected:
                continue  # told by _result
    seconds: dict[int, str | None] = {}
    if sound:
        asked = [rewriting.agreement_request(items[i].prompt, rewritten) for i, rewritten in sound]
        seconds = dict(zip((i for i, _ in sound), completer.complete(asked), strict=True))
    results: list[Item | Drop] = []
    for i, (item, first) in enumerate(zip(items, firsts, strict=True)):
        if first is None or (i in seconds and seconds[i] is None):
            # not kept: the next run asks again
            results.append(Drop(item, rewriting.NO_REPLY, "first request" if first is None else "second request"))
            continue
        replies = Replies(first[: rewriting.MOST_REPLY + 1], _cut(seconds.get(i)))
        result = _result(item, replies)
        outcome = "rewritten" if isinstance(result, Item) else f"{result.reason}: {result.detail}"
        told = {"question": rewriting.question_of(item.prompt), "answer": item.prompt.answer, "outcome": outcome}
        journal.add(_key(item), replies, told)
        results.append(result)
    return results


def _result(item: Item, replies: Replies) -> Item | Drop:
    try:
        rewritten = rewriting.read_rewrite(replies.rewrite, item.prompt)
        rewriting.check_agreement(replies.agreement or "", rewritten)
    except Rejected as rejected:
        return Drop(item, rejected.reason, rejected.detail)
    prompt = rewriting.with_question(item.prompt, rewritten)
    return replace(item, prompt=prompt, original=item.original or item.prompt, rule=rewritten.rule)


def _key(item: Item) -> str:
    question = rewriting.question_of(item.prompt)
    return journal_key(rewriting.REWRITE, rewriting.AGREE, question, item.prompt.answer)


def _cut(reply: str | None) -> str | None:
    return None if reply is None else reply[: rewriting.MOST_REPLY + 1]


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
