"""A checkpoint on disk: which files it consists of, and the policy they hold.

Weights come from safetensors, the optimizer state by `torch.load(weights_only=True)`:
opening a checkpoint never runs code from it. Whatever is missing, surplus or of another
shape is an error that names it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_ddp.config import Checkpoint, Compute, Precision
from entropy_ddp.errors import InputError
from entropy_ddp.policy.implementations import (
    supported_attention,
    use_exact_experts,
)
from entropy_ddp.policy.parameters import trainable_parameters

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """The parts of one checkpoint.

    Attributes:
        base: folder or hub id of the base model, or of the full-weight model.
        adapter: folder of the PEFT adapter; None for full weights.
        optimizer: file of the optimizer state; None if no step is to be taken.
        tokenizer: folder or hub id that holds the tokenizer.
    """

    base: str
    adapter: Path | None
    optimizer: Path | None
    tokenizer: str


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
    """

    model: nn.Module
    tokenizer: Any
    parameters: dict[str, nn.Parameter]
    files: CheckpointFiles
    dtype: torch.dtype
    device: torch.device

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
        InputError: a folder or file is missing, or the folder is of a kind that cannot
            be read.
    """
    folder = None if checkpoint.path is None else _existing_folder(checkpoint.path)
    adapter = folder if folder and (folder / "adapter_config.json").exists() else None
    if checkpoint.adapter is not None:
        adapter = _existing_folder(checkpoint.adapter)
        if not (adapter / "adapter_config.json").exists():
            raise InputError(
                f"{adapter}: expected a PEFT adapter folder with adapter_config.json, "
                f"found {_listing(adapter)}"
            )
    base = checkpoint.base
    if base is None:
        base = _base_of(folder, adapter)
    elif folder and adapter is None and _has_weights(folder):
        _require_same(folder, base)
    return CheckpointFiles(
        base=base,
        adapter=adapter,
        optimizer=_find_optimizer(checkpoint, folder),
        tokenizer=_find_tokenizer(folder, adapter, base),
    )


def _base_of(folder: Path | None, adapter: Path | None) -> str:
    if adapter is None:
        assert folder is not None
        if not _has_weights(folder):
            raise InputError(
                f"{folder}: expected adapter_config.json (an adapter) or "
                f"{WEIGHT_FILES[0]} (full weights), found {_listing(folder)}"
            )
        return str(folder)
    base = _read_adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise InputError(
            f"{adapter / 'adapter_config.json'}: names no base model; set "
            "checkpoint.base"
        )
    return base


def _require_same(folder: Path, base: str) -> None:
    if Path(base).resolve() != folder.resolve():
        raise InputError(
            f"{folder}: holds full weights, but checkpoint.base names {base}; which of "
            "the two is to be measured? leave checkpoint.base out, or name an adapter"
        )


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in WEIGHT_FILES)


def _read_adapter_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable adapter configuration") from error
    if not isinstance(config, dict):
        found = type(config).__name__
        raise InputError(f"{path}: expected a mapping, found {found}")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: expected peft_type LORA, found {kind}")
    return config


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


def _existing_folder(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise InputError(f"{path}: expected a checkpoint folder, found none there")
    return path


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") or "nothing"


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
    model = _load_base(files.base, dtype, attention)
    use_exact_experts(model, dtype)
    if files.adapter is None:
        model.requires_grad_(True)
    else:
        model = _load_adapter(model, files.adapter)
    if dtype == torch.float64:
        model.to(dtype)
    model.to(device).eval()
    policy = Policy(
        model=model,
        tokenizer=load_tokenizer(files.tokenizer),
        parameters=trainable_parameters(model),
        files=files,
        dtype=dtype,
        device=device,
    )
    if not policy.parameters:
        raise InputError(
            f"{files.adapter or files.base}: has no trainable parameters; is the "
            "adapter one without weights?"
        )
    _require_finite_weights(model)
    return policy


def _load_base(base: str, dtype: torch.dtype, attention: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=supported_attention(base, attention),
            use_safetensors=True,
            trust_remote_code=False,
            # Reported below, by name.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        # Whatever the libraries raise, it is these files that they cannot read.
        raise InputError(
            f"base model {base}: cannot be loaded ({_first_line(error)}); set "
            "checkpoint.base to its folder or hub id"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(_describe(entry) for entry in report[kind])
            raise InputError(
                f"base model {base}: {len(names)} {kind.replace('_', ' ')}, the first "
                f"is {names[0]}; the weights do not belong to its config.json"
            )
    return model


def _describe(entry: Any) -> str:
    """A key of a loading report, with its shapes if they are what is wrong."""
    if isinstance(entry, str):
        return entry
    name, found, expected = entry
    return f"{name} (found {tuple(found)}, expected {tuple(expected)})"


def _load_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    _read_adapter_config(adapter)
    try:
        stored = load_peft_weights(str(adapter), device="cpu")
        wrapped = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except Exception as error:
        # Whatever the libraries raise, it is these files that they cannot read.
        raise InputError(
            f"adapter {adapter}: does not fit the base model ({_first_line(error)}); "
            "is checkpoint.base the model it was trained on?"
        ) from error
    expected = get_peft_model_state_dict(wrapped)
    for name in sorted(expected.keys() ^ stored.keys()):
        place = "the adapter file" if name in expected else "the model"
        raise InputError(
            f"adapter {adapter}: {name} is missing from {place}; is checkpoint.base "
            "the model it was trained on?"
        )
    return wrapped


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder or hub id; None if the folder has none.

    Raises:
        InputError: it is there, and cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        # Whatever the library raises, it is this folder that it cannot read.
        raise InputError(
            f"tokenizer {source}: cannot be loaded ({_first_line(error)})"
        ) from error


def _require_finite_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            raise InputError(f"checkpoint: {name} has NaN or infinite weights")


def _first_line(error: BaseException) -> str:
    """The line of a message that says most: the one that names a tensor, or the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = [line.strip() for line in lines if "size mismatch for" in line]
    return (named or lines)[0]
