"""Commands that leave a run directory: probe, sweep, attribute, audit."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from entropy_ddp.cli.options import (
    Options,
    configured,
    error_console,
    output_folder,
    progress_console,
    resolving,
    stdout_kept,
    table_console,
)
from entropy_ddp.cli.ranks import EXIT_UNTRUSTED, load, require_report, run_ranks

if TYPE_CHECKING:
    from entropy_ddp.config import Config
    from entropy_ddp.distributed import World
    from entropy_ddp.probe.pipeline import Command


with_report = click.option(
    "--report", is_flag=True, help="Make report.html too, as the command report does."
)
with_resolve = resolving(
    "Where the measured change is not resolved, say how large E must be for a change of "
    "this share of the entropy; default: 0.01."
)


@click.command()
@with_report
@with_resolve
@configured
def probe(options: Options) -> None:
    """Measure what one optimizer step does to the entropy.

    Takes the step, re-scores E, importance-weights, undoes the step (the truth); the
    derivative along the step (the prediction); both with a standard error, and audits.
    """
    _run_job("probe", options)


@click.command()
@with_report
@configured
def sweep(options: Options) -> None:
    """Truth and both predictions over a grid of step sizes."""
    _run_job("sweep", options)


@click.command()
@with_report
@with_resolve
@configured
@click.option("--verify", is_flag=True, help="Take every what-if step for real.")
@click.option(
    "--hold",
    type=float,
    metavar="VALUE",
    help="Say what would have left this change of the entropy, nats per token; else 0.",
)
def attribute(options: Options, verify: bool, hold: float | None) -> None:
    """Which sequences and tokens of U cause the change.

    Every token's exact share, what the change had been without some of them, and what
    would have held the entropy.
    """
    asked = ["attribution.verify=true"] if verify else []
    if hold is not None:
        asked.append(f"attribution.hold={hold!r}")
    assignments = (*options.assignments, *asked)
    _run_job("attribute", replace(options, assignments=assignments))


@click.command()
@with_report
@with_resolve
@configured
def audit(options: Options) -> None:
    """Why is the predicted change zero, noisy or wrong?

    A probe with every check on all of E, and those that cost a pass or a step more.
    """
    _run_job("audit", options)


def _run_job(command: "Command", options: Options) -> None:
    """Run a job that leaves a run directory, and exit with its code."""
    if options.resolve is not None:
        assignment = f"truth.resolve={options.resolve!r}"
        options = replace(options, assignments=(*options.assignments, assignment))
    config = load(options)
    if options.report:
        require_report()
    out = output_folder(options, config, command)
    sys.exit(
        run_ranks(
            lambda world: _job(command, config, world, out, options),
            config.compute.rank_timeout_seconds,
            gathers_layers=config.compute.shard != "none",
        )
    )


def _job(
    command: "Command", config: "Config", world: "World", out: Path, options: Options
) -> int:
    from entropy_ddp.config import to_yaml
    from entropy_ddp.probe.pipeline import run
    from entropy_ddp.results import nothing_left, prepare_folder, write_results
    from entropy_ddp.terminal import commands
    from entropy_ddp.terminal.progress import phase_progress

    show = {
        "probe": commands.print_results,
        "sweep": commands.print_sweep,
        "attribute": commands.print_attribution,
        "audit": commands.print_diagnosis,
    }[command]
    console = table_console(world, options)
    with (
        nothing_left(out, options.overwrite),
        phase_progress(progress_console(world, options)) as progress,
        stdout_kept(options),
    ):
        if world.is_main:
            prepare_folder(out, options.overwrite, options.resume)
        probed = run(command, config, world, out, progress)
    if not world.is_main:
        return 0
    write_results(out, probed, to_yaml(config))
    if console is not None:
        show(console, probed.results, str(out))
        if command == "probe" and probed.results.attribution is not None:
            commands.print_shares(console, probed.results)
    else:
        # Quiet is no reason to leave with exit code 3 and without a word.
        commands.print_distrust(error_console(), probed.results)
    if options.report:
        from entropy_ddp.report.writing import write_report

        written = write_report([out], None)
        if console is not None:
            console.print(f"page: {written.page}", soft_wrap=True, markup=False)
    if options.as_json:
        click.echo(json.dumps(probed.results.to_dict(), allow_nan=False))
    # Only this rank says so: a launcher stops the others at the first non-zero code.
    return EXIT_UNTRUSTED if probed.results.status == "untrusted" else 0
