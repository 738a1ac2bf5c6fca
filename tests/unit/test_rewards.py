"""Is the user's reward function found, called and believed only when it can be?"""

import os
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from entropy_ddp.config import Reward
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.sampling.rewards import (
    Score,
    Term,
    load_function,
    load_rewards,
    score_rewards,
)

MODULE = """
def length(prompt, response, row):
    return len(response) / row["norm"]

constant = 3
"""


def score_reward(
    score: Score, prompt: str, response: str, row: dict[str, Any], group: int
) -> float:
    """The reward of one term of weight 1."""
    term = Term(label="mine", weight=1.0, score=score)
    return score_rewards([term], f"group {group}", prompt, response, row)[0]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module that defines rewards."""
    (tmp_path / "rewards_of_a_user.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import not_installed_at_all")
    (tmp_path / "failing_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    return "rewards_of_a_user"


def test_a_reward_is_found_and_called(module: str) -> None:
    reward = load_function(f"{module}:length")
    assert score_reward(reward, "p", "abc", {"norm": 2}, 0) == 1.5


@pytest.mark.parametrize(
    "name",
    ["", "length", "m.length", ":length", "m:", "m:a:b", "m:a.b", "a b:c", "/m.py:f"],
)
def test_a_malformed_name_is_an_error(name: str) -> None:
    message = "reward: expected module:function, found " + re.escape(repr(name))
    with pytest.raises(InputError, match=message):
        load_function(name)


@pytest.mark.parametrize(
    ("name", "cause", "kind"),
    [
        ("no_such_module_here", "No module named 'no_such_module_here'", ImportError),
        ("broken_rewards", "No module named 'not_installed_at_all'", ImportError),
        ("failing_rewards", "ZeroDivisionError: division by zero", ZeroDivisionError),
    ],
)
def test_a_failed_import_shows_its_cause(
    module: str, name: str, cause: str, kind: type[Exception]
) -> None:
    message = f"expected the module '{name}' to be importable, found .*{cause}"
    with pytest.raises(InputError, match=message) as caught:
        load_function(f"{name}:reward")
    assert isinstance(caught.value.__cause__, kind)


def test_a_name_that_is_no_function_is_an_error(module: str) -> None:
    message = f"a function 'lenght' in module '{module}', found none; correct the name"
    with pytest.raises(InputError, match=message):
        load_function(f"{module}:lenght")
    with pytest.raises(InputError, match="a function 'constant'.*found a int"):
        load_function(f"{module}:constant")


def test_a_module_is_found_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a console script, whose path begins with its own folder."""
    (tmp_path / "rewards_here.py").write_text(
        "def score(prompt, response, row): return 2"
    )
    monkeypatch.setattr(
        sys, "path", [p for p in sys.path if p not in ("", os.getcwd())]
    )
    monkeypatch.chdir(tmp_path)
    assert load_function("rewards_here:score")("", "", {}) == 2


@pytest.mark.parametrize(
    "arguments",
    ["completions, **kwargs", "prompt, response", "*, prompt, response, row"],
)
def test_a_function_of_other_arguments_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    """TRL's are of a whole batch. Found before anything is sampled."""
    name = f"rewards_{len(arguments)}"
    (tmp_path / f"{name}.py").write_text(f"def score({arguments}): return 0.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = rf"score\(prompt, response, row\) .*found score\({re.escape(arguments)}\)"
    with pytest.raises(InputError, match=message):
        load_function(f"{name}:score")


@pytest.mark.parametrize(
    "value", [1, 0.5, True, numpy.float32(0.5), numpy.int64(2), Fraction(1, 2)]
)
def test_any_real_number_is_a_reward(value: Any) -> None:
    result = score_reward(lambda *_: value, "p", "r", {}, 0)
    assert type(result) is float
    assert result == value


@pytest.mark.parametrize(
    "value",
    [None, "1", float("nan"), float("inf"), [1.0], 1j, torch.tensor(1.0), {}],
    ids=repr,
)
def test_anything_else_stops_the_run(value: Any) -> None:
    message = (
        "reward mine: expected a finite number for group 4, prompt 'p', response 'r', "
        f"found {re.escape(repr(value))}; correct"
    )
    with pytest.raises(RunError, match=message):
        score_reward(lambda *_: value, "p", "r", {}, 4)


def test_a_number_beyond_float64_stops_the_run() -> None:
    with pytest.raises(RunError, match="found OverflowError"):
        score_reward(lambda *_: 10**400, "p", "r", {}, 0)


def test_a_failing_reward_stops_the_run_and_names_the_sample() -> None:
    def reward(prompt: str, response: str, row: dict[str, Any]) -> float:
        return row["answer"]

    message = (
        f"reward mine: .* group 7, prompt '{'p' * 80}', response '{'r' * 80}', found "
        "KeyError: 'answer'; correct the reward"
    )
    with pytest.raises(RunError, match=message) as caught:
        score_reward(reward, "p" * 100, "r" * 100, {}, 7)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_cannot_change_the_row() -> None:
    def reward(prompt: str, response: str, row: dict[str, Any]) -> float:
        return row.pop("answer")

    row = {"answer": 2}
    assert score_reward(reward, "p", "r", row, 0) == 2.0
    assert row == {"answer": 2}


def score_response(
    terms: list[Term], response: str, **row: Any
) -> tuple[float, dict[str, float]]:
    return score_rewards(terms, "group 3", "p", response, row)


def test_terms_are_summed_with_their_weights(module: str) -> None:
    terms = load_rewards(
        [
            Reward(exact="answer", answer_pattern="<(.*?)>"),
            Reward(regex="^a.*z$", weight=0.5, name="shape"),
            Reward(function=f"{module}:length", weight=-2.0),
        ]
    )
    total, scores = score_response(terms, "a<1>\nz", answer=1, norm=3)
    assert scores == {"exact": 1.0, "shape": 1.0, "length": 2.0}
    assert total == 1.0 + 0.5 - 4.0
    total, scores = score_response(terms, "a<1>z<2>", answer=1, norm=4)
    assert scores == {"exact": 0.0, "shape": 0.0, "length": 2.0}
    assert total == -4.0


def test_a_sum_beyond_float64_stops_the_run() -> None:
    terms = [
        Term(label=label, weight=1.0, score=lambda *_: 1.7e308) for label in ("a", "b")
    ]
    with pytest.raises(
        RunError, match="a finite sum for group 3, prompt 'p'.*found inf"
    ):
        score_response(terms, "r")
