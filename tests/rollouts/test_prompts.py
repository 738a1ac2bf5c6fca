"""Are prompt files checked, and prompts drawn as asked?"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from entropy_ddp.errors import InputError
from entropy_ddp.rollouts.prompts import draw_prompts, read_prompts


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


def write_rows(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_are_kept_as_they_are(path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": "b"},
        {"prompt_ids": [1, 2], "level": 3},
        {"prompt": "c", "prompt_ids": [4]},
    ]
    write_rows(path, *rows)
    assert read_prompts(path) == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "`prompt_ids` or `prompt`, found neither"),
        ({"prompt": None}, "`prompt_ids` or `prompt`, found neither"),
        ({"prompt": 1}, "`prompt` to be a string"),
        ({"prompt_ids": [True]}, "`prompt_ids` to be a list of integers"),
        ({"prompt": "a", "reward": 1}, "that sampling itself writes, found `reward`"),
        ({"prompt": "a", "prompt_index": 1}, "writes, found `prompt_index`; rename"),
        ([], r"a JSON object, found \[\]"),
    ],
)
def test_a_bad_row_is_named(path: Path, row: Any, message: str) -> None:
    write_rows(path, {"prompt": "good"}, row)
    where = "^" + re.escape(f"{path}:2: ")
    with pytest.raises(InputError, match=where + ".*" + message):
        read_prompts(path)


def test_draws_without_replacement_are_distinct() -> None:
    drawn = draw_prompts(10, 10, False, seed=1)
    assert sorted(drawn) == list(range(10))
    assert drawn != list(range(10))
    assert len(set(draw_prompts(100, 30, False, seed=1))) == 30


def test_draws_with_replacement_are_uniform() -> None:
    drawn = draw_prompts(5, 10_000, True, seed=1)
    counts = [drawn.count(prompt) for prompt in range(5)]
    assert sum(counts) == 10_000
    # Chi-square with 4 degrees of freedom: above 18.5 once in 1,000 seeds.
    assert sum((count - 2000) ** 2 / 2000 for count in counts) < 18.5


@pytest.mark.parametrize("with_replacement", [False, True])
def test_draws_depend_on_the_seed_alone(with_replacement: bool) -> None:
    def draw(seed: int) -> list[int]:
        return draw_prompts(100, 20, with_replacement, seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_more_than_there_are_is_an_error_without_replacement() -> None:
    message = "num_prompts: expected at most 3.*found 4; draw fewer or set with_repl"
    with pytest.raises(InputError, match=message):
        draw_prompts(3, 4, False, seed=1)
    assert len(draw_prompts(3, 4, True, seed=1)) == 4
