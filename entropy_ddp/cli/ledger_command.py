"""The command `ledger`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from entropy_ddp.cli.console import error_console, output_console
from entropy_ddp.cli.ranks import run_ranks

if TYPE_CHECKING:
    from entropy_ddp.distributed import World


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the ledger as JSON on standard output, and nothing else there.",
)
def ledger(run: Path, quiet: bool, as_json: bool) -> None:
    """Add up the entropy changes of a whole training.

    RUN: the folder of `ledger.jsonl`, the callback's `out`. Writes ledger.json and
    ledger.html there.
    """

    def body(world: "World") -> int:
        if world.is_main:
            _ledger(run, quiet, as_json)
        return 0

    sys.exit(run_ranks(body))


def _ledger(run: Path, quiet: bool, as_json: bool) -> None:
    from entropy_ddp.atomic import written_whole
    from entropy_ddp.ledger.accumulate import accumulate
    from entropy_ddp.ledger.reading import read_ledger
    from entropy_ddp.report.ledger_page import ledger_page
    from entropy_ddp.terminal.ledger import print_ledger

    found = accumulate(read_ledger(run))
    text = json.dumps(asdict(found), allow_nan=False, indent=1)
    page = ledger_page(found, run.resolve().name)
    for name, content in (("ledger.json", text + "\n"), ("ledger.html", page)):
        with written_whole(run / name) as stream:
            stream.write(content.encode())
    if not quiet:
        console = error_console() if as_json else output_console()
        print_ledger(console, found, str(run / "ledger.html"))
    if as_json:
        click.echo(text)
