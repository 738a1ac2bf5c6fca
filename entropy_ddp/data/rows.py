"""How one row of a rollout file becomes a `Sequence`.

Rules where a row could be read in two ways:

- Token ids are authoritative; `prompt` and `response` are tokenised only where
  `prompt_ids` and `response_ids` are absent. `null` means absent.
- Prompt text is tokenised as it stands, with the tokenizer's beginning-of-sequence
  token in front exactly when the tokenizer adds one by itself and the text does not
  begin with it already. No other special token is added.
- Response text is tokenised as it stands. Because the end-of-sequence token counts when
  it was generated, it is appended (unless the text ends with it) when `finished` is
  true; text without `finished` is an error, never a guess.
- `ids_from_text` stands in a row whose response ids were tokenised from text, by an
  importer or here, and lists what may make them others than the policy sampled.
- Keys that are not in `KNOWN_KEYS` are kept in `Sequence.extra`.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_ddp.data.batch import Sequence
from entropy_ddp.data.jsonlines import make_problem, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A log-probability above 0 by less than this is float32 rounding in the sampler.
LOGPROB_ROUNDING_NATS = 1e-5
# Of `ids_from_text`: the end-of-sequence token was put back behind the text.
END_RESTORED = "end restored"
# And what makes ids doubtful: it was put back close to the maximum length; the ids decode
# to another text; they are more than that length; the trainer logged another length.
NEAR_LIMIT, OTHER_TEXT = "near the limit", "other text"
TOO_LONG, LOG_DIFFERS = "too long", "log differs"
DOUBTS = (NEAR_LIMIT, OTHER_TEXT, TOO_LONG, LOG_DIFFERS)


@dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """What the checkpoint can take.

    Attributes:
        vocabulary_size: token ids are in [0, vocabulary_size).
        max_positions: most tokens the model reads of one sequence (the last token of a
            response is not read), or None if there is no limit.
    """

    vocabulary_size: int
    max_positions: int | None


def _is_text(value: object) -> bool:
    # A lone surrogate is legal in JSON, but no tokenizer can read it.
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def is_number(value: object) -> bool:
    """Whether it is a number of JSON that float64 can hold."""
    # An integer beyond the range of float64 counts as infinite.
    return type(value) is float or (type(value) is int and abs(value) < 2**1023)


def _is_list_of_numbers(value: object) -> bool:
    # What most lists are, told at once.
    if isinstance(value, list) and set(map(type, value)) == {float}:
        return True
    return isinstance(value, list) and all(map(is_number, value))


def _is_list_of_integers(value: object) -> bool:
    # type() and not isinstance(): JSON's true is a bool, which is an int to Python.
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _is_list_of_marks(value: object) -> bool:
    return isinstance(value, list) and all(
        mark == END_RESTORED or mark in DOUBTS for mark in value
    )


KNOWN_KEYS: dict[str, tuple[Callable[[object], bool], str]] = {
    "group": (lambda value: type(value) in (int, str), "an integer or a string"),
    "prompt_ids": (_is_list_of_integers, "a list of integers"),
    "response_ids": (_is_list_of_integers, "a list of integers"),
    "prompt": (_is_text, "a string of valid Unicode"),
    "response": (_is_text, "a string of valid Unicode"),
    "reward": (is_number, "a number"),
    "advantage": (is_number, "a number"),
    "sampling_logprobs": (_is_list_of_numbers, "a list of numbers"),
    "finished": (lambda value: type(value) is bool, "true or false"),
    "ids_from_text": (
        _is_list_of_marks,
        f"a list of {', '.join(map(repr, (END_RESTORED, *DOUBTS)))}",
    ),
    "num_prompts_total": (
        lambda value: type(value) is int and 0 < value < 2**63,
        "a positive integer",
    ),
    "with_replacement": (lambda value: type(value) is bool, "true or false"),
}


def listed_lines(lines: list[int], most: int = 8) -> str:
    """`line 3`, `lines 3, 7 and 9`, and how many more there are."""
    shown = [str(line) for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"{len(lines) - most} more")
    *head, last = shown
    listed = f"{', '.join(head)} and {last}" if head else last
    return f"line{'s' if len(lines) > 1 else ''} {listed}"


def check_types(row: dict[str, Any], where: str) -> None:
    """Check the JSON types of the known keys of a row; null is no value.

    Raises:
        InputError: if a known key has a value of another type.
    """
    for key, (is_right, expected) in KNOWN_KEYS.items():
        value = row.get(key)
        if value is not None and not is_right(value):
            raise make_problem(
                where, f"`{key}` to be {expected}", show(value), "correct the value"
            )


def read_prompt_ids(
    row: dict[str, Any],
    where: str,
    limits: TokenLimits,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> list[int]:
    """Token ids of a row's prompt, at least one: `prompt_ids`, or `prompt` tokenised.

    Args:
        tokenizer: the checkpoint's tokenizer; None allows rows with ids only.

    Raises:
        InputError: if both forms are missing, the prompt is empty, or an id is not in
            the vocabulary.
    """
    ids = row.get("prompt_ids")
    if ids is None:
        text, tokenizer = _require_text(row, "prompt", where, tokenizer)
        ids = _encode(text, tokenizer)
        begin = tokenizer.bos_token_id
        adds_begin = begin is not None and _encode(text, tokenizer, True)[:1] == [begin]
        if adds_begin and ids[:1] != [begin]:
            ids = [begin, *ids]
    if not ids:
        raise make_problem(
            where, "at least one prompt token", "an empty prompt", "give a prompt"
        )
    check_vocabulary(ids, "prompt_ids", where, limits)
    return ids


def _read_response_ids(
    row: dict[str, Any],
    where: str,
    limits: TokenLimits,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> tuple[list[int], tuple[str, ...] | None]:
    ids, marks = row.get("response_ids"), row.get("ids_from_text")
    finished = row.get("finished")
    if ids is None:
        marks = []
        text, tokenizer = _require_text(row, "response", where, tokenizer)
        ids = _encode(text, tokenizer)
        if finished is None:
            raise make_problem(
                where,
                "`finished` or `response_ids` beside the text `response`",
                "neither",
                "say with `finished` whether the end-of-sequence token, which text "
                "lacks, was generated",
            )
        end = tokenizer.eos_token_id
        if finished and end is None:
            raise make_problem(
                where,
                "a tokenizer with an end-of-sequence token",
                "none, but `finished` is true",
                "give `response_ids`",
            )
        if finished and ids[-1:] != [end]:
            ids, marks = [*ids, end], [END_RESTORED]
    if finished and not ids:
        raise make_problem(
            where,
            "the end-of-sequence token in `response_ids`, as `finished` is true",
            "no token",
            "add the token's id or set `finished` to false",
        )
    check_vocabulary(ids, "response_ids", where, limits)
    return ids, None if marks is None else tuple(marks)


def _require_text(
    row: dict[str, Any],
    key: str,
    where: str,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> "tuple[str, PreTrainedTokenizerBase]":
    """The text and the tokenizer, both of which must be there."""
    text = row.get(key)
    if text is None:
        raise make_problem(
            where, f"`{key}_ids` or `{key}`", "neither", "add one of them to the row"
        )
    if tokenizer is None:
        raise make_problem(
            where,
            f"`{key}_ids`, as no tokenizer was given",
            f"only the text `{key}`",
            f"add `{key}_ids` or name a checkpoint that has a tokenizer",
        )
    return text, tokenizer


def _encode(
    text: str, tokenizer: "PreTrainedTokenizerBase", special: bool = False
) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def check_vocabulary(ids: list[int], key: str, where: str, limits: TokenLimits) -> None:
    """Check that every token id is one of the checkpoint's.

    Raises:
        InputError: one is not, with its place.
    """
    if ids and not 0 <= min(ids) <= max(ids) < limits.vocabulary_size:
        bad = next(i for i, t in enumerate(ids) if not 0 <= t < limits.vocabulary_size)
        raise make_problem(
            where,
            f"token ids from 0 to {limits.vocabulary_size - 1}, the checkpoint's "
            f"vocabulary, in `{key}`",
            f"{ids[bad]} at place {bad}",
            "use the checkpoint that the rollouts were sampled from",
        )


def _check_sampling_logprobs(row: dict[str, Any], num_tokens: int, where: str) -> None:
    values = row.get("sampling_logprobs")
    if values is None:
        return
    if len(values) != num_tokens:
        raise make_problem(
            where,
            f"{num_tokens} `sampling_logprobs`, one for each response token (the "
            "end-of-sequence token included)",
            str(len(values)),
            "write one for each token, or leave the key out",
        )
    if max(values, default=0.0) > LOGPROB_ROUNDING_NATS:
        place = next(i for i, v in enumerate(values) if v > LOGPROB_ROUNDING_NATS)
        raise make_problem(
            where,
            "`sampling_logprobs` that are at most 0 (nats)",
            f"{values[place]!r} at place {place}",
            "write log-probabilities, not probabilities or their negative logs",
        )


def _numbers(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
    """A tensor of int64 or float64, several times faster than `torch.tensor`."""
    if not values:
        return torch.empty(0, dtype=dtype)
    code = "q" if dtype == torch.int64 else "d"
    return torch.frombuffer(array(code, values), dtype=dtype)


def make_sequence(
    row: dict[str, Any],
    index: int,
    where: str,
    limits: TokenLimits,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> Sequence:
    """The sequence of one row; its group number is still to be given."""
    check_types(row, where)
    if row.get("group") is None:
        raise make_problem(
            where, "the key `group`", "none", "give the responses of a prompt one group"
        )
    prompt_ids = read_prompt_ids(row, where, limits, tokenizer)
    response_ids, marks = _read_response_ids(row, where, limits, tokenizer)
    positions = len(prompt_ids) + len(response_ids) - 1
    if limits.max_positions is not None and positions > limits.max_positions:
        raise make_problem(
            where,
            f"a sequence of at most {limits.max_positions} positions",
            f"{positions} ({len(prompt_ids)} prompt and {len(response_ids)} response "
            "tokens, the last of which is not read)",
            "drop the row's group, or use the checkpoint it was sampled from",
        )
    _check_sampling_logprobs(row, len(response_ids), where)
    logprobs = row.get("sampling_logprobs")
    reward, advantage = row.get("reward"), row.get("advantage")
    return Sequence(
        index=index,
        group=-1,
        group_key=row["group"],
        prompt_ids=_numbers(prompt_ids, torch.int64),
        response_ids=_numbers(response_ids, torch.int64),
        reward=None if reward is None else float(reward),
        advantage=None if advantage is None else float(advantage),
        sampling_logprobs=(
            None if logprobs is None else _numbers(logprobs, torch.float64)
        ),
        finished=row.get("finished"),
        ids_from_text=marks,
        num_prompts_total=row.get("num_prompts_total"),
        with_replacement=row.get("with_replacement"),
        extra={key: value for key, value in row.items() if key not in KNOWN_KEYS},
    )
