"""A checkpoint on disk: which files it consists of. No tensor is read.

Weights and optimizer state may be one file each, or the shares of the ranks of a large
training, in the folder itself or in those that trainers give them (`layouts`).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from entropy_ddp.checkpoint.layouts import (
    FULL_WEIGHTS,
    OPTIMIZER,
    WEIGHTS,
    configuration_in,
    find_layout,
    refused_in,
)
from entropy_ddp.checkpoint.weights import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    SAFE_FILES,
    listing,
    read_adapter_config,
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


def refuse_unreadable(folder: Path, wanted: str) -> None:
    """Refuse a folder without what is wanted if it is of a kind that is not read.

    Raises:
        InputError: it is; with the export that would help.
    """
    found = refused_in(folder)
    if found is not None:
        refused, name = found
        raise InputError(
            f"{folder}: expected {wanted}, found {refused.name} ({name}); "
            f"{refused.advice}"
        )


def why_no_optimizer(folder: Path | None) -> str:
    """The sentence on a folder without a readable optimizer state."""
    found = None if folder is None else refused_in(folder)
    if found is not None:
        refused, name = found
        return (
            f"{folder}: expected an optimizer state, found {refused.name} ({name}); "
            f"{refused.advice}; {_DELTA}"
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
    """Whether it holds weights by name, and no model that they are loaded with.

    So do accelerate's `save_state`, and the shares of ranks in any layout.
    """
    if (folder / ADAPTER_CONFIG).exists():
        has_own = any((folder / name).exists() for name in ADAPTER_WEIGHTS)
        return not has_own and find_layout(folder, WEIGHTS) is not None
    if weight_file(folder) is not None:
        return not (folder / "config.json").exists()
    return find_layout(folder, WEIGHTS) is not None


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
        weights: folder or file of weights by name, of any format, which replace those
            of base and adapter; None if there is none.
        optimizer: file or folder of the optimizer state; None if there is none.
        tokenizer: folder or hub id that holds the tokenizer.
        trust_remote_code: whether code that comes with model or tokenizer may be run.
    """

    folder: Path | None
    base: str
    adapter: Path | None
    adapter_name: str
    weights: Path | None
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
    weights = _find_weights(checkpoint, folder)
    adapter, name = _find_adapter(checkpoint, folder)
    if weights is not None:
        name = _adapter_in(weights, adapter)
    base = checkpoint.base
    if base is None:
        base = _base_of(folder, adapter, weights)
    elif folder is not None and adapter is None and weights is None:
        _require_not_passed_over(folder, base)
    return CheckpointFiles(
        folder=folder,
        base=base,
        adapter=adapter,
        adapter_name=name,
        weights=weights,
        optimizer=_find_optimizer(checkpoint, folder),
        tokenizer=_find_tokenizer(folder, adapter, base),
        trust_remote_code=checkpoint.trust_remote_code,
    )


def _find_weights(checkpoint: Checkpoint, folder: Path | None) -> Path | None:
    """Where weights by name are, in place of those of base and adapter."""
    if checkpoint.weights is None:
        is_state = folder is not None and is_training_state(folder)
        return folder if is_state else None
    place = Path(checkpoint.weights)
    is_whole = place.is_dir() and weight_file(place) is not None
    if not is_whole and find_layout(place, WEIGHTS) is None:
        if place.is_dir():
            refuse_unreadable(place, "weights")
        found = listing(place) if place.is_dir() else "none there"
        raise InputError(
            f"checkpoint.weights: {place}: expected a folder of weights by name (of DCP, "
            f"of DeepSpeed with `latest` or `zero`, of verl's ranks, or model.safetensors) "
            f"or the file {FULL_WEIGHTS}, found {found}"
        )
    return place


def find_tokenizer(folder: Path, base: str | None = None) -> tuple[str, str]:
    """Where the tokenizer and the configuration of a checkpoint's model are.

    Its weights need not be loadable: any of several adapters tells the base, and shares
    of ranks need no settings of their adapter.

    Args:
        base: folder or hub id of the model, where the checkpoint does not tell it.

    Raises:
        InputError: there is no such folder, or no model is found.
    """
    existing_folder(str(folder))
    if is_training_state(folder):
        base = base or _base_of(folder, None, folder)
        return _find_tokenizer(folder, None, base), base
    names = list(adapters_in(folder))
    section = Checkpoint(
        path=str(folder),
        adapter=names[0] if len(names) > 1 else None,
        # Whole weights are their own base.
        base=base if names else None,
    )
    files = find_checkpoint(section)
    return files.tokenizer, files.base


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


def _adapter_in(weights: Path, adapter: Path | None) -> str:
    """The adapter's name in weights by name; default if they have none."""
    # Heavy: only where there are such weights.
    from entropy_ddp.checkpoint.formats import stored_weights

    pattern = re.compile(r"\.lora_[A-Za-z_]+\.(\w+)")
    matches = (pattern.search(name) for name in stored_weights(weights))
    # Of one adapter alone, PEFT leaves the name out.
    adapters = sorted(
        {DEFAULT_ADAPTER if m[1] == "weight" else m[1] for m in matches if m}
    )
    place = described_weights(weights)
    if len(adapters) > 1:
        raise InputError(
            f"{weights}: expected one adapter in {place}, found "
            f"{', '.join(adapters)}; save the one to measure with save_pretrained"
        )
    if adapters and adapter is None:
        raise InputError(
            f"{weights}: {place} holds a PEFT model, and its settings (rank, "
            f"alpha, ...) are not among its files; set checkpoint.adapter to a "
            f"folder with its {ADAPTER_CONFIG} (LoraConfig.save_pretrained writes one)"
        )
    if adapter is not None and not adapters:
        raise InputError(
            f"{weights}: checkpoint.adapter names {adapter}, but {place} has "
            "no LoRA weights; leave checkpoint.adapter out"
        )
    return adapters[0] if adapters else DEFAULT_ADAPTER


def described_weights(weights: Path) -> str:
    """What holds weights by name: their file, or their layout."""
    layout = find_layout(weights, WEIGHTS)
    return str(weight_file(weights)) if layout is None else layout.described


def described_optimizer(place: Path) -> str:
    """What holds the optimizer state: one file, or shares of ranks."""
    layout = find_layout(place, OPTIMIZER)
    return "one file" if layout is None else layout.described


def _base_of(folder: Path | None, adapter: Path | None, weights: Path | None) -> str:
    if adapter is not None:
        base = read_adapter_config(adapter).get("base_model_name_or_path")
        if not base:
            raise InputError(
                f"{adapter / ADAPTER_CONFIG}: names no base model; set checkpoint.base"
            )
        return base
    if weights is not None:
        places = [p for p in (folder, weights) if p is not None and p.is_dir()]
        for place in places:
            found = configuration_in(place)
            if found is not None:
                return str(found)
        raise InputError(
            f"{weights}: holds weights without a config.json, as accelerate's save_state "
            "and sharded checkpoints leave them; set checkpoint.base to the folder or "
            "hub id of the model"
        )
    assert folder is not None
    if not has_full_model(folder):
        refuse_unreadable(folder, "weights")
        raise InputError(
            f"{folder}: expected {ADAPTER_CONFIG} (an adapter) or {SAFE_FILES[0]} "
            f"(full weights), found {listing(folder)}"
        )
    return str(folder)


def _require_not_passed_over(folder: Path, base: str) -> None:
    """Refuse to measure the base where the folder has weights of its own."""
    if not has_full_model(folder):
        refuse_unreadable(folder, "weights")
    elif Path(base).resolve() != folder.resolve():
        raise InputError(
            f"{folder}: holds full weights, but checkpoint.base names {base}; which of "
            "the two is to be measured? leave checkpoint.base out, or name an adapter"
        )


def _find_optimizer(checkpoint: Checkpoint, folder: Path | None) -> Path | None:
    if checkpoint.optimizer is not None:
        path = Path(checkpoint.optimizer)
        if path.is_dir() and optimizer_file(path) is not None:
            return optimizer_file(path)
        if path.is_dir():
            refuse_unreadable(path, "an optimizer state")
        if not path.is_file():
            found = f"holds {listing(path)}" if path.is_dir() else "is not a file"
            raise InputError(
                f"checkpoint.optimizer: {path} {found}; name the trainer's optimizer.pt "
                "or optimizer.bin, or a folder of DCP, of DeepSpeed (with `latest` or "
                "`zero`) or of verl's ranks"
            )
        return path
    return None if folder is None else optimizer_file(folder)


def optimizer_file(folder: Path) -> Path | None:
    """The file of the optimizer state in a folder, or the folder if it holds its parts.

    Raises:
        InputError: files of some ranks are missing.
    """
    paths = [folder / name for name in OPTIMIZER_FILES]
    whole = next((path for path in paths if path.exists()), None)
    if whole is not None or find_layout(folder, OPTIMIZER) is None:
        return whole
    return folder


def _find_tokenizer(folder: Path | None, adapter: Path | None, base: str) -> str:
    for place in (folder, adapter):
        if place is not None and (place / "tokenizer_config.json").exists():
            return str(place)
    return base
