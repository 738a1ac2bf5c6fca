"""Are parquet files and data sets read as the same rows as JSON lines?"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from entropy_ddp.config import Prompts
from entropy_ddp.errors import InputError
from entropy_ddp.sampling.prompts import describe_source, iterate_rows, read_prompts

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "level": 1, "turns": [{"role": "user", "content": "x"}]},
    {"prompt": "b", "level": 2, "turns": [{"role": "user", "content": "y"}]},
    {"prompt": "c", "level": None, "turns": [{"role": "user", "content": "z"}]},
]
# The configurations of a data set, as its README on the hub declares them.
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main.jsonl}
  - {split: test, path: test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: other.jsonl}
---
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_dataset(folder: Path) -> Path:
    """A data set of two configurations and two splits, in a folder."""
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    write_rows(folder / "main.jsonl", ROWS)
    write_rows(folder / "test.jsonl", ROWS[1:])
    write_rows(folder / "other.jsonl", ROWS[2:])
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached here."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(**source: Any) -> list[dict[str, Any]]:
    return [row for _, row in iterate_rows(Prompts(**source))]


def test_a_parquet_file_holds_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    assert read(file=str(path)) == ROWS
    assert read(file=str(write_rows(tmp_path / "rows.jsonl", ROWS))) == ROWS
    source = Prompts(file=str(path), field="turns", keep=["level"])
    prompts = read_prompts(source)
    assert [prompt.content for prompt in prompts] == [row["turns"] for row in ROWS]
    assert prompts[2].where == f"{path}: row 2"
    assert prompts[1].carried == {"level": 2}


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and more"])
def test_a_bad_parquet_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path}: expected a parquet file")):
        read(file=str(path))


def test_a_value_that_json_has_not_must_be_left_out(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    rows = [{"prompt": "a", "image": b"\x00", "score": float("nan")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for key in ("image", "score"):
        with pytest.raises(InputError, match=f"row 0: .*`{key}` that JSON can hold"):
            read_prompts(Prompts(file=str(path), keep=[key]))
    assert read_prompts(Prompts(file=str(path), keep=[]))[0].carried == {}


def test_an_empty_source_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], "string")}), path)
    with pytest.raises(InputError, match="expected at least one row, found none"):
        read(file=str(path))


def test_a_data_set_is_read_by_configuration_and_split(tmp_path: Path) -> None:
    folder = str(write_dataset(tmp_path / "set"))
    assert read(dataset=folder, name="main", split="train") == ROWS
    assert read(dataset=folder, name="main", split="test") == ROWS[1:]
    assert read(dataset=folder, name="main", split="train[:2]") == ROWS[:2]
    other = Prompts(dataset=folder, name="other", split="train")
    rows = list(iterate_rows(other))
    assert [row["prompt"] for _, row in rows] == ["c"]
    assert describe_source(other) == f"{folder}/other[train]"
    assert rows[0][0] == f"{folder}/other[train]: row 0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, r"/main\[dev\]: expected a data set .*dev"),
        ({"name": "socratic"}, "expected a data set .*ValueError: .*socratic"),
        ({"dataset": "./no/such/folder"}, "expected a data set .*no such|folder"),
    ],
)
def test_a_data_set_that_cannot_be_loaded_is_named(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    folder = str(write_dataset(tmp_path / "set"))
    source = {"dataset": folder, "name": "main", "split": "train"} | changes
    with pytest.raises(InputError, match=message):
        read(**source)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("datasets", {"dataset": "a/b", "split": "train"}),
        ("pyarrow", {"file": "a.parquet"}),
    ],
)
def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, package: str, source: dict[str, str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"expected {package} to be installed, .*pip install entropy_ddp\[data\]"
    with pytest.raises(InputError, match=message):
        read(**source)
