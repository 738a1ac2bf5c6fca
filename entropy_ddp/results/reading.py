"""A run directory read back, without torch.

results.json is written last, so that its presence means that the others are whole.
"""

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from entropy_ddp.config import Config, load_config
from entropy_ddp.data.jsonlines import read_rows
from entropy_ddp.errors import InputError
from entropy_ddp.results.folder import RESULTS, UNFINISHED
from entropy_ddp.results.schema import SCHEMA_VERSION, Results

# The one that a page's headline comes from first.
COMMANDS = ("probe", "attribute", "audit", "sweep")
REQUIRED = ("status", "run", "E", "update", "truth", "linear", "audit")

Columns = dict[str, list[Any]]


def read_results(folder: Path | str) -> Results:
    """The results of a run directory.

    Raises:
        InputError: it holds no results, or those of another version of the schema.
    """
    document = read_document(Path(folder))
    try:
        return _made(Results, document)
    except (TypeError, KeyError, AttributeError) as error:
        path = Path(folder) / RESULTS
        raise InputError(f"{path}: not the results of a run ({error})") from error


def _made(kind: Any, value: Any) -> Any:
    """A value of JSON as the type that an annotation names."""
    if get_origin(kind) in (Union, types.UnionType):
        choices = [choice for choice in get_args(kind) if choice is not type(None)]
        return value if value is None else _made(choices[0], value)
    if get_origin(kind) is list:
        return [_made(get_args(kind)[0], item) for item in value]
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        absent = {f.name: None for f in fields(kind)} | value
        return kind(**{name: _made(hints[name], absent[name]) for name in absent})
    return tuple(value) if get_origin(kind) is tuple else value


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A finished run as it lies on disk.

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
    document = read_document(folder)
    command = document["run"].get("command", "probe")
    if command not in COMMANDS:
        raise InputError(
            f"{folder / RESULTS}: expected run.command to be one of "
            f"{', '.join(COMMANDS)}, found {command!r}; run the job again"
        )
    config_path = folder / "config.yaml"
    config = load_config(config_path, ())
    return StoredRun(
        folder=folder,
        document=document,
        config=config,
        config_text=config_path.read_text(encoding="utf-8"),
    )


def read_document(folder: Path) -> dict[str, Any]:
    """The content of results.json.

    Raises:
        InputError: the folder holds none, or that of another version of the schema.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise InputError(f"{folder}: {_what_it_is(folder)}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected the results of a run, found no JSON that can be read "
            f"({error}); give the folder of a finished run"
        ) from error
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found != SCHEMA_VERSION:
        raise InputError(
            f"{path}: expected schema_version {SCHEMA_VERSION}, found {found}; read it "
            "with the version of entropy_ddp that wrote it"
        )
    missing = [key for key in REQUIRED if key not in document]
    if missing:
        raise InputError(
            f"{path}: not the results of a run: lacks {', '.join(missing)}; run the job "
            "again"
        )
    return document


def _what_it_is(folder: Path) -> str:
    expected = (
        "expected the results of a run of probe, sweep, attribute or audit, found "
    )
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
