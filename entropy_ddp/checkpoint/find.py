"""A checkpoint on disk: which files it consists of. No tensor is read.

Recognised, and refused with the export that would help: the sharded checkpoints of
DeepSpeed ZeRO, of FSDP and of torch.distributed.checkpoint, whose parts belong to ranks
and not to parameters.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from entropy_ddp.checkpoint.weights import (
    ADAPTER_CONFIG,
    SAFE_FILES,
    listing,
    read_adapter_config,
    tensor_names,
    weight_file,
)
from entropy_ddp.config import Checkpoint
from entropy_ddp.errors import InputError

# PEFT writes this adapter into the folder itself, others into folders of their name.
DEFAULT_ADAPTER = "default"
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")

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


def existing_folder(name: str) -> Path:
    """The folder of a checkpoint.

    Raises:
        InputError: there is none.
    """
    path = Path(name)
    if not path.is_dir():
        raise InputError(f"{path}: expected a checkpoint folder, found none there")
    return path


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """The parts of one checkpoint.

    Attributes:
        folder: the checkpoint's folder; None if only parts of it are named.
        base: folder or hub id of the base model, or of the full-weight model.
        adapter: folder of the PEFT adapter; None for full weights.
        adapter_name: the adapter's name, which is a part of its parameters' names.
        state: folder of accelerate's `save_state`, whose weights replace those of base
            and adapter; None if there is none.
        optimizer: file of the optimizer state; None if there is none.
        tokenizer: folder or hub id that holds the tokenizer.
        trust_remote_code: whether code that comes with model or tokenizer may be run.
    """

    folder: Path | None
    base: str
    adapter: Path | None
    adapter_name: str
    state: Path | None
    optimizer: Path | None
    tokenizer: str
    trust_remote_code: bool = False


def find_checkpoint(checkpoint: Checkpoint) -> CheckpointFiles:
    """Resolve a configuration to the files of the checkpoint.

    Raises:
        InputError: a folder or file is missing, the folder is of a kind that cannot be
            read, or holds several adapters of which none is named.
    """
    folder = None if checkpoint.path is None else existing_folder(checkpoint.path)
    state = folder if folder is not None and is_training_state(folder) else None
    adapter, name = _find_adapter(checkpoint, folder)
    if state is not None:
        name = _adapter_of_state(state, adapter)
    base = checkpoint.base
    if base is None:
        base = _base_of(folder, adapter, state)
    elif folder is not None and adapter is None and state is None:
        _require_not_passed_over(folder, base)
    return CheckpointFiles(
        folder=folder,
        base=base,
        adapter=adapter,
        adapter_name=name,
        state=state,
        optimizer=_find_optimizer(checkpoint, folder),
        tokenizer=_find_tokenizer(folder, adapter, base),
        trust_remote_code=checkpoint.trust_remote_code,
    )


def _find_adapter(
    checkpoint: Checkpoint, folder: Path | None
) -> tuple[Path | None, str]:
    """The folder and the name of the adapter; (None, default) for full weights."""
    found = {} if folder is None else adapters_in(folder)
    name = checkpoint.adapter
    if name is None:
        if folder is None or (has_full_model(folder) and DEFAULT_ADAPTER not in found):
            return None, DEFAULT_ADAPTER
        return _only_adapter(folder, found)
    if name in found:
        return found[name], name
    path = Path(name)
    if not path.is_dir():
        others = f"; {folder} has the adapters {', '.join(found)}" if found else ""
        raise InputError(
            f"checkpoint.adapter: {name}: expected a checkpoint folder, found none "
            f"there{others}"
        )
    adapter, inner = _only_adapter(path, adapters_in(path))
    if adapter is None:
        raise InputError(
            f"{path}: expected a PEFT adapter folder with {ADAPTER_CONFIG}, found "
            f"{listing(path)}"
        )
    named = [own for own, place in found.items() if place.samefile(adapter)]
    return adapter, named[0] if named else inner


def _only_adapter(folder: Path, found: dict[str, Path]) -> tuple[Path | None, str]:
    if len(found) > 1:
        raise InputError(
            f"{folder}: holds {len(found)} adapters: {', '.join(found)}; set "
            "checkpoint.adapter to the name of the one to measure"
        )
    for name, path in found.items():
        return path, name
    return None, DEFAULT_ADAPTER


def _adapter_of_state(state: Path, adapter: Path | None) -> str:
    """The adapter's name in a state of accelerate; default if it has none."""
    pattern = re.compile(r"\.lora_[A-Za-z_]+\.(\w+)")
    matches = (pattern.search(name) for name in tensor_names(state))
    adapters = sorted({match[1] for match in matches if match})
    if len(adapters) > 1:
        raise InputError(
            f"{state}: expected one adapter in {weight_file(state)}, found "
            f"{', '.join(adapters)}; save the one to measure with save_pretrained"
        )
    if adapters and adapter is None:
        raise InputError(
            f"{state}: {weight_file(state)} holds a PEFT model, and its settings (rank, "
            f"alpha, ...) are not among accelerate's files; set checkpoint.adapter to a "
            f"folder with its {ADAPTER_CONFIG} (LoraConfig.save_pretrained writes one)"
        )
    if adapter is not None and not adapters:
        raise InputError(
            f"{state}: checkpoint.adapter names {adapter}, but {weight_file(state)} has "
            "no LoRA weights; leave checkpoint.adapter out"
        )
    return adapters[0] if adapters else DEFAULT_ADAPTER


def _base_of(folder: Path | None, adapter: Path | None, state: Path | None) -> str:
    if adapter is not None:
        base = read_adapter_config(adapter).get("base_model_name_or_path")
        if not base:
            raise InputError(
                f"{adapter / ADAPTER_CONFIG}: names no base model; set checkpoint.base"
            )
        return base
    assert folder is not None
    if state is not None:
        raise InputError(
            f"{state}: holds weights without a config.json, as accelerate's save_state "
            "leaves them; set checkpoint.base to the folder or hub id of the model"
        )
    if not has_full_model(folder):
        refuse_sharded_weights(folder)
        raise InputError(
            f"{folder}: expected {ADAPTER_CONFIG} (an adapter) or {SAFE_FILES[0]} "
            f"(full weights), found {listing(folder)}"
        )
    return str(folder)


def _require_not_passed_over(folder: Path, base: str) -> None:
    """Refuse to measure the base where the folder has weights of its own."""
    if not has_full_model(folder):
        refuse_sharded_weights(folder)
    elif Path(base).resolve() != folder.resolve():
        raise InputError(
            f"{folder}: holds full weights, but checkpoint.base names {base}; which of "
            "the two is to be measured? leave checkpoint.base out, or name an adapter"
        )


def _find_optimizer(checkpoint: Checkpoint, folder: Path | None) -> Path | None:
    if checkpoint.optimizer is not None:
        path = Path(checkpoint.optimizer)
        if not path.is_file():
            raise InputError(f"checkpoint.optimizer: {path} is not a file")
        return path
    candidates = [] if folder is None else [folder / n for n in OPTIMIZER_FILES]
    return next((path for path in candidates if path.exists()), None)


def _find_tokenizer(folder: Path | None, adapter: Path | None, base: str) -> str:
    for place in (folder, adapter):
        if place is not None and (place / "tokenizer_config.json").exists():
            return str(place)
    return base
