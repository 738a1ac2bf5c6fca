"""What kind of checkpoint a folder holds, told by the names of its files alone.

Large trainings leave weights and optimizer state in parts that belong to ranks, each
library in a layout of its own. Those that are read (`find_layout`) are read by the files
beside this one; those that are not are named with the export that would help.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from entropy_ddp.errors import InputError

# Names of the layouts that are read, as they are shown.
DCP = "torch.distributed.checkpoint (DCP)"
ZERO = "DeepSpeed ZeRO"
UNIVERSAL = "DeepSpeed universal"
RANKS = "a file of DTensors for each rank"
SHARDS = "safetensors of each rank (transformers)"
FULL = "one file of all weights (FSDP, FULL_STATE_DICT)"

# By what is wanted: weights or optimizer state.
WEIGHTS, OPTIMIZER = "weights", "optimizer"
_RANK_FILES = {
    WEIGHTS: ("model_world_size_*_rank_*.pt", "pytorch_model_fsdp_0_rank*.bin"),
    OPTIMIZER: ("optim_world_size_*_rank_*.pt", "optimizer_0_rank*.bin"),
}
_DCP_FOLDERS = {
    WEIGHTS: ("", "pytorch_model_fsdp_0", "trainer"),
    OPTIMIZER: ("", "optimizer_0", "trainer"),
}
FULL_WEIGHTS = "pytorch_model_fsdp.bin"
_SHARD = "shard-[0-9]*-model-*.safetensors"
# Where verl keeps the policy among what a step leaves.
_ACTOR = "actor"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Weights or optimizer state in parts.

    Attributes:
        kind: one of the names above.
        place: the folder of the files, or the file.
        files: those that ranks wrote, in their order; empty where the place says all.
    """

    kind: str
    place: Path
    files: tuple[Path, ...] = ()

    @property
    def described(self) -> str:
        """For a table."""
        # A rank of DCP may write several files: __RANK_NUMBER.distcp.
        writers = {re.sub(r"_\d+\.distcp$", "", path.name) for path in self.files}
        count = f", written by {len(writers)} ranks" if writers else ""
        return f"{self.kind}{count}"


def find_layout(folder: Path, wanted: str) -> Layout | None:
    """The layout in which a folder holds weights or optimizer state; None if in none.

    Args:
        folder: of a checkpoint, or of these files alone; or the one file of all weights.
        wanted: `WEIGHTS` or `OPTIMIZER`.

    Raises:
        InputError: files of some ranks are missing.
    """
    if wanted == WEIGHTS and folder.name == FULL_WEIGHTS and folder.is_file():
        return Layout(kind=FULL, place=folder)
    if not folder.is_dir():
        return None
    for place in (folder, folder / _ACTOR):
        for pattern in _RANK_FILES[wanted]:
            files = _of_every_rank(sorted(place.glob(pattern), key=_rank))
            if files:
                return Layout(kind=RANKS, place=place, files=files)
    zero = zero_folder(folder)
    if zero is not None:
        states = sorted(zero.glob("*_optim_states.pt"), key=_rank)
        if states:
            return Layout(kind=ZERO, place=zero, files=tuple(states))
        return Layout(kind=UNIVERSAL, place=zero)
    for name in _DCP_FOLDERS[wanted]:
        place = folder / name
        if (place / ".metadata").is_file():
            files = tuple(sorted(place.glob("*.distcp")))
            return Layout(kind=DCP, place=place, files=files)
    if wanted == WEIGHTS:
        if (folder / FULL_WEIGHTS).is_file():
            return Layout(kind=FULL, place=folder / FULL_WEIGHTS)
        shards = sorted(folder.glob(_SHARD))
        if shards:
            return Layout(kind=SHARDS, place=folder, files=tuple(shards))
    return None


def zero_folder(folder: Path) -> Path | None:
    """The folder of DeepSpeed's files: it, what `latest` in it names, or its only step."""
    if _has_zero_files(folder):
        return folder
    for name in ("latest", "latest_universal"):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace").strip()
            if text and "/" not in text and _has_zero_files(folder / text):
                return folder / text
    steps = [path for path in folder.glob("global_step[0-9]*") if _has_zero_files(path)]
    return steps[0] if len(steps) == 1 else None


def _has_zero_files(folder: Path) -> bool:
    try:
        return any(folder.glob("*_optim_states.pt")) or any(
            folder.glob("zero/*/exp_avg.pt")
        )
    except OSError:
        return False


def _rank(path: Path) -> int:
    """The rank that a file is of, by its name."""
    found = re.search(r"(?:zero_pp_rank_|_rank_?)(\d+)", path.name)
    return int(found[1]) if found else 0


def _of_every_rank(files: list[Path]) -> tuple[Path, ...]:
    """The files, in the order of their ranks, of which none is missing."""
    if not files:
        return ()
    sizes = {m[1] for f in files if (m := re.search(r"world_size_(\d+)_", f.name))}
    expected = int(sizes.pop()) if len(sizes) == 1 else len(files)
    if sizes or [_rank(path) for path in files] != list(range(expected)):
        found = ", ".join(path.name for path in files[:4])
        raise InputError(
            f"{files[0].parent}: expected a file of every rank from 0 to "
            f"{expected - 1}, found {len(files)}: {found}, ...; copy them all, of one "
            "training"
        )
    return tuple(files)


def configuration_in(folder: Path) -> Path | None:
    """The folder of a model's configuration that a sharded checkpoint has beside it."""
    for name in ("", "huggingface", f"{_ACTOR}/huggingface"):
        if (folder / name / "config.json").is_file():
            return folder / name
    return None


# What is not read


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A kind of checkpoint that is not read.

    Attributes:
        name: what it is called.
        patterns: any of these names in a folder tells it.
        advice: the export that would help.
    """

    name: str
    patterns: tuple[str, ...]
    advice: str


_GATHER = (
    "save the gathered state in the trainer: torch.save(torch.distributed.checkpoint."
    "state_dict.get_optimizer_state_dict(model, optimizer, options=StateDictOptions("
    'full_state_dict=True, cpu_offload=True)), "optimizer.pt")'
)
REFUSED = (
    Refused(
        name="a Megatron checkpoint",
        patterns=(
            "latest_checkpointed_iteration.txt",
            "iter_[0-9]*",
            "mp_rank_*/model_optim_rng.pt",
            "dist_ckpt",
            f"{_ACTOR}/dist_ckpt",
            "common.pt",
        ),
        advice="export its weights as a Hugging Face folder (Megatron-Bridge's "
        "export_ckpt, or `python -m verl.model_merger merge --backend megatron "
        "--local_dir FOLDER --target_dir OUT`); its optimizer state has no names of "
        "that folder, so probe with update.delta: the export of the next checkpoint",
    ),
    Refused(
        name="a checkpoint of FSDP's LOCAL_STATE_DICT",
        patterns=("pytorch_model_fsdp_rank*.bin",),
        advice="save with fsdp_state_dict_type: SHARDED_STATE_DICT or FULL_STATE_DICT; "
        + _GATHER,
    ),
    Refused(
        name="a DeepSpeed checkpoint without ZeRO's optimizer states",
        patterns=(
            "zero_to_fp32.py",
            "*mp_rank_*_model_states.pt",
            "*/*mp_rank_*_model_states.pt",
        ),
        advice="copy the *_optim_states.pt of every rank too, with the file `latest`; "
        "ZeRO stage 0 leaves none: " + _GATHER,
    ),
    Refused(
        name="a checkpoint of torch.distributed.checkpoint (DCP) without its .metadata",
        patterns=("*.distcp", "*/*.distcp"),
        advice="copy .metadata too (its name begins with a dot), or name the folder "
        "that has it",
    ),
)


def refused_in(folder: Path) -> tuple[Refused, str] | None:
    """The kind of unreadable checkpoint that a folder is, and the name that tells it."""
    for refused in REFUSED:
        for pattern in refused.patterns:
            for path in sorted(folder.glob(pattern)):
                return refused, str(path.relative_to(folder))
    return None
