"""A small task with worked steps: chains of + and −, and a tokenizer for them.

A question such as `7-1+9-7-8=` has the worked response `7-1=6;6+9=15;15-7=8;8-8=0;Answer: 0`, the terse response
`7-1=6+9=15-7=8-8=0;Answer: 0`, which writes each total once, and the direct response `Answer: 0`. The running total
never leaves 0..total_max. A question belongs to validation when crc32(question) % 16 == 0 and to training otherwise, so
the two are disjoint whatever the seed and the sizes.
"""

import json
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from dapo_megatron.errors import RequestError
from dapo_megatron.files import write_text_atomically

VALIDATION_SHARE = 16
CHARACTERS = "0123456789+-=;: "
# Spaces of questions up to this size are shuffled as a whole; larger ones are drawn from, skipping repetitions.
_SHUFFLE_WHOLE = 1 << 18


def generate_task(
    folder: Path,
    *,
    terms: Sequence[int],
    operand_max: int,
    total_max: int,
    train_prompts: int,
    validation_prompts: int,
    supervised_examples: int,
    direct_fraction: float,
    terse_fraction: float = 0.0,
    seed: int,
) -> None:
    """Write the task's five files into `folder`; the same arguments give the same bytes.

    train.jsonl, validation.jsonl: rows {"prompt", "answer"}, distinct questions, the numbers of terms taking turns.
    preferences.jsonl: rows {"prompt", "chosen", "rejected"} of train.jsonl's questions: worked, and a wrong guess.
    worked.jsonl: rows {"prompt", "response"}, all worked. mixed.jsonl: the same, round(direct_fraction · rows) of them
    direct and round(terse_fraction · rows) terse. The supervised files draw training-side questions with repetition.
    Within one number of terms every question is equally likely. Each file has a random stream of its own, so resizing
    one leaves the others as they were.

    Args:
        folder: created when missing.
        terms: numbers of operands in a question, each at least 2.
        operand_max: operands are 1..operand_max.
        total_max: largest running total.
        train_prompts, validation_prompts: rows, at least 1.
        supervised_examples: rows of worked.jsonl and of mixed.jsonl.
        direct_fraction, terse_fraction: in 0..1, together too.
        seed: of all random choices.

    Raises:
        RequestError: a value out of range, or more distinct questions asked for than exist.
    """
    check_task(
        terms=terms,
        operand_max=operand_max,
        total_max=total_max,
        train_prompts=train_prompts,
        validation_prompts=validation_prompts,
        supervised_examples=supervised_examples,
        direct_fraction=direct_fraction,
        terse_fraction=terse_fraction,
    )
    chains = Chains(max(terms), operand_max, total_max)
    wanted = {"train": train_prompts, "validation": validation_prompts}
    files: dict[str, list[dict[str, str]]] = {}
    for side, count in wanted.items():
        questions = _distinct_questions(chains, terms, side, count, random.Random(f"{seed} {side}"))
        files[side] = [{"prompt": question, "answer": str(solve(question))} for question in questions]
    files["preferences"] = [
        {"prompt": q, "chosen": worked_response(q), "rejected": wrong_guess(q, total_max)}
        for q in (row["prompt"] for row in files["train"])
    ]
    for name, direct, terse in (("worked", 0.0, 0.0), ("mixed", direct_fraction, terse_fraction)):
        rng = random.Random(f"{seed} {name}")
        rows = [_training_question(chains, terms, rng) for _ in range(supervised_examples)]
        styles = [worked_response] * len(rows)
        for i in rng.sample(range(len(rows)), round(direct * len(rows))):
            styles[i] = direct_response
        left = [i for i, style in enumerate(styles) if style is worked_response]
        for i in rng.sample(left, min(len(left), round(terse * len(rows)))):
            styles[i] = terse_response
        files[name] = [
            {"prompt": question, "response": style(question)} for question, style in zip(rows, styles, strict=True)
        ]
    for name, records in files.items():
        write_text_atomically(Path(folder) / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))


class Chains:
    """All questions of 2..max_terms operands, counted and numbered without being listed.

    Questions of n operands are numbered 0..count(n) − 1. Built in O(max_terms · total_max) integer additions.
    """

    def __init__(self, max_terms: int, operand_max: int, total_max: int) -> None:
        self.operand_max = operand_max
        self.total_max = total_max
        self._operands = [*range(1, operand_max + 1), *range(-1, -operand_max - 1, -1)]
        # _ways[k][t]: how many ways to continue from running total t by k more operations
        self._ways = [[1] * (total_max + 1)]
        for _ in range(max_terms - 1):
            sums = [0]  # sums[t]: Σ of the previous row's entries below t
            for ways in self._ways[-1]:
                sums.append(sums[-1] + ways)
            self._ways.append(
                [
                    sums[min(t + operand_max, total_max) + 1] - sums[t + 1] + sums[t] - sums[max(t - operand_max, 0)]
                    for t in range(total_max + 1)
                ]
            )

    def count(self, terms: int) -> int:
        """How many questions of `terms` operands exist."""
        return sum(self._ways[terms - 1][1 : min(self.operand_max, self.total_max) + 1])

    def question(self, terms: int, number: int) -> str:
        """Question `number` of `terms` operands, in 0..count(terms) − 1."""
        text, total = "", 0
        for remaining in reversed(range(terms)):
            for operand in self._operands:  # at the start the total is 0, which leaves no room for a negative one
                after = total + operand
                ways = self._ways[remaining][after] if 0 <= after <= self.total_max else 0
                if number < ways:
                    break
                number -= ways
            else:
                raise IndexError(f"there are only {self.count(terms)} questions of {terms} operands")
            text += f"{operand:+d}"
            total = after
        return text.removeprefix("+") + "="


def is_validation(question: str) -> bool:
    """True for the questions held out of training: crc32(question) % 16 == 0."""
    return zlib.crc32(question.encode()) % VALIDATION_SHARE == 0


def solve(question: str) -> int:
    """The value of a question such as `7-1+9=`."""
    return sum(_operands(question))


def worked_response(question: str) -> str:
    """The response that shows every step: `7-1+9=` → `7-1=6;6+9=15;Answer: 15`."""
    total, *rest = _operands(question)
    steps = []
    for operand in rest:
        steps.append(f"{total}{operand:+d}={total + operand};")
        total += operand
    return "".join(steps) + f"Answer: {total}"


def terse_response(question: str) -> str:
    """The response that shows every step and writes each total once: `7-1+9=` → `7-1=6+9=15;Answer: 15`."""
    total, *rest = _operands(question)
    text = str(total)
    for operand in rest:
        total += operand
        text += f"{operand:+d}={total}"
    return f"{text};Answer: {total}"


def direct_response(question: str) -> str:
    """The response without steps: `7-1+9=` → `Answer: 15`."""
    return f"Answer: {solve(question)}"


def wrong_guess(question: str, total_max: int) -> str:
    """A response without steps and with another number, in 0..total_max, than the question's: `Answer: 12`."""
    value = solve(question)
    away = 1 + zlib.crc32(question[::-1].encode()) % total_max
    return f"Answer: {(value + away) % (total_max + 1)}"


def check_task(
    *,
    terms: Sequence[int],
    operand_max: int,
    total_max: int,
    train_prompts: int,
    validation_prompts: int,
    supervised_examples: int,
    direct_fraction: float,
    terse_fraction: float = 0.0,
) -> None:
    """Refuse a task that cannot be generated, without generating it.

    Raises:
        RequestError: values out of range, all problems together; or more questions than exist on both sides.
    """
    problems = []
    if not terms or min(terms) < 2 or len(set(terms)) < len(terms):
        problems.append(
            f"data.generate.terms={list(terms)} must be different numbers of at least 2; use for example [4, 5, 6]"
        )
    least = {
        "operand_max": (operand_max, 1),
        "total_max": (total_max, 1),
        "train_prompts": (train_prompts, 1),
        "validation_prompts": (validation_prompts, 1),
        "supervised_examples": (supervised_examples, 0),
    }
    problems += [
        f"data.generate.{name}={value} is too small; use at least {bound}"
        for name, (value, bound) in least.items()
        if value < bound
    ]
    for name, fraction in (("direct", direct_fraction), ("terse", terse_fraction)):
        if not 0 <= fraction <= 1:
            nearest = 1.0 if fraction > 1 else 0.0
            problems.append(f"data.generate.{name}_fraction={fraction} must lie in 0..1; use {nearest}")
    if not problems and direct_fraction + terse_fraction > 1:
        problems.append(
            f"data.generate.terse_fraction={terse_fraction} and direct_fraction={direct_fraction} exceed 1 together; "
            f"use terse_fraction={round(1 - direct_fraction, 6)} or less"
        )
    if problems:
        raise RequestError("\n".join(problems))
    chains = Chains(max(terms), operand_max, total_max)
    exist = sum(chains.count(n) for n in terms)
    for side, count in (("train", train_prompts), ("validation", validation_prompts)):
        if count > exist:
            share = exist // VALIDATION_SHARE * (1 if side == "validation" else VALIDATION_SHARE - 1)
            raise RequestError(
                f"data.generate.{side}_prompts={count} exceeds the {exist} questions that exist on both sides with "
                f"terms={list(terms)}, operand_max={operand_max}, total_max={total_max}; use at most {share}"
            )


def longest_example(terms: Sequence[int], operand_max: int, total_max: int) -> tuple[int, int]:
    """(tokens of the longest question, bound on question, worked response and end of sequence), a token a character."""
    count, operand, total = max(terms), len(str(operand_max)), len(str(total_max))
    question = count * operand + (count - 1) + 1
    step = total + 1 + operand + 1 + total + 1  # "71+9=80;"
    return question, question + (count - 1) * step + len(" : ") + total + 1


def build_tokenizer(folder: Path) -> int:
    """Write the task's tokenizer into `folder` for `transformers.AutoTokenizer`; return its vocabulary size, 20.

    One token a character of `0123456789+-=;: `, one for the word Answer, and <pad>, <eos>, <unk> as ids 0, 1, 2.
    Encoding adds no special tokens, and decoding gives back the text exactly. It is a byte-level BPE without merges,
    because beside a Qwen2 config.json transformers rebuilds the tokenizer as one whatever tokenizer.json says.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<eos>", "<unk>"]
    # byte-level vocabularies write the space as Ġ
    pieces = [*special, *CHARACTERS.replace(" ", "Ġ")]
    model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    tokenizer.add_tokens([AddedToken("Answer", special=False, normalized=False)])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    write_text_atomically(Path(folder) / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text_atomically(Path(folder) / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return tokenizer.get_vocab_size()


def _operands(question: str) -> list[int]:
    """Signed operands: `7-1+9=` → [7, −1, 9]."""
    return [int(part) for part in question.removesuffix("=").replace("-", "+-").split("+")]


def _distinct_questions(
    chains: Chains, terms: Sequence[int], side: str, count: int, rng: random.Random
) -> Iterator[str]:
    """`count` different questions of one side, the numbers of terms taking turns until one runs out."""
    sources = [_shuffled(chains, n, side, rng) for n in terms]
    made = 0
    while made < count:
        for source in list(sources):
            question = next(source, None)
            if question is None:
                sources.remove(source)
                continue
            yield question
            made += 1
            if made == count:
                return
        if not sources:
            raise RequestError(
                f"data.generate.{side}_prompts={count} exceeds the {made} distinct {side} questions that exist with "
                f"terms={list(terms)}, operand_max={chains.operand_max}, total_max={chains.total_max}; "
                + (f"use at most {made}" if made else "use more terms or a larger operand_max")
            )


def _shuffled(chains: Chains, terms: int, side: str, rng: random.Random) -> Iterator[str]:
    """Every question of one side and number of terms, once each, in random order."""
    size = chains.count(terms)
    for number in _shuffled_numbers(size, rng):
        question = chains.question(terms, number)
        if is_validation(question) == (side == "validation"):
            yield question


def _shuffled_numbers(size: int, rng: random.Random) -> Iterator[int]:
    if size <= _SHUFFLE_WHOLE:
        yield from rng.sample(range(size), size)
        return
    seen: set[int] = set()
    while len(seen) < size:
        number = rng.randrange(size)
        if number not in seen:
            seen.add(number)
            yield number


def _training_question(chains: Chains, terms: Sequence[int], rng: random.Random) -> str:
    # ends: the caller has already found at least one training question
    while True:
        n = rng.choice(terms)
        size = chains.count(n)
        if size:
            question = chains.question(n, rng.randrange(size))
            if not is_validation(question):
                return question
