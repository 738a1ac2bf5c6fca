"""A command on every rank: one message and one exit code, whatever happens."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from entropy_ddp.cli.console import error_console
from entropy_ddp.cli.options import Options
from entropy_ddp.errors import InputError, RunError

if TYPE_CHECKING:
    from entropy_ddp.config import Config
    from entropy_ddp.distributed import World

EXIT_FAILED, EXIT_INPUT, EXIT_UNTRUSTED = 1, 2, 3


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
        error_console().print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    world: World | None = None
    try:
        with process_group() as world:
            return body(world)
    except Exception as error:  # noqa: BLE001
        # Whatever it is, the first rank to fail says so; the others fail because it did.
        if world is None or world.claim_failure(str(error)):
            print_failure(error, world)
            if world is not None:
                world.failure_told()
        return EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED


def print_failure(error: Exception, world: "World | None") -> None:
    if not isinstance(error, (InputError, RunError)):
        traceback.print_exception(error)
    rank = f"rank {world.rank}: " if world is not None and world.world_size > 1 else ""
    console = error_console()
    console.print(f"[bold red]error:[/] {rank}", end="", soft_wrap=True)
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)


def load(options: Options) -> "Config":
    """The configuration; on a mistake, rank 0 says so and every rank exits."""
    from entropy_ddp.config import load_config
    from entropy_ddp.policy.trained_settings import with_training_arguments

    try:
        config = load_config(options.config, options.assignments)
        return with_training_arguments(config)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print_failure(error, None)
        sys.exit(EXIT_INPUT)
