"""A command on every rank: one message and one exit code, whatever happens."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from entropy_ddp.cli.options import Options, error_console, print_warning
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.interruption import (
    Interrupted,
    end_at_once,
    ignore_signals,
    signals_raise,
)

if TYPE_CHECKING:
    from entropy_ddp.config import Config
    from entropy_ddp.distributed import World

EXIT_FAILED, EXIT_INPUT, EXIT_UNTRUSTED = 1, 2, 3


def run_ranks(
    body: Callable[["World"], int],
    rank_timeout_seconds: float | None = None,
    *,
    gathers_layers: bool = False,
) -> int:
    """Run a command's body on this rank and turn failures into one message.

    With a process group a failure ends this process here, and the others with it.

    Args:
        body: the command, from the ranks to an exit code.
        rank_timeout_seconds: `compute.rank_timeout_seconds`; None: its default.
        gathers_layers: whether its passes wait for other ranks in C++ (`compute.shard`):
            it is then run in a thread, so that signals are seen meanwhile.

    Returns:
        The exit code.
    """
    from entropy_ddp import distributed

    # The libraries' deprecations among themselves are nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warning = distributed.single_process_warning(os.environ)
    if warning is not None:
        print_warning(warning)
    timeout = rank_timeout_seconds or distributed.RANK_TIMEOUT_SECONDS
    world: World | None = None
    try:
        with (
            signals_raise(lambda interrupted: _fail(interrupted, world)),
            distributed.process_group(timeout, tell=print_error) as world,
        ):
            if gathers_layers:
                opened = world
                return distributed.interruptibly(lambda: body(opened))
            return body(world)
    except (Exception, Interrupted) as error:  # noqa: BLE001
        # Whatever it is: the first rank to fail says so, and all end.
        return _fail(error, world)


def _fail(error: BaseException, world: "World | None") -> int:
    """End this rank, with the failure's message if it is the first."""
    ignore_signals()
    code = EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED
    if world is None or world.watch is None:
        print_failure(error, world)
        if isinstance(error, Interrupted):
            end_at_once(code)
        return code
    # A lost connection raises a RuntimeError, a launcher that stops all sends a signal:
    # in both cases another rank may be the cause.
    is_suspect = isinstance(error, (RuntimeError, Interrupted))
    world.watch.fail(
        str(error),
        code,
        lambda: print_failure(error, world),
        is_suspect=is_suspect and not isinstance(error, RunError),
    )


def print_failure(error: BaseException, world: "World | None") -> None:
    """Print one line; of an error that nobody foresaw, the traceback before it."""
    if isinstance(error, Interrupted):
        # A bar may not have come to show it again.
        error_console().show_cursor()
        print_line(str(error))
        return
    if not isinstance(error, (InputError, RunError)):
        traceback.print_exception(error)
    rank = f"rank {world.rank}: " if world is not None and world.world_size > 1 else ""
    print_error(f"{rank}{str(error) or type(error).__name__}")


def print_error(message: str) -> None:
    """Print a message as an error."""
    error_console().print("[bold red]error:[/] ", end="", soft_wrap=True)
    print_line(message)


def print_line(message: str) -> None:
    error_console().print(message, markup=False, highlight=False, soft_wrap=True)


def require_report() -> None:
    """Exit before anything expensive if a page is asked for and cannot be made."""
    from entropy_ddp.report.writing import require_report_extra

    try:
        require_report_extra()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print_failure(error, None)
        sys.exit(EXIT_INPUT)


def load(options: Options) -> "Config":
    """The configuration; on a mistake on any rank, one says so and all exit."""
    try:
        return _read(options)
    except Exception as error:  # noqa: BLE001
        failure = error
    if not {"RANK", "WORLD_SIZE"} & set(os.environ):
        sys.exit(_fail(failure, None))

    def fail(world: "World") -> int:
        raise failure

    # The others may have read theirs, and wait.
    sys.exit(run_ranks(fail))


def _read(options: Options) -> "Config":
    from entropy_ddp.checkpoint.trainer_settings import with_training_arguments
    from entropy_ddp.config import load_config

    return with_training_arguments(load_config(options.config, options.assignments))
