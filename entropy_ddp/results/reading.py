"""results.json read back: the dataclasses it was written from."""

import json
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from entropy_ddp.errors import InputError
from entropy_ddp.results.schema import SCHEMA_VERSION, Results


def read_results(folder: Path | str) -> Results:
    """The results of a run directory.

    Args:
        folder: the run directory.

    Raises:
        InputError: it holds no results, or those of another version of the schema.
    """
    path = Path(folder) / "results.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected the results of a run, found none that can be read "
            f"({error}); give the folder of a finished run"
        ) from error
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found != SCHEMA_VERSION:
        raise InputError(
            f"{path}: expected schema_version {SCHEMA_VERSION}, found {found}; read it "
            "with the version of entropy_ddp that wrote it"
        )
    try:
        return _made(Results, document)
    except (TypeError, KeyError, AttributeError) as error:
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
