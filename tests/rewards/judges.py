"""Judges for tests: a tiny model whose tokenizer knows YES and NO, a scripted server, a scripted judge."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from dapo_megatron.rewards.judge_prompt import Case
from dapo_megatron.rewards.verdicts import Opinions
from tests.tiny_models import write_model

CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "~~end~~")
ADDED = ("<tool_call>",)  # in the vocabulary, and not called special


def write_tokenizer(folder: Path, texts: Sequence[str] = (), size: int = 340) -> int:
    """A byte-level BPE tokenizer of `texts` with YES and NO as tokens, chat marks and a chat template; returns its
    size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words = ["YES NO Yes No yes no ( YES ) (YES (NO the answer is right"]
    tokenizer.train_from_iterator([*words * 50, *texts], trainer)
    tokenizer.add_tokens(list(ADDED))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL),
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def write_judge(folder: Path, **changes: object) -> Path:
    """A judge with random weights."""
    size = write_tokenizer(folder)
    return write_model(folder, "qwen2", tied=False, vocab_size=size, max_position_embeddings=2048, **changes)


class ScriptedJudge:
    """P(YES) by a function of the case; NaN = no verdict, None = unreached. `asked` keeps the calls."""

    def __init__(self, p_yes: Callable[[Case], float | None]) -> None:
        self._p_yes, self.asked = p_yes, []

    def ask(self, cases: list[Case]) -> Opinions:
        self.asked.append(list(cases))
        opinions = [self._p_yes(case) for case in cases]
        reached_B = np.array([p is not None for p in opinions], bool)
        return Opinions(np.array([math.nan if p is None else p for p in opinions], np.float64), reached_B, "it is down")


def first_token(p_yes: float) -> list[tuple[str, float]]:
    """Log-probs of a first token with that P(YES), 0.8 on the two words together."""
    shares = {"YES": 0.6 * p_yes, " Yes": 0.2 * p_yes, "NO": 0.8 * (1 - p_yes), "The": 0.2}
    return [(token, math.log(share)) for token, share in shares.items() if share > 0]


def chat_answer(tokens: list[tuple[str, float]]) -> bytes:
    """A chat completion of one token with these most probable ones."""
    entries = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in tokens]
    message = {"role": "assistant", "content": tokens[0][0] if tokens else ""}
    logprobs = {"content": [{**entries[0], "top_logprobs": entries}]} if tokens else None
    return json.dumps({"choices": [{"index": 0, "message": message, "logprobs": logprobs}]}).encode()


@contextmanager
def serving(answer: Callable[[str], bytes | int | float]) -> Iterator[tuple[str, list[dict]]]:
    """(url, requests) of a server that answers each prompt with what `answer` makes of it.

    bytes: the body; int: a status; float: seconds to wait, as a server does that hangs.
    """
    requests: list[dict] = []
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            requests.append({"path": self.path, "key": self.headers.get("authorization"), "time": time.time(), **body})
            found = answer(body["messages"][0]["content"])
            if isinstance(found, float):
                closing.wait(found)
                found = 503
            self.send_response(found if isinstance(found, int) else 200)
            self.end_headers()
            self.wfile.write(b"no" if isinstance(found, int) else found)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        closing.set()
        server.shutdown()
        thread.join(20)
        server.server_close()
