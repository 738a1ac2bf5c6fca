"""The command line: parse, call, exit code.

Exit codes: 0 ok; 1 failed; 2 bad usage, configuration or input; 3 results written but
untrusted. Heavy libraries are imported inside the commands, so that help and usage
errors answer at once.
"""

import click

from entropy_ddp import __version__
from entropy_ddp.cli.import_command import import_
from entropy_ddp.cli.inputs import check, demo, sample
from entropy_ddp.cli.jobs import attribute, audit, probe, sweep
from entropy_ddp.cli.ledger_command import ledger


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Why is my policy's entropy collapsing, and which update did it?

    Every command runs alone, under `torchrun --nproc_per_node=K -m entropy_ddp ...`
    and under `accelerate launch -m entropy_ddp ...`, with the same results.
    """


for command in (probe, sweep, attribute, audit, sample, import_, ledger, check, demo):
    main.add_command(command)
