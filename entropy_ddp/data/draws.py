"""How the prompts of a batch were drawn, and which of its draws are one unit.

Every row of a batch may say `num_prompts_total`, the size of the set that the prompts
were drawn from, uniformly at random, and `with_replacement`. Drawn without replacement,
a prompt comes once, or in balanced passes: every prompt of the set equally often.

A unit is what an error is estimated between: a group, or in balanced passes all groups
of one prompt. The set takes part in the error where it is known (`known_set_size`).

Shape legend: N sequences, n units.
"""

from collections import Counter

import torch
from torch import Tensor

from entropy_ddp.data.batch import Batch, Sequence
from entropy_ddp.data.jsonlines import make_problem
from entropy_ddp.errors import InputError

# A smaller unit has no spread of its own.
RESPONSES_OF_A_UNIT = 2


def check_draws(batch: Batch, source: str) -> None:
    """Check that all rows say the same of the draws, and something possible.

    Args:
        source: name of the batch's file, for the message.

    Raises:
        InputError: a row has one of the two keys only, or other values than the first;
            the set is smaller than the number of distinct prompts; or without
            replacement a prompt comes twice, and not every prompt of the set equally
            often.
    """
    _check_rows(batch, source)
    if batch.num_prompts_total is None:
        return
    prompts = batch.prompts.tolist()
    draws_of = Counter(prompts)
    if batch.num_prompts_total < len(draws_of):
        raise make_problem(
            source,
            f"`num_prompts_total` of at least {len(draws_of)}, the number of distinct "
            "prompts here",
            str(batch.num_prompts_total),
            "write the size of the set that the prompts were drawn from",
        )
    often = max(draws_of.values())
    is_balanced = (
        len(draws_of) == batch.num_prompts_total and min(draws_of.values()) == often
    )
    if often > 1 and not batch.with_replacement and not is_balanced:
        twice = next(
            p for p, number in enumerate(prompts) if p != prompts.index(number)
        )
        lines = zip(batch.column("index"), batch.column("group"))
        line = next(index for index, group in lines if group == twice) + 1
        raise make_problem(
            f"{source}:{line}",
            "a prompt that no other group has, as `with_replacement` is false (or "
            f"every one of the {batch.num_prompts_total} prompts in equally many groups)",
            f"the prompt of group {batch.sequences[line - 1].group_key!r}, which comes "
            f"{draws_of[prompts[twice]]} times",
            "write with_replacement: true, or leave `num_prompts_total` and "
            "`with_replacement` out",
        )


def _check_rows(batch: Batch, source: str) -> None:
    said = list(zip(*map(batch.column, ("num_prompts_total", "with_replacement"))))
    for place, (total, again) in enumerate(said):
        if (total is None) != (again is None) or (total, again) != said[0]:
            sequence = batch.sequences[place]
            where = f"{source}:{sequence.index + 1}"
            raise _other_draws(sequence, batch.sequences[0], where)


def _other_draws(sequence: Sequence, first: Sequence, where: str) -> InputError:
    total, again = sequence.num_prompts_total, sequence.with_replacement
    if (total is None) != (again is None):
        given = "with_replacement" if total is None else "num_prompts_total"
        return make_problem(
            where,
            "`num_prompts_total` and `with_replacement`, or neither",
            f"only `{given}`",
            "say both: the size of the set, and whether a prompt could be drawn twice",
        )
    return make_problem(
        where,
        f"the draws of line {first.index + 1}, {_described(first)}",
        _described(sequence),
        "give all rows of a batch the same values",
    )


def _described(sequence: Sequence) -> str:
    if sequence.num_prompts_total is None:
        return "no `num_prompts_total`"
    word = "true" if sequence.with_replacement else "false"
    total = sequence.num_prompts_total
    return f"`num_prompts_total` {total} and `with_replacement` {word}"


def units(batch: Batch) -> Tensor:
    """Number of the unit of each sequence, int64, [N].

    Groups where nothing is said of the draws, or they were made with replacement: two
    draws of a prompt are independent then.
    """
    if batch.num_prompts_total is None or batch.with_replacement:
        return batch.groups
    return batch.prompts[batch.groups]


def known_set_size(batch: Batch) -> int | None:
    """Number of prompts of the set that the units are a part of, drawn without return.

    Returns:
        The size; None where it is not known or the draws were made with replacement,
        and where a unit has a single response: then the spread within units, which is
        all the error there is of prompts that are in E, cannot be told from the spread
        between them.
    """
    if batch.num_prompts_total is None or batch.with_replacement:
        return None
    sizes = torch.bincount(units(batch))
    is_enough = len(sizes) > 0 and int(sizes.min()) >= RESPONSES_OF_A_UNIT
    return batch.num_prompts_total if is_enough else None


def responses_per_prompt(batch: Batch) -> int | None:
    """Responses of each unit where all have equally many; else None."""
    sizes = torch.bincount(units(batch)).unique()
    return int(sizes) if len(sizes) == 1 else None
