"""A run directory as it lies on disk, read without torch.

results.json is written last, so that its presence means that the others are whole.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_ddp.config import Config, load_config
from entropy_ddp.data.jsonlines import read_rows
from entropy_ddp.errors import InputError

# What this package reads; `results.SCHEMA_VERSION` is what it writes.
READABLE_SCHEMA_VERSION = 1
# Where a run keeps what its phases leave: `results.UNFINISHED`, read without torch.
UNFINISHED = "unfinished"
REQUIRED = ("status", "run", "E", "update", "truth", "linear", "audit")

# The one that a page's headline comes from first.
COMMANDS = ("probe", "attribute", "audit", "sweep")

Columns = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A finished run.

    Attributes:
        folder: the run directory.
        document: what results.json holds.
        config: the resolved configuration.
        config_text: the same as config.yaml spells it.
    """

    folder: Path
    document: dict[str, Any]
    config: Config
    config_text: str

    @property
    def command(self) -> str:
        """What made the run, told by the parts that it left if the file does not say."""
        named = self.document["run"].get("command")
        if named is not None:
            return str(named)
        if "sweep" in self.document:
            return "sweep"
        return "attribute" if "attribution" in self.document else "probe"

    def columns(self, split: str) -> Columns:
        """The rows of per_sequence.jsonl of one batch by key.

        A key that some rows lack is left out.

        Raises:
            InputError: the file is absent or damaged.
        """
        path = self.folder / "per_sequence.jsonl"
        rows = [row for row in read_rows(path) if row.get("split") == split]
        if not rows:
            return {}
        shared = [key for key in rows[0] if all(key in row for row in rows)]
        return {key: [row[key] for row in rows] for key in shared}

    def tokens(self) -> Iterator[dict[str, Any]]:
        """The rows of tokens.jsonl.gz, one by one.

        Raises:
            InputError: the file is absent or damaged.
        """
        return read_rows(self.folder / "tokens.jsonl.gz")


def read_run(folder: Path) -> StoredRun:
    """Read a run directory.

    Raises:
        InputError: it is none, its run has not finished, or another version of the
            package wrote it.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise InputError(f"{folder}: {_what_it_is(folder)}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found != READABLE_SCHEMA_VERSION:
        raise InputError(
            f"{path}: expected schema_version {READABLE_SCHEMA_VERSION}, found {found}; "
            "report it with the version of this package that wrote it"
        )
    missing = [key for key in REQUIRED if key not in document]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}; run the job again")
    command = document["run"].get("command", "probe")
    if command not in COMMANDS:
        raise InputError(
            f"{path}: expected run.command to be one of {', '.join(COMMANDS)}, found "
            f"{command!r}; run the job again"
        )
    config_path = folder / "config.yaml"
    config = load_config(config_path, ())
    return StoredRun(
        folder=folder,
        document=document,
        config=config,
        config_text=config_path.read_text(encoding="utf-8"),
    )


def _what_it_is(folder: Path) -> str:
    expected = "expected a run directory of probe, sweep, attribute or audit, found "
    if not folder.exists():
        return expected + "nothing there; check the path"
    if folder.is_file():
        return expected + "a file; give the folder that it lies in"
    if (folder / UNFINISHED).is_dir():
        return expected + "an unfinished run; start it again with --resume"
    return (
        expected
        + "a folder without results.json, which a run writes last; wait for the "
        "run to end, or run it again"
    )
