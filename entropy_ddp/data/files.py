"""How a batch is read from a rollout file.

A rollout file holds one JSON object a line, `.jsonl` or `.jsonl.gz`; one line is one
sequence (see `rows` for what a row may hold). What concerns more than one row is checked
here:

- Rows of equal `group` may stand anywhere in the file, and must have equal prompts.
- `1` and `"1"` in one file are an error: which group was meant cannot be known.
- `advantage` is given for all responses of a group or for none.
- What rows say of how the prompts were drawn is one thing, and possible (`draws`).
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from entropy_ddp.data.batch import Batch, Sequence
from entropy_ddp.data.draws import check_draws
from entropy_ddp.data.jsonlines import make_problem, read_rows, show
from entropy_ddp.data.rows import TokenLimits, make_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_batch(
    path: Path,
    split: str,
    limits: TokenLimits,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Batch:
    """Read and check a rollout file.

    Args:
        tokenizer: the checkpoint's tokenizer, for rows without token ids; None allows
            rows with ids only.

    Returns:
        The batch in file order; groups are numbered by first appearance.

    Raises:
        InputError: if anything is wrong with the file, naming `path:line`.
    """
    return make_batch(read_rows(path), str(path), split, limits, tokenizer)


def make_batch(
    rows: Iterable[dict[str, Any]],
    source: str,
    split: str,
    limits: TokenLimits,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Batch:
    """The same of the rows of a file of this name; errors as of `read_batch`."""
    group_of_key: dict[int | str, int] = {}
    key_of_name: dict[str, int | str] = {}
    first_of_group: list[Sequence] = []
    sequences: list[Sequence] = []
    for index, row in enumerate(rows):
        where = f"{source}:{index + 1}"
        sequence = make_sequence(row, index, where, limits, tokenizer)
        key = sequence.group_key
        same_name = key_of_name.setdefault(str(key), key)
        if type(same_name) is not type(key):
            raise make_problem(
                where,
                "group keys that differ in more than their type",
                f"{show(key)} after {show(same_name)}",
                "write all group keys as strings, or all as integers",
            )
        group = group_of_key.setdefault(key, len(group_of_key))
        if group == len(first_of_group):
            first_of_group.append(sequence)
        first = first_of_group[group]
        _check_same_group(sequence, first, where)
        # The responses of a group share one copy of its prompt.
        sequences.append(replace(sequence, group=group, prompt_ids=first.prompt_ids))
    batch = Batch(split=split, sequences=tuple(sequences))
    check_draws(batch, source)
    return batch


def _check_same_group(sequence: Sequence, first: Sequence, where: str) -> None:
    if not torch.equal(sequence.prompt_ids, first.prompt_ids):
        raise make_problem(
            where,
            f"the prompt of group {show(first.group_key)}, as in line "
            f"{first.index + 1}",
            "another prompt",
            "give every prompt draw a group of its own",
        )
    if (sequence.advantage is None) != (first.advantage is None):
        raise make_problem(
            where,
            f"`advantage` for all responses of group {show(first.group_key)} or none",
            f"{'none' if sequence.advantage is None else 'one'} here, unlike in line "
            f"{first.index + 1}",
            "give it for all, or leave it out and give `reward`",
        )


def require_rewards(batch: Batch, path: Path) -> None:
    """Check that every sequence has a reward or an advantage, as U needs.

    Raises:
        InputError: if one has neither, naming the first such line.
    """
    for sequence in batch.sequences:
        if sequence.reward is None and sequence.advantage is None:
            raise make_problem(
                f"{path}:{sequence.index + 1}",
                f"`reward` or `advantage`, which batch {batch.split} needs",
                "neither",
                "score the response and add its `reward`",
            )


def decode_prompt(prompt_ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Text of a prompt as the model reads it: special tokens shown."""
    return _decode(prompt_ids, tokenizer, skip_special_tokens=False)


def decode_response(
    response_ids: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """Text of a response as reward functions see it: without special tokens."""
    return _decode(response_ids, tokenizer, skip_special_tokens=True)


def _decode(
    ids: list[int], tokenizer: "PreTrainedTokenizerBase", skip_special_tokens: bool
) -> str:
    text = tokenizer.decode(
        ids,
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )
    assert isinstance(text, str)  # a list for a batch of sequences only
    return text


def sequence_to_row(
    sequence: Sequence, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> dict[str, Any]:
    """The row of a rollout file that reads back as this sequence.

    Keys whose value is not known are absent.

    Args:
        sequence: the sequence; an advantage it has is written, so pass the batch as
            read to keep computed advantages out of the file.
        tokenizer: the checkpoint's tokenizer for the `prompt` and `response` texts;
            None leaves them out.
    """
    prompt_ids = sequence.prompt_ids.tolist()
    response_ids = sequence.response_ids.tolist()
    logprobs = sequence.sampling_logprobs
    row: dict[str, Any] = {
        "group": sequence.group_key,
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
    }
    if tokenizer is not None:
        row["prompt"] = decode_prompt(prompt_ids, tokenizer)
        row["response"] = decode_response(response_ids, tokenizer)
    known = {
        "reward": sequence.reward,
        "advantage": sequence.advantage,
        "sampling_logprobs": None if logprobs is None else logprobs.tolist(),
        "finished": sequence.finished,
        "ids_from_text": (
            None if sequence.ids_from_text is None else list(sequence.ids_from_text)
        ),
        "num_prompts_total": sequence.num_prompts_total,
        "with_replacement": sequence.with_replacement,
    }
    row.update({key: value for key, value in known.items() if value is not None})
    return row | sequence.extra
