"""Where prompts come from, how a row becomes one, and which are drawn.

Rows stand in JSON lines, a parquet file, or a data set. Every row comes with its place
(`path:line`, or `source: row i` from 0), for messages.

A row gives its prompt as `prompt_ids`, or as text: the key `prompt` (or another, or a
template over several). A list of messages, or text with `chat: true`, goes through the
tokenizer's chat template with a generation prompt. Reward functions see the whole row
(the right answer, say); the keys to be kept are carried to the rollout file.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import torch

from entropy_ddp.config import Prompts
from entropy_ddp.data.jsonlines import make_problem, read_rows, show
from entropy_ddp.data.rows import KNOWN_KEYS, TokenLimits, check_types, read_prompt_ids
from entropy_ddp.errors import InputError, raise_if_out_of_memory
from entropy_ddp.files import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def describe_source(source: Prompts) -> str:
    """The source's name: its path, or data set, configuration and split."""
    if source.file is not None:
        return source.file
    name = "" if source.name is None else f"/{source.name}"
    revision = "" if source.revision is None else f"@{source.revision}"
    return f"{source.dataset}{revision}{name}[{source.split}]"


def iterate_rows(source: Prompts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a prompt source.

    Yields:
        The place and the keys of every row, in the source's order; at least one row.

    Raises:
        InputError: if the file or data set cannot be read or is empty, or a library
            that reads it is not installed.
    """
    if source.file is not None and not source.file.endswith(".parquet"):
        path = Path(source.file)
        for number, row in enumerate(read_rows(path), start=1):
            yield f"{path}:{number}", row
        return
    place = describe_source(source)
    rows = _read_parquet(place) if source.file is not None else _load_dataset(source)
    count = 0
    for row in rows:
        yield f"{place}: row {count}", row
        count += 1
    if not count:
        raise make_problem(place, "at least one row", "none", "correct the source")


def _read_parquet(place: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _make_missing("prompts", "pyarrow", "data") from error
    try:
        with parquet.ParquetFile(place) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise make_problem(
            place,
            "a parquet file",
            reason_of(error),
            "check the path, or copy it again",
        ) from error


def _load_dataset(source: Prompts) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise _make_missing("prompts", "datasets", "data") from error
    assert source.dataset is not None
    try:
        return iter(
            datasets.load_dataset(
                source.dataset,
                source.name,
                split=source.split,
                revision=source.revision,
            )
        )
    except Exception as error:  # any: hub, network, cache and builders each have theirs
        raise_if_out_of_memory(error)
        reason = " ".join(str(error).split())[:300]
        raise make_problem(
            describe_source(source),
            "a data set that `datasets` can load",
            f"{type(error).__name__}: {reason}",
            "correct `dataset`, `name` and `split`; without a network, load it once "
            "where there is one, or give a `file`",
        ) from error


def _make_missing(setting: str, package: str, extra: str) -> InputError:
    return InputError(
        f"{setting}: expected {package} to be installed, found no such package; pip "
        f"install entropy_ddp[{extra}]"
    )


# What sampling writes beside a prompt's own keys.
SAMPLED_KEYS = KNOWN_KEYS.keys() - {"prompt", "prompt_ids"} | {
    "prompt_index",
    "reward_terms",
}
Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the source.

    Attributes:
        where: its place, for messages.
        row: all its keys.
        content: token ids, text, or messages for the chat template.
        carried: what the rollout file gets of the row.
    """

    where: str
    row: dict[str, Any]
    content: list[int] | str | Messages
    carried: dict[str, Any]


def read_prompts(source: Prompts) -> list[Prompt]:
    """Read and check the prompts of a source, in its order.

    Whether the ids are in the checkpoint's vocabulary is checked when they are encoded.

    Raises:
        InputError: if the source cannot be read, or a row has no prompt, or something
            that cannot be written to a rollout file, naming the row's place.
    """
    return [_make_prompt(row, where, source) for where, row in iterate_rows(source)]


def _make_prompt(row: dict[str, Any], where: str, source: Prompts) -> Prompt:
    if source.template is not None:
        content: Any = _fill_template(source.template, row, where)
    else:
        content = _read_content(row, where, source.field)
    if source.chat:
        content = _make_turns(content, where, source.system)
    return Prompt(
        where=where,
        row=row,
        content=content,
        carried=_carried_keys(row, where, source.keep),
    )


def _read_content(
    row: dict[str, Any], where: str, field: str | None
) -> list[int] | str | Messages:
    if field is None:
        _check_known(row, where)
        if row.get("prompt_ids") is not None:
            return row["prompt_ids"]
        if row.get("prompt") is None:
            raise make_problem(
                where,
                "`prompt_ids` or `prompt`",
                "neither",
                "add one of them, or name the key in `prompts.field`",
            )
    key = field or "prompt"
    content = row.get(key)
    if content is None:
        raise _missing_key(key, row, where, "prompts.field")
    if isinstance(content, list):
        _check_messages(content, key, where)
    elif not KNOWN_KEYS["prompt"][0](content):
        raise make_problem(
            where,
            f"`{key}` to be a string of valid Unicode or a list of messages",
            show(content),
            "correct the value",
        )
    return content


def _check_known(row: dict[str, Any], where: str) -> None:
    """The types of `prompt` and `prompt_ids`, where `prompt` is no list of messages."""
    keys = (
        {"prompt_ids"}
        if isinstance(row.get("prompt"), list)
        else {"prompt_ids", "prompt"}
    )
    check_types({key: row[key] for key in keys & row.keys()}, where)


def _missing_key(key: str, row: dict[str, Any], where: str, setting: str) -> InputError:
    return make_problem(
        where,
        f"a value of `{key}`",
        f"none; the row has {', '.join(map(repr, row)) or 'no keys'}",
        f"correct `{setting}`, or leave the row out",
    )


def _is_messages(content: Any) -> bool:
    """Whether it is messages, and not token ids; both were checked."""
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


def _check_messages(messages: list[Any], key: str, where: str) -> None:
    for message in messages:
        texts = (
            [message.get(k) for k in ("role", "content")]
            if isinstance(message, dict)
            else []
        )
        if not texts or not all(isinstance(text, str) for text in texts):
            raise make_problem(
                where,
                f"messages with `role` and `content` in `{key}`",
                show(message),
                "correct the message",
            )
    if not messages or messages[-1]["role"] == "assistant":
        raise make_problem(
            where,
            f"messages that end before the assistant's turn in `{key}`",
            "none" if not messages else "an assistant's message at the end",
            "leave the answer out of the prompt",
        )


def _fill_template(template: str, row: dict[str, Any], where: str) -> str:
    pieces = []
    for text, key, _, _ in Formatter().parse(template):
        pieces.append(text)
        if key is None:
            continue
        value = row.get(key)
        if value is None:
            raise _missing_key(key, row, where, "prompts.template")
        if type(value) not in (str, int, float):
            raise make_problem(
                where,
                f"text or a number in `{key}` for the template",
                show(value),
                "use another key in `prompts.template`",
            )
        pieces.append(str(value))
    filled = "".join(pieces)
    check_types({"prompt": filled}, where)
    return filled


def _make_turns(content: Any, where: str, system: str | None) -> Messages:
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    if not _is_messages(content):
        raise make_problem(
            where,
            "text or messages, as `prompts.chat` is true",
            "`prompt_ids`",
            "leave the ids out, or set chat: false",
        )
    if system is None:
        return content
    if content[0]["role"] == "system":
        raise make_problem(
            where,
            "no system turn, as `prompts.system` gives one",
            show(content[0]["content"]),
            "leave one of them out",
        )
    return [{"role": "system", "content": system}, *content]


def _carried_keys(
    row: dict[str, Any], where: str, keep: list[str] | None
) -> dict[str, Any]:
    kept = row.keys() if keep is None else keep
    for key in kept:
        if key not in row:
            raise _missing_key(key, row, where, "prompts.keep")
    taken = sorted(SAMPLED_KEYS & set(kept))
    if taken:
        raise make_problem(
            where,
            "no key that sampling itself writes",
            f"`{taken[0]}`",
            "rename or delete the key, or leave it out of `prompts.keep`",
        )
    carried = {key: row[key] for key in kept if key not in KNOWN_KEYS}
    for key, value in carried.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise make_problem(
                where,
                f"a value of `{key}` that JSON can hold",
                show(value),
                "list the keys to be carried to the rollout file in `prompts.keep`",
            ) from error
    return carried


def encode_prompt(
    prompt: Prompt,
    source: Prompts,
    limits: TokenLimits,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[int]:
    """Token ids of a prompt, at least one.

    Raises:
        InputError: if the prompt is empty, an id is not in the vocabulary, or the
            tokenizer has no chat template that takes the messages.
    """
    content = prompt.content
    if _is_messages(content):
        content = render_messages(
            content,
            prompt.where,
            tokenizer,
            source.chat_template_kwargs,
            without_template="give the prompt as text, or add the template to the "
            "tokenizer's files",
            if_refused="correct the messages or `prompts.chat_template_kwargs`",
        )
    key = "prompt" if isinstance(content, str) else "prompt_ids"
    return read_prompt_ids({key: content}, prompt.where, limits, tokenizer)


def render_messages(
    messages: Any,
    where: str,
    tokenizer: "PreTrainedTokenizerBase",
    options: dict[str, Any],
    *,
    without_template: str,
    if_refused: str,
) -> list[int]:
    """Token ids of messages under the tokenizer's chat template, ready for an answer.

    Args:
        options: further arguments of the template.
        without_template: what to do if the tokenizer has none.
        if_refused: what to do if the template refuses the messages.

    Raises:
        InputError: the tokenizer has no template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise make_problem(
            where,
            "a tokenizer with a chat template, as the prompt consists of messages",
            "none",
            without_template,
        )
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **options,
        )
    except Exception as error:  # any: the template is a program of its own
        raise_if_out_of_memory(error)
        raise make_problem(
            where,
            "messages that the chat template takes",
            f"{type(error).__name__}: {error}",
            if_refused,
        ) from error
    return list(encoded["input_ids"])


def draw_prompts(
    num_prompts_available: int, num_prompts: int, with_replacement: bool, seed: int
) -> list[int]:
    """0-based rows of prompts drawn uniformly at random, in order of drawing.

    Raises:
        InputError: if more prompts are to be drawn without replacement than there are.
    """
    generator = torch.Generator().manual_seed(seed)
    if with_replacement:
        drawn = torch.randint(
            num_prompts_available, (num_prompts,), generator=generator
        )
        return drawn.tolist()
    if num_prompts > num_prompts_available:
        raise InputError(
            f"num_prompts: expected at most {num_prompts_available}, the number of "
            f"prompts in the source, found {num_prompts}; draw fewer or set "
            "with_replacement: true"
        )
    return torch.randperm(num_prompts_available, generator=generator)[
        :num_prompts
    ].tolist()
