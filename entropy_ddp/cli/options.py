"""What every command that reads a configuration takes, and where it prints."""

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from entropy_ddp.config import Config
    from entropy_ddp.distributed import World


@dataclass(frozen=True, kw_only=True)
class Options:
    """What commands that read a configuration take.

    Attributes:
        share: of `--for`, over 1.
        resolve: a change, as a share of the entropy.
    """

    config: Path | None
    assignments: tuple[str, ...]
    out: Path | None
    overwrite: bool
    resume: bool = False
    quiet: bool
    as_json: bool
    report: bool = False
    share: float | None = None
    pilot: Path | None = None
    resolve: float | None = None


trusting = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that comes with the model or its tokenizer.",
)


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
    @click.option(
        "--resume", is_flag=True, help="Go on with the unfinished run in --out."
    )
    @click.option("--quiet", is_flag=True, help="Print errors only.")
    @click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print results as JSON on standard output, and nothing else there.",
    )
    @trusting
    @wraps(command)
    def wrapper(trust_remote_code: bool, **arguments: Any) -> None:
        if trust_remote_code:
            arguments["assignments"] += ("checkpoint.trust_remote_code=true",)
        names = Options.__dataclass_fields__
        options = {name: arguments.pop(name) for name in names if name in arguments}
        command(Options(**options), **arguments)

    return wrapper


def resolving(meaning: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option `--resolve`, of which the command says what it means."""
    return click.option(
        "--resolve",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SHARE",
        help=meaning,
    )


def planned(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options by which E is sized from a pilot run."""
    command = resolving(
        "Plan for a change of this share of the entropy, as 0.01, instead of the one that "
        "the pilot measured."
    )(command)
    command = click.option(
        "--pilot",
        type=click.Path(path_type=Path),
        help="Run directory of a probe, whose E tells the errors.",
    )(command)
    return click.option(
        "--for",
        "share",
        metavar="PERCENT",
        callback=_as_share,
        help="Size E so that the 95 % interval of the change is within this share of it "
        "to either side, as 20%. Needs --pilot.",
    )(command)


def _as_share(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> float | None:
    """A percentage as a share."""
    if text is None:
        return None
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not text.strip().endswith("%") or not 0 < share < 1:
        raise click.BadParameter(f"expected a percentage below 100%, found {text!r}")
    return share


def require_both(options: Options) -> None:
    """Check that what E is sized for and what tells the errors are given together.

    Raises:
        UsageError: one of them is missing.
    """
    if (options.share is None) != (options.pilot is None) or (
        options.resolve is not None and options.share is None
    ):
        raise click.UsageError(
            "expected --for and --pilot together (and --resolve only with them): the size "
            "of E follows from a share and a run that tells the errors"
        )


def output_folder(options: Options, config: "Config", command: str) -> Path:
    if options.out is not None or config.out is not None:
        return options.out or Path(config.out or "")
    started = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{command}-{started}"


def stdout_kept(options: Options) -> AbstractContextManager[Any]:
    """Under --json, what a reward function prints goes to standard error."""
    return redirect_stdout(sys.stderr) if options.as_json else nullcontext()


def table_console(world: "World", options: Options) -> "Console | None":
    """Where tables go: standard output, or standard error if that is for JSON."""
    if not world.is_main or options.quiet:
        return None
    return error_console() if options.as_json else output_console()


def progress_console(world: "World", options: Options) -> "Console | None":
    """Where progress goes: standard error of the first rank."""
    return None if options.quiet or not world.is_main else error_console()


def output_console() -> "Console":
    from rich.console import Console

    # A pipe has no width; the tables are made for 100 columns.
    return Console(width=None if sys.stdout.isatty() else 100)


def error_console() -> "Console":
    from rich.console import Console

    return Console(stderr=True, width=None if sys.stderr.isatty() else 100)


def print_warning(message: str) -> None:
    """Say on standard error what the command did not do, also when it is quiet."""
    from rich.text import Text

    text = Text("warning: ", style="yellow").append(message, style="default")
    error_console().print(text, soft_wrap=True)
