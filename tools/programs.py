"""PPO, DPO, iterative DPO and DAPO on tiny programs that test cases grade in the sandbox: a table, rows and curves.

Each seed makes one warm start, which all methods continue. Finished cells are kept; a cell that was killed goes on from
its last checkpoint, so the command can be stopped and started again.

    python tools/programs.py [--out runs/programs] [--seeds 1 2 3] [--jobs 2] [--cell-limit-s 1800] [--task-only]
                             [--set key.sub=value ...]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dapo_megatron.errors import exit_with_message  # noqa: E402
from tools.ladder import conclude, options, run_given  # noqa: E402
from tools.ladder_table import Rung  # noqa: E402
from tools.placed_recipes import placed_recipes  # noqa: E402
from tools.programs_task import write_task  # noqa: E402

RECIPES = ROOT / "recipes" / "methods" / "programs"
METHODS = (Rung("dapo", "DAPO"), Rung("dpo", "DPO"), Rung("iterative-dpo", "iterative DPO"), Rung("ppo", "PPO"))
START = "ppo"  # with a critic and a reference, so that every method may go on from it


def main() -> None:
    parser = options(__doc__.splitlines()[0], name="programs", cell_limit_s=1800.0)
    parser.add_argument("--task-only", action="store_true", help="write the task's files, for the recipes alone")
    given = parser.parse_args()
    write_task(given.out / "data")
    if given.task_only:
        return
    recipes = placed_recipes(RECIPES, METHODS, given.out)
    cells, failures = run_given(given, rungs=METHODS, recipes=recipes, warm=recipes / f"{START}.yaml")
    conclude(cells, failures, given.out, name="programs", of="method", last_less_first=False)


if __name__ == "__main__":
    with exit_with_message():
        main()
