"""The methods of recipes/methods/ side by side over several seeds, on the ladder's task: a table, rows and curves.

Each cell is the ladder's base recipe with section `algorithm` of a method's recipe (an update a step where that has
one, else the ladder's eight) and the same warm start for all of a seed. Finished cells are kept; a cell that was killed
goes on from its last checkpoint, so the command can be stopped and started again.

    python tools/compare.py [--out runs/compare] [--seeds 1 2 3] [--jobs 2] [--cell-limit-s 1800]
                            [--methods grpo gspo ...] [--set key.sub=value ...]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dapo_megatron.config import load_recipe  # noqa: E402
from dapo_megatron.config.problems import nearest_name  # noqa: E402
from dapo_megatron.config.yaml_text import to_yaml  # noqa: E402
from dapo_megatron.errors import RequestError, exit_with_message  # noqa: E402
from dapo_megatron.files import write_text_atomically  # noqa: E402
from tools.ladder import RECIPES as LADDER  # noqa: E402
from tools.ladder import conclude, options, run_ladder, run_train  # noqa: E402
from tools.ladder_table import Rung  # noqa: E402

METHODS = ROOT / "recipes" / "methods"
DAPO = LADDER / "6-dapo.yaml"
COMPARED = {
    "dapo": "DAPO",
    "grpo": "GRPO",
    "dr-grpo": "Dr.GRPO",
    "rloo": "RLOO",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "high-entropy": "high-entropy tokens",
    "clip-cov": "Clip-Cov",
    "kl-cov": "KL-Cov",
    "iterative-dpo": "iterative DPO",
}


def rungs_of(names: Sequence[str]) -> list[Rung]:
    """The named methods in the order of COMPARED; all of them without a name.

    Raises:
        RequestError: a name is not known.
    """
    for name in names:
        if name not in COMPARED:
            near = nearest_name(name, list(COMPARED))
            hint = f" did you mean {near}?" if near else ""
            raise RequestError(f"--methods {name}: not known;{hint} use {', '.join(COMPARED)}")
    return [
        Rung(f"{place}-{name}", title)
        for place, (name, title) in enumerate(COMPARED.items())
        if not names or name in names
    ]


def write_recipes(rungs: Sequence[Rung], folder: Path) -> None:
    """The recipe of each cell: the ladder's task, model and sizes, the method's algorithm; DAPO is the ladder's own."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_recipe(DAPO)
    for rung in rungs:
        name = rung.recipe.partition("-")[2]
        settings = base.model_dump()
        if name != "dapo":
            method = load_recipe(METHODS / f"{name}.yaml")
            one_update = method.algorithm.mini_batch_prompts == method.rollout.prompts_per_step
            settings["algorithm"] = method.algorithm.model_dump() | {
                "mini_batch_prompts": base.rollout.prompts_per_step if one_update else base.algorithm.mini_batch_prompts
            }
            settings["algorithm"]["dynamic_sampling"]["max_waves"] = base.algorithm.dynamic_sampling.max_waves
        settings["run"] |= {"name": rung.recipe, "directory": str(Path("runs") / "compare" / rung.recipe)}
        write_text_atomically(folder / f"{rung.recipe}.yaml", to_yaml(settings))


def write_warm_recipe(folder: Path) -> Path:
    """The recipe of the warm starts: the ladder's with a KL term, for a reference, which DPO must have from the start.

    A cell without one may go on from it; no update is made before the cells part."""
    settings = load_recipe(DAPO).model_dump()
    settings["algorithm"]["kl"]["coefficient"] = 1.0
    settings["run"] |= {"name": "warm", "directory": str(Path("runs") / "compare" / "warm")}
    write_text_atomically(folder / "warm.yaml", to_yaml(settings))
    return folder / "warm.yaml"


def main() -> None:
    parser = options(__doc__.splitlines()[0], name="compare", cell_limit_s=1800.0)
    parser.add_argument("--methods", nargs="+", default=[], help="some of them (default: all)")
    given = parser.parse_args()
    rungs = rungs_of(given.methods)
    recipes = given.out / "recipes"
    write_recipes(rungs, recipes)

    def train(arguments: list[str], log: Path) -> int:
        return run_train(arguments, log, limit_s=given.cell_limit_s)

    cells, failures = run_ladder(
        given.out,
        given.seeds,
        given.set,
        train,
        jobs=given.jobs,
        rungs=rungs,
        recipes=recipes,
        warm=write_warm_recipe(recipes),
    )
    conclude(cells, failures, given.out, name="compare", of="method", last_less_first=False)


if __name__ == "__main__":
    with exit_with_message():
        main()
