"""Tiny programs: a question names operations on a number, and the answer is a Python program that test cases grade.

`+3,*2` asks for a program that reads x and prints (x + 3) · 2, `+3,*2 twice` for one that does so two times over. What
the warm start draws is right or wrong as people are: operation by operation (right), all in one expression without
brackets (right where multiplication comes first), or with an operation or the `twice` forgotten.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.files import write_text_atomically

END = "<eos>"
CHARACTERS = "0123456789+-*,() \n"
WORDS = ("```", "twice", "x=int(input())", "x+=", "x-=", "x*=", "print(x)", "print(int(input())")
LENGTHS = (2, 3)  # operations of a question, before `twice`
SHARES = (0.4, 0.35, 0.25)  # of the warm start: step by step, in one expression, forgetful
CASES = 2  # test cases a question
TRAIN, VALIDATION, WARM = 480, 64, 4000  # questions, questions, examples

Operation = tuple[str, int]  # "+", "-" or "*", and its operand


@dataclass(frozen=True)
class Question:
    """Operations in their order, done once or twice."""

    operations: tuple[Operation, ...]
    twice: bool

    @property
    def text(self) -> str:
        """As a prompt: `+3,*2 twice`."""
        return ",".join(f"{sign}{operand}" for sign, operand in self.operations) + " twice" * self.twice

    @property
    def all_operations(self) -> tuple[Operation, ...]:
        """Every operation as often as it is done."""
        return self.operations * (1 + self.twice)


@dataclass(frozen=True)
class Program:
    """Operations on the input: one after the other, or `flat`, in one expression where multiplication comes first."""

    operations: tuple[Operation, ...]
    flat: bool = False

    @property
    def response(self) -> str:
        """The program between lines of ```."""
        if self.flat:
            code = "print(int(input())" + "".join(f"{sign}{operand}" for sign, operand in self.operations) + ")"
        else:
            code = "\n".join(
                ["x=int(input())", *(f"x{sign}={operand}" for sign, operand in self.operations), "print(x)"]
            )
        return f"```\n{code}\n```"

    def output(self, number: int) -> int:
        """What the program prints."""
        terms = [number]
        for sign, operand in self.operations:
            if sign == "*":
                terms[-1] *= operand
            else:
                terms.append(operand if sign == "+" else -operand)
            if not self.flat:
                terms = [sum(terms)]
        return sum(terms)


def is_right(program: Program, question: Question, inputs: Sequence[int]) -> bool:
    """Whether the program prints what is asked for, for each of these inputs."""
    wanted = Program(question.all_operations)
    return all(program.output(number) == wanted.output(number) for number in inputs)


def draw_question(rng: random.Random) -> Question:
    """Any number of operations of LENGTHS, each kind of operation as likely."""
    operations = []
    for _ in range(rng.choice(LENGTHS)):
        sign = rng.choice("+-*")
        operations.append((sign, rng.randint(2 if sign == "*" else 1, 9)))
    return Question(tuple(operations), rng.random() < 0.5)


def draw_program(question: Question, rng: random.Random) -> Program:
    """An answer of the warm start."""
    (kind,) = rng.choices(("steps", "flat", "forgetful"), SHARES)
    if kind != "forgetful":
        return Program(question.all_operations, flat=kind == "flat")
    if question.twice and rng.random() < 0.5:
        return Program(question.operations)
    kept = list(question.all_operations)
    kept.pop(rng.randrange(len(kept)))
    return Program(tuple(kept))


def case_inputs(question: Question) -> list[int]:
    """CASES different numbers of 1 to 99, always the same for a question."""
    return random.Random(question.text).sample(range(1, 100), CASES)


def write_task(folder: Path, *, seed: int = 0) -> None:
    """The task's files; the same seed gives the same bytes.

    train.jsonl: TRAIN rows {"prompt", "answer", "chosen", "rejected"}, the answer being test cases as
    `reward.grader=code` reads them, the responses a right and a wrong program as the warm start draws them; methods
    that draw their own responses read its questions alone. validation.jsonl: VALIDATION rows of other questions.
    warm.jsonl: WARM rows {"prompt", "response"} of questions that are not of validation. tokenizer/: a token a
    character, and one for each of WORDS.
    """
    rng = random.Random(f"{seed} questions")
    questions: dict[str, Question] = {}
    while len(questions) < TRAIN + VALIDATION:
        question = draw_question(rng)
        questions.setdefault(question.text, question)
    held_out = set(list(questions)[TRAIN:])
    files: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "warm": []}
    for question in questions.values():
        inputs = case_inputs(question)
        outputs = [Program(question.all_operations).output(number) for number in inputs]
        cases = {"inputs": [f"{number}\n" for number in inputs], "outputs": [f"{number}\n" for number in outputs]}
        row = {"prompt": question.text, "answer": json.dumps(cases)}
        if question.text in held_out:
            files["validation"].append(row)
            continue
        pair: dict[bool, str] = {}
        while len(pair) < 2:
            program = draw_program(question, rng)
            pair.setdefault(is_right(program, question, inputs), program.response)
        files["train"].append({**row, "chosen": pair[True], "rejected": pair[False]})
    rng = random.Random(f"{seed} warm")
    while len(files["warm"]) < WARM:
        question = draw_question(rng)
        if question.text not in held_out:
            files["warm"].append({"prompt": question.text, "response": draw_program(question, rng).response})
    for name, rows in files.items():
        write_text_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_tokenizer(folder / "tokenizer")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of END as id 0, CHARACTERS and WORDS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = [END, *CHARACTERS.replace(" ", "Ġ").replace("\n", "Ċ")]  # as byte-level vocabularies write them
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    write_text_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
