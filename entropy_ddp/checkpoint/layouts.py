"""What a checkpoint folder holds, by the names of its files: no tensor is read.

Recognised, and refused with the export that would help: the sharded checkpoints of
DeepSpeed ZeRO, of FSDP and of torch.distributed.checkpoint, whose parts belong to ranks
and not to parameters.
"""

from dataclasses import dataclass
from pathlib import Path

from entropy_ddp.errors import InputError

SAFE_FILES = ("model.safetensors", "model.safetensors.index.json")
# Read with torch.load(weights_only=True), where there is no safetensors file.
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_CONFIG = "adapter_config.json"
# PEFT writes this adapter into the folder itself, others into folders of their name.
DEFAULT_ADAPTER = "default"

_DELTA = (
    "or measure what the trainer's step did, without optimizer state, by update.delta: "
    "the next checkpoint"
)
_GATHER = (
    "save the gathered state in the trainer: torch.save(torch.distributed.checkpoint."
    "state_dict.get_optimizer_state_dict(model, optimizer, options=StateDictOptions("
    'full_state_dict=True, cpu_offload=True)), "optimizer.pt")'
)


@dataclass(frozen=True, kw_only=True)
class ShardedLayout:
    """A kind of checkpoint whose files belong to ranks.

    Attributes:
        name: what it is called.
        patterns: any of these names in a folder tells it.
        weights: how its weights are exported as safetensors.
        optimizer: how its optimizer state is exported as one file.
    """

    name: str
    patterns: tuple[str, ...]
    weights: str
    optimizer: str


SHARDED_LAYOUTS = (
    ShardedLayout(
        name="a DeepSpeed ZeRO checkpoint",
        patterns=(
            "zero_to_fp32.py",
            "global_step[0-9]*",
            "*zero_pp_rank_*_optim_states.pt",
            "*mp_rank_*_model_states.pt",
            "pytorch_model/*mp_rank_*_model_states.pt",
        ),
        weights="export its weights with `python zero_to_fp32.py . OUT "
        "--safe_serialization` in that folder, with config.json beside them",
        optimizer="gather it in the trainer with deepspeed.utils."
        'safe_get_full_optimizer_state(parameter, "exp_avg") and "exp_avg_sq" into '
        '{"state": {name: {step, exp_avg, exp_avg_sq}}, "param_groups": [...]} with '
        "`params` lists of names, and torch.save that as optimizer.pt",
    ),
    ShardedLayout(
        name="an FSDP checkpoint of verl, sharded by rank",
        patterns=(
            "model_world_size_*_rank_*.pt",
            "optim_world_size_*_rank_*.pt",
            "*/model_world_size_*_rank_*.pt",
        ),
        weights="export its weights with `python -m verl.model_merger merge --backend "
        "fsdp --local_dir FOLDER --target_dir OUT`",
        optimizer=_GATHER,
    ),
    ShardedLayout(
        name="a sharded FSDP checkpoint of accelerate or the Trainer",
        patterns=("pytorch_model_fsdp_[0-9]*", "optimizer_[0-9]*/.metadata"),
        weights="export its weights with `accelerate merge-weights "
        "FOLDER/pytorch_model_fsdp_0 OUT`, with config.json beside them",
        optimizer="save with fsdp_state_dict_type: FULL_STATE_DICT, or " + _GATHER,
    ),
    ShardedLayout(
        name="a checkpoint of torch.distributed.checkpoint",
        patterns=("*.distcp", "*/*.distcp"),
        weights="convert it with `python -m torch.distributed.checkpoint.format_utils "
        "dcp_to_torch FOLDER FILE`, load its model part into the model and save that "
        "with save_pretrained (prime-rl writes such a folder under weights/)",
        optimizer="convert it with `python -m torch.distributed.checkpoint.format_utils "
        "dcp_to_torch FOLDER FILE` and torch.save its optimizer part as optimizer.pt",
    ),
)


def sharded_layout(folder: Path) -> tuple[ShardedLayout, str] | None:
    """The kind of sharded checkpoint that a folder is, and the name that tells it."""
    for layout in SHARDED_LAYOUTS:
        for pattern in layout.patterns:
            for path in sorted(folder.glob(pattern)):
                return layout, str(path.relative_to(folder))
    return None


def refuse_sharded_weights(folder: Path) -> None:
    """Refuse a folder without whole weights if their shards are recognised in it.

    Raises:
        InputError: they are; with the export that would help.
    """
    found = sharded_layout(folder)
    if found is not None:
        layout, name = found
        raise InputError(
            f"{folder}: expected whole weights, found {layout.name} ({name}); "
            f"{layout.weights}"
        )


def why_no_optimizer(folder: Path | None) -> str:
    """The sentence on a folder without a readable optimizer state."""
    found = None if folder is None else sharded_layout(folder)
    if found is not None:
        layout, name = found
        return (
            f"{folder}: expected a whole optimizer state, found {layout.name} ({name}); "
            f"{layout.optimizer}, {_DELTA}"
        )
    return (
        "checkpoint: no optimizer.pt or optimizer.bin found; set checkpoint.optimizer to "
        "the saved AdamW state (a fresh optimizer would step in another direction), "
        f"{_DELTA}"
    )


def weight_file(folder: Path) -> str | None:
    """The file (or index of files) of a folder's whole weights; safetensors first."""
    names = (*SAFE_FILES, *PICKLED_FILES)
    return next((name for name in names if (folder / name).exists()), None)


def has_full_model(folder: Path) -> bool:
    """Whether the folder holds whole weights and the configuration of their model."""
    return weight_file(folder) is not None and (folder / "config.json").exists()


def is_training_state(folder: Path) -> bool:
    """Whether it is a folder of accelerate's `save_state`: weights, and no model."""
    return (
        weight_file(folder) is not None
        and not (folder / "config.json").exists()
        and not (folder / ADAPTER_CONFIG).exists()
    )


def adapters_in(folder: Path) -> dict[str, Path]:
    """The PEFT adapters of a folder by name: in it, and one folder below."""
    below = {
        path.parent.name: path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")
    }
    own = {DEFAULT_ADAPTER: folder} if (folder / ADAPTER_CONFIG).exists() else {}
    return own | {name: below[name] for name in sorted(below)}


def listing(folder: Path) -> str:
    """The first names of a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") or "nothing"


def existing_folder(name: str) -> Path:
    """The folder of a checkpoint.

    Raises:
        InputError: there is none.
    """
    path = Path(name)
    if not path.is_dir():
        raise InputError(f"{path}: expected a checkpoint folder, found none there")
    return path
