"""What runs as an engine: vLLM's own server (`python -m dapo_megatron.rollout.vllm_server OPTIONS`), whose child
processes die with it from their start on.

A spawned child imports the module that was started before anything else. vLLM's hook for plugins comes later: an engine
core first waits up to five minutes for a server that may be dead by then.
"""

import runpy

from dapo_megatron.launch import die_with_parent

SERVER = "vllm.entrypoints.openai.api_server"

if __name__ == "__mp_main__":  # in a child that multiprocessing has spawned
    die_with_parent()
elif __name__ == "__main__":
    runpy.run_module(SERVER, run_name="__main__")  # sys.modules["__main__"] stays this module, for the children
