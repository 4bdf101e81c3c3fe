"""A task so small that every response can be listed: three letters that add up to what the question adds up to.

Letters a to f are worth 0 to 5. A question is two of them; a response is right when it is three letters whose sum
equals the question's modulo 6: `bc` (1 + 2 = 3) has `abc`, `fff` and 34 other right responses of 216. A model has
vocabulary for these letters and the end of sequence alone and MOST_TOKENS tokens to answer, so its responses can be
counted: 259 that end, and 1296 that are cut.

This file is also the recipes' reward function (`reward.custom`), so it imports no package.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

LETTERS = "abcdef"
END = "<eos>"
LENGTH = 3  # letters of a response that can be right
MOST_TOKENS = LENGTH + 1
PROMPTS = tuple(LETTERS[i] + LETTERS[(total - i) % len(LETTERS)] for total in range(len(LETTERS)) for i in (0, 3))
USUAL, USUAL_SHARE = 6, 0.9  # right responses that are usual, and as many wrong ones; their share of the warm start
WARM_ROWS, PAIRS = 200, 8  # rows a prompt


def worth(text: str) -> int:
    """Sum of the letters modulo 6."""
    return sum(map(LETTERS.index, text)) % len(LETTERS)


def is_right(prompt: str, response: str) -> bool:
    """Three letters of the question's worth; any text is taken."""
    return len(response) == LENGTH and set(response) <= set(LETTERS) and worth(response) == worth(prompt)


def reward(responses: Sequence[str], answers: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """1 for right, −1 for wrong: what `reward.custom` asks for. The reference answer is not looked at."""
    return [1.0 if is_right(prompt, response) else -1.0 for prompt, response in zip(prompts, responses, strict=True)]


def usual_responses(prompt: str, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """(right, wrong) responses, USUAL of each, that make up most of the warm start."""
    rng = random.Random(f"{seed} usual {prompt}")
    every = [a + b + c for a in LETTERS for b in LETTERS for c in LETTERS]
    right = [text for text in every if is_right(prompt, text)]
    wrong = [text for text in every if not is_right(prompt, text)]
    return rng.sample(right, USUAL), rng.sample(wrong, USUAL)


def draw_response(prompt: str, rng: random.Random, *, seed: int = 0) -> str:
    """A response of the warm start: a usual one, right or wrong alike, or, of 1 − USUAL_SHARE, any three letters."""
    if rng.random() < USUAL_SHARE:
        return rng.choice(rng.choice(usual_responses(prompt, seed=seed)))
    return "".join(rng.choices(LETTERS, k=LENGTH))


def write_task(folder: Path, *, seed: int = 0) -> None:
    """The task's files; the same seed gives the same bytes.

    pairs.jsonl: rows {"prompt", "answer", "chosen", "rejected"}, PAIRS a prompt, a right and a wrong response as the
    warm start draws them: methods that draw their own responses read the questions of the same file. prompts.jsonl:
    every question once. warm.jsonl: rows {"prompt", "response"}, WARM_ROWS a prompt. tokenizer/: a token a letter.
    """
    from dapo_megatron.files import write_text_atomically

    files: dict[str, list[dict[str, str]]] = {"pairs": [], "prompts": [], "warm": []}
    for prompt in PROMPTS:
        question = {"prompt": prompt, "answer": LETTERS[worth(prompt)]}
        files["prompts"].append(question)
        rng = random.Random(f"{seed} warm {prompt}")
        files["warm"] += [
            {"prompt": prompt, "response": draw_response(prompt, rng, seed=seed)} for _ in range(WARM_ROWS)
        ]
        rng = random.Random(f"{seed} pairs {prompt}")
        for _ in range(PAIRS):
            pair: dict[bool, str] = {}
            while len(pair) < 2:
                response = draw_response(prompt, rng, seed=seed)
                pair.setdefault(is_right(prompt, response), response)
            files["pairs"].append({**question, "chosen": pair[True], "rejected": pair[False]})
    for name, rows in files.items():
        write_text_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_tokenizer(folder / "tokenizer")


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of END as id 0 and the letters behind it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from dapo_megatron.files import write_text_atomically

    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([END, *LETTERS])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    write_text_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
