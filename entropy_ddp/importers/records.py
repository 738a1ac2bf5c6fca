"""One sequence of another trainer's dump, and how it becomes the row of a rollout file.

Where the dump has token ids they are taken over. Text is tokenised as it stands:

- A response without the end-of-sequence token gets it back, unless it was truncated,
  that is, if it has fewer tokens than the maximum completion length.
- A prompt of messages goes through the chat template with a generation prompt.
- A prompt that was decoded without its special tokens (verl) is parsed into turns,
  rendered by the chat template, and accepted only if that gives the same text again.

Text need not tokenise to the tokens that were sampled: special tokens inside of it are
lost, and a response that loses some may look finished when it was truncated. Where ids
are known, the responses whose text tokenises to others are counted; where they are not,
the row's `ids_from_text` says what makes them doubtful.
"""

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_ddp.data.files import decode_prompt, decode_response
from entropy_ddp.data.jsonlines import make_problem, show
from entropy_ddp.data.rows import (
    END_RESTORED,
    KNOWN_KEYS,
    NEAR_LIMIT,
    OTHER_TEXT,
    TOO_LONG,
    TokenLimits,
    check_types,
    check_vocabulary,
    is_number,
    make_sequence,
    read_prompt_ids,
)
from entropy_ddp.sampling.prompts import render_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the importers are told beside the files.

    Attributes:
        columns: for `table`: names of the file's columns by field.
        rewards: for `trl`: names of the reward columns; empty for all numeric ones.
        reward_weights: for `trl`: the trainer's weight of each reward, if known.
        num_generations: responses of one prompt draw, if known.
        num_prompts_total: size of the set that the prompts were drawn from without
            replacement, if it is known.
    """

    columns: dict[str, str] = field(default_factory=dict)
    rewards: tuple[str, ...] = ()
    reward_weights: list[float] | None = None
    num_generations: int | None = None
    num_prompts_total: int | None = None


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


ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Tokenising:
    """What turns text into token ids.

    Attributes:
        tokenizer: the checkpoint's tokenizer.
        end_ids: token ids that end a response.
        max_length: maximum completion length in tokens; None if not known.
        template_options: further arguments of the chat template.
    """

    tokenizer: "PreTrainedTokenizerBase"
    end_ids: set[int]
    max_length: int | None
    template_options: dict[str, Any] = field(default_factory=dict)

    @property
    def limits(self) -> TokenLimits:
        """What a row may hold; the model's positions are checked when it is opened."""
        return TokenLimits(vocabulary_size=len(self.tokenizer), max_positions=None)


def make_rows(records: list[Record], tokenising: Tokenising) -> list[dict[str, Any]]:
    """Rows of a rollout file, in the order of the records; groups by first appearance.

    Raises:
        InputError: a record cannot be tokenised, or is not what a rollout file may
            hold; the rows of a group differ in their prompt, or some of them only have
            an advantage.
    """
    numbers: dict[Hashable, int] = {}
    firsts: dict[int, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for record in records:
        group = numbers.setdefault(record.group, len(numbers))
        row = {"group": group} | _make_row(record, tokenising)
        make_sequence(row, len(rows), record.where, tokenising.limits, None)
        _check_same_group(row, firsts.setdefault(group, row), record.where)
        rows.append(row)
    return rows


def _check_same_group(row: dict[str, Any], first: dict[str, Any], where: str) -> None:
    if row["prompt_ids"] != first["prompt_ids"]:
        raise make_problem(
            where,
            f"the prompt of its group, {show(first['prompt'])}",
            show(row["prompt"]),
            "is the key that groups the rows the same for several prompts?",
        )
    if ("advantage" in row) != ("advantage" in first):
        raise make_problem(
            where,
            "an advantage for all responses of a group or for none",
            "one for some",
            "give it for all, or leave it out and give rewards",
        )


def _make_row(record: Record, tokenising: Tokenising) -> dict[str, Any]:
    texts = {"prompt": record.prompt, "response": record.response}
    # Messages are the chat template's to refuse.
    check_types({k: v for k, v in texts.items() if isinstance(v, str)}, record.where)
    prompt_ids = _prompt_ids(record, tokenising)
    marks = None
    if record.response_ids is None:
        response_ids, finished, marks = _encode_response(record, tokenising)
    else:
        response_ids = record.response_ids
        for key, ids in (("prompt_ids", prompt_ids), ("response_ids", response_ids)):
            # Before they are decoded: tokenizers fail on what no token has.
            check_vocabulary(ids, key, record.where, tokenising.limits)
        finished = response_ids[-1] in tokenising.end_ids
    row = {
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
        "prompt": decode_prompt(prompt_ids, tokenising.tokenizer),
        "response": decode_response(response_ids, tokenising.tokenizer),
        "reward": record.reward,
        "advantage": record.advantage,
        "sampling_logprobs": record.sampling_logprobs,
        "finished": finished,
        "ids_from_text": marks,
    }
    row = {key: value for key, value in row.items() if value is not None}
    # A key of the dump that means another thing here must not be read as ours.
    renamed = {
        f"source_{key}" if key in KNOWN_KEYS else key: _jsonable(value)
        for key, value in record.extra.items()
    }
    return row | {k: v for k, v in renamed.items() if v is not None}


def _jsonable(value: Any) -> Any:
    """A value that JSON has, NaN being none; text for what it has not."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if abs(value) <= 1.7976931348623157e308 else None
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    return str(value)


# Responses


def _encode(text: str, tokenising: Tokenising) -> list[int]:
    return tokenising.tokenizer(text, add_special_tokens=False, verbose=False)[
        "input_ids"
    ]


def _encode_response(
    record: Record, tokenising: Tokenising
) -> tuple[list[int], bool, list[str]]:
    """Token ids, whether they end in the end-of-sequence token, and what is doubtful."""
    assert record.response is not None
    ids = _encode(record.response, tokenising)
    has_end = bool(ids) and ids[-1] in tokenising.end_ids
    limit, finished = tokenising.max_length, record.finished
    if finished is None and limit is None and not has_end:
        raise make_problem(
            record.where,
            "to know whether the response was truncated, as its text lacks the "
            "end-of-sequence token",
            "no maximum completion length",
            "give --max-completion-length N",
        )
    if finished is None:
        finished = has_end or len(ids) < (limit or 0)
    is_altered = decode_prompt(ids, tokenising.tokenizer) != record.response
    marks = [OTHER_TEXT] if is_altered else []
    if limit is not None and len(ids) - has_end > limit:
        marks.append(TOO_LONG)
    if not finished or has_end:
        return ids, finished, marks
    end = tokenising.tokenizer.eos_token_id
    if end is None:
        raise make_problem(
            record.where,
            "a tokenizer with an end-of-sequence token",
            "none",
            "add it to the checkpoint's tokenizer_config.json",
        )
    # A twentieth of the limit, or one token, is left.
    is_full = limit is not None and len(ids) + max(1, limit // 20) >= limit
    if is_full and record.finished is None:
        marks.append(NEAR_LIMIT)
    return [*ids, end], True, [*marks, END_RESTORED]


def tokenises_otherwise(ids: list[int], tokenising: Tokenising) -> bool:
    """Whether a response's text tokenises to other ids than were sampled."""
    body = ids[:-1] if ids[-1] in tokenising.end_ids else ids
    return _encode(decode_prompt(body, tokenising.tokenizer), tokenising) != body


# Prompts


def is_templated(record: Record, tokenising: Tokenising) -> bool:
    """Whether the chat template renders a record's prompt."""
    if record.prompt_ids is not None or isinstance(record.prompt, list):
        return record.prompt_ids is None
    has_template = tokenising.tokenizer.chat_template is not None
    return record.prompt_lacks_special_tokens and has_template


def _prompt_ids(record: Record, tokenising: Tokenising) -> list[int]:
    if record.prompt_ids is not None:
        return record.prompt_ids
    if isinstance(record.prompt, list):
        return _render(record.prompt, record.where, tokenising)
    assert record.prompt is not None
    if is_templated(record, tokenising):
        return _render_again(record.prompt, record.where, tokenising)
    if record.prompt_encoded_by_default:
        return tokenising.tokenizer(record.prompt, verbose=False)["input_ids"]
    return read_prompt_ids(
        {"prompt": record.prompt},
        record.where,
        tokenising.limits,
        tokenising.tokenizer,
    )


def _render(messages: list[Message], where: str, tokenising: Tokenising) -> list[int]:
    advice = "import with the checkpoint that the rollouts were sampled from"
    return render_messages(
        messages,
        where,
        tokenising.tokenizer,
        tokenising.template_options,
        without_template=advice,
        if_refused=advice,
    )


def _render_again(text: str, where: str, tokenising: Tokenising) -> list[int]:
    """Token ids of a rendered prompt whose special tokens were removed.

    The default system prompt of a template may be in the text: rendering it as a turn
    must give the same.
    """
    pieces = re.split(rf"(?:^|\n)({'|'.join(ROLES)})\n", text)
    turns = list(zip(pieces[1::2], pieces[2::2]))
    if turns and not pieces[0].strip() and turns[-1] == ("assistant", ""):
        messages = [{"role": role, "content": content} for role, content in turns[:-1]]
        if messages:
            ids = _render(messages, where, tokenising)
            if decode_response(ids, tokenising.tokenizer) == text:
                return ids
    raise make_problem(
        where,
        "a prompt from which the chat template's special tokens can be restored",
        show(text),
        "the dump was decoded without them: log the messages or the token ids, and "
        "import these as a table",
    )
