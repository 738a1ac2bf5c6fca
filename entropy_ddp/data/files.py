"""How a batch is read from a rollout file.

A rollout file holds one JSON object a line, `.jsonl` or `.jsonl.gz`; one line is one
sequence (see `rows` for what a row may hold). Every rank parses its share of the lines,
so that none parses the whole file. What concerns more than one row is checked here:

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
from torch import Tensor

from entropy_ddp.data.batch import Batch, Sequence
from entropy_ddp.data.draws import check_draws
from entropy_ddp.data.jsonlines import (
    FileShare,
    Lines,
    make_problem,
    no_rows,
    parse_line,
    show,
)
from entropy_ddp.data.rows import TokenLimits, make_sequence
from entropy_ddp.data.shared_rows import Facts, SharedRows
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_batch(
    path: Path,
    split: str,
    limits: TokenLimits,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    world: World | None = None,
) -> Batch:
    """Read and check a rollout file, every rank its share of the lines.

    The ranks tell each other what concerns more than one row; then the tokens of E's
    rows go to the rank that holds them, those of U's rows to all.

    Args:
        tokenizer: the checkpoint's tokenizer, for rows without token ids; None allows
            rows with ids only.
        world: the ranks, all of which must call it; None for this process alone.

    Returns:
        The batch in file order; groups are numbered by first appearance.

    Raises:
        InputError: if anything is wrong with the file, naming `path:line`; of several
            mistakes the first in the file, the same on every rank.
    """
    world = world or World()
    share = _share(path, world)
    lines, problem = Lines(path, share), None
    mine: list[Sequence] = []
    try:
        for index, line in lines:
            where = f"{path}:{index + 1}"
            row = parse_line(line, where)
            mine.append(make_sequence(row, index, where, limits, tokenizer))
    except InputError as error:
        problem = (lines.index, str(error))
    found = world.gather_objects((Facts.of(mine), problem))
    facts = Facts.joined([facts for facts, _ in found])
    problems = [problem for _, problem in found if problem is not None]
    rows = _checked_groups(facts, str(path), min(problems, default=None))
    if not len(rows):
        raise no_rows(path)
    batch = Batch(split=split, sequences=rows)
    check_draws(batch, str(path))
    reader = torch.repeat_interleave(
        torch.arange(world.world_size),
        torch.tensor([len(facts.index) for facts, _ in found]),
    )
    read = torch.cat([facts.index for facts, _ in found]).argsort()
    _give_tokens(batch, rows, mine, reader[read], world)
    return batch


def _share(path: Path, world: World) -> FileShare:
    """This rank's share of a file, with the number of the lines before it."""
    rank, count = world.rank, world.world_size
    shares = world.from_all_ranks(lambda: FileShare.of(path, rank, count))
    sizes = [share.size for share in shares]
    if len(set(sizes)) > 1:
        raise make_problem(
            str(path),
            "the same file on every rank",
            f"{min(sizes)} bytes on rank {sizes.index(min(sizes))} and {max(sizes)} on "
            f"rank {sizes.index(max(sizes))}",
            "copy it again, or wait until it is written",
        )
    before = sum(share.num_lines for share in shares[:rank])
    return replace(shares[rank], first=before)


def _checked_groups(
    facts: Facts, source: str, problem: tuple[int, str] | None
) -> SharedRows:
    """The rows with their groups numbered by first appearance; no tokens yet.

    Args:
        problem: line and text of the first row that is wrong in itself.

    Raises:
        InputError: that one, or what is wrong between rows before it.
    """
    group_of_key: dict[int | str, int] = {}
    key_of_name: dict[str, int | str] = {}
    first_of_group: list[tuple[int, bytes, bool]] = []
    groups: list[int] = []
    rows = zip(
        facts.index.tolist(),
        facts.group_key,
        facts.column("prompt_digest"),
        facts.advantage.isnan().tolist(),
    )
    for index, key, prompt, is_without in rows:
        if problem is not None and index > problem[0]:
            break
        where = f"{source}:{index + 1}"
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
            first_of_group.append((index, prompt, is_without))
        first, same_prompt, first_without = first_of_group[group]
        if prompt != same_prompt:
            raise make_problem(
                where,
                f"the prompt of group {show(key)}, as in line {first + 1}",
                "another prompt",
                "give every prompt draw a group of its own",
            )
        if is_without != first_without:
            raise make_problem(
                where,
                f"`advantage` for all responses of group {show(key)} or none",
                f"{'none' if is_without else 'one'} here, unlike in line {first + 1}",
                "give it for all, or leave it out and give `reward`",
            )
        groups.append(group)
    if problem is not None:
        raise InputError(problem[1])
    numbers = torch.tensor(groups, dtype=torch.int64)
    return SharedRows(facts=facts, groups=numbers, held={})


def _give_tokens(
    batch: Batch, rows: SharedRows, mine: list[Sequence], reader: Tensor, world: World
) -> None:
    """Bring every row's tokens to the rank that holds it.

    Args:
        rows: the batch's, whose `held` is filled.
        mine: the sequences that this rank has read; emptied.
        reader: the rank that has read each row, [N].
    """
    count, rank = world.world_size, world.rank
    everywhere = batch.split != "E"
    owner = batch.owners(count)[batch.groups]
    # Places among this rank's for each rank, and in the batch from each rank.
    own = owner[reader == rank]
    to = [
        list(range(len(mine))) if everywhere else (own == r).nonzero()[:, 0].tolist()
        for r in range(count)
    ]
    places = torch.arange(len(owner)) if everywhere else (owner == rank).nonzero()[:, 0]
    places = places[reader[places].argsort(stable=True)]

    def exchanged(pieces: list[Tensor], lengths: Tensor, empty: Tensor) -> list[Tensor]:
        if count == 1:
            return pieces
        sent = torch.cat([empty, *(pieces[i] for here in to for i in here)])
        sent_sizes = [sum(len(pieces[i]) for i in here) for here in to]
        sizes = lengths.new_zeros(count).index_add_(0, reader[places], lengths)
        pieces.clear()
        received = world.exchange(sent, sent_sizes, sizes.tolist())
        return list(received.split(lengths.tolist()))

    ids = torch.empty(0, dtype=torch.int64)
    prompts = [s.prompt_ids for s in mine]
    responses = [s.response_ids for s in mine]
    nothing = torch.empty(0, dtype=torch.float64)
    logprobs = [nothing if (x := s.sampling_logprobs) is None else x for s in mine]
    # Nothing is kept twice for longer than it is on its way.
    mine.clear()
    lengths = batch.lengths[places]
    received = exchanged(prompts, batch.prompt_lengths[places], ids)
    # The responses of a group share one copy of its prompt.
    shared: dict[int, Tensor] = {}
    groups = batch.groups[places].tolist()
    for group, prompt in zip(groups, received):
        if group not in shared:
            # Not a view of all that were received.
            shared[group] = prompt.clone()
    del received, prompts
    own_responses = exchanged(responses, lengths, ids)
    has_logprobs = rows.facts.has_logprobs
    own_logprobs: list[Tensor] = [nothing] * len(places)
    if bool(has_logprobs.any()):
        recorded = torch.where(has_logprobs[places], lengths, 0)
        own_logprobs = exchanged(logprobs, recorded, nothing)
    found = zip(
        rows.facts.index[places].tolist(),
        groups,
        own_responses,
        own_logprobs,
        has_logprobs[places].tolist(),
    )
    for line, group, response, values, is_recorded in found:
        rows.held[line] = (shared[group], response, values if is_recorded else None)


def make_batch(
    rows: Iterable[dict[str, Any]],
    source: str,
    split: str,
    limits: TokenLimits,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Batch:
    """A batch of rows that every rank has, whole; errors as of `read_batch`.

    Args:
        source: name of the file that the rows stand for.
    """
    sequences: list[Sequence] = []
    problem = None
    for index, row in enumerate(rows):
        try:
            where = f"{source}:{index + 1}"
            sequences.append(make_sequence(row, index, where, limits, tokenizer))
        except InputError as error:
            problem = (index, str(error))
            break
    facts = _checked_groups(Facts.of(sequences), source, problem)
    first: dict[int, Tensor] = {}
    # The responses of a group share one copy of its prompt.
    whole = tuple(
        replace(s, group=g, prompt_ids=first.setdefault(g, s.prompt_ids))
        for s, g in zip(sequences, facts.groups.tolist())
    )
    batch = Batch(split=split, sequences=whole)
    check_draws(batch, source)
    return batch


def require_rewards(batch: Batch, path: Path) -> None:
    """Check that every sequence has a reward or an advantage, as U needs.

    Raises:
        InputError: if one has neither, naming the first such line.
    """
    columns = (batch.column(name) for name in ("index", "reward", "advantage"))
    for index, reward, advantage in zip(*columns):
        if reward is None and advantage is None:
            raise make_problem(
                f"{path}:{index + 1}",
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
