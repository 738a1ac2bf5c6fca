"""Dumps of JSON lines, a file a step: verl's, prime-rl's and NeMo-RL's.

verl: `{step}.jsonl` has input, output, gts, score, step, whatever the reward function added,
and in newer versions uid. Both texts are decoded without special tokens. There are no
advantages. Rows of one prompt stand anywhere: they are found by uid, or by the prompt.

prime-rl: `token_exports/step_N/rank_R.jsonl`, one sequence a line, with token_ids,
loss_mask, advantages, rewards and inference_logprobs, each [length].

NeMo-RL: `train_data_step{N}.jsonl`, one sequence a line, with token_ids,
token_loss_mask, advantages, generation_logprobs, each padded on the right to
input_lengths or more, and rewards and sample_loss_mask of the sequence. Every value may
be wrapped in a list of one. Sequences whose sample_loss_mask is 0 are not in the loss
and are left out.

In the last two, position k of every list belongs to token k. The prompt is what stands before
the first token in the loss, the response is what is in the loss, and tokens after it
(the environment's answer, padding) touch nothing and are dropped. A response in several
pieces is an error: tokens that the policy did not sample would be taken for its own.
Neither of them names the prompt draws: a group is the sequences of equal prompt tokens of
one step. NeMo-RL's own baselines are of these groups too.
"""

from pathlib import Path
from typing import Any

from entropy_ddp.data.jsonlines import make_problem, read_rows, show
from entropy_ddp.data.rows import is_number
from entropy_ddp.importers.records import (
    Record,
    Source,
    require,
    require_number,
    require_text,
    step_in_name,
)

VERL_ADVICE = "is it a file of verl's trainer.rollout_data_dir?"
VERL_KEYS = ("input", "output", "score")


def read_verl(path: Path, source: Source) -> list[Record]:
    """The sequences of one dump.

    Raises:
        InputError: the file cannot be read, or a key is missing or of another type.
    """
    rows = list(read_rows(path))
    with_uid = sum(row.get("uid") is not None for row in rows)
    if 0 < with_uid < len(rows):
        number = next(i for i, row in enumerate(rows, 1) if row.get("uid") is None)
        raise make_problem(
            f"{path}:{number}", "`uid` in all rows or in none", "none here", VERL_ADVICE
        )
    return [_verl_record(row, path, n) for n, row in enumerate(rows, start=1)]


def _verl_record(row: dict[str, Any], path: Path, number: int) -> Record:
    where = f"{path}:{number}"
    prompt = require_text(row, "input", where, VERL_ADVICE)
    # Absent from old versions, which name the file by it too.
    step = step_in_name(path, r"^(\d+)\.jsonl")
    if "step" in row:
        step = int(require_number(row, "step", where, VERL_ADVICE))
    by_uid = row.get("uid") is not None
    key = require(row, "uid", where, VERL_ADVICE) if by_uid else prompt
    return Record(
        where=where,
        group=(step, "uid" if by_uid else "prompt", str(key)),
        grouped_by_prompt=not by_uid,
        prompt=prompt,
        prompt_lacks_special_tokens=True,
        response=require_text(row, "output", where, VERL_ADVICE),
        reward=require_number(row, "score", where, VERL_ADVICE),
        step=step,
        extra={k: v for k, v in row.items() if k not in VERL_KEYS},
    )


PRIME_ADVICE = "is it a file of prime-rl's token export (enable_token_export)?"
NEMO_ADVICE = (
    "is it a train_data_step file of NeMo-RL? older versions wrote no token ids"
)


def read_prime_rl(path: Path, source: Source) -> list[Record]:
    """The sequences of one rank's export.

    Raises:
        InputError: the file cannot be read, or a key is missing or not what it should
            be.
    """
    return [
        _prime_record(row, f"{path}:{number}")
        for number, row in enumerate(read_rows(path), start=1)
    ]


def _prime_record(row: dict[str, Any], where: str) -> Record:
    ids = _token_ids(row, where, PRIME_ADVICE)
    columns = _Columns(row, where, len(ids), PRIME_ADVICE)
    begin, end = columns.response("loss_mask")
    kept = ("run_id", "env_name", "step", "export_step")
    return Record(
        where=where,
        group=(
            repr(row.get("run_id")),
            repr(row.get("export_step")),
            tuple(ids[:begin]),
        ),
        grouped_by_prompt=True,
        prompt_ids=ids[:begin],
        response_ids=ids[begin:end],
        reward=columns.constant("rewards", begin, end),
        advantage=columns.constant("advantages", begin, end),
        sampling_logprobs=columns.numbers("inference_logprobs", begin, end),
        num_dropped=len(ids) - end,
        extra={key: value for key, value in row.items() if key in kept},
    )


def read_nemo_rl(path: Path, source: Source) -> list[Record]:
    """The sequences of one step's train data that are in the loss.

    Raises:
        InputError: the file cannot be read, or a key is missing or not what it should
            be.
    """
    records = []
    step = step_in_name(path, r"step(\d+)\.jsonl")
    for number, row in enumerate(read_rows(path), start=1):
        where = f"{path}:{number}"
        unwrapped = {key: _unwrapped(value) for key, value in row.items()}
        mask = require(unwrapped, "sample_loss_mask", where, NEMO_ADVICE)
        if mask not in (0, 1):
            raise make_problem(
                where, "`sample_loss_mask` 0 or 1", show(mask), NEMO_ADVICE
            )
        if mask:
            records.append(_nemo_record(unwrapped, where, step))
    return records


def _nemo_record(row: dict[str, Any], where: str, step: int | None) -> Record:
    ids = _token_ids(row, where, NEMO_ADVICE)
    columns = _Columns(row, where, len(ids), NEMO_ADVICE)
    begin, end = columns.response("token_loss_mask")
    length = require(row, "input_lengths", where, NEMO_ADVICE)
    if not _is_integer(length) or not end <= length <= len(ids):
        raise make_problem(
            where,
            f"`input_lengths` from {end} to {len(ids)}",
            show(length),
            NEMO_ADVICE,
        )
    # With dynamic sampling `rewards` are those before the filter.
    key = "filtered_rewards" if "filtered_rewards" in row else "rewards"
    reward = require(row, key, where, NEMO_ADVICE)
    if not is_number(reward):
        raise make_problem(where, f"a number in `{key}`", show(reward), NEMO_ADVICE)
    return Record(
        where=where,
        group=(step, tuple(ids[:begin])),
        prompt_ids=ids[:begin],
        response_ids=ids[begin:end],
        reward=float(reward),
        advantage=columns.constant("advantages", begin, end),
        sampling_logprobs=columns.numbers("generation_logprobs", begin, end),
        step=step,
        num_dropped=length - end,
        extra={k: row[k] for k in ("agent_ref", "idx") if k in row},
    )


def _unwrapped(value: Any) -> Any:
    """What a list of one holds: NeMo-RL writes batches of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_integer(value: object) -> bool:
    return type(value) is int


def _token_ids(row: dict[str, Any], where: str, advice: str) -> list[int]:
    ids = require(row, "token_ids", where, advice)
    if not isinstance(ids, list) or not ids or not all(map(_is_integer, ids)):
        raise make_problem(
            where, "a list of integers in `token_ids`", show(ids), advice
        )
    return ids


class _Columns:
    """The lists of a row that have one entry a token."""

    def __init__(
        self, row: dict[str, Any], where: str, length: int, advice: str
    ) -> None:
        self.row, self.where, self.length, self.advice = row, where, length, advice

    def entries(self, key: str) -> list[Any]:
        """A list of one entry a token."""
        value = require(self.row, key, self.where, self.advice)
        if not isinstance(value, list) or len(value) != self.length:
            count = len(value) if isinstance(value, list) else show(value)
            raise make_problem(
                self.where,
                f"{self.length} entries in `{key}`, one a token",
                str(count),
                self.advice,
            )
        return value

    def response(self, key: str) -> tuple[int, int]:
        """First token of the response and the one after its last, by a loss mask."""
        mask = [bool(entry) for entry in self.entries(key)]
        begin = mask.index(True) if True in mask else 0
        end = self.length - mask[::-1].index(True) if True in mask else 0
        if not begin or not all(mask[begin:end]):
            raise make_problem(
                self.where,
                f"a prompt, then one piece of response in `{key}`",
                "no token in the loss"
                if True not in mask
                else "no prompt"
                if not begin
                else f"{mask[begin:end].count(False)} tokens outside of the loss "
                "between the first and the last in it",
                "sequences of several turns cannot be imported",
            )
        return begin, end

    def numbers(self, key: str, begin: int, end: int) -> list[float] | None:
        """Numbers of the response's tokens; None if the key is absent."""
        if self.row.get(key) is None:
            return None
        values = self.entries(key)[begin:end]
        for place, value in enumerate(values, start=begin):
            if not is_number(value):
                raise make_problem(
                    self.where,
                    f"numbers in `{key}`",
                    f"{show(value)} at place {place}",
                    "drop the row's group",
                )
        return [float(value) for value in values]

    def constant(self, key: str, begin: int, end: int) -> float | None:
        """The one value of all the response's tokens; None where none has one."""
        if self.row.get(key) is None:
            return None
        if all(value is None for value in self.entries(key)[begin:end]):
            return None
        values = self.numbers(key, begin, end)
        assert values is not None
        if len(set(values)) > 1:
            raise make_problem(
                self.where,
                f"one value of `{key}` for the whole response",
                f"{min(values)} to {max(values)}",
                "advantages that differ by token have no form here",
            )
        return values[0]
