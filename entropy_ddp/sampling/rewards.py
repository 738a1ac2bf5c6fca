"""How a response is rewarded: reward = Σ over terms of weight × score.

A term is a function `module:function` of (prompt, response, row), the prompt's and the
response's text and the row of the prompt source, found from the working directory as by
`python -m`; or it compares the response's answer with a gold answer of the row (`math`,
`exact`); or it searches the response (`regex`). A failing term stops the run; it is never
counted as 0.

The gold answer is a value of the prompt's row, or what follows the last `gold_after`
mark in it (GSM8K: `####`). The response's answer is the group of the last match of
`answer_pattern` (an answer tag, say), or the whole response if there is no pattern; a
response in which the pattern does not match is wrong. Both are compared without the
space around them, as text or by math-verify.
"""

import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

from entropy_ddp.config import Reward
from entropy_ddp.data.jsonlines import make_problem, show
from entropy_ddp.errors import InputError, RunError, raise_if_out_of_memory

Score = Callable[[str, str, dict[str, Any]], float]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of the reward.

    Attributes:
        label: what it is called, different for every term.
        weight: its factor in the sum.
        score: its function of (prompt, response, row).
    """

    label: str
    weight: float
    score: Score


def load_rewards(settings: Sequence[Reward]) -> list[Term]:
    """Find everything that the terms of a reward need.

    Raises:
        InputError: a function cannot be found or imported, or math-verify is not
            installed.
    """
    return [
        Term(label=term.label, weight=term.weight, score=_make_score(term))
        for term in settings
    ]


def _make_score(settings: Reward) -> Score:
    if settings.function is not None:
        return load_function(settings.function)
    if settings.regex is not None:
        pattern = re.compile(settings.regex, re.DOTALL)
        return lambda _, response, __: float(pattern.search(response) is not None)
    if settings.math is not None:
        require_math_verify()

    def score(prompt: str, response: str, row: dict[str, Any]) -> float:
        gold = find_gold(settings, row, "row")
        answer = find_answer(settings, response)
        if answer is None:
            return 0.0
        if settings.math is not None:
            return float(is_equal_in_mathematics(gold, answer))
        return float(answer == gold)

    return score


def load_function(name: str) -> Score:
    """Import a reward function: `entropy_ddp.demo:running_total_reward`, for example.

    Raises:
        InputError: the name is malformed, the module cannot be imported, it has no
            such function, or that does not take these arguments.
    """
    module_name, colon, function_name = name.partition(":")
    if not (
        colon
        and function_name.isidentifier()
        and all(part.isidentifier() for part in module_name.split("."))
    ):
        raise InputError(
            f"reward: expected module:function, found {name!r}; name a function of an "
            "importable module"
        )
    # A console script's path begins with its own folder instead. Functions may import
    # more when they are called, so this stays.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # any: importing runs the user's code
        raise_if_out_of_memory(error)
        raise InputError(
            f"reward: expected the module {module_name!r} to be importable, found "
            f"{type(error).__name__}: {error}; install it, start in its folder, or add "
            "that to PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "none" if function is None else f"a {type(function).__name__}"
        raise InputError(
            f"reward: expected a function {function_name!r} in module "
            f"{module_name!r}, found {found}; correct the name"
        )
    _require_arguments(function, name)
    return function


def _require_arguments(function: Callable[..., Any], name: str) -> None:
    """Check that a reward function can be called with prompt, response and row."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some functions written in C
        return
    try:
        signature.bind("prompt", "response", {})
    except TypeError as error:
        raise InputError(
            f"reward: expected {name} to be called as "
            f"{name.rpartition(':')[2]}(prompt, response, row) with one response, found "
            f"{name.rpartition(':')[2]}{signature}; correct the function"
        ) from error


def score_rewards(
    terms: Sequence[Term], where: str, prompt: str, response: str, row: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """Reward of one response.

    Args:
        where: which response it is, for messages.
        response: text of the response, without special tokens.
        row: row of the prompt source; functions get a copy.

    Returns:
        The weighted sum of the scores, and each term's score without its weight.

    Raises:
        RunError: a term fails, or yields anything but a finite number, or the sum is
            not finite; the message names the response.
    """
    shown = f"{where}, prompt {prompt[:80]!r}, response {response[:80]!r}"
    scores = {}
    for term in terms:
        try:
            value = term.score(prompt, response, dict(row))
            is_finite = isinstance(value, Real) and math.isfinite(value)
        except Exception as error:  # any: this is the user's code
            raise RunError(
                f"reward {term.label}: expected a number for {shown}, found "
                f"{type(error).__name__}: {error}; correct the reward"
            ) from error
        if not is_finite:
            raise RunError(
                f"reward {term.label}: expected a finite number for {shown}, found "
                f"{value!r}; correct the reward"
            )
        scores[term.label] = float(value)
    total = sum(term.weight * scores[term.label] for term in terms)
    if not math.isfinite(total):
        raise RunError(
            f"reward: expected a finite sum for {shown}, found {total} of {scores}; "
            "correct the reward's terms and weights"
        )
    return total, scores


def find_gold(settings: Reward, row: dict[str, Any], where: str) -> str:
    """The gold answer of a row for a `math` or `exact` reward, never empty.

    Raises:
        InputError: the row has no such key, it is no text or number, the mark is not
            in it, or nothing is left.
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
    """The answer that a response gives; None where `answer_pattern` does not match."""
    if settings.answer_pattern is None:
        return response.strip()
    found = re.findall(settings.answer_pattern, response, re.DOTALL)
    return found[-1].strip() if found else None


def check_gold(settings: Reward, row: dict[str, Any], where: str) -> None:
    """Check that a reward which needs a gold answer finds one in a row.

    Raises:
        InputError: there is none, or math-verify cannot parse it.
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
    """Check that math-verify is installed.

    Raises:
        InputError: it is not.
    """
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise InputError(
            "reward: expected math-verify to be installed, as the reward is `math`, "
            f"found {type(error).__name__}: {error}; pip install entropy_ddp[math]"
        ) from error


def is_equal_in_mathematics(gold: str, answer: str) -> bool:
    """Whether math-verify finds a gold answer, which must parse, and another one equal.

    An answer that it cannot parse, or not compare within its limit of five seconds, is
    wrong.
    """
    import math_verify

    return bool(math_verify.verify(_parse_gold(gold), math_verify.parse(answer)))


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[Any]:
    import math_verify

    return math_verify.parse(gold)
