"""Which rows a prompt source holds: JSON lines, a parquet file, or a data set.

Every row comes with its place (`path:line`, or `source: row i` from 0), for messages.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_ddp.config import Prompts
from entropy_ddp.data.jsonlines import make_problem, read_rows
from entropy_ddp.errors import InputError, raise_if_out_of_memory


def describe_source(source: Prompts) -> str:
    """The source's name: its path, or data set, configuration and split.

    Args:
        source: where the prompts are.

    Returns:
        One line.
    """
    if source.file is not None:
        return source.file
    name = "" if source.name is None else f"/{source.name}"
    revision = "" if source.revision is None else f"@{source.revision}"
    return f"{source.dataset}{revision}{name}[{source.split}]"


def iterate_rows(source: Prompts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a prompt source.

    Args:
        source: where the prompts are.

    Yields:
        The place and the keys of every row, in the source's order; at least one row.

    Raises:
        InputError: if the file or data set cannot be read or is empty, or a library
            that reads it is not installed.
    """
    if source.file is not None and not source.file.endswith(".parquet"):
        path = Path(source.file)
        for number, row in enumerate(read_rows(path), start=1):
            yield f"{path}:{number}", row
        return
    place = describe_source(source)
    rows = _read_parquet(place) if source.file is not None else _load_dataset(source)
    count = 0
    for row in rows:
        yield f"{place}: row {count}", row
        count += 1
    if not count:
        raise make_problem(place, "at least one row", "none", "correct the source")


def _read_parquet(place: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _make_missing("prompts", "pyarrow", "data") from error
    try:
        with parquet.ParquetFile(place) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise make_problem(
            place, "a parquet file", reason, "check the path, or copy it again"
        ) from error


def _load_dataset(source: Prompts) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise _make_missing("prompts", "datasets", "data") from error
    assert source.dataset is not None
    try:
        return iter(
            datasets.load_dataset(
                source.dataset,
                source.name,
                split=source.split,
                revision=source.revision,
            )
        )
    except Exception as error:  # any: hub, network, cache and builders each have theirs
        raise_if_out_of_memory(error)
        reason = " ".join(str(error).split())[:300]
        raise make_problem(
            describe_source(source),
            "a data set that `datasets` can load",
            f"{type(error).__name__}: {reason}",
            "correct `dataset`, `name` and `split`; without a network, load it once "
            "where there is one, or give a `file`",
        ) from error


def _make_missing(setting: str, package: str, extra: str) -> InputError:
    return InputError(
        f"{setting}: expected {package} to be installed, found no such package; pip "
        f"install entropy_ddp[{extra}]"
    )
