"""verl's rollout dumps (`trainer.rollout_data_dir`), one JSONL file a step.

`{step}.jsonl` has input, output, gts, score, step, whatever the reward function added,
and in newer versions uid. Both texts are decoded without special tokens. There are no
advantages. Rows of one prompt stand anywhere: they are found by uid, or by the prompt.
"""

from pathlib import Path
from typing import Any

from entropy_ddp.data.jsonlines import make_problem, read_rows
from entropy_ddp.importers.records import (
    Record,
    Source,
    require,
    require_number,
    require_text,
    step_in_name,
)

ADVICE = "is it a file of verl's trainer.rollout_data_dir?"
USED = ("input", "output", "score")


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
            f"{path}:{number}", "`uid` in all rows or in none", "none here", ADVICE
        )
    return [_make_record(row, path, n) for n, row in enumerate(rows, start=1)]


def _make_record(row: dict[str, Any], path: Path, number: int) -> Record:
    where = f"{path}:{number}"
    prompt = require_text(row, "input", where, ADVICE)
    # Absent from old versions, which name the file by it too.
    step = step_in_name(path, r"^(\d+)\.jsonl")
    if "step" in row:
        step = int(require_number(row, "step", where, ADVICE))
    by_uid = row.get("uid") is not None
    key = require(row, "uid", where, ADVICE) if by_uid else prompt
    return Record(
        where=where,
        group=(step, "uid" if by_uid else "prompt", str(key)),
        grouped_by_prompt=not by_uid,
        prompt=prompt,
        prompt_lacks_special_tokens=True,
        response=require_text(row, "output", where, ADVICE),
        reward=require_number(row, "score", where, ADVICE),
        step=step,
        extra={k: v for k, v in row.items() if k not in USED},
    )
