"""Is a rollout file read as it was meant, and is everything wrong with it said?"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from entropy_ddp.data.batch import Sequence
from entropy_ddp.data.files import (
    TokenLimits,
    make_batch,
    read_batch,
    require_rewards,
    sequence_to_row,
)
from entropy_ddp.data.jsonlines import read_rows, write_jsonl
from entropy_ddp.data.rows import make_sequence
from entropy_ddp.errors import InputError, RunError

LIMITS = TokenLimits(vocabulary_size=20, max_positions=12)
ROW = {"group": 0, "prompt_ids": [5, 6], "response_ids": [7, 8, 1]}
BOS, EOS = 0, 1


def make_tokenizer(
    adds_bos: bool = False, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Characters; ids: <s> 0, </s> 1, <pad> 2, <unk> 3, then abcdefgh= from 4."""
    words = ["<s>", "</s>", "<pad>", "<unk>", *"abcdefgh="]
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    core.decoder = decoders.Fuse()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        unk_token="<unk>",
    )


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "batch.jsonl"


def read(path: Path, *rows: Any, tokenizer: Any = None) -> tuple[Sequence, ...]:
    return read_batch(write_rows(path, *rows), "E", LIMITS, tokenizer).sequences


def expect(path: Path, line: int | None, message: str) -> Any:
    """The error with this message, beginning with `path:line: ` (or `path: `)."""
    where = f"{path}:{line}: " if line else f"{path}: "
    return pytest.raises(InputError, match="^" + re.escape(where) + ".*" + message)


# --- what is read ---------------------------------------------------------------------


def test_a_full_row_is_read(path: Path) -> None:
    row = ROW | {
        "group": "a",
        "prompt": "ignored, as ids are authoritative",
        "response": "likewise",
        "reward": 1,
        "advantage": -0.5,
        "sampling_logprobs": [-0.1, -2, 0],
        "finished": True,
        "answer": {"value": [1, 2.5, None]},
    }
    (sequence,) = read(path, row)
    assert (sequence.index, sequence.group, sequence.group_key) == (0, 0, "a")
    assert sequence.prompt_ids.tolist() == [5, 6]
    assert sequence.response_ids.tolist() == [7, 8, 1]
    assert sequence.prompt_ids.dtype == sequence.response_ids.dtype == torch.int64
    assert (sequence.reward, sequence.advantage) == (1.0, -0.5)
    assert type(sequence.reward) is float
    assert sequence.sampling_logprobs is not None
    assert sequence.sampling_logprobs.tolist() == [-0.1, -2.0, 0.0]
    assert sequence.sampling_logprobs.dtype == torch.float64
    assert sequence.finished is True
    assert sequence.extra == {"answer": {"value": [1, 2.5, None]}}


def test_what_a_row_lacks_is_none(path: Path) -> None:
    nulls = dict.fromkeys(
        ["reward", "advantage", "sampling_logprobs", "finished", "prompt", "response"]
    )
    for row in (ROW, ROW | nulls):
        (sequence,) = read(path, row)
        assert sequence.reward is sequence.advantage is None
        assert sequence.sampling_logprobs is sequence.finished is None
        assert sequence.extra == {}


def test_groups_are_told_by_key_wherever_they_stand(path: Path) -> None:
    keys = [7, 3, 7, "x", 3]
    batch = read_batch(
        write_rows(path, *(ROW | {"group": key} for key in keys)), "U", LIMITS
    )
    assert batch.split == "U"
    assert [s.group_key for s in batch.sequences] == keys
    assert batch.groups.tolist() == [0, 1, 0, 2, 1]
    assert [s.index for s in batch.sequences] == [0, 1, 2, 3, 4]


def test_an_empty_response_is_legal(path: Path) -> None:
    (sequence,) = read(path, ROW | {"response_ids": [], "finished": False})
    assert sequence.num_tokens == 0
    assert sequence.response_ids.dtype == torch.int64


def test_the_last_token_needs_no_position(path: Path) -> None:
    (sequence,) = read(path, ROW | {"response_ids": [7] * 11})
    assert len(sequence.prompt_ids) + sequence.num_tokens == 13
    unlimited = TokenLimits(vocabulary_size=20, max_positions=None)
    write_rows(path, ROW | {"response_ids": [7] * 99})
    assert read_batch(path, "E", unlimited).num_tokens == 99


def test_line_separators_inside_strings_end_no_line(path: Path) -> None:
    path.write_text(json.dumps(ROW | {"note": "a\u2028b\x85"}, ensure_ascii=False))
    (sequence,) = read_batch(path, "E", LIMITS).sequences
    assert sequence.extra == {"note": "a\u2028b\x85"}


def test_gzip_reads_the_same(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"group": 1}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "a.jsonl.gz", rows)
    plain, packed = (
        [sequence_to_row(s) for s in read_batch(file, "E", LIMITS).sequences]
        for file in (tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz")
    )
    assert plain == packed == rows


# --- text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "finished", "expected"),
    [
        ("ab", True, [4, 5, EOS]),
        ("ab</s>", True, [4, 5, EOS]),  # not twice
        ("ab", False, [4, 5]),
        ("", True, [EOS]),
        ("", False, []),
    ],
)
def test_the_end_of_sequence_token_counts_when_finished(
    path: Path, response: str, finished: bool, expected: list[int]
) -> None:
    row = {"group": 0, "prompt": "c", "response": response, "finished": finished}
    for adds_bos in (False, True):
        (sequence,) = read(path, row, tokenizer=make_tokenizer(adds_bos))
        assert sequence.response_ids.tolist() == expected


@pytest.mark.parametrize(
    ("adds_bos", "prompt", "expected"),
    [
        (False, "ab", [4, 5]),
        (True, "ab", [BOS, 4, 5]),
        (True, "<s>ab", [BOS, 4, 5]),  # not twice
        (False, "<s>ab", [BOS, 4, 5]),
        (True, "", [BOS]),
    ],
)
def test_prompts_begin_as_the_tokenizer_begins_them(
    path: Path, adds_bos: bool, prompt: str, expected: list[int]
) -> None:
    row = {"group": 0, "prompt": prompt, "response_ids": [4]}
    (sequence,) = read(path, row, tokenizer=make_tokenizer(adds_bos))
    assert sequence.prompt_ids.tolist() == expected


# --- what is wrong with a row ---------------------------------------------------------

WITHOUT = object()

BAD_ROWS = [
    ({"group": WITHOUT}, "expected the key `group`, found none"),
    ({"group": None}, "expected the key `group`, found none"),
    ({"group": True}, "`group` to be an integer or a string, found True"),
    ({"group": 1.0}, "`group` to be an integer or a string, found 1.0"),
    ({"prompt_ids": [1, True]}, r"`prompt_ids` to be a list of integers.*True"),
    ({"prompt_ids": [1.0]}, r"`prompt_ids` to be a list of integers, found \[1.0\]"),
    ({"prompt_ids": "5 6"}, "`prompt_ids` to be a list of integers, found '5 6'"),
    ({"response_ids": [[1]]}, "`response_ids` to be a list of integers"),
    ({"prompt": 3}, "`prompt` to be a string"),
    ({"prompt": "a\ud800"}, "`prompt` to be a string of valid Unicode"),
    ({"response": ["a"]}, "`response` to be a string"),
    ({"reward": "1"}, "`reward` to be a number, found '1'"),
    ({"reward": True}, "`reward` to be a number, found True"),
    ({"reward": 10**400}, "`reward` to be a number, found 1000"),
    ({"advantage": [1]}, r"`advantage` to be a number, found \[1\]"),
    ({"finished": 1}, "`finished` to be true or false, found 1"),
    ({"sampling_logprobs": -1.0}, "`sampling_logprobs` to be a list of numbers"),
    ({"sampling_logprobs": [-1, None, -1]}, "`sampling_logprobs` to be a list of num"),
    ({"sampling_logprobs": [-1, -1]}, "expected 3 `sampling_logprobs`.*found 2"),
    ({"sampling_logprobs": [-1, 0.5, -1]}, "at most 0 .*found 0.5 at place 1"),
    ({"reward": float("nan")}, "finite numbers in `reward`, found nan"),
    ({"reward": float("inf")}, "finite numbers in `reward`, found inf"),
    ({"advantage": float("-inf")}, "finite numbers in `advantage`, found -inf"),
    ({"sampling_logprobs": [-1, float("nan"), -1]}, "in `sampling_logprobs`.*nan"),
    ({"extra": {"a": [float("nan")]}}, "finite numbers in `extra`"),
    ({"prompt_ids": []}, "at least one prompt token, found an empty prompt"),
    ({"prompt_ids": WITHOUT}, "`prompt_ids` or `prompt`, found neither"),
    ({"response_ids": WITHOUT}, "`response_ids` or `response`, found neither"),
    ({"prompt_ids": [5, 20]}, "from 0 to 19.*in `prompt_ids`, found 20 at place 1"),
    ({"response_ids": [-1]}, "from 0 to 19.*in `response_ids`, found -1 at place 0"),
    ({"response_ids": [7] * 12}, "at most 12 positions, found 13 .2 prompt and 12 re"),
    ({"response_ids": [], "finished": True}, "end-of-sequence token in `response_ids`"),
    ({"prompt_ids": WITHOUT, "prompt": "a"}, "no tokenizer was given, found only the"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_a_bad_row_is_named(path: Path, change: dict[str, Any], message: str) -> None:
    row = {key: v for key, v in (ROW | change).items() if v is not WITHOUT}
    write_rows(path, ROW | {"group": "good"}, row)
    with expect(path, 2, message):
        read_batch(path, "E", LIMITS)


TEXT = {"group": 0, "prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (TEXT, "`finished` or `response_ids` beside the text `response`, found neith"),
        (TEXT | {"prompt": "", "finished": True}, "found an empty prompt"),
        (TEXT | {"finished": True, "sampling_logprobs": [-1]}, "expected 2 `samplin"),
        (TEXT | {"prompt": "a" * 13, "finished": False}, "at most 12 positions, fou"),
    ],
)
def test_a_bad_text_row_is_named(path: Path, row: dict[str, Any], message: str) -> None:
    with expect(path, 1, message):
        read(path, row, tokenizer=make_tokenizer())


def test_finished_text_needs_an_end_of_sequence_token(path: Path) -> None:
    with expect(path, 1, "a tokenizer with an end-of-sequence token, found none"):
        read(path, TEXT | {"finished": True}, tokenizer=make_tokenizer(eos=None))
    (sequence,) = read(
        path, TEXT | {"finished": False}, tokenizer=make_tokenizer(eos=None)
    )
    assert sequence.response_ids.tolist() == [5]


def test_rounding_above_zero_is_no_probability(path: Path) -> None:
    (sequence,) = read(path, ROW | {"sampling_logprobs": [-1, 1e-7, -1]})
    assert sequence.sampling_logprobs is not None
    assert sequence.sampling_logprobs[1] == 1e-7


# --- what is wrong between rows -------------------------------------------------------


def test_keys_that_differ_in_type_only_are_an_error(path: Path) -> None:
    with expect(path, 3, "differ in more than their type, found '1' after 1"):
        read(path, ROW | {"group": 1}, ROW | {"group": "x"}, ROW | {"group": "1"})


def test_a_group_has_one_prompt(path: Path) -> None:
    other = ROW | {"prompt_ids": [5, 7]}
    with expect(path, 3, "prompt of group 0, as in line 1, found another prompt"):
        read(path, ROW, other | {"group": 1}, other)


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [({}, {"advantage": 1.0}, "one"), ({"advantage": 1.0}, {}, "none")],
)
def test_advantages_are_for_whole_groups(
    path: Path, first: dict[str, Any], second: dict[str, Any], found: str
) -> None:
    rows = [ROW | {"group": 9, "advantage": 0.0}, ROW | first, ROW | second]
    with expect(path, 3, f"all responses of group 0 or none, found {found} here, unl"):
        read(path, *rows)


def test_u_needs_rewards(path: Path) -> None:
    rows = [ROW | {"reward": 0.0}, ROW | {"group": 1, "advantage": 0.0}]
    require_rewards(read_batch(write_rows(path, *rows), "U", LIMITS), path)
    write_rows(path, *rows, ROW | {"group": 2}, ROW | {"group": 2})
    batch = read_batch(path, "U", LIMITS)
    with expect(path, 3, "`reward` or `advantage`, which batch U needs, found neither"):
        require_rewards(batch, path)


# --- what is wrong with a file --------------------------------------------------------

GOOD = json.dumps(ROW).encode()


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", 1, "at least one row, found an empty file"),
        (GOOD + b"\n\n" + GOOD, 2, "a JSON object, found a blank line; delete"),
        (GOOD + b"\n \t\n", 2, "found a blank line"),
        (GOOD + b"\n{", 2, r"invalid JSON \(Expecting property name.* at column 2\)"),
        (b"{}{}", 1, r"invalid JSON \(Extra data at column 3\)"),
        (b"[1]", 1, r"a JSON object, found \[1\]"),
        (b"3", 1, "a JSON object, found 3"),
        (b'{"a": 1, "a": 2}', 1, "the key 'a' stands twice in one object"),
        (b'{"b": {"a": 1, "a": 2}}', 1, "the key 'a' stands twice in one object"),
        (b'{"a": NaN}', 1, "finite numbers in `a`, found nan"),
        (b'{"a": 1e999}', 1, "finite numbers in `a`, found inf"),
        (b'{"a": ' + b"1" * 5000 + b"}", 1, "invalid JSON .*integer string"),
        (b'{"a": ' + b"[" * 10**5, 1, "invalid JSON .*recursion"),
        (b"\xef\xbb\xbf" + GOOD, 1, "invalid JSON .*byte-order mark"),
        (GOOD + b'\n{"a": "\xff"}', 2, "UTF-8 text, found byte 0xff at byte 8; save"),
        (
            gzip.compress(GOOD, mtime=0),
            1,
            r"UTF-8 text.*gzip data: name it \.jsonl\.gz",
        ),
    ],
)
def test_a_bad_file_is_named(
    path: Path, content: bytes, line: int, message: str
) -> None:
    path.write_bytes(content)
    with expect(path, line, message):
        read_batch(path, "E", LIMITS)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl.gz"
    rows = "".join(json.dumps(ROW | {"group": i}) + "\n" for i in range(2000)).encode()
    whole = gzip.compress(rows, mtime=0)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[:-20], whole[: len(whole) // 2], bytes(flipped), GOOD):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}:\d+: "):
            read_batch(path, "E", LIMITS)
    with expect(path, 1, "gzip data, found a damaged or cut file .Not a gzipped file"):
        read_batch(path, "E", LIMITS)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with expect(tmp_path / "a.jsonl", None, "can be read, found No such file"):
        read_batch(tmp_path / "a.jsonl", "E", LIMITS)
    (tmp_path / "b.jsonl").mkdir()
    with expect(tmp_path / "b.jsonl", None, "can be read, found Is a directory"):
        read_batch(tmp_path / "b.jsonl", "E", LIMITS)
    (tmp_path / "c.json").write_bytes(GOOD)
    with expect(tmp_path / "c.json", None, r"ending in .jsonl or .jsonl.gz, found 'c"):
        read_batch(tmp_path / "c.json", "E", LIMITS)


# --- writing --------------------------------------------------------------------------

FINITE = st.floats(allow_nan=False, allow_infinity=False)
ID = st.integers(0, 19)


@st.composite
def make_sequences(draw: st.DrawFn) -> Sequence:
    response = draw(st.lists(ID, max_size=5))
    size = len(response)
    logprobs = st.lists(st.floats(-1e300, 0), min_size=size, max_size=size)
    given_logprobs = draw(st.none() | logprobs)
    total, again = draw(
        st.just((None, None)) | st.tuples(st.integers(1, 2**63 - 1), st.booleans())
    )
    return Sequence(
        index=3,
        group=-1,
        group_key=draw(st.integers() | st.text()),
        prompt_ids=torch.tensor(draw(st.lists(ID, min_size=1, max_size=5))),
        response_ids=torch.tensor(response, dtype=torch.int64),
        reward=draw(st.none() | FINITE),
        advantage=draw(st.none() | FINITE),
        sampling_logprobs=(
            None
            if given_logprobs is None
            else torch.tensor(given_logprobs, dtype=torch.float64)
        ),
        finished=draw(st.none() | st.booleans()) if size else None,
        num_prompts_total=total,
        with_replacement=again,
        extra={"note": draw(st.text())},
    )


@given(make_sequences())
def test_a_written_row_reads_back(sequence: Sequence) -> None:
    limits = TokenLimits(vocabulary_size=20, max_positions=None)
    row = json.loads(json.dumps(sequence_to_row(sequence)))
    result = vars(make_sequence(row, 3, "here:4", limits, None))
    for name, value in vars(sequence).items():
        if isinstance(value, torch.Tensor):
            assert result[name].dtype == value.dtype
            assert torch.equal(result[name], value)
        else:
            assert result[name] == value


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_text_alone_reads_back_as_the_same_ids(
    path: Path, adds_bos: bool, finished: bool
) -> None:
    tokenizer = make_tokenizer(adds_bos)
    row = {"group": 0, "prompt": "ab=", "response": "cd", "finished": finished}
    (first,) = read(path, row, tokenizer=tokenizer)
    written = sequence_to_row(first, tokenizer)
    assert written["prompt"] == ("<s>ab=" if adds_bos else "ab=")
    assert written["response"] == "cd"
    assert written["response_ids"] == first.response_ids.tolist()
    del written["prompt_ids"], written["response_ids"]
    (second,) = read(path, written, tokenizer=tokenizer)
    assert torch.equal(first.prompt_ids, second.prompt_ids)
    assert torch.equal(first.response_ids, second.response_ids)


def test_unknown_values_are_absent_from_the_row(path: Path) -> None:
    (sequence,) = read(path, ROW)
    assert sequence_to_row(sequence) == ROW


def test_gzip_bytes_depend_on_the_rows_alone(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_jsonl(tmp_path / name, [ROW])
    first, second = ((tmp_path / f"{n}.jsonl.gz").read_bytes() for n in "ab")
    assert first == second
    assert first[4:8] == bytes(4)  # the time of modification
    assert first[3] == 0  # no flags: no file name


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_jsonl(path, [ROW])
    before = path.read_bytes()
    bad = ROW | {"reward": float("nan")}
    message = f"^{re.escape(str(path))}:2: expected a row of finite numbers"
    with pytest.raises(RunError, match=message):
        write_jsonl(path, [ROW, bad])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_seen_under_the_name_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def rows() -> Any:
        yield ROW
        assert not path.exists()
        assert len(list(tmp_path.iterdir())) == 1
        yield ROW

    write_jsonl(path, rows())
    assert path.read_text().count("\n") == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.jsonl"
    with pytest.raises(RunError, match="a.jsonl: cannot be written .No such file"):
        write_jsonl(path, [ROW])


def test_rows_are_read_when_they_are_asked_for(path: Path) -> None:
    """A file's rows are never in memory together; a damaged one is met in its turn."""
    path.write_bytes(GOOD + b"\n" + GOOD + b"\n{")
    rows = read_rows(path)
    assert next(rows) == next(rows) == json.loads(GOOD)
    with pytest.raises(InputError, match=":3: "):
        next(rows)


def test_responses_of_a_group_share_one_copy_of_its_prompt() -> None:
    """However often the file repeats it."""
    rows = [{"group": g, "prompt_ids": [1, 2], "response_ids": [3]} for g in (0, 0, 1)]
    first, second, third = make_batch(rows, "rows", "U", LIMITS).sequences
    assert first.prompt_ids is second.prompt_ids
    assert third.prompt_ids is not first.prompt_ids


@pytest.mark.parametrize(
    ("row", "marks"),
    [
        (ROW, None),
        (ROW | {"ids_from_text": []}, ()),
        (ROW | {"ids_from_text": ["other text"]}, ("other text",)),
        ({"group": 0, "prompt": "a", "response": "b", "finished": False}, ()),
        (
            {"group": 0, "prompt": "a", "response": "b", "finished": True},
            ("end restored",),
        ),
    ],
)
def test_ids_from_text_are_told_and_written_again(
    row: dict[str, Any], marks: tuple[str, ...] | None
) -> None:
    """By the file, or because the text is tokenised here."""
    sequence = make_sequence(row, 0, "rows:1", LIMITS, make_tokenizer())
    assert sequence.ids_from_text == marks
    written = sequence_to_row(sequence)
    assert written.get("ids_from_text") == (None if marks is None else list(marks))
    again = make_sequence(written, 0, "rows:1", LIMITS, None)
    assert again.ids_from_text == marks


@pytest.mark.parametrize("marks", ["other text", ["no such mark"], [1], {}])
def test_a_mark_that_is_none_is_refused(marks: Any) -> None:
    message = r"`ids_from_text` to be a list of 'end restored', 'near the limit'"
    with pytest.raises(InputError, match=message):
        make_sequence(ROW | {"ids_from_text": marks}, 0, "rows:1", LIMITS, None)
