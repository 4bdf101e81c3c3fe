"""The plans of all recipes for GPU nodes as one table, in docs/planning.md between its two marks.

python tools/plan_table.py            write it
python tools/plan_table.py --print    show it alone
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dapo_megatron.config import load_recipe  # noqa: E402
from dapo_megatron.files import write_text_atomically  # noqa: E402
from dapo_megatron.planning.plan import RunPlan, plan_run  # noqa: E402
from dapo_megatron.prepare import planned_architecture  # noqa: E402

DOCUMENT = ROOT / "docs" / "planning.md"
RECIPES = ROOT / "recipes" / "gpu"
MARKS = ("<!-- plan_table begins -->", "<!-- plan_table ends -->")
COLUMNS = (
    "recipe", "cards", "t x p x d", "fits", "learning", "sampling", "parameters", "gradients", "optimizer",
    "activations", "logits", "contexts", "staging", "engine weights", "KV cache", "rollout", "score", "update", "step",
)  # fmt: skip
PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "contexts",
    "staging",
    "engine_weights",
    "kv_cache",
)


def recipe_names() -> list[str]:
    """All recipes of the folder but those that only others build on."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith("base"))


def planned(name: str) -> RunPlan:
    """The plan of a recipe without its weight transfer: that one takes seconds to plan, and a second to carry out."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    return plan_run(recipe, planned_architecture(recipe, folder_needed=False))


def row(name: str, plan: RunPlan) -> dict[str, str]:
    """The cells of one recipe by column; GB of the fullest rank, seconds of a step."""
    layout, memory, phases = plan.layout, plan.memory, plan.time.phases
    stage, parts = memory.stages[memory.fullest], memory.parts
    cells = [
        name,
        f"{layout.world} {memory.card.name.split()[0]}",
        f"{layout.tensor} x {layout.pipeline} x {layout.data}",
        "yes" if plan.fits else "no",
        *(f"{count / 1e9:.1f}" for count in (stage.learn, stage.rollout, *(parts[part] for part in PARTS))),
        *(f"{phases[phase].seconds:.0f}" if phase in phases else "" for phase in ("rollout", "score", "update")),
        f"{plan.time.seconds:.0f}",
    ]
    return dict(zip(COLUMNS, cells, strict=True))


def table() -> str:
    """All recipes, as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    for name in recipe_names():
        lines.append(f"| {' | '.join(row(name, planned(name)).values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", dest="show", help="show the table and write nothing")
    arguments = parser.parse_args()
    if arguments.show:
        print(table())
        return
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    write_text_atomically(DOCUMENT, f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
