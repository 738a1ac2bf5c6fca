"""The commands before a run: sample, check, demo."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from entropy_ddp.cli.options import (
    Options,
    configured,
    error_console,
    output_folder,
    planned,
    progress_console,
    require_both,
    stdout_kept,
    table_console,
)
from entropy_ddp.cli.ranks import load, run_ranks

if TYPE_CHECKING:
    from entropy_ddp.config import Config
    from entropy_ddp.distributed import World
    from entropy_ddp.probe.planning import Wanted


@click.command()
@planned
@configured
def sample(options: Options) -> None:
    """Roll E and U out of the checkpoint into rollout files."""
    require_both(options)
    config = load(options)
    out = output_folder(options, config, "sample")
    sys.exit(
        run_ranks(
            lambda world: _sample(config, world, out, options),
            config.compute.rank_timeout_seconds,
            gathers_layers=config.compute.shard != "none",
        )
    )


def _sample(config: "Config", world: "World", out: Path, options: Options) -> int:
    from entropy_ddp.probe.planning import with_planned_evaluation
    from entropy_ddp.probe.sample import run_sample, sampled_files
    from entropy_ddp.results import nothing_left, prepare_folder
    from entropy_ddp.terminal.commands import print_samples
    from entropy_ddp.terminal.progress import phase_progress

    config = with_planned_evaluation(config, _wanted(options))
    names = [path.name for path in sampled_files(config, out).values()]
    console = table_console(world, options)
    with (
        nothing_left(out, options.overwrite),
        phase_progress(progress_console(world, options)) as progress,
        stdout_kept(options),
    ):
        if world.is_main:
            prepare_folder(out, options.overwrite, options.resume, names)
        summaries = run_sample(config, world, out, progress)
    if console is not None:
        print_samples(console, summaries, str(out))
    if options.as_json and world.is_main:
        click.echo(json.dumps(summaries, allow_nan=False))
    return 0


def _wanted(options: Options) -> "Wanted | None":
    """What E is sized for, if anything."""
    from entropy_ddp.probe.planning import Wanted

    if options.share is None or options.pilot is None:
        return None
    return Wanted(share=options.share, pilot=options.pilot, resolve=options.resolve)


@click.command()
@planned
@configured
def check(options: Options) -> None:
    """Validate a configuration, its checkpoint and its batches.

    Runs nothing expensive.
    """
    require_both(options)
    config = load(options)
    sys.exit(
        run_ranks(
            lambda world: _check(config, world, options),
            config.compute.rank_timeout_seconds,
            gathers_layers=config.compute.shard != "none",
        )
    )


def _check(config: "Config", world: "World", options: Options) -> int:
    from entropy_ddp.probe.check import inspect_run
    from entropy_ddp.terminal.commands import print_inspection
    from entropy_ddp.terminal.progress import phase_progress

    console = table_console(world, options)
    with phase_progress(progress_console(world, options)) as progress:
        found = inspect_run(config, world, progress, _wanted(options))
    if console is not None:
        print_inspection(console, found)
    if options.as_json and world.is_main:
        click.echo(json.dumps(found, allow_nan=False))
    return 0


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to make; must not exist.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="Print errors only.")
def demo(out: Path, seed: int, quiet: bool) -> None:
    """Make the demo checkpoint with TRL, and roll E and U out of it."""
    sys.exit(run_ranks(lambda world: _demo(out, seed, quiet, world)))


def _demo(out: Path, seed: int, quiet: bool, world: "World") -> int:
    from entropy_ddp.demo import make_demo
    from entropy_ddp.terminal.progress import phase_progress

    console = None if quiet else error_console()
    with phase_progress(console) as progress:
        made = make_demo(out, seed, world, progress)
    if console is not None:
        console.print(
            f"made {out / made.checkpoint.name} (TRL checkpoint), {out / made.base.name} "
            f"(its base model), {out / 'E.jsonl'} and {out / 'U.jsonl'} (rollouts)",
            soft_wrap=True,
            markup=False,
        )
    return 0
