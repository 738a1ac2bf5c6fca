"""From run directories to a page and its plots on disk."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from entropy_ddp.errors import InputError
from entropy_ddp.files import written_whole
from entropy_ddp.report.page import Page, render_page
from entropy_ddp.report.subjects import group_runs
from entropy_ddp.results.reading import read_run

EXTRA_LIBRARIES = ("jinja2", "matplotlib")
PAGE_NAME, PLOTS_NAME = "report.html", "plots"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a report left.

    Attributes:
        page: the HTML file.
        plots: the folder of its figures as PNG and SVG files.
        num_figures: how many.
    """

    page: Path
    plots: Path
    num_figures: int


def missing_report_extra() -> str | None:
    """What a page needs and is not installed, and how to install it; None if all is."""
    missing = [name for name in EXTRA_LIBRARIES if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"{' and '.join(missing)} not installed; install the extra with "
        "pip install 'entropy_ddp[report]'"
    )


def require_report_extra() -> None:
    """Check that the libraries of the extra `report` are there.

    Raises:
        InputError: one is not.
    """
    missing = missing_report_extra()
    if missing is not None:
        raise InputError(f"report: {missing}")


def write_report(folders: Sequence[Path], out: Path | None) -> Written:
    """Write the page of one run, of several about one step, or a comparison.

    Runs about the same step make one page, beside the first of them; runs about
    different ones are compared on a page in the folder that holds them all.

    Args:
        out: the page; its plots lie beside it in a folder of its name.

    Raises:
        InputError: a folder is no finished run, the runs contradict each other, or a
            library is missing.
        RunError: a file cannot be written.
    """
    require_report_extra()
    from entropy_ddp.report.comparison import comparison_page
    from entropy_ddp.report.run_page import run_page

    subjects = group_runs([read_run(folder) for folder in folders])
    if len(subjects) == 1:
        page = run_page(subjects[0])
        if out is None:
            return _write(page, folders[0] / PAGE_NAME, folders[0] / PLOTS_NAME)
    else:
        page = comparison_page(subjects)
        out = out or _folder_of_all(folders) / PAGE_NAME
    if out.is_dir():
        raise InputError(f"--out {out}: expected a file to write, found a folder")
    return _write(page, out, out.with_name(f"{out.stem}-{PLOTS_NAME}"))


def _folder_of_all(folders: Sequence[Path]) -> Path:
    """The innermost folder that holds all these."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def _write(page: Page, path: Path, plots: Path) -> Written:
    """Write the plots, then the page; plots of an earlier page do not stay."""
    html = render_page(page)
    try:
        plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{plots}: cannot be made: {error.strerror}") from error
    earlier = {*plots.glob("*.png"), *plots.glob("*.svg")}
    for figure in page.figures:
        files = {"png": figure.png_file(), "svg": figure.svg_file()}
        for ending, content in files.items():
            target = plots / f"{figure.name}.{ending}"
            with written_whole(target) as stream:
                stream.write(content)
            earlier.discard(target)
    for target in earlier:
        target.unlink()
    with written_whole(path) as stream:
        stream.write(html.encode())
    return Written(page=path, plots=plots, num_figures=len(page.figures))
