"""`python -m benchmarks`: the table of all rows; `python -m benchmarks scale`."""

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from benchmarks.comparison import Comparison, Setting
from benchmarks.probes import scale_rows
from benchmarks.rows import GPU_ROWS, ROWS, default_rows
from benchmarks.table import (
    as_document,
    document_of,
    print_comparisons,
    print_scale,
    write_document,
)
from entropy_ddp.errors import InputError

SIZES = ("tiny", "default", "full")


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """What both commands take."""
    out = click.option("--out", type=click.Path(path_type=Path), show_default=True)
    size = click.option(
        "--size",
        type=click.Choice(SIZES),
        default="default",
        show_default=True,
        help="tiny: seconds, to see that it runs; full: an hour.",
    )
    return out(size(command))


@click.group(invoke_without_command=True)
@click.option(
    "--rows",
    "names",
    multiple=True,
    type=click.Choice(list(ROWS)),
    help="Rows to run; repeatable. Default: all, gpu-probe on a GPU only.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@common_options
@click.pass_context
def main(context: click.Context, out: Path | None, **options: Any) -> None:
    """Time every part of a probe against what it is made of."""
    # The models are made here; nothing is asked of the hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    quiet_libraries()
    if context.invoked_subcommand is None:
        run_rows(out or Path("runs/bench.json"), **options)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice about made-up models to themselves."""
    for module in ("transformers", "peft"):
        warnings.filterwarnings("ignore", module=module)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run_rows(
    out: Path, names: tuple[str, ...], repeats: int, device: str, size: Any
) -> None:
    """Run rows, print the table, write the document."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: there is no GPU that torch can use")
    setting = Setting(size=size, repeats=repeats, device=torch.device(device))
    chosen = list(names) or default_rows(setting)
    if device == "cpu" and size != "tiny" and set(chosen) & set(GPU_ROWS):
        raise click.UsageError(
            f"--rows {GPU_ROWS[0]}: needs --device cuda, or --size tiny to try it out"
        )
    console, errors = wide_console(), Console(stderr=True)
    comparisons: list[Comparison] = []
    seconds: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in chosen:
        begin = time.perf_counter()
        try:
            for comparison in ROWS[name](setting):
                comparisons.append(comparison)
                median = comparison.median
                found = comparison.says if median is None else f"{median:.3g}"
                errors.print(f"{comparison.part}: {found}", highlight=False)
        except InputError as error:
            missing[name] = str(error)
            errors.print(f"[yellow]{name}: not measured:[/] {error}")
        seconds[name] = time.perf_counter() - begin
        # After every row: an interrupted run keeps what it measured.
        document = document_of(
            setting,
            rows=[as_document(comparison) for comparison in comparisons],
            not_measured=missing,
            seconds_by_row=seconds,
        )
        write_document(out, document)
    print_comparisons(console, comparisons)
    console.print(f"{sum(seconds.values()):.0f} s, written to {out}")


def wide_console() -> Console:
    """Standard output; a pipe has no width, and the tables are made for 120 columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


@main.command()
@common_options
def scale(out: Path | None, size: Any) -> None:
    """Cost of a probe at growing sizes of E: linear time, a constant communication."""
    setting = Setting(size=size)
    costs = list(scale_rows(setting))
    console = wide_console()
    print_scale(console, costs)
    path = out or Path("runs/bench-scale.json")
    write_document(path, document_of(setting, probes=costs))
    console.print(f"written to {path}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
