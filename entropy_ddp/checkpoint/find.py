"""A checkpoint on disk: which files it consists of, and the policy they hold.

Weights come from safetensors, or from pickles by `torch.load(weights_only=True)` where
there is nothing else; so does the optimizer state: opening a checkpoint never runs code
from it. Whatever is missing, surplus or of another shape is an error that names it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_ddp.checkpoint.layouts import (
    ADAPTER_CONFIG,
    DEFAULT_ADAPTER,
    SAFE_FILES,
    adapters_in,
    existing_folder,
    has_full_model,
    is_training_state,
    listing,
    refuse_sharded_weights,
    weight_file,
)
from entropy_ddp.checkpoint.stored import stored_dtypes, tensor_names
from entropy_ddp.checkpoint.weights import (
    load_adapter,
    load_base,
    load_state,
    make_adapter,
    needs_own_code,
    own_code_refused,
    quiet_transformers,
    read_adapter_config,
)
from entropy_ddp.config import Checkpoint, Compute, Precision
from entropy_ddp.errors import InputError
from entropy_ddp.inputs import fault_of_file
from entropy_ddp.model.implementations import use_exact_experts
from entropy_ddp.model.parameters import trainable_parameters

OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")


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


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A model opened for measurement.

    Attributes:
        model: the causal language model in evaluation mode, adapter included.
        tokenizer: its tokenizer, or None if the checkpoint has none.
        parameters: the trainable parameters by name.
        files: where it came from.
        dtype: dtype of weights and activations.
        device: where it is.
        stored: dtypes of the weights in the files, by part of the checkpoint.
    """

    model: nn.Module
    tokenizer: Any
    parameters: dict[str, nn.Parameter]
    files: CheckpointFiles
    dtype: torch.dtype
    device: torch.device
    stored: dict[str, str] = field(default_factory=dict)

    @property
    def vocabulary_size(self) -> int:
        """Number of logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def end_ids(self) -> set[int]:
        """Token ids that end a response: the tokenizer's and the model's own."""
        declared = self.model.generation_config.eos_token_id
        ids = {declared} if isinstance(declared, int) else set(declared or ())
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return ids if own is None else ids | {own}

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model's positions allow; None if unlimited."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


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


def resolve_device(compute: Compute, local_rank: int) -> torch.device:
    """The device of this rank, made torch's current one if it is a GPU.

    Raises:
        InputError: `cuda` was asked for and there is none, or fewer than ranks.
    """
    count = torch.cuda.device_count()
    if compute.device == "cuda" and not count:
        raise InputError("compute.device: cuda asked for, but torch sees no GPU")
    if compute.device == "cpu" or not count:
        return torch.device("cpu")
    if local_rank >= count:
        raise InputError(
            f"compute.device: this machine has {count} GPUs, and rank {local_rank} of "
            "it finds none; start at most that many processes, or set compute.device: "
            "cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def load_policy(
    files: CheckpointFiles,
    precision: Precision,
    attention: str,
    device: torch.device,
) -> Policy:
    """Load base model, adapter and tokenizer; evaluation mode, trainable parameters on.

    Raises:
        InputError: weights are missing, surplus, of another shape or not finite.
    """
    from transformers.utils import logging

    # Its bars would write over ours, on every rank.
    logging.disable_progress_bar()
    dtype = getattr(torch, precision.model)
    model = load_base(files.base, dtype, attention, files.trust_remote_code)
    use_exact_experts(model, dtype)
    if files.adapter is None:
        model.requires_grad_(True)
    elif files.state is None:
        model = load_adapter(model, files.adapter, files.adapter_name)
    else:
        model = make_adapter(model, files.adapter, files.adapter_name)
    if dtype == torch.float64:
        model.to(dtype)
    if files.state is not None:
        load_state(model, files.state)
    model.to(device).eval()
    policy = Policy(
        model=model,
        tokenizer=load_tokenizer(files.tokenizer, files.trust_remote_code),
        parameters=trainable_parameters(model),
        files=files,
        dtype=dtype,
        device=device,
        stored=stored_dtypes(state=files.state, base=files.base, adapter=files.adapter),
    )
    if not policy.parameters:
        raise InputError(
            f"{files.adapter or files.base}: has no trainable parameters; is the "
            "adapter one without weights?"
        )
    _require_finite_weights(model)
    return policy


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id; None if the folder has none.

    Args:
        source: folder or hub id.
        trust_remote_code: whether code that comes with it may be run.

    Raises:
        InputError: it is there, and cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        return None

    def describe(reason: str) -> str:
        if needs_own_code(reason):
            return own_code_refused(f"tokenizer {source}")
        return f"tokenizer {source}: cannot be loaded ({reason}); copy its files again"

    with fault_of_file(f"tokenizer {source}", describe), quiet_transformers():
        return AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code
        )


def _require_finite_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            raise InputError(
                f"checkpoint: expected finite weights, found NaN or infinity in {name}; "
                "take an earlier checkpoint"
            )
