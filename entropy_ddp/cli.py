"""The command line: parse, call, exit code.

Exit codes: 0 ok; 1 failed; 2 bad usage, configuration or input; 3 results written but
untrusted. Heavy libraries are imported inside the commands, so that help and usage
errors answer at once.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from entropy_ddp import __version__
from entropy_ddp.errors import InputError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from entropy_ddp.config import Config
    from entropy_ddp.distributed import World

EXIT_FAILED, EXIT_INPUT, EXIT_UNTRUSTED = 1, 2, 3


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Why is my policy's entropy collapsing, and which update did it?

    Every command runs alone, under `torchrun --nproc_per_node=K -m entropy_ddp ...`
    and under `accelerate launch -m entropy_ddp ...`, with the same results.
    """


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command that reads a configuration takes."""

    config: Path | None
    assignments: tuple[str, ...]
    out: Path | None
    overwrite: bool
    quiet: bool
    as_json: bool


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a configured run, bundled."""

    @click.option(
        "--config",
        type=click.Path(path_type=Path),
        help="YAML file of the run; see configs/.",
    )
    @click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY.SUB=VALUE",
        help="Set one key of the configuration; wins over the file. Repeatable.",
    )
    @click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Folder for what is written; default: a new one under runs/.",
    )
    @click.option("--overwrite", is_flag=True, help="Replace earlier results in --out.")
    @click.option("--quiet", is_flag=True, help="Print errors only.")
    @click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print results as JSON on standard output, and nothing else there.",
    )
    @wraps(command)
    def wrapper(**arguments: Any) -> None:
        names = Options.__dataclass_fields__
        options = {name: arguments.pop(name) for name in names}
        command(Options(**options), **arguments)

    return wrapper


@main.command()
@configured
def probe(options: Options) -> None:
    """Measure what one optimizer step does to the entropy, predicted and true."""
    _run_job("probe", options)


@main.command()
@configured
def sweep(options: Options) -> None:
    """Truth and both predictions over a grid of step sizes; continues if interrupted."""
    _run_job("sweep", options)


@main.command()
@configured
@click.option("--verify", is_flag=True, help="Take every what-if step for real.")
def attribute(options: Options, verify: bool) -> None:
    """Which sequences and tokens of U cause the change, and what if they were out."""
    assignment = ("attribution.verify=true",) if verify else ()
    assignments = (*options.assignments, *assignment)
    _run_job("attribute", replace(options, assignments=assignments))


@main.command()
@configured
def audit(options: Options) -> None:
    """Why is the predicted change zero, noisy or wrong? Every check on all of E."""
    _run_job("audit", options)


def _run_job(name: str, options: Options) -> None:
    """Run a job that leaves a run directory, and exit with its code."""
    config = _load(options)
    out = _output_folder(options, config, name)
    sys.exit(run_ranks(lambda world: _job(name, config, world, out, options)))


def _job(
    name: str, config: "Config", world: "World", out: Path, options: Options
) -> int:
    from entropy_ddp.config import to_yaml
    from entropy_ddp.probe.attribution import run_attribution
    from entropy_ddp.probe.run import run_audit, run_probe
    from entropy_ddp.probe.sweep import run_sweep
    from entropy_ddp.report import attribution, tables
    from entropy_ddp.report.progress import phase_progress
    from entropy_ddp.results import prepare_folder, write_results

    job, show = {
        "probe": (run_probe, tables.print_results),
        "sweep": (run_sweep, tables.print_sweep),
        "attribute": (run_attribution, attribution.print_attribution),
        "audit": (run_audit, tables.print_diagnosis),
    }[name]
    if world.is_main:
        prepare_folder(out, options.overwrite)
    console = _console(world, options)
    with phase_progress(console) as progress, _stdout_kept(options):
        probed = job(config, world, out, progress)
    if not world.is_main:
        return 0
    write_results(out, probed, to_yaml(config))
    if console is not None:
        show(console, probed.results, str(out))
        if name == "probe" and probed.results.attribution is not None:
            attribution.print_shares(console, probed.results)
    if options.as_json:
        click.echo(json.dumps(probed.results.to_dict(), allow_nan=False))
    # Only this rank says so: a launcher stops the others at the first non-zero code.
    return EXIT_UNTRUSTED if probed.results.status == "untrusted" else 0


@main.command()
@configured
def sample(options: Options) -> None:
    """Roll E and U out of the checkpoint and write them as rollout files."""
    config = _load(options)
    out = _output_folder(options, config, "sample")
    sys.exit(run_ranks(lambda world: _sample(config, world, out, options)))


def _sample(config: "Config", world: "World", out: Path, options: Options) -> int:
    from entropy_ddp.probe.sample import run_sample
    from entropy_ddp.report.inputs import print_samples
    from entropy_ddp.report.progress import phase_progress

    console = _console(world, options)
    with phase_progress(console) as progress, _stdout_kept(options):
        summaries = run_sample(config, world, out, options.overwrite, progress)
    if console is not None:
        print_samples(console, summaries, str(out))
    if options.as_json and world.is_main:
        click.echo(json.dumps(summaries, allow_nan=False))
    return 0


@main.command()
@configured
def check(options: Options) -> None:
    """Validate configuration, checkpoint and batches; run nothing expensive."""
    config = _load(options)
    sys.exit(run_ranks(lambda world: _check(config, world, options)))


def _check(config: "Config", world: "World", options: Options) -> int:
    from entropy_ddp.probe.inspect import inspect_run
    from entropy_ddp.report.inputs import print_inspection
    from entropy_ddp.report.progress import phase_progress

    console = _console(world, options)
    with phase_progress(console) as progress:
        found = inspect_run(config, world, progress)
    if console is not None:
        print_inspection(console, found)
    if options.as_json and world.is_main:
        click.echo(json.dumps(found, allow_nan=False))
    return 0


@main.command("import")
@click.argument("format_name", metavar="FORMAT")
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the checkpoint that the rollouts were sampled from.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Rollout file to write: .jsonl or .jsonl.gz.",
)
@click.option(
    "--max-completion-length",
    type=click.IntRange(min=1),
    help="Responses of this many tokens were truncated; default: the checkpoint's.",
)
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    metavar="NAME",
    help="trl: a reward function's column; default: all numeric ones. Repeatable.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="FIELD=NAME",
    help="table: the column that a field is read from. Repeatable.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier --output.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print what was imported as JSON on standard output, and nothing else there.",
)
def import_(format_name: str, quiet: bool, as_json: bool, **arguments: Any) -> None:
    """Turn another trainer's rollout dump into a rollout file.

    FORMAT: trl (completions parquet), verl, prime-rl, nemo-rl, or table (JSON lines or
    CSV with prompt, response and reward).
    """

    def body(world: "World") -> int:
        if world.is_main:
            _import(format_name, arguments, quiet, as_json)
        return 0

    sys.exit(run_ranks(body))


def _import(
    format_name: str, arguments: dict[str, Any], quiet: bool, as_json: bool
) -> None:
    from entropy_ddp.importers.records import Source
    from entropy_ddp.importers.run import ImportOptions, import_rollouts
    from entropy_ddp.importers.table import parse_columns
    from entropy_ddp.report.inputs import print_import

    rewards, columns = arguments.pop("rewards"), arguments.pop("columns")
    source = Source(rewards=rewards, columns=parse_columns(columns))
    options = ImportOptions(format=format_name, source=source, **arguments)
    summary = import_rollouts(options)
    if not quiet:
        console = _error_console() if as_json else _output_console()
        print_import(console, summary, str(options.output))
    if as_json:
        click.echo(json.dumps(summary, allow_nan=False))


@main.command()
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
    from entropy_ddp.probe.demonstration import make_demo
    from entropy_ddp.report.progress import phase_progress

    console = None if quiet else _error_console()
    with phase_progress(console) as progress:
        made = make_demo(out, seed, world, progress)
    if console is not None:
        console.print(
            f"made {out / made.checkpoint.name} (TRL checkpoint), {out / made.base.name} "
            f"(its base model), {out / 'E.jsonl'} and {out / 'U.jsonl'} (rollouts)",
            soft_wrap=True,
        )
    return 0


def run_ranks(body: Callable[["World"], int]) -> int:
    """Run a command's body on this rank and turn failures into one message.

    Returns:
        The exit code.
    """
    from entropy_ddp.distributed import World, process_group, single_process_warning

    # The libraries' deprecations among themselves are nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warning = single_process_warning(os.environ)
    if warning is not None:
        _error_console().print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    world: World | None = None
    try:
        with process_group() as world:
            return body(world)
    except Exception as error:  # noqa: BLE001
        # Whatever it is, the first rank to fail says so; the others fail because it did.
        if world is None or world.claim_failure(str(error)):
            _print_failure(error, world)
            if world is not None:
                world.failure_told()
        return EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED


def _print_failure(error: Exception, world: "World | None") -> None:
    if not isinstance(error, (InputError, RunError)):
        traceback.print_exception(error)
    rank = f"rank {world.rank}: " if world is not None and world.world_size > 1 else ""
    console = _error_console()
    console.print(f"[bold red]error:[/] {rank}", end="", soft_wrap=True)
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)


def _load(options: Options) -> "Config":
    """The configuration; on a mistake, rank 0 says so and every rank exits."""
    from entropy_ddp.config import load_config
    from entropy_ddp.policy.trained_settings import with_training_arguments

    try:
        config = load_config(options.config, options.assignments)
        return with_training_arguments(config)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            _print_failure(error, None)
        sys.exit(EXIT_INPUT)


def _output_folder(options: Options, config: "Config", command: str) -> Path:
    if options.out is not None or config.out is not None:
        return options.out or Path(config.out or "")
    started = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{command}-{started}"


def _stdout_kept(options: Options) -> AbstractContextManager[Any]:
    """Under --json, what a reward function prints goes to standard error."""
    return redirect_stdout(sys.stderr) if options.as_json else nullcontext()


def _console(world: "World", options: Options) -> "Console | None":
    """Where tables go: standard output, or standard error if that is for JSON."""
    if not world.is_main or options.quiet:
        return None
    return _error_console() if options.as_json else _output_console()


def _output_console() -> "Console":
    from rich.console import Console

    # A pipe has no width; the tables are made for 100 columns.
    return Console(width=None if sys.stdout.isatty() else 100)


def _error_console() -> "Console":
    from rich.console import Console

    return Console(stderr=True, width=None if sys.stderr.isatty() else 100)
