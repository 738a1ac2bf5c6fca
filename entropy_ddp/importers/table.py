"""A plain table: JSON lines or CSV with columns of text and reward.

Fields and the columns they are read from by default: `prompt` (text, or in JSON lines a
list of messages), `response`, `reward`, `advantage`, `group`, `finished`. Only `prompt`
and `response` are required, and `reward` or `advantage`. Without a group column a group
is the rows of equal prompt.
"""

import csv
import math
from pathlib import Path
from typing import Any

from entropy_ddp.data.jsonlines import make_problem, read_rows, show
from entropy_ddp.errors import InputError
from entropy_ddp.importers.records import (
    Record,
    Source,
    read_messages,
    require,
    require_number,
    require_text,
)

FIELDS = ("prompt", "response", "reward", "advantage", "group", "finished")
ADVICE = "name the file's column by --column FIELD=NAME"


def read_table(path: Path, source: Source) -> list[Record]:
    """The sequences of one file.

    Raises:
        InputError: the file cannot be read, or a column is missing or of another type.
    """
    names = {name: source.columns.get(name, name) for name in FIELDS}
    if path.suffix == ".csv":
        rows = _read_csv(path, names)
    else:
        numbered = enumerate(read_rows(path), start=1)
        rows = [(f"{path}:{number}", row) for number, row in numbered]
    _require_columns(rows, source.columns)
    return [_make_record(row, where, names) for where, row in rows]


def _require_columns(
    rows: list[tuple[str, dict[str, Any]]], columns: dict[str, str]
) -> None:
    """A column that was named on the command line must be there."""
    for name in columns.values():
        for where, row in rows:
            require(row, name, where, ADVICE)


def _make_record(row: dict[str, Any], where: str, names: dict[str, str]) -> Record:
    prompt = require(row, names["prompt"], where, ADVICE)
    if not isinstance(prompt, str):
        prompt = read_messages(prompt, names["prompt"], where)
    numbers = {
        field: require_number(row, names[field], where, ADVICE)
        for field in ("reward", "advantage")
        if row.get(names[field]) is not None
    }
    if not numbers:
        require(row, names["reward"], where, ADVICE)
    finished = row.get(names["finished"])
    if finished is not None and not isinstance(finished, bool):
        raise make_problem(
            where, f"true or false in `{names['finished']}`", show(finished), ADVICE
        )
    key = row.get(names["group"])
    if key is not None and type(key) not in (int, str):
        raise make_problem(
            where, f"an integer or text in `{names['group']}`", show(key), ADVICE
        )
    return Record(
        where=where,
        group=("prompt", repr(prompt)) if key is None else ("group", key),
        grouped_by_prompt=key is None,
        prompt=prompt,
        response=require_text(row, names["response"], where, ADVICE),
        finished=finished,
        extra={k: v for k, v in row.items() if k not in names.values()},
        reward=numbers.get("reward"),
        advantage=numbers.get("advantage"),
    )


def _read_csv(path: Path, names: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Rows by column name; an empty cell of a number or of `finished` is no value."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            numbered = [(reader.line_num, cells) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise make_problem(
            str(path), "a CSV file in UTF-8", str(error), "correct or copy it again"
        ) from error
    if not numbered or len(set(header)) < len(header):
        raise make_problem(
            str(path),
            "a header of distinct names, then rows",
            f"{len(numbered)} rows under {show(header)}",
            "correct the file",
        )
    return [
        (f"{path}:{line}", _parse_cells(header, cells, f"{path}:{line}", names))
        for line, cells in numbered
    ]


def _parse_cells(
    header: list[str], cells: list[str], where: str, names: dict[str, str]
) -> dict[str, Any]:
    if len(cells) != len(header):
        raise make_problem(
            where, f"{len(header)} cells", str(len(cells)), "quote cells with commas"
        )
    row: dict[str, Any] = dict(zip(header, cells))
    for field in ("reward", "advantage", "finished", "group"):
        text = row.get(names[field], "")
        row.pop(names[field], None)
        if text:
            row[names[field]] = text if field == "group" else _parse(field, text, where)
    return row


def _parse(field: str, text: str, where: str) -> float | bool:
    if field == "finished":
        known = {"true": True, "false": False, "1": True, "0": False}
        if text.lower() in known:
            return known[text.lower()]
        raise make_problem(where, f"true or false in `{field}`", show(text), ADVICE)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise make_problem(where, f"a number in `{field}`", show(text), ADVICE)
    return value


def parse_columns(assignments: tuple[str, ...]) -> dict[str, str]:
    """`FIELD=NAME` assignments of the command line.

    Raises:
        InputError: one is malformed or names no field.
    """
    columns: dict[str, str] = {}
    for assignment in assignments:
        name, separator, column = assignment.partition("=")
        if not separator or name not in FIELDS or not column or name in columns:
            raise InputError(
                f"--column {assignment}: expected FIELD=NAME, each field once, with "
                f"one of {', '.join(FIELDS)}"
            )
        columns[name] = column
    return columns
