"""TRL's logged completions (`log_completions=True`), one parquet file a step.

`completions/completions_{step:05d}.parquet` has the columns step, prompt, completion,
one for each reward function, further columns that the user logged, and advantage. Texts
are without special tokens, so the end-of-sequence token is missing. The file of step
N + 1 is the batch of the step that is taken from checkpoint-N.

A group is a run of `num_generations` rows: processes are gathered in their order, and
the advantages are computed by the same runs. So a prompt that was drawn twice is two
groups. Where `num_generations` is not known, the rows of a prompt are one group, if that
is the only way to read them.

The total reward is the weighted sum of the reward columns, NaN counting as no reward.
It is held against the advantages, which are a positive multiple of r - mean(r) within
each group.

The completions file has text only. Special tokens that the policy sampled inside of a
response are missing from it, and a truncated response that lost some of its tokens looks
finished. TRL's log, which checkpoints keep in trainer_state.json, has the mean length in
tokens and the share of truncated responses of the step: both are reproduced exactly when
every response was restored.
"""

import json
import math
from collections.abc import Hashable, Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

from entropy_ddp.data.jsonlines import make_problem, show
from entropy_ddp.errors import InputError
from entropy_ddp.files import reason_of
from entropy_ddp.importers.records import (
    Message,
    Record,
    Source,
    read_messages,
    require,
    require_number,
)

Prompt = str | list[Message]
FIXED_COLUMNS = ("step", "prompt", "completion", "advantage")
ADVICE = "is it a file of TRL's log_completions?"
# Of the largest in the group; the file's advantages were computed in float32.
REWARD_TOLERANCE = 1e-3


def read_trl(path: Path, source: Source) -> list[Record]:
    """The sequences of one completions file.

    Raises:
        InputError: the file cannot be read, a column is missing, or a row is not what
            TRL writes.
    """
    rows = _read_parquet(path)
    wheres = [f"{path}: row {number}" for number in range(1, len(rows) + 1)]
    weights = _reward_weights(rows, path, source)
    prompts = [_read_prompt(row, where) for row, where in zip(rows, wheres)]
    groups = _groups(prompts, path, source.num_generations)
    records = [
        _make_record(row, where, weights, prompt, (str(path), group))
        for row, where, prompt, group in zip(rows, wheres, prompts, groups)
    ]
    if not source.rewards:
        _check_rewards(records, weights, source.num_generations is not None)
    return records


def _read_prompt(row: dict[str, Any], where: str) -> Prompt:
    prompt = require(row, "prompt", where, ADVICE)
    return prompt if isinstance(prompt, str) else read_messages(prompt, "prompt", where)


def _groups(prompts: list[Prompt], path: Path, size: int | None) -> list[int]:
    """The number of each row's group: runs of rows that are one draw of a prompt."""
    if size is None:
        _require_one_reading(prompts, path)
        same = [first == second for first, second in pairwise(prompts)]
        return list(accumulate((not is_same for is_same in same), initial=0))
    for start in range(0, len(prompts), size):
        run = prompts[start : start + size]
        if len(run) < size or any(prompt != run[0] for prompt in run):
            different = len({repr(prompt) for prompt in run})
            raise make_problem(
                str(path),
                f"runs of {size} rows with one prompt each (num_generations, by "
                "--num-generations or the checkpoint's training_args.bin)",
                f"{different} prompts in {_rows_of(start, len(run))}",
                "give the trainer's --num-generations; a file that rows were taken from "
                "or that an evaluation wrote to cannot be told into groups: import "
                "another step's",
            )
    return [place // size for place in range(len(prompts))]


def _require_one_reading(prompts: list[Prompt], path: Path) -> None:
    """Every prompt stands in one run of rows, and all runs are of one length."""
    lengths = [len(list(run)) for _, run in groupby(prompts, key=repr)]
    different = len(set(map(repr, prompts)))
    if different < len(lengths) or len(set(lengths)) > 1:
        raise make_problem(
            str(path),
            "one run of rows for every prompt, all of one length, or to know how many "
            "responses a draw of a prompt has (num_generations)",
            f"{different} prompts in {len(lengths)} runs of {min(lengths)} to "
            f"{max(lengths)} rows",
            "give --num-generations N, or import with a checkpoint that has the "
            "trainer's training_args.bin",
        )


def _rows_of(start: int, length: int) -> str:
    """`row 3`, `rows 1 to 4`; `start` counts from 0."""
    if length == 1:
        return f"row {start + 1}"
    return f"rows {start + 1} to {start + length}"


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            "import: expected pyarrow to be installed, as the file is parquet, found "
            "no such package; pip install entropy_ddp[import]"
        ) from error
    try:
        table = parquet.read_table(path)
        # Names and texts of a damaged file are found not to be UTF-8 only here.
        names, rows = table.column_names, table.to_pylist()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise make_problem(
            str(path),
            "a parquet file",
            reason_of(error),
            "check the path, or copy it again",
        ) from error
    missing = [name for name in FIXED_COLUMNS if name not in names]
    if missing or not rows:
        found = f"{len(rows)} rows of {', '.join(names)}"
        expected = f"rows with the column `{(missing or FIXED_COLUMNS)[0]}`"
        raise make_problem(str(path), expected, found, ADVICE)
    return rows


def _reward_weights(
    rows: list[dict[str, Any]], path: Path, source: Source
) -> dict[str, float]:
    """The columns that are rewards, and what each counts."""
    numeric = [
        name
        for name in rows[0]
        if name not in FIXED_COLUMNS
        and all(_is_number(row[name]) or row[name] is None for row in rows)
        and any(_is_number(row[name]) for row in rows)
    ]
    names = list(source.rewards) or numeric
    unknown = [name for name in names if name not in numeric]
    if unknown or not names:
        raise make_problem(
            str(path),
            f"a column of numbers `{unknown[0]}`" if unknown else "a reward column",
            ", ".join(rows[0]),
            "name the reward functions' columns by --reward",
        )
    weights = source.reward_weights
    if weights is None or len(weights) != len(names):
        return dict.fromkeys(names, 1.0)
    return dict(zip(names, weights))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _make_record(
    row: dict[str, Any],
    where: str,
    weights: dict[str, float],
    prompt: Prompt,
    group: Hashable,
) -> Record:
    step = int(require_number(row, "step", where, ADVICE))
    rewards = [
        weight * row[name]
        for name, weight in weights.items()
        if row[name] is not None and math.isfinite(row[name])
    ]
    extra = {k: v for k, v in row.items() if k not in (*FIXED_COLUMNS, *weights)}
    if len(weights) > 1:
        extra |= {name: row[name] for name in weights}
    return Record(
        where=where,
        group=group,
        prompt=prompt,
        prompt_encoded_by_default=True,
        response=_completion_text(row, where),
        reward=math.fsum(rewards) if rewards else None,
        advantage=require_number(row, "advantage", where, ADVICE),
        step=step,
        extra=extra | {"step": step},
    )


def _completion_text(row: dict[str, Any], where: str) -> str:
    completion = require(row, "completion", where, ADVICE)
    if isinstance(completion, str):
        return completion
    messages = read_messages(completion, "completion", where)
    if len(messages) != 1:
        raise make_problem(
            where,
            "one message in `completion`",
            f"{len(messages)}, the first {show(messages[0])}",
            "a completion with tool calls cannot be told from its text: export ids",
        )
    return messages[0]["content"]


def _check_rewards(
    records: list[Record], weights: dict[str, float], size_is_known: bool
) -> None:
    """Hold the total reward against the advantages, group by group."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    for group in groups.values():
        scored = [r for r in group if r.reward is not None]
        rewards = _direction([r.reward or 0.0 for r in scored], centre=True)
        advantages = _direction([r.advantage or 0.0 for r in scored], centre=False)
        gap = max((abs(r - a) for r, a in zip(rewards, advantages)), default=0.0)
        if gap > REWARD_TOLERANCE:
            raise make_problem(
                scored[0].where,
                f"advantages that follow from the sum of {', '.join(weights)}, times "
                f"{list(weights.values())}",
                f"others, for example {scored[0].advantage} in its group",
                "name the reward functions' columns by --reward"
                + ("" if size_is_known else ", or give --num-generations N"),
            )


def _direction(values: list[float], *, centre: bool) -> list[float]:
    """The values over the largest of them; zeros if that is a rounding error."""
    mean = math.fsum(values) / len(values) if centre and values else 0.0
    centred = [value - mean for value in values]
    largest = max(map(abs, centred), default=0.0)
    scale = max(map(abs, values), default=0.0)
    if largest <= 1e-6 * scale:
        return [0.0] * len(values)
    return [value / largest for value in centred]


# The log's numbers are float32.
LOG_TOLERANCE = 1e-5


def log_notes(
    files: Sequence[Path], rows: list[dict[str, Any]], steps: list[int | None]
) -> dict[int, str]:
    """By step, a sentence where the log says another thing than its rows.

    Steps that no log beside the files mentions are left out.

    Args:
        files: the completions files; their trainer's output folder is two levels up.

    Raises:
        InputError: a trainer_state.json cannot be read.
    """
    logged: dict[int, dict[str, Any]] = {}
    for folder in {path.resolve().parent.parent for path in files}:
        logged |= _read_log(folder)
    notes = {}
    for step in sorted({step for step in steps if step is not None and step in logged}):
        own = [row for row, its in zip(rows, steps) if its == step]
        length = sum(len(row["response_ids"]) for row in own) / len(own)
        truncated = sum(not row["finished"] for row in own) / len(own)
        entry = logged[step]
        expected = entry["completions/mean_length"], entry["completions/clipped_ratio"]
        if not all(map(_agree, expected, (length, truncated))):
            notes[step] = (
                f"TRL logged a mean length of {expected[0]:.6g} tokens and a truncated "
                f"share of {expected[1]:.6g} for step {step}, the rows have "
                f"{length:.6g} and {truncated:.6g}: some responses are not what was "
                "sampled (special tokens inside of them are not in the file, or the "
                "maximum completion length is another)"
            )
    return notes


def _agree(expected: float, found: float) -> bool:
    return math.isclose(expected, found, rel_tol=LOG_TOLERANCE, abs_tol=LOG_TOLERANCE)


def _read_log(folder: Path) -> dict[int, dict[str, Any]]:
    """Log entries about completions by step, from all checkpoints of a run."""
    entries: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("checkpoint-*/trainer_state.json")):
        try:
            history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            for entry in history:
                if {"completions/mean_length", "completions/clipped_ratio"} <= set(
                    entry
                ):
                    entries[int(entry["step"])] = entry
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: expected the Trainer's log, found a file that cannot be read "
                f"as such ({type(error).__name__}: {error}); copy it again"
            ) from error
    return entries
