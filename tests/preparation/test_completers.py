import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from dapo_megatron.chat_server import MOST_BYTES, ChatServer
from dapo_megatron.data.arithmetic import build_tokenizer
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.preparation.completers import ChatCompletions, HuggingFaceModel
from tests.tiny_models import load_model, write_model


class _Server(BaseHTTPRequestHandler):
    """The user's text says what to do: "echo …" or a list of statuses and mishaps, one a try."""

    tries: ClassVar[Counter] = Counter()
    seen: ClassVar[list] = []
    hold: ClassVar[threading.Event] = threading.Event()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][0]["content"]
        self.seen.append((self.path, self.headers.get("authorization"), body["model"]))
        script = text.split()
        step = script[min(self.tries[text], len(script) - 1)]
        self.tries[text] += 1
        if step == "hang":
            self.hold.wait(20)
        answer = {"choices": [{"message": {"role": "assistant", "content": f"reply to {text}"}}]}
        long = {"choices": [{"message": {"content": "x" * MOST_BYTES}}]}
        payload = {"long": json.dumps(long).encode(), "garbage": b"<html>", "empty": b'{"choices": []}'}.get(step)
        self.send_response(int(step) if step.isdigit() else 200)
        self.end_headers()
        self.wfile.write(payload or json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    _Server.tries, _Server.seen, _Server.hold = Counter(), [], threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    _Server.hold.set()
    server.shutdown()
    thread.join(20)
    server.server_close()


def model(url: str, **changes) -> ChatCompletions:
    return ChatCompletions(ChatServer(url, **{"backoff_s": 0.01, "time_limit_s": 10.0, "tries": 3, **changes}), "m")


def test_replies_in_order_and_mishaps_retried(url: str):
    requests = ["echo", "503 429 echo", "garbage empty echo", "503", "long"]
    replies = model(url, key="k", concurrency=2).complete(requests)
    assert replies == ["reply to echo", "reply to 503 429 echo", "reply to garbage empty echo", None, None]
    assert _Server.tries == {"echo": 1, "503 429 echo": 3, "garbage empty echo": 3, "503": 3, "long": 3}
    assert set(_Server.seen) == {("/v1/chat/completions", "Bearer k", "m")}


def test_a_server_that_hangs(url: str):
    assert model(url, time_limit_s=0.5, tries=2).complete(["hang echo", "echo"]) == [
        "reply to hang echo",
        "reply to echo",
    ]


def test_a_server_that_refuses_or_is_not_there(url: str):
    with pytest.raises(RequestError, match=r"refuses the request with status 401"):
        model(url).complete(["401"])
    with pytest.raises(RunError, match=r"answered none of 2 requests: status 503"):
        model(url).complete(["503", "503 503"])
    with pytest.raises(RunError, match=r"http://127.0.0.1:9/v1 answered none of 1 requests: "):
        model("http://127.0.0.1:9/v1", tries=1).complete(["echo"])
    assert model(url).complete([]) == []
    with pytest.raises(RequestError, match=r"'localhost:8000' is not an address like http://host:8000/v1"):
        model("localhost:8000")


def test_a_hugging_face_folder(tmp_path: Path):
    folder = write_model(tmp_path / "model", "qwen2", tied=True, vocab_size=20)
    build_tokenizer(folder)
    completer = HuggingFaceModel(folder, max_tokens=12)
    requests = ["1+2=", "7-3+4=", "1" * 200]
    first, second, none = completer.complete(requests)
    assert none is None  # longer than the model's positions
    reference = load_model(folder)
    for request, reply in (("1+2=", first), ("7-3+4=", second)):
        ids = completer._tokenizer(request, return_tensors="pt").input_ids
        drawn = reference.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert reply == completer._tokenizer.decode(drawn, skip_special_tokens=True)
