"""Is it known how a batch's prompts were drawn, and what follows for its error?"""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch

from entropy_ddp.data.batch import Batch
from entropy_ddp.data.draws import known_set_size, responses_per_prompt, units
from entropy_ddp.data.files import make_batch, sequence_to_row
from entropy_ddp.data.rows import TokenLimits
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.standard_errors import Draws, Estimate

LIMITS = TokenLimits(vocabulary_size=20, max_positions=None)
Row = dict[str, Any]


def row(group: int, prompt: int, **keys: Any) -> Row:
    return {"group": group, "prompt_ids": [prompt], "response_ids": [1], **keys}


def drawn(
    prompts: str, responses: int = 2, *, total: int = 5, again: bool = False
) -> list[Row]:
    """A group of so many responses for each letter."""
    keys = {"num_prompts_total": total, "with_replacement": again}
    return [
        row(group, ord(letter) - ord("a"), **keys)
        for group, letter in enumerate(prompts)
        for _ in range(responses)
    ]


def read(rows: list[Row]) -> Batch:
    return make_batch(rows, "E.jsonl", "E", LIMITS)


@pytest.mark.parametrize(
    ("rows", "unit_of_row", "known", "responses"),
    [
        ([row(0, 3), row(0, 3), row(1, 4), row(1, 4)], [0, 0, 1, 1], None, 2),
        (drawn("abc"), [0, 0, 1, 1, 2, 2], 5, 2),
        (drawn("edcba"), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], 5, 2),
        # A unit of one response has no spread of its own.
        (drawn("abc", 1), [0, 1, 2], None, 1),
        (drawn("abc")[:-1], [0, 0, 1, 1, 2], None, None),
        # Unequal numbers, but two of each.
        (drawn("ab", 3)[:-1], [0, 0, 0, 1, 1], 5, None),
        # Draws of one prompt are independent.
        (drawn("aba", again=True), [0, 0, 1, 1, 2, 2], None, 2),
        (drawn("abcde", 1, again=True), [0, 1, 2, 3, 4], None, 1),
        # Two and three passes over the set.
        (drawn("abcba" + "c", 1, total=3), [0, 1, 2, 1, 0, 2], 3, 2),
        (drawn("ab" * 3, total=2), [0, 0, 1, 1] * 3, 2, 6),
    ],
)
def test_units_and_the_set_they_are_of(
    rows: list[Row], unit_of_row: list[int], known: int | None, responses: int | None
) -> None:
    batch = read(rows)
    assert units(batch).tolist() == unit_of_row
    assert known_set_size(batch) == known
    assert responses_per_prompt(batch) == responses


def test_the_order_of_the_rows_changes_nothing() -> None:
    """But the numbers of the units, which go by first appearance as those of groups."""
    rows = drawn("abcba" + "c", 1, total=3)
    for turned in (rows[::-1], rows[2:] + rows[:2]):
        batch = read(turned)
        assert known_set_size(batch) == 3
        together = {(r["group"], int(u)) for r, u in zip(turned, units(batch))}
        pairs = [{0, 4}, {1, 3}, {2, 5}]
        assert all(len({u for g, u in together if g in pair}) == 1 for pair in pairs)
        assert len({u for _, u in together}) == 3


def test_equal_texts_of_a_source_are_two_prompts() -> None:
    """`prompt_index` tells them apart; without it they are one that was drawn twice."""
    rows = drawn("aab")
    with pytest.raises(InputError, match="found the prompt of group 1, which comes 2"):
        read(rows)
    for each in rows:
        each["prompt_index"] = each["group"]
    assert units(read(rows)).tolist() == [0, 0, 1, 1, 2, 2]
    assert known_set_size(read(rows)) == 5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row(0, 1, num_prompts_total=5)],
            (
                "E.jsonl:1: expected `num_prompts_total` and `with_replacement`, or neither, "
                "found only `num_prompts_total`; say both"
            ),
        ),
        (
            [row(0, 1), row(1, 2, with_replacement=False)],
            (
                "E.jsonl:2: expected `num_prompts_total` and `with_replacement`, or neither, "
                "found only `with_replacement`; say both"
            ),
        ),
        (
            drawn("ab", 1, total=5) + drawn("ab", 1, total=6)[1:],
            (
                "E.jsonl:3: expected the draws of line 1, `num_prompts_total` 5 and "
                "`with_replacement` false, found `num_prompts_total` 6 and `with_replacement` "
                "false; give all rows of a batch the same values"
            ),
        ),
        (
            [*drawn("a", 1), row(1, 2)],
            (
                "E.jsonl:2: expected the draws of line 1, `num_prompts_total` 5 and "
                "`with_replacement` false, found no `num_prompts_total`; give"
            ),
        ),
        (
            drawn("abc", total=2),
            (
                "E.jsonl: expected `num_prompts_total` of at least 3, the number of distinct "
                "prompts here, found 2; write the size of the set"
            ),
        ),
        (
            drawn("abca", total=3),
            (
                "E.jsonl:7: expected a prompt that no other group has, as `with_replacement` "
                "is false (or every one of the 3 prompts in equally many groups), found the "
                "prompt of group 3, which comes 2 times; write with_replacement: true"
            ),
        ),
        # Equally often, but not all of the set.
        (drawn("abab"), "E.jsonl:5: expected a prompt that no other group has"),
        (
            [row(0, 1, num_prompts_total=0, with_replacement=True)],
            "E.jsonl:1: expected `num_prompts_total` to be a positive integer, found 0",
        ),
        (
            [row(0, 1, num_prompts_total=True, with_replacement=True)],
            "E.jsonl:1: expected `num_prompts_total` to be a positive integer, found True",
        ),
        (
            [row(0, 1, num_prompts_total=5, with_replacement=0)],
            "E.jsonl:1: expected `with_replacement` to be true or false, found 0",
        ),
    ],
)
def test_what_cannot_be_is_refused(rows: list[Row], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        read(rows)


def test_rows_are_written_as_they_were_read() -> None:
    rows = drawn("cab")
    assert [sequence_to_row(s) for s in read(rows).sequences] == rows


# Every sample there is of a set of four prompts


VALUES = torch.tensor(
    [[1.0, 4.0], [-2.0, 3.0], [7.0, 7.5], [0.0, -6.0]], dtype=torch.float64
)
CHANCE = torch.tensor(
    [[0.5, 0.5], [0.2, 0.8], [0.9, 0.1], [0.35, 0.65]], dtype=torch.float64
)


def samples(units: int, sizes: Sequence[int]) -> Iterator[tuple[list[float], float]]:
    """The responses' values of each sample, unit by unit, and its probability.

    Args:
        sizes: responses of each unit.
    """
    subsets = list(combinations(range(len(VALUES)), units))
    for prompts in subsets:
        of_row = [
            p for p, size in zip(prompts, sizes, strict=True) for _ in range(size)
        ]
        for outcome in product(range(2), repeat=len(of_row)):
            chosen = list(zip(of_row, outcome))
            values = [float(VALUES[p, o]) for p, o in chosen]
            chance = math.prod(float(CHANCE[p, o]) for p, o in chosen)
            yield values, chance / len(subsets)


@pytest.mark.parametrize("sizes", [[2, 2], [2, 3, 2], [2, 2, 2, 2]])
def test_the_error_of_a_known_set_has_the_mean_that_it_must(sizes: list[int]) -> None:
    """Of a sum over units of their means, it is the variance to the last digit."""
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    each = torch.tensor(sizes).double()[groups]
    draws = Draws(groups=groups, num_prompts_total=len(VALUES))
    found = []
    for values, chance in samples(len(sizes), sizes):
        columns = (torch.tensor(values, dtype=torch.float64) / each)[:, None]
        estimate = Estimate.of(lambda totals: totals[..., 0], columns, draws)
        # For a sum both methods are one.
        assert estimate.se_jackknife == pytest.approx(estimate.se, rel=1e-9, abs=1e-9)
        found.append((chance, estimate.value, estimate.se**2))
    chance, value, square = torch.tensor(found, dtype=torch.float64).unbind(1)
    mean = float((chance * value).sum())
    variance = float((chance * (value - mean).square()).sum())
    assert float(chance.sum()) == pytest.approx(1, rel=1e-12)
    assert mean == pytest.approx(
        len(sizes) * float((VALUES * CHANCE).sum(1).mean()), rel=1e-10
    )
    assert float((chance * square).sum()) == pytest.approx(variance, rel=1e-10)


def test_draws_are_those_of_the_batch() -> None:
    known = Draws.of(read(drawn("abcba" + "c", 1, total=3)))
    assert known.groups.tolist() == [0, 1, 2, 1, 0, 2]
    assert (known.num_prompts_total, known.num_units, known.fraction) == (3, 3, 1.0)
    single = Draws.of(read(drawn("abc", 1)))
    assert (single.num_prompts_total, single.fraction) == (None, 0.0)
