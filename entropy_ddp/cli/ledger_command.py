"""The command `ledger`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from entropy_ddp.cli.options import (
    Options,
    configured,
    print_warning,
    progress_console,
    table_console,
)
from entropy_ddp.cli.ranks import EXIT_UNTRUSTED, run_ranks

if TYPE_CHECKING:
    from entropy_ddp.distributed import World


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@configured
def ledger(options: Options, run: Path) -> None:
    """Add up the entropy changes of a whole training.

    RUN: the folder of `ledger.jsonl`, the callback's `out`. With --config (or --set) a
    trainer's output folder instead, whose checkpoints and batches (rollouts/ of a
    RolloutRecorder, or else completions/ of TRL) are probed one after the other. Writes
    ledger.json and, with the extra `report`, ledger.html into --out, by default the
    ledger's folder.
    """
    sys.exit(run_ranks(lambda world: _ledger(world, run, options)))


def _ledger(world: "World", run: Path, options: Options) -> int:
    folder = run
    if options.config is not None or options.assignments:
        folder = options.out or run / "ledger"
        _probe(world, run, folder, options)
    if not world.is_main:
        return 0
    return _add_up(world, folder, options.out or folder, options)


def _probe(world: "World", run: Path, out: Path, options: Options) -> None:
    """Write the ledger of a run that has checkpoints."""
    from entropy_ddp.ledger.lines import LEDGER_FILE
    from entropy_ddp.terminal.progress import phase_progress
    from entropy_ddp.training.checkpoints import CheckpointRun, probe_checkpoints

    checkpoints = CheckpointRun(
        folder=run, out=out, config=options.config, assignments=options.assignments
    )
    if options.overwrite and world.is_main:
        (out / LEDGER_FILE).unlink(missing_ok=True)
    world.gather_objects(None)
    with phase_progress(progress_console(world, options)) as progress:
        probe_checkpoints(checkpoints, world, progress)


def _add_up(world: "World", folder: Path, out: Path, options: Options) -> int:
    from entropy_ddp.files import written_whole
    from entropy_ddp.ledger.accumulate import accumulate
    from entropy_ddp.ledger.lines import read_ledger
    from entropy_ddp.report.writing import missing_report_extra
    from entropy_ddp.terminal.commands import print_ledger

    found = accumulate(read_ledger(folder))
    text = json.dumps(asdict(found), allow_nan=False, indent=1)
    contents = {"ledger.json": text + "\n"}
    missing = missing_report_extra()
    if missing is None:
        from entropy_ddp.report.ledger_page import ledger_page
        from entropy_ddp.report.page import render_page

        page = ledger_page(found, folder.resolve().name)
        contents["ledger.html"] = render_page(page)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with written_whole(out / name) as stream:
            stream.write(content.encode())
    if missing is not None:
        # The page of an earlier ledger would say another thing than ledger.json.
        (out / "ledger.html").unlink(missing_ok=True)
        print_warning(f"no page is made: {missing}")
    console = table_console(world, options)
    if console is not None:
        print_ledger(console, found, str(out / list(contents)[-1]))
    if options.as_json:
        click.echo(text)
    return 0 if found.trusted else EXIT_UNTRUSTED
