"""A vLLM server for a judge: it has the model's own weights and tokenizer, and answers chat completions.

It runs as a rollout engine does (`launcher.py`): behind a secret, in a process group of its own, dead with its parent.
"""

import sys
from functools import partial
from pathlib import Path

from dapo_megatron.rollout.launcher import EngineSettings, ServerProcess, device_options, engine_environment

NAME = "judge"  # of the model at its server
PLAIN = "{% for turn in messages %}{{ turn.content }}{% endfor %}"  # a chat template that leaves a text as it is


def start_judge_engine(
    settings: EngineSettings, *, chat_template: str | None, log_probs: int, secret: str, log: Path
) -> ServerProcess:
    """Start the server and return at once.

    Args:
        chat_template: in the place of the folder's own; None = that.
        log_probs: most of a token that a request may ask for.
    """
    environment = engine_environment(settings, secret)
    del environment["VLLM_SERVER_DEV_MODE"]  # the routes that steer an engine: nothing is to be steered here
    command = partial(judge_command, settings, chat_template, log_probs)
    return ServerProcess(command, environment, secret=secret, log=log)


def judge_command(
    settings: EngineSettings, chat_template: str | None, log_probs: int, host: str, port: int
) -> list[str]:
    """The command line of vLLM's own server; it holds no secret."""
    options = {
        "--model": str(settings.model),
        "--served-model-name": NAME,
        "--host": host,
        "--port": str(port),
        "--dtype": settings.dtype,
        "--tensor-parallel-size": str(settings.tensor),
        "--max-model-len": str(settings.max_model_len),
        "--max-num-seqs": str(settings.max_sequences),
        "--max-logprobs": str(log_probs),
        "--logprobs-mode": "raw_logprobs",  # of softmax(logits), whatever temperature 0 makes of them
        "--generation-config": "vllm",  # no sampling defaults from the model's folder
        "--middleware": "dapo_megatron.rollout.vllm_secret.RequireSecret",
        "--uvicorn-log-level": "warning",
    }
    if chat_template is not None:
        options["--chat-template"] = chat_template
    words = [word for pair in options.items() for word in pair]
    # the wording's beginning is the same in every case
    server = [sys.executable, "-m", "dapo_megatron.rollout.vllm_server"]
    return [*server, *words, "--enable-prefix-caching", *device_options(settings)]
