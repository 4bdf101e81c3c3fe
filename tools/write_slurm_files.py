"""Write recipes/slurm/*.sbatch: what `dapo-megatron submit` makes, for jobs that need no settings frozen beside them.

python tools/write_slurm_files.py            write them
python tools/write_slurm_files.py --check    exit 1 when a committed file is not up to date
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dapo_megatron.config import load_recipe  # noqa: E402
from dapo_megatron.files import write_text_atomically  # noqa: E402
from dapo_megatron.slurm.batch_file import batch_file  # noqa: E402

FOLDER = ROOT / "recipes" / "slurm"
TWO_NODES = "recipes/slurm/two-nodes.yaml"
CONTAINER = "slurm.container_image=dapo-megatron.sqsh"
TORCHRUN = "slurm.launcher=torchrun"
RUNGS = tuple(f"recipes/ladder/{path.name}" for path in sorted((ROOT / "recipes" / "ladder").glob("[0-9]-*.yaml")))
GPU = (
    "qwen2.5-0.5b-dapo", "qwen2.5-7b-dapo", "qwen2.5-14b-dapo", "qwen2.5-32b-dapo-paper",
    "qwen2.5-32b-dapo-paper-8-nodes", "qwen2.5-32b-dapo-reproduction", "qwen2.5-72b-dapo", "qwen3-32b-high-entropy-20k",
)  # fmt: skip
# file → its recipes, several being an array job, and the settings changed
FILES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tiny": (("recipes/slurm/tiny.yaml",), ()),
    "two-nodes": ((TWO_NODES,), ()),
    "two-nodes-container": ((TWO_NODES,), (CONTAINER,)),
    "two-nodes-torchrun": ((TWO_NODES,), (TORCHRUN,)),
    "two-nodes-torchrun-container": ((TWO_NODES,), (TORCHRUN, CONTAINER)),
    "ladder": (RUNGS, ()),
    **{name: ((f"recipes/gpu/{name}.yaml",), ()) for name in GPU},
    "qwen2.5-32b-dapo-paper-container": (("recipes/gpu/qwen2.5-32b-dapo-paper.yaml",), (CONTAINER,)),
}


def render(name: str) -> str:
    """The text of one of FILES."""
    recipes, overrides = FILES[name]
    loaded = [load_recipe(ROOT / recipe, overrides) for recipe in recipes]
    return batch_file(
        loaded[0],
        command="python tools/write_slurm_files.py",
        arguments=[[recipe, *overrides] for recipe in recipes],
        directories=[recipe.run.directory for recipe in loaded],
    )


def main() -> int:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    check = parser.parse_args().check
    for name in FILES:
        path = FOLDER / f"{name}.sbatch"
        text = render(name)
        if not check:
            write_text_atomically(path, text)
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is not up to date; run python tools/write_slurm_files.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
