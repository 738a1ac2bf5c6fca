"""How the user's reward function is found and called.

`module:function` names a function reward(prompt, response, row) -> float: the prompt's
and the response's text, and the row of the prompt file. A failing reward stops the run;
it is never counted as 0.
"""

import importlib
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from entropy_ddp.errors import InputError, RunError

Reward = Callable[[str, str, dict[str, Any]], float]


def load_reward(name: str) -> Reward:
    """Import a reward function.

    Args:
        name: `module:function`, for example `entropy_ddp.demo:running_total_reward`.

    Returns:
        The function.

    Raises:
        InputError: if the name is malformed, the module cannot be imported, or it has
            no such function.
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
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # any: importing runs the user's code
        raise InputError(
            f"reward: expected the module {module_name!r} to be importable, found "
            f"{type(error).__name__}: {error}; install it or add its folder to "
            "PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "none" if function is None else f"a {type(function).__name__}"
        raise InputError(
            f"reward: expected a function {function_name!r} in module "
            f"{module_name!r}, found {found}; correct the name"
        )
    return function


def score_reward(
    reward: Reward, prompt: str, response: str, row: dict[str, Any], draw: int
) -> float:
    """Reward of one response.

    Args:
        reward: the user's function; a bool counts as 0 or 1.
        prompt: text of the prompt.
        response: text of the response, without special tokens.
        row: row of the prompt file; the function gets a copy.
        draw: index of the prompt draw, for the message.

    Returns:
        A finite number.

    Raises:
        RunError: if the function fails, or returns anything but a finite number.
    """
    sample = f"prompt draw {draw}, prompt {prompt[:80]!r}, response {response[:80]!r}"
    try:
        value = reward(prompt, response, dict(row))
        is_finite = isinstance(value, Real) and math.isfinite(value)
    except Exception as error:  # any: this is the user's code
        raise RunError(
            f"reward: expected a number for {sample}, found {type(error).__name__}: "
            f"{error}; correct the reward function"
        ) from error
    if not is_finite:
        raise RunError(
            f"reward: expected a finite number for {sample}, found {value!r}; correct "
            "the reward function"
        )
    return float(value)
