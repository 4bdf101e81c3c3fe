"""The picture of a benchmark: how many times the floor each case takes."""

import os
from pathlib import Path

SHOWN_ROWS = 8192  # of a whole matrix of shapes, only this N is drawn


def draw(rows: list[dict[str, object]], facts: dict[str, str], path: Path) -> bool:
    """Bars: how many times the floor each case takes, grouped by operation. False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plain = [row for row in rows if row["mix"] == "plain"]
    plain = [row for row in plain if int(row["N"]) == SHOWN_ROWS] or plain
    names = sorted({str(row["op"]) for row in plain})
    heights = [sum(row["op"] == name for row in plain) + 1 for name in names]
    size = (9, 1.2 + 0.28 * len(plain) + 0.8 * len(names))
    figure, axes = plt.subplots(len(names), 1, figsize=size, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, name in zip(axes[:, 0], names, strict=True):
        own = [row for row in plain if row["op"] == name]
        labels = [
            f"{row['implementation']}  N {row['N']}, V {row['V']}" + (f", H {row['H']}" if row["H"] else "")
            for row in own
        ]
        by = [str(row["implementation"]).split(",")[0] for row in own]  # without the rows a chunk
        ours = ["#1f6f8b" if name in ("torch", "triton") else "#c9c9c9" for name in by]
        axis.barh(labels, [float(row["times_floor"]) for row in own], color=ours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(f"{name}: times the floor ({own[0]['floor']})", fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
    figure.suptitle(f"{facts['card']}, torch {facts['torch']}, triton {facts['triton']}, {facts['commit']}", fontsize=9)
    figure.tight_layout()
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=130)
    plt.close(figure)
    os.replace(beside, path)
    return True
