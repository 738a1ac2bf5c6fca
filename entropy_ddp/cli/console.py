"""Where a command prints: tables on standard output, errors beside it."""

import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

from entropy_ddp.cli.options import Options

if TYPE_CHECKING:
    from rich.console import Console

    from entropy_ddp.distributed import World


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
