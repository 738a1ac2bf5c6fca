"""One sequence of another trainer's dump, before it is tokenised and written."""

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropy_ddp.data.jsonlines import make_problem, show
from entropy_ddp.data.rows import is_number

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the importers are told beside the files.

    Attributes:
        columns: for `table`: names of the file's columns by field.
        rewards: for `trl`: names of the reward columns; empty for all numeric ones.
        reward_weights: for `trl`: the trainer's weight of each reward, if known.
        num_generations: responses of one prompt draw, if known.
    """

    columns: dict[str, str] = field(default_factory=dict)
    rewards: tuple[str, ...] = ()
    reward_weights: list[float] | None = None
    num_generations: int | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sequence as a dump has it.

    Attributes:
        where: file and row, for messages.
        group: key of its prompt draw; equal keys are one group.
        grouped_by_prompt: the dump does not name the draws, which the trainer keeps
            apart: the key is the prompt.
        prompt: text, or messages for the chat template; None if there are ids.
        prompt_lacks_special_tokens: the text was decoded without special tokens.
        prompt_encoded_by_default: the text was tokenised by a plain call of the
            tokenizer, whatever special tokens that adds.
        prompt_ids: token ids, if the dump has them.
        response: text without the end-of-sequence token; None if there are ids.
        response_ids: token ids, end-of-sequence token included.
        finished: whether the end-of-sequence token was generated; None if the dump does
            not say.
        reward, advantage: where the dump has them.
        sampling_logprobs: the sampler's log-probabilities of `response_ids`, nats.
        step: the trainer's step that the sequence belongs to, if the dump says.
        num_dropped: masked tokens after the response, which the dump has and the row
            will not.
        extra: other keys, carried over.
    """

    where: str
    group: Hashable
    grouped_by_prompt: bool = False
    prompt: str | list[Message] | None = None
    prompt_lacks_special_tokens: bool = False
    prompt_encoded_by_default: bool = False
    prompt_ids: list[int] | None = None
    response: str | None = None
    response_ids: list[int] | None = None
    finished: bool | None = None
    reward: float | None = None
    advantage: float | None = None
    sampling_logprobs: list[float] | None = None
    step: int | None = None
    num_dropped: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


def require(row: dict[str, Any], key: str, where: str, advice: str) -> Any:
    """The value of a key that must be there.

    Raises:
        InputError: it is absent or null.
    """
    if row.get(key) is None:
        found = f"the keys {', '.join(sorted(row)) or 'none'}"
        if key in row:
            found = "null"
        raise make_problem(where, f"the key `{key}`", found, advice)
    return row[key]


def require_text(row: dict[str, Any], key: str, where: str, advice: str) -> str:
    """A text that must be there.

    Raises:
        InputError: it is absent or no text.
    """
    value = require(row, key, where, advice)
    if not isinstance(value, str):
        raise make_problem(where, f"text in `{key}`", show(value), advice)
    return value


def require_number(row: dict[str, Any], key: str, where: str, advice: str) -> float:
    """A finite number that must be there; true and false count as 1 and 0.

    Raises:
        InputError: it is absent, no number or not finite.
    """
    value = require(row, key, where, advice)
    is_finite = isinstance(value, bool) or (is_number(value) and math.isfinite(value))
    if not is_finite:
        raise make_problem(where, f"a finite number in `{key}`", show(value), advice)
    return float(value)


def read_messages(value: Any, key: str, where: str) -> list[Message]:
    """A list of chat messages with a role and a text each.

    Raises:
        InputError: it is none.
    """
    if not isinstance(value, list) or not value:
        raise make_problem(
            where, f"text or a list of messages in `{key}`", show(value), "correct it"
        )
    messages = []
    for message in value:
        given = message if isinstance(message, dict) else {}
        present = {k: v for k, v in given.items() if v is not None}
        texts = isinstance(present.get("content"), str)
        if set(present) != {"role", "content"} or not texts:
            raise make_problem(
                where,
                f"messages with `role` and a text `content` in `{key}`",
                show(message),
                "tool calls, reasoning fields and images cannot be turned back into "
                "the tokens that were sampled: export token ids",
            )
        messages.append(present)
    return messages


def step_in_name(path: Path, pattern: str) -> int | None:
    """The step that a file's name holds by a pattern with one group, if it matches."""
    found = re.search(pattern, path.name)
    return int(found[1]) if found else None
