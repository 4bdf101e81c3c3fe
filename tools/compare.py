"""The methods of recipes/methods/ side by side over several seeds, on the ladder's task: a table, rows and curves.

Each cell is the ladder's base recipe with sections `algorithm` and `critic` of a method's recipe (an update a step
where that has one, else the ladder's eight) and its shape of rollouts, 256 responses a step in all of them, and the
same warm start for all of a seed. Finished cells are kept; a cell that was killed goes on from its last checkpoint, so
the command can be stopped and started again.

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
from tools.ladder import conclude, options, run_given  # noqa: E402
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
    "ppo": "PPO",
    "spo-chain": "SPO-chain",
    "spo-tree": "SPO-tree",
    "iterative-dpo": "iterative DPO",
}
OF_A_SHAPE = ("shape", "partition", "chain", "tree")  # the settings of section `rollout` that make a method
STEPS, EVALUATE_EVERY = 20, 5


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
        Rung(f"{place:02d}-{name}", title)
        for place, (name, title) in enumerate(COMPARED.items())
        if not names or name in names
    ]


def write_recipes(rungs: Sequence[Rung], folder: Path) -> None:
    """The recipe of each cell, named as its rung."""
    for rung in rungs:
        _write_recipe(rung.recipe.partition("-")[2], folder / f"{rung.recipe}.yaml")


def write_warm_recipe(folder: Path) -> Path:
    """The recipe of the warm starts: PPO's, whose run keeps a reference, as DPO must have from the start, and a critic.

    A cell without one may go on from it; no update is made before the cells part."""
    _write_recipe("ppo", folder / "warm.yaml")
    return folder / "warm.yaml"


def _write_recipe(method: str, file: Path) -> None:
    """The ladder's task, model and sizes with the method's algorithm, critic and shape; DAPO is the ladder's own."""
    base = load_recipe(DAPO)
    settings = base.model_dump()
    if method != "dapo":
        own = load_recipe(METHODS / f"{method}.yaml")
        settings["critic"] = own.critic.model_dump()
        settings["algorithm"] = own.algorithm.model_dump()
        responses = base.rollout.prompts_per_step * base.rollout.samples_per_prompt
        prompts = responses // own.rollout.samples_per_prompt
        updates = base.rollout.prompts_per_step // base.algorithm.mini_batch_prompts
        one_update = own.algorithm.mini_batch_prompts == own.rollout.prompts_per_step
        settings["algorithm"]["mini_batch_prompts"] = prompts if one_update else prompts // updates
        settings["algorithm"]["dynamic_sampling"]["max_waves"] = base.algorithm.dynamic_sampling.max_waves
        settings["rollout"] |= {"samples_per_prompt": own.rollout.samples_per_prompt, "prompts_per_step": prompts}
        settings["rollout"] |= {key: own.rollout.model_dump()[key] for key in OF_A_SHAPE}
    settings["run"] |= {"name": file.stem, "directory": str(Path("runs") / "compare" / file.stem), "steps": STEPS}
    settings["evaluation"]["every"] = EVALUATE_EVERY
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(file, to_yaml(settings))


def main() -> None:
    parser = options(__doc__.splitlines()[0], name="compare", cell_limit_s=1800.0)
    parser.add_argument("--methods", nargs="+", default=[], help="some of them (default: all)")
    given = parser.parse_args()
    rungs = rungs_of(given.methods)
    recipes = given.out / "recipes"
    write_recipes(rungs, recipes)
    cells, failures = run_given(given, rungs=rungs, recipes=recipes, warm=write_warm_recipe(recipes))
    conclude(cells, failures, given.out, name="compare", of="method", last_less_first=False)


if __name__ == "__main__":
    with exit_with_message():
        main()
