"""`ledger.jsonl`: its lines, appended while a run trains, and read back.

Every line is a JSON object with a `kind`:

- `run`: the first of every (re)start: `version`, `first_step`, `settings`, `trainer`
  {loss_type, learning_rate, max_grad_norm, temperature, world_size, dtype}, `steps` (the
  number of optimizer steps planned).
- `step`, one of every probed step, changes in nats per token:

  | key | meaning |
  |---|---|
  | step | number of the optimizer step, from 1 |
  | learning_rate, grad_norm, clip_coefficient | of the step |
  | E, U | {num_groups, num_sequences, num_tokens} |
  | entropy | {value, se, se_jackknife, interval} at theta on E, fresh responses; as of
    what follows, `se` is of the delta method, `interval` [low, high] of 95 % |
  | first_order, second_order | predicted change, likewise; second order at the middle |
  | truth | importance-weighted change on the same E, likewise, and ess_fraction |
  | truth_minus_first, truth_minus_second | differences with their paired errors |
  | second_minus_first | the curvature, likewise |
  | parts | {momentum, decay, gradient} of the first-order change |
  | tokens | {positive, negative, zero, unattributed}: the gradient part by sign of the
    advantage; unattributed is what the shares of tokens leave of it |
  | deciles | the gradient part by probability of the token, least probable first, [10] |
  | covariance | mean over U's tokens of (log p - mean)(A - mean) |
  | top_tokens | the tokens with the largest shares, in their context |
  | by_token, by_prompt | sums of shares by token id and by prompt, the largest |
  | floor | what an `EntropyFloor` did, if there is one: {floor, measured (H of the batch),
    parameter, saturated}; of first order also {wanted, predicted_plain, predicted}, and
    `change`, what its weights changed of the gradient part, where they changed a token's |
  | checks | see below |
  | seconds | wall-clock seconds that the probe took |

- `end`: `step`, `entropy` as above at the weights that the training ended with.

A key that was not asked for is absent. Of a run that is read from its checkpoints, `run`
has `checkpoints` in place of `settings` and `trainer`, and a `step` that is about all
steps since the checkpoint before has their number as `num_steps`; what follows `U` is
then of the first of them.

With dropout or mixed precision the parts are still the trainer's own: its gradient, its
moments. The tokens' shares are of the model as it is measured, without either; what they
leave of the gradient part is `unattributed`. The checks:

- identity: the gradient part from the trainer's own gradient over the sum of its tokens'
  shares, which are of another pass and of the weights that the hooks saw: 1 expected.
  identity_gap is |unattributed| over the sum of |share|, the scale of its rounding: where
  shares cancel, the ratio alone says little.
- step_gap: ||(theta' - theta) - delta|| / ||delta|| of the step that was foreseen, less
  what the rounding of theta' can make.
- duality_gap: forward against reverse mode on E.
- logp_gap: largest difference of log p on U from what the trainer computed, nats.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_ddp.errors import InputError, RunError

LEDGER_FILE = "ledger.jsonl"
# Kinds of lines, and what each must have.
NEEDED = {
    "run": ("first_step", "steps"),
    "step": ("step", "entropy", "first_order"),
    "end": ("step", "entropy"),
}


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """A ledger file.

    Attributes:
        runs: the line of the start and of every restart.
        entries: the probed steps, ascending; of a step that was trained twice, the one
            that the training went on from.
        end: the last line of a training that ended; None of one that goes on.
        notes: sentences on what was left out.
    """

    runs: list[dict[str, Any]]
    entries: list[dict[str, Any]]
    end: dict[str, Any] | None
    notes: list[str]


def require_new(folder: Path) -> None:
    """Check that a training from its first step has a ledger to itself.

    Raises:
        InputError: there is one already.
    """
    file = folder / LEDGER_FILE
    if file.exists():
        raise InputError(
            f"{file}: expected no ledger for a training that begins, found one; give "
            "the callback another `out`, or remove it"
        )


def append_line(folder: Path, entry: dict[str, Any]) -> None:
    """Append one whole line: a reader never sees half of one for long.

    Raises:
        RunError: a number is not finite, or the file cannot be written.
    """
    file = folder / LEDGER_FILE
    assert not _missing(entry), entry
    try:
        line = json.dumps(entry, allow_nan=False)
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    except ValueError as error:
        raise RunError(f"{file}: step {entry.get('step')}: {error}") from error
    except OSError as error:
        raise RunError(
            f"{file}: cannot be written ({error.strerror or error}); check that the "
            "folder has room and may be written to"
        ) from error


def read_ledger(folder: Path) -> RunLog:
    """Read the ledger of a run.

    A restart from a checkpoint takes back what was written of later steps. A last line
    without its end is of a process that was killed, and left out.

    Raises:
        InputError: there is none, or a line is no line of a ledger.
    """
    file = folder / LEDGER_FILE
    if not file.is_file():
        raise InputError(
            f"{file}: expected a run's ledger, found no such file; name the folder that "
            "the callback was given as `out`"
        )
    lines, notes = file.read_text(encoding="utf-8").split("\n"), []
    if lines.pop():
        notes.append("the last line is cut off (the training was killed): left out")
    runs: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    end = None
    for number, text in enumerate(lines, start=1):
        line = _parsed(text, f"{file}:{number}")
        if line["kind"] == "end":
            end = line
        elif line["kind"] == "step":
            entries.append(line)
        else:
            kept = [entry for entry in entries if entry["step"] < line["first_step"]]
            if len(kept) < len(entries):
                notes.append(
                    f"restarted at step {line['first_step']}: "
                    f"{len(entries) - len(kept)} lines of steps that were taken back are "
                    "left out"
                )
            runs.append(line)
            entries, end = kept, None
    if not entries:
        raise InputError(
            f"{file}: expected at least one probed step, found none; let the training "
            "go on, or probe more often (`every`)"
        )
    return RunLog(runs=runs, entries=entries, end=end, notes=notes)


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{where}: expected a JSON object, found {line[:40]!r}"
        ) from error
    kind = str(found.get("kind")) if isinstance(found, dict) else "none"
    missing = _missing(found) if kind in NEEDED else []
    if kind not in NEEDED or missing:
        raise InputError(
            f"{where}: expected a line of kind {', '.join(NEEDED)} with all of its keys, "
            f"found kind {kind!r}{' without ' + missing[0] if missing else ''}; is this "
            "a ledger of this version?"
        )
    return found


def _missing(line: dict[str, Any]) -> list[str]:
    """What a line must have by its kind and has not."""
    return [key for key in NEEDED[line["kind"]] if key not in line]
