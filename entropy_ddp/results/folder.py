"""The run directory: an old run whole, a new run whole, never a mixture.

While a run lasts, what its passes leave is in `unfinished/` below the run directory, and
an earlier run's files stand as they are. At the end all files are written beside them,
and only then renamed into their places, results.json last. Whatever fails before leaves
the earlier run as it was, and the unfinished one to be resumed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from entropy_ddp.data.jsonlines import write_jsonl
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.files import temporary, write_tensors, written_whole
from entropy_ddp.results.schema import Probed

# Where a run that is under way keeps what its passes leave.
UNFINISHED = "unfinished"
# In it, what the run depends on.
RUN_FILE = "run.json"
RESULTS = "results.json"
# What a run may leave beside results.json; what this one does not make is removed.
_OPTIONAL = (
    "tokens.jsonl.gz",
    "delta_theta.safetensors",
    "sweep.jsonl",
    "report.html",
    "rollouts/E.jsonl",
    "rollouts/U.jsonl",
)


def prepare_folder(
    out: Path,
    overwrite: bool,
    resume: bool = False,
    results: Iterable[str] = (RESULTS,),
) -> None:
    """Make the run directory, or say why it cannot be used.

    Args:
        overwrite: begin anew, whatever is there.
        resume: go on with an unfinished run.
        results: the files that finished results consist of.

    Raises:
        InputError: it holds results or an unfinished run and may not be used so, or
            cannot be written.
    """
    try:
        _require_usable(out, overwrite, resume, results)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from error
    if overwrite:
        discard_unfinished(out)


def _require_usable(
    out: Path, overwrite: bool, resume: bool, results: Iterable[str]
) -> None:
    unfinished = (out / UNFINISHED).exists()
    if overwrite and resume:
        raise InputError(
            "--overwrite begins anew and --resume goes on; give one of them"
        )
    if unfinished and not (overwrite or resume):
        raise InputError(
            f"{out}: holds an unfinished run; give --resume to go on with it, "
            "--overwrite to begin anew, or another --out"
        )
    if resume and not unfinished:
        raise InputError(
            f"{out}: there is nothing unfinished to resume; leave --resume out"
        )
    for name in results:
        if (out / name).is_dir():
            raise InputError(f"{out / name}: expected a file or none, found a folder")
        if (out / name).exists() and not (overwrite or unfinished):
            found = f"{out}: holds the results of an earlier run"
            if name != RESULTS:
                found = f"{out / name}: exists"
            raise InputError(f"{found}; give --overwrite or another --out")


@contextmanager
def nothing_left(out: Path, overwrite: bool) -> Iterator[None]:
    """Leave nothing behind of wrong input, and no folder without a finished pass.

    What a run that failed otherwise has finished stays, to be resumed; and so do
    rollouts that it has sampled, whatever failed, which the message then says.

    Args:
        out: the run directory, which is made within the context, or before.
        overwrite: whether an unfinished run there is given up.
    """
    is_kept = os.path.exists(out / UNFINISHED) and not overwrite
    before = _sampled(out)
    above = [path for path in (out, *out.parents) if not os.path.exists(path)]
    try:
        yield
    except BaseException as error:
        new = sorted(path for path, _ in _sampled(out) - before)
        with suppress(OSError):
            found = {path.name for path in (out / UNFINISHED).iterdir()}
            is_wrong = isinstance(error, InputError) and not new
            if (is_wrong or found <= {RUN_FILE}) and not is_kept:
                discard_unfinished(out)
        with suppress(OSError):
            for path in above:
                path.rmdir()
        if new and isinstance(error, (InputError, RunError)):
            kept = f"{' and '.join(new)} {'are' if new[1:] else 'is'} kept"
            error.args = (f"{error}; {kept}: start again with --resume",)
        raise


def _sampled(out: Path) -> set[tuple[str, int]]:
    """The rollouts that an unfinished run has sampled, each with its time."""
    found = set()
    # What cannot be looked into has none of this run's; that it cannot be used is said.
    with suppress(OSError):
        for path in (out / UNFINISHED).glob("rollouts/*.jsonl"):
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def discard_unfinished(out: Path) -> None:
    """Remove what a run kept that is finished, or not to be resumed."""
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def write_results(out: Path, probed: Probed, config_yaml: str) -> None:
    """Write a run directory; results.json last, so that its presence means complete.

    Raises:
        RunError: a number is not finite, or a file cannot be written; the files of an
            earlier run are as before.
    """
    document = json.dumps(probed.results.to_dict(), indent=2, allow_nan=False)
    with _written_beside(out) as new:
        with written_whole(new / "config.yaml") as stream:
            stream.write(config_yaml.encode())
        write_jsonl(new / "per_sequence.jsonl", probed.sequences)
        if probed.tokens is not None:
            write_jsonl(new / "tokens.jsonl.gz", probed.tokens)
        if probed.delta is not None:
            write_tensors(new / "delta_theta.safetensors", probed.delta)
        if probed.results.sweep is not None:
            write_jsonl(new / "sweep.jsonl", map(asdict, probed.results.sweep))
        with written_whole(new / RESULTS) as stream:
            stream.write(document.encode() + b"\n")
        try:
            (out / RESULTS).unlink(missing_ok=True)
            _put_in_place(new, out, probed.sampled)
        except OSError as error:
            raise RunError(
                f"{out}: the results are complete but cannot be put in their place "
                f"({error.strerror or error}); make room, and start again with --resume"
            ) from error
    discard_unfinished(out)


@contextmanager
def _written_beside(out: Path) -> Iterator[Path]:
    """A folder for new files, which is gone afterwards."""
    new = tempfile.mkdtemp(dir=out, prefix=".new.", suffix=".tmp")
    with temporary(Path(new)) as folder:
        yield folder


def _put_in_place(new: Path, out: Path, sampled: Iterable[str]) -> None:
    """Rename complete files into the run directory; results.json last."""
    moved = {f"rollouts/{split}.jsonl" for split in sampled}
    for name in sorted(moved):
        kept = out / UNFINISHED / name
        if kept.exists():
            (out / "rollouts").mkdir(exist_ok=True)
            os.replace(kept, out / name)
    names = sorted(path.name for path in new.iterdir())
    plots = {str(path.relative_to(out)) for path in out.glob("plots/*.[ps][nv]g")}
    for name in {*_OPTIONAL, *plots} - moved - set(names):
        (out / name).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name == RESULTS):
        os.replace(new / name, out / name)
