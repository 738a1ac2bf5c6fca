"""Is the answer of a response the gold answer?

The gold answer is a value of the prompt's row, or what follows the last `gold_after`
mark in it (GSM8K: `####`). The response's answer is the group of the last match of
`answer_pattern` (an answer tag, say), or the whole response if there is no pattern; a
response in which the pattern does not match is wrong. Both are compared without the
space around them, as text or by math-verify.
"""

import re
from functools import lru_cache
from typing import Any

from entropy_ddp.config import Reward
from entropy_ddp.data.jsonlines import make_problem, show
from entropy_ddp.errors import InputError


def find_gold(settings: Reward, row: dict[str, Any], where: str) -> str:
    """The gold answer of a row.

    Args:
        settings: a `math` or `exact` reward.
        row: row of the prompt source.
        where: the row's place, for messages.

    Returns:
        The answer as text, never empty.

    Raises:
        InputError: if the row has no such key, it is no text or number, the mark is
            not in it, or nothing is left.
    """
    assert settings.gold is not None
    value = row.get(settings.gold)
    if type(value) not in (str, int, float):
        raise make_problem(
            where,
            f"a gold answer, text or a number, in `{settings.gold}`",
            "none" if value is None else show(value),
            "correct the row, or the key in `reward`",
        )
    text = str(value)
    if settings.gold_after is not None and settings.gold_after not in text:
        raise make_problem(
            where,
            f"the mark {settings.gold_after!r} before the gold answer in "
            f"`{settings.gold}`",
            show(text),
            "correct the row, or `reward.gold_after`",
        )
    if settings.gold_after is not None:
        text = text.rpartition(settings.gold_after)[2]
    if not text.strip():
        raise make_problem(
            where,
            f"a gold answer in `{settings.gold}`",
            f"no text in {show(value)}",
            "correct the row",
        )
    return text.strip()


def find_answer(settings: Reward, response: str) -> str | None:
    """The answer that a response gives.

    Args:
        settings: a `math` or `exact` reward.
        response: text of the response.

    Returns:
        The answer as text, or None where `answer_pattern` does not match.
    """
    if settings.answer_pattern is None:
        return response.strip()
    found = re.findall(settings.answer_pattern, response, re.DOTALL)
    return found[-1].strip() if found else None


def check_gold(settings: Reward, row: dict[str, Any], where: str) -> None:
    """Check that a reward has a gold answer in a row, and can read it.

    Args:
        settings: any reward; those without a gold answer pass.
        row: row of the prompt source.
        where: the row's place.

    Raises:
        InputError: if it has none, or math-verify cannot parse it.
    """
    if settings.gold is None:
        return
    gold = find_gold(settings, row, where)
    if settings.math is not None and not _parse_gold(gold):
        raise make_problem(
            where,
            f"a gold answer that math-verify can parse in `{settings.gold}`",
            show(gold),
            "set `reward.gold_after`, correct the row, or use `exact`",
        )


def require_math_verify() -> None:
    """Check that math-verify can be imported.

    Raises:
        InputError: if it cannot.
    """
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise InputError(
            "reward: expected math-verify to be installed, as the reward is `math`, "
            f"found {type(error).__name__}: {error}; pip install entropy_ddp[math]"
        ) from error


def is_equal_in_mathematics(gold: str, answer: str) -> bool:
    """Whether math-verify finds two answers equal.

    Args:
        gold: the right answer; must parse.
        answer: the answer given; one that math-verify cannot parse, or not compare
            within its limit of five seconds, is wrong.

    Returns:
        True if they are equal.
    """
    import math_verify

    return bool(math_verify.verify(_parse_gold(gold), math_verify.parse(answer)))


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[Any]:
    import math_verify

    return math_verify.parse(gold)
