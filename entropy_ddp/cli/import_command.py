"""The command `import`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from entropy_ddp.cli.options import error_console, output_console, trusting
from entropy_ddp.cli.ranks import run_ranks

if TYPE_CHECKING:
    from entropy_ddp.distributed import World


@click.command("import")
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
    "--base",
    help="Folder or hub id of the model, where the checkpoint does not name it.",
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
    "--num-generations",
    type=click.IntRange(min=1),
    help="Responses of one draw of a prompt; default: the checkpoint's.",
)
@click.option(
    "--num-prompts-total",
    type=click.IntRange(min=1),
    help="The prompts were drawn from a set of this size, without replacement.",
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
@trusting
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
    from entropy_ddp.importers.run import import_rollouts
    from entropy_ddp.importers.table import parse_columns
    from entropy_ddp.terminal.commands import print_import

    source = Source(
        rewards=arguments.pop("rewards"),
        columns=parse_columns(arguments.pop("columns")),
        num_generations=arguments.pop("num_generations"),
        num_prompts_total=arguments.pop("num_prompts_total"),
    )
    summary = import_rollouts(format_name, source=source, **arguments)
    if not quiet:
        console = error_console() if as_json else output_console()
        print_import(console, summary, str(arguments["output"]))
    if as_json:
        click.echo(json.dumps(summary, allow_nan=False))
