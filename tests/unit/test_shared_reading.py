"""Is a rollout file that ranks read in shares the one that a single process reads?

No rank parses every row, or holds the tokens of another rank's; what is wrong with a
file is told by all, and is what one process says.
"""

import gzip
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_files import BAD_ROWS, LIMITS, WITHOUT, make_tokenizer
from thread_ranks import ThreadWorld, run_thread_ranks

from entropy_ddp.data import files, jsonlines
from entropy_ddp.data.batch import Batch
from entropy_ddp.data.files import make_batch, read_batch, sequence_to_row
from entropy_ddp.data.jsonlines import FileShare, Lines
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError

COLUMNS = (
    "index", "group", "group_key", "num_prompt_tokens", "num_tokens", "last_id",
    "reward", "advantage", "finished", "ids_from_text", "num_prompts_total",
    "with_replacement", "extra", "has_logprobs", "prompt_digest",
    "named_prompt_digest", "response_digest", "logprobs_digest",
)  # fmt: skip


def mixed_rows(seed: int, num_groups: int = 12) -> list[dict[str, Any]]:
    """Rows of every kind, those of a group apart from one another."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for group in range(num_groups):
        prompt = [draw.randrange(20) for _ in range(draw.randint(1, 4))]
        given = draw.random() < 0.3
        for _ in range(draw.randint(1, 3)):
            ids = [draw.randrange(20) for _ in range(draw.randint(0, 8))]
            row: dict[str, Any] = {
                "group": f"g{group}" if group % 2 else group,
                "prompt_ids": prompt,
                "response_ids": ids,
                "reward": draw.choice([0, 0.5, -1e300]),
                "finished": draw.choice([True, False, None]) if ids else False,
            }
            if given:
                row["advantage"] = draw.gauss(0, 1)
            if draw.random() < 0.5:
                row["sampling_logprobs"] = [-draw.random() for _ in ids]
            if draw.random() < 0.5:
                row["ids_from_text"] = draw.choice([[], ["end restored"]])
            if draw.random() < 0.5:
                row |= {"prompt_index": group, "wörd": {"a": [1.5, None, "\ud800"]}}
            rows.append(row)
    draw.shuffle(rows)
    return rows


def write(path: Path, rows: list[dict[str, Any]], end: str = "\n") -> Path:
    content = ("\n".join(map(json.dumps, rows)) + end).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read_by(count: int, path: Path, split: str = "E") -> list[Batch]:
    """The batch as each of so many ranks has it."""
    return run_thread_ranks(
        count, lambda world: read_batch(path, split, LIMITS, make_tokenizer(), world)
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(("count", "num_groups"), [(1, 12), (2, 12), (3, 30), (7, 2)])
def test_every_rank_knows_every_row_and_holds_its_own(
    tmp_path: Path, name: str, count: int, num_groups: int
) -> None:
    rows = mixed_rows(count, num_groups)
    rows.append({"group": "t", "prompt": "ab", "response": "cd", "finished": True})
    path = write(tmp_path / name, rows, end="" if count == 2 else "\n")
    expected = make_batch(rows, str(path), "E", LIMITS, make_tokenizer())
    owner = expected.owners(count)[expected.groups]
    for rank, batch in enumerate(read_by(count, path)):
        for column in COLUMNS:
            assert batch.column(column) == expected.column(column), column
        assert torch.equal(batch.owners(count), expected.owners(count))
        assert torch.equal(batch.prompts, expected.prompts)
        assert torch.equal(batch.group_order, expected.group_order)
        whole = expected.shard(rank, count)
        for own, right in zip(
            batch.shard(rank, count).sequences, whole.sequences, strict=True
        ):
            assert sequence_to_row(own) == sequence_to_row(right)
            assert own.group == right.group
        for place, sequence in enumerate(batch.sequences):
            assert sequence.num_tokens == expected.sequences[place].num_tokens
            assert sequence.prompt_ids.is_meta == (int(owner[place]) != rank)


@pytest.mark.parametrize("count", [1, 3])
def test_every_rank_holds_the_whole_of_U(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "U.jsonl", rows := mixed_rows(5))
    expected = make_batch(rows, str(path), "U", LIMITS)
    for batch in read_by(count, path, "U"):
        own = [sequence_to_row(sequence) for sequence in batch.sequences]
        assert own == [sequence_to_row(sequence) for sequence in expected.sequences]


def test_parts_of_a_batch_are_those_of_a_whole_one(tmp_path: Path) -> None:
    path = write(tmp_path / "E.jsonl", rows := mixed_rows(8))
    whole = make_batch(rows, str(path), "E", LIMITS)
    chosen = torch.arange(whole.num_groups) % 3 != 1
    advantages = torch.arange(len(whole), dtype=torch.float64)
    for rank, batch in enumerate(read_by(3, path)):
        for make in (
            lambda b: b.first(7),
            lambda b: b.part(chosen, 3),
            lambda b: b.with_advantages(advantages),
        ):
            found, expected = make(batch), make(whole)
            for column in COLUMNS:
                assert found.column(column) == expected.column(column), column
            if len(found) < 8:
                continue
            pairs = (b.shard(rank, 3).sequences for b in (found, expected))
            for own, right in zip(*pairs, strict=True):
                assert sequence_to_row(own) == sequence_to_row(right)
        assert [s.index for s in batch.sequences[2:5]] == [2, 3, 4]
        assert batch.sequences[-1].index == len(whole) - 1


def test_tokens_that_another_rank_holds_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "E.jsonl", mixed_rows(3))
    batch = read_by(2, path)[0]
    other = next(s for s in batch.sequences if s.prompt_ids.is_meta and s.num_tokens)
    for read in (
        lambda: other.response_ids.tolist(),
        lambda: int(other.prompt_ids[0]),
        lambda: other.prompt_digest,
        lambda: torch.equal(other.prompt_ids, other.prompt_ids),
    ):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            read()


# --- no rank reads or holds all -------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_rank_parses_and_holds_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of 400 rows about 400 / R, whatever the number of ranks."""
    rows = [
        {"group": i, "prompt_ids": [1], "response_ids": [2] * 10} for i in range(400)
    ]
    path = write(tmp_path / name, rows)
    parse, parsed = files.parse_line, Counter[int]()

    def counted(line: bytes, where: str) -> Any:
        parsed[threading.get_ident()] += 1
        return parse(line, where)

    def held_by(world: World) -> int:
        batch = read_batch(path, "E", LIMITS, None, world)
        own = (s for s in batch.sequences if not s.prompt_ids.is_meta)
        return sum(len(s.prompt_ids) + len(s.response_ids) for s in own)

    monkeypatch.setattr(files, "parse_line", counted)
    for count in (1, 2, 8):
        parsed.clear()
        held = run_thread_ranks(count, held_by)
        assert sum(parsed.values()) == 400
        assert max(parsed.values()) <= 1.2 * 400 / count
        assert sum(held) == 400 * 11
        assert max(held) <= 1.1 * 400 * 11 / count


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(
        st.binary(max_size=6).map(lambda b: b.replace(b"\n", b"")), max_size=9
    ),
    ends=st.booleans(),
    count=st.integers(1, 12),
)
def test_shares_are_the_lines_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ends: bool, count: int
) -> None:
    """Each once and with its number, wherever the bytes are cut."""
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    content = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    path.write_bytes(content)
    whole = content.split(b"\n")
    expected = list(enumerate(whole if whole[-1] else whole[:-1]))
    found, first = [], 0
    for number in range(count):
        share = FileShare.of(path, number, count)
        begun = Lines(path, files.replace(share, first=first))
        found += [(i, line.rstrip(b"\n")) for i, line in begun]
        first += share.num_lines
    assert found == expected


# --- what is wrong is told as by one process ------------------------------------------


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def messages_by(count: int, path: Path) -> set[str]:
    """What each of so many ranks says of a file."""

    def body(world: World) -> str:
        return message_of(lambda: read_batch(path, "E", LIMITS, None, world))

    return set(run_thread_ranks(count, body))


GOOD = [{"group": i, "prompt_ids": [5], "response_ids": [7, 1]} for i in range(6)]
BETWEEN: list[dict[str, Any]] = [
    {"group": "3"},
    {"group": 2, "prompt_ids": [6]},
    {"group": 4, "advantage": 1.0},
    {"num_prompts_total": 9, "with_replacement": False},
    {"num_prompts_total": 9},
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("seed", range(8))
def test_the_first_mistake_is_told_by_all(tmp_path: Path, name: str, seed: int) -> None:
    """Of rows and between rows, several in one file, wherever its bytes are cut."""
    draw = random.Random(seed)
    changes = [change for change, _ in BAD_ROWS]
    rows = [dict(row) for row in GOOD * 3]
    for place in draw.sample(range(len(rows)), 3):
        rows[place] |= draw.choice(draw.choice([changes, BETWEEN]))
    rows = [{k: v for k, v in row.items() if v is not WITHOUT} for row in rows]
    path = write(tmp_path / name, rows)
    expected = message_of(lambda: make_batch(rows_of(path), str(path), "E", LIMITS))
    for count in (1, 2, 3, 5):
        assert messages_by(count, path) == {expected}


def rows_of(path: Path) -> Any:
    return jsonlines.read_rows(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_bad_file_is_named_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    path = tmp_path / name
    pack = gzip.compress if path.suffix == ".gz" else bytes
    good = json.dumps(GOOD[0]).encode() + b"\n"
    monkeypatch.setattr(jsonlines, "MAX_LINE_BYTES", 200)
    for content, message in (
        (b"", ":1: expected at least one row"),
        (
            good * 9 + b"\n" + good * 9,
            ":10: expected a JSON object, found a blank line",
        ),
        (good * 17 + b"{\n", ":18: expected one JSON object"),
        (b" " * 2000 + good * 9, ":1: expected a row of less than 200 bytes"),
        (good * 9 + b" " * 2000 + good, ":10: expected a row of less than 200 bytes"),
        (good * 2 + b"\xff\n" + good * 20, ":3: expected UTF-8 text"),
    ):
        path.write_bytes(pack(content))
        (found,) = messages_by(count, path)
        assert found.startswith(f"{path}{message}")
    missing = tmp_path / "missing.jsonl"
    (found,) = messages_by(count, missing)
    assert found.startswith(
        f"{missing}: expected a file that can be read, found No such"
    )


def test_damaged_gzip_data_is_named_by_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(
        "".join(
            json.dumps(row | {"group": i}) + "\n" for i, row in enumerate(GOOD * 200)
        ).encode()
    )
    path.write_bytes(whole[:-20])
    expected = message_of(lambda: make_batch(rows_of(path), str(path), "E", LIMITS))
    assert messages_by(3, path) == {expected}
    assert "a damaged or cut file" in expected


def test_a_file_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    """A copy that is not finished on one machine."""
    paths = [tmp_path / str(rank) for rank in range(2)]
    for rank, folder in enumerate(paths):
        folder.mkdir()
        write(folder / "E.jsonl", GOOD[: 6 - rank])

    def body(world: World) -> str:
        path = paths[world.rank] / "E.jsonl"
        return message_of(lambda: read_batch(path, "E", LIMITS, None, world))

    found = run_thread_ranks(2, body)
    assert all("expected the same file on every rank, found " in text for text in found)


def test_a_file_that_is_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are replaced between counting and reading."""
    path = write(tmp_path / "E.jsonl", GOOD)
    measure = FileShare.of

    def and_write(path: Path, number: int, count: int) -> FileShare:
        share = measure(path, number, count)
        if number == count - 1:
            path.write_bytes(path.read_bytes().replace(b"[5]", b"\n5]"))
        return share

    monkeypatch.setattr(FileShare, "of", and_write)
    (found,) = messages_by(2, path)
    assert ": expected " in found


def test_counts_and_bytes_of_reading_do_not_grow_with_ranks(tmp_path: Path) -> None:
    """Five exchanges, whatever the number of rows; what a rank hands over falls."""
    costs = []
    for count, num_groups in ((2, 30), (2, 300), (16, 300)):
        path = write(tmp_path / "E.jsonl", mixed_rows(1, num_groups))

        def body(world: World, path: Path = path) -> tuple[int, int]:
            assert isinstance(world, ThreadWorld)
            read_batch(path, "E", LIMITS, None, world)
            return world.collectives["objects"]

        found = run_thread_ranks(count, body)
        assert {number for number, _ in found} == {5}
        costs.append(max(size for _, size in found))
    assert costs[2] < costs[1] / 4


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_files_one_behind_the_other_are_one(tmp_path: Path, name: str) -> None:
    """What `cat` makes of several, packed ones too."""
    rows = mixed_rows(4)
    parts = [write(tmp_path / f"{i}-{name}", rows[i::2]) for i in range(2)]
    path = tmp_path / name
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    expected = make_batch(rows[0::2] + rows[1::2], str(path), "E", LIMITS)
    for batch in read_by(3, path):
        for column in COLUMNS:
            assert batch.column(column) == expected.column(column), column
