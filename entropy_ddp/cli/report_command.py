"""The command `report`. It needs no model, and so neither torch nor a launcher."""

import json
import sys
from pathlib import Path

import click

from entropy_ddp.cli.ranks import EXIT_FAILED, EXIT_INPUT, print_failure
from entropy_ddp.errors import InputError, RunError


@click.command()
@click.argument(
    "runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="HTML file to write; default: report.html in the first RUN, and of runs that "
    "are compared in the folder that holds them.",
)
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print what was written as JSON on standard output, and nothing else there.",
)
def report(
    runs: tuple[Path, ...], out: Path | None, quiet: bool, as_json: bool
) -> None:
    """Make a page of a run directory, or of several.

    RUN is what probe, sweep, attribute or audit wrote. Runs of the same checkpoint,
    batches and step (a probe, a sweep, an attribution) make one page together; others
    are compared, checkpoint by checkpoint. Plots are written beside the page too.
    """
    from entropy_ddp.report.writing import write_report

    try:
        written = write_report(runs, out)
    except (InputError, RunError) as error:
        print_failure(error, None)
        sys.exit(EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED)
    if as_json:
        paths = {"page": str(written.page), "plots": str(written.plots)}
        click.echo(json.dumps({**paths, "figures": written.num_figures}))
    elif not quiet:
        click.echo(
            f"wrote {written.page} and {written.num_figures} figures to {written.plots}"
        )
