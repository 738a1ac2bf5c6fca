"""Is the answer found in a response, and compared with the gold answer of its row?"""

import sys
from typing import Any

import pytest

from entropy_ddp.config import Reward
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.sampling.rewards import (
    check_gold,
    find_answer,
    find_gold,
    load_rewards,
    score_rewards,
)

GSM8K = {"gold_after": "####", "answer_pattern": "<answer>(.*?)</answer>"}
WORKED = "3 * 750 = <<3*750=2250>>2,250\n#### 2,250"


def score(settings: Reward, response: str, **row: Any) -> float:
    """The score of one response."""
    return score_rewards(load_rewards([settings]), "group 0", "p", response, row)[0]


@pytest.mark.parametrize(
    ("settings", "value", "gold"),
    [
        ({}, " 12 ", "12"),
        ({}, 12, "12"),
        ({}, 0.5, "0.5"),
        ({"gold_after": "####"}, WORKED, "2,250"),
        ({"gold_after": "####"}, "a #### b #### -5\n", "-5"),
    ],
)
def test_the_gold_answer_follows_the_last_mark(
    settings: dict[str, Any], value: Any, gold: str
) -> None:
    assert find_gold(Reward(exact="a", **settings), {"a": value}, "row") == gold


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "file:3: expected a gold answer, text or a number, in `a`, found none"),
        (True, "found True; correct the row, or the key in `reward`"),
        ([1], r"found \[1\]"),
        ("12", "expected the mark '####' before the gold answer in `a`, found '12'"),
        ("12 #### ", "expected a gold answer in `a`, found no text in '12 #### '"),
    ],
)
def test_a_row_without_a_gold_answer_is_named(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_gold(Reward(exact="a", gold_after="####"), {"a": value}, "file:3")
    check_gold(Reward(regex="a"), {}, "file:3")


def test_the_answer_is_the_pattern_s_last_match() -> None:
    tagged = Reward(exact="a", answer_pattern="<answer>(.*?)</answer>")
    text = "<answer>1</answer> no: <answer>\n2 </answer> so 3"
    assert find_answer(tagged, text) == "2"
    assert find_answer(tagged, "2") is None
    assert find_answer(tagged, "<answer>2") is None
    assert find_answer(Reward(exact="a"), " 2\n") == "2"


def test_exact_answers_are_equal_as_text() -> None:
    settings = Reward(exact="a", **GSM8K)
    assert score(settings, "so <answer> 2,250</answer>", a=WORKED) == 1.0
    assert score(settings, "so <answer>2250</answer>", a=WORKED) == 0.0
    assert score(settings, "2,250", a=WORKED) == 0.0
    assert score(Reward(exact="a"), "yes\n", a="yes") == 1.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("2250", True),
        ("2,250", True),
        ("$2250", True),
        ("2250.00", True),
        ("4500/2", True),
        (r"$\frac{4500}{2}$", True),
        ("the sum is 2250.", True),
        ("2251", False),
        ("-2250", False),
        ("two", False),
        ("", False),
        (r"\frac{", False),
    ],
)
def test_math_answers_are_equal_as_numbers(answer: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    settings = Reward(math="a", **GSM8K)
    assert score(settings, f"x <answer>{answer}</answer>", a=WORKED) == float(right)
    assert score(settings, answer, a=WORKED) == 0.0


def test_a_gold_answer_that_cannot_be_parsed_is_named() -> None:
    pytest.importorskip("math_verify")
    message = (
        "file:3: expected a gold answer that math-verify can parse in `a`, found '"
    )
    with pytest.raises(InputError, match=message):
        check_gold(Reward(math="a"), {"a": "no number"}, "file:3")
    check_gold(Reward(math="a", gold_after="####"), {"a": WORKED}, "file:3")


def test_without_math_verify_the_reward_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"pip install entropy_ddp\[math\]"):
        load_rewards([Reward(math="a")])


def test_a_missing_gold_answer_stops_the_run_and_names_the_sample() -> None:
    message = "reward exact: .* group 0, prompt 'p', response 'r', found InputError"
    with pytest.raises(RunError, match=message):
        score(Reward(exact="a"), "r", b=1)
