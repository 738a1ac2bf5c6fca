"""The command line: parse, call, exit code.

Exit codes: 0 ok; 1 failed; 2 bad usage, configuration or input; 3 results written but
untrusted. Heavy libraries are imported inside the commands, so that help and usage
errors answer at once.
"""

import os
from typing import Any, NoReturn

import click

from entropy_ddp import __version__
from entropy_ddp.cli.import_command import import_
from entropy_ddp.cli.jobs import attribute, audit, probe, sweep
from entropy_ddp.cli.ledger_command import ledger
from entropy_ddp.cli.prepare import check, demo, sample
from entropy_ddp.cli.ranks import EXIT_FAILED
from entropy_ddp.cli.report_command import report
from entropy_ddp.interruption import Interrupted, end_at_once, signals_raise


class _Interruptible(click.Group):
    """Commands that a signal ends with one line, also while libraries are imported."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        # A rank that is gone is reported once, in words, not by each connection to it.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        try:
            with signals_raise(_leave):
                return super().invoke(ctx)
        except Interrupted as interrupted:
            _leave(interrupted)


def _leave(interrupted: Interrupted) -> NoReturn:
    # No rank knows of the others yet.
    if os.environ.get("RANK", "0") == "0":
        click.echo(str(interrupted), err=True)
    end_at_once(EXIT_FAILED)


@click.group(
    cls=_Interruptible, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__)
def main() -> None:
    """Why is my policy's entropy collapsing, and which update did it?

    Every command runs alone, under `torchrun --nproc_per_node=K -m entropy_ddp ...`
    and under `accelerate launch -m entropy_ddp ...`, with the same results.
    """


for command in (
    probe, sweep, attribute, audit, report, ledger, sample, import_, check, demo,
):  # fmt: skip
    main.add_command(command)
