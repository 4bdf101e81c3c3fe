"""What runs as an engine: vLLM's own server (`python -m dapo_megatron.rollout.vllm_server OPTIONS`), whose child
processes die with it from their start on.

A spawned child imports the module that was started before anything else. vLLM's hook for plugins comes later: an engine
core first waits up to five minutes for a server that may be dead by then. One that was dead before the child asked for
its signal is known by its number, which each process leaves to its children.
"""

import os
import runpy
import sys

from dapo_megatron.launch import die_with_parent

SERVER = "vllm.entrypoints.openai.api_server"
PARENT = "DAPO_MEGATRON_ENGINE_PARENT"


def name_parent() -> None:
    """Leave this process's number to its children."""
    os.environ[PARENT] = str(os.getpid())


if __name__ == "__mp_main__":  # in a child that multiprocessing has spawned
    die_with_parent()
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):  # it is dead: no signal would come
        sys.exit(1)
if __name__ in ("__main__", "__mp_main__"):
    name_parent()
    os.register_at_fork(after_in_child=name_parent)
if __name__ == "__main__":
    runpy.run_module(SERVER, run_name="__main__")  # sys.modules["__main__"] stays this module, for the children
