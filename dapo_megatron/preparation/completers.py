"""Who answers requests in text: an OpenAI-compatible server, or a Hugging Face folder in this process."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dapo_megatron.chat_server import ChatServer, Mishap, NoReply
from dapo_megatron.errors import RunError


class Completer(Protocol):
    """`name` is kept in the journal: replies of different models are not mixed."""

    name: str

    def complete(self, requests: Sequence[str]) -> list[str | None]:
        """One reply to each request, in order; None where none came."""
        ...


@dataclass
class ChatCompletions:
    """Chat completions of an OpenAI-compatible server, one user turn each, greedy. model: its name there."""

    server: ChatServer
    model: str
    max_tokens: int = 2048

    @property
    def name(self) -> str:
        return f"{self.model} at {self.server.url}"

    def complete(self, requests: Sequence[str]) -> list[str | None]:
        """See `Completer`.

        Raises:
            RequestError: the server refuses the request itself.
            RunError: not one request was answered.
        """
        replies = self.server.ask([self._body(request) for request in requests], _text_of, raise_refusals=True)
        failures = [reply.reason for reply in replies if isinstance(reply, NoReply)]
        if requests and len(failures) == len(requests):
            raise RunError(f"{self.server.url} answered none of {len(requests)} requests: {failures[-1]}")
        return [None if isinstance(reply, NoReply) else reply for reply in replies]

    def _body(self, request: str) -> dict[str, object]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": request}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }


class HuggingFaceModel:
    """A model in this process, greedy, through the embedded engine. time_limit_s: of one call of `complete`."""

    def __init__(self, folder: Path, *, max_tokens: int = 2048, batch: int = 32, time_limit_s: float = 3600.0) -> None:
        from dapo_megatron.config.architecture import read_architecture
        from dapo_megatron.data.tokenizer import load_tokenizer, stop_tokens
        from dapo_megatron.resharding.hf_layout import check_checkpoint
        from dapo_megatron.rollout.hf_engine import engine_of_folder

        self.name = str(folder)
        self._max_tokens, self._time_limit_s = max_tokens, time_limit_s
        architecture = read_architecture(folder)
        check_checkpoint(folder, architecture)
        self._positions = architecture.max_positions
        self._tokenizer = load_tokenizer(folder)
        ends = stop_tokens(architecture.eos_token_ids, self._tokenizer)
        self._engine = engine_of_folder(folder, architecture, stop_tokens=ends, max_batch_sequences=batch)

    def complete(self, requests: Sequence[str]) -> list[str | None]:
        """See `Completer`; None for a request that leaves no room for an answer.

        Raises:
            RunError: not done within the time limit.
        """
        from dapo_megatron.data.prompts import Prompt, encode_prompt
        from dapo_megatron.rollout.engine import RolloutRequest

        chat = bool(self._tokenizer.chat_template)
        replies: list[str | None] = [None] * len(requests)
        asked = []
        for i, request in enumerate(requests):
            tokens = encode_prompt(self._tokenizer, Prompt(i, request, ""), chat)
            room = min(self._max_tokens, self._positions - len(tokens))
            if room > 0:
                asked.append(RolloutRequest(i, tokens, seed=0, max_new_tokens=room, temperature=0.0))
        self._engine.submit(asked)
        for completion in self._engine.collect(time_limit_s=self._time_limit_s):
            replies[completion.ticket] = self._tokenizer.decode(completion.tokens.tolist(), skip_special_tokens=True)
        return replies


def _text_of(answer: bytes) -> str:
    """The content of the first choice; an empty text, which no check accepts, where it holds something else."""
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Mishap(f"not a chat completion: {type(error).__name__}") from None
    return content if isinstance(content, str) else ""
