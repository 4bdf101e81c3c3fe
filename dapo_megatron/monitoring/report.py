"""The report of one or several runs: a picture and one page that needs nothing beside itself."""

from collections.abc import Sequence
from pathlib import Path

from dapo_megatron.errors import RequestError
from dapo_megatron.files import atomic_path, write_text_atomically
from dapo_megatron.monitoring.run_record import read_runs


def write_report(run_directories: Sequence[Path], destination: Path | None = None) -> tuple[Path, Path]:
    """Write report.png and report.html for the given runs, overlaid, and return their paths.

    Reads metrics.jsonl and, where they exist, config.yaml, supervised.jsonl and samples.jsonl of each run.
    `destination` is a folder, by default the first run's.

    Raises RequestError for a folder without metrics.jsonl, a broken line, or a destination that is a file.
    """
    runs = read_runs(run_directories)
    folder = Path(run_directories[0] if destination is None else destination)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; name a folder for report.png and report.html")
    # matplotlib takes most of a second to import, so not before everything has been read
    from dapo_megatron.monitoring.report_figure import draw_report
    from dapo_megatron.monitoring.report_page import render_page

    picture = draw_report(runs)
    png_path, html_path = folder / "report.png", folder / "report.html"
    with atomic_path(png_path) as temporary:
        temporary.write_bytes(picture)
    write_text_atomically(html_path, render_page(runs, picture))
    return png_path, html_path
