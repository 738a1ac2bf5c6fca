"""A checkpoint's files become a policy: its very weights, every mistake named.

Weights come from safetensors, or from pickles by `torch.load(weights_only=True)` where
there is nothing else; so does the optimizer state: opening a checkpoint never runs code
from it. Whatever is missing, surplus or of another shape is an error that names it.

The reference policy of a loss with a KL term is the base model without its adapter, as
TRL's for an adapter that it made itself. Biases that were trained together with the
adapter (`bias="all"`) stay as they are, there and here.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.checkpoint.find import (
    CheckpointFiles,
    described_weights,
    refuse_unreadable,
)
from entropy_ddp.checkpoint.formats import stored_weights
from entropy_ddp.checkpoint.mapped import (
    map_weights,
    replace_parameters,
    reserve_weights,
)
from entropy_ddp.checkpoint.stored import StoredTensor
from entropy_ddp.checkpoint.weights import (
    SAFE_FILES,
    read_adapter,
    read_adapter_config,
    stored_dtypes,
    unwrapped_name,
    weight_file,
)
from entropy_ddp.config import Compute, Precision
from entropy_ddp.errors import InputError
from entropy_ddp.files import fault_of_file
from entropy_ddp.model.implementations import supported_attention, use_exact_experts
from entropy_ddp.model.parameters import trainable_parameters

# The folder, within a checkpoint, of the copy that TRL keeps of an adapter which it goes
# on training: then that copy is the reference.
REFERENCE_ADAPTER = "ref"


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
        mapped: names of parameters that are still in their files, for a model that is to
            be divided among ranks: they are pages of the files, of the files' dtypes.
        unread: those of them that are not even that, and where they will be read.
        read_whole: of such a model, why every rank has read all of it nevertheless.
    """

    model: nn.Module
    tokenizer: Any
    parameters: dict[str, nn.Parameter]
    files: CheckpointFiles
    dtype: torch.dtype
    device: torch.device
    stored: dict[str, str] = field(default_factory=dict)
    mapped: frozenset[str] = frozenset()
    unread: dict[str, StoredTensor] = field(default_factory=dict)
    read_whole: str | None = None

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
    is_divided: bool = False,
) -> Policy:
    """Load base model, adapter and tokenizer; evaluation mode, trainable parameters on.

    Args:
        is_divided: whether ranks divide the model among them: its weights then stay in
            their files as far as they can, and none of it is on the device yet.

    Raises:
        InputError: weights are missing, surplus, of another shape or not finite.
    """
    from transformers.utils import logging

    # Its bars would write over ours, on every rank.
    logging.disable_progress_bar()
    dtype = getattr(torch, precision.model)
    given = (files.base, dtype, attention, files.trust_remote_code)
    mapped = _mapped_base(files, *given) if is_divided else None
    read_whole = mapped if isinstance(mapped, str) else None
    pages: set[int] = set()
    if isinstance(mapped, nn.Module):
        model, pages = mapped, {id(p) for p in mapped.parameters()}
    else:
        # All weights of the base come from elsewhere: not read twice.
        is_replaced = files.weights is not None and files.adapter is None
        model = (empty_base if is_replaced else load_base)(*given)
    use_exact_experts(model, dtype)
    if files.adapter is None:
        model.requires_grad_(True)
    elif files.weights is None:
        model = load_adapter(model, files.adapter, files.adapter_name)
    else:
        model = make_adapter(model, files.adapter, files.adapter_name)
    if dtype == torch.float64 and not pages:
        model.to(dtype)
    unread: dict[str, StoredTensor] = {}
    if files.weights is None:
        stored = stored_dtypes(base=files.base, adapter=files.adapter)
    else:
        of_state, is_partial, unread = load_state(
            model, files.weights, files.adapter_name, pages
        )
        of_base = stored_dtypes(base=files.base, adapter=None)
        stored = of_state | of_base if is_partial else of_state
    for parameter in model.parameters():
        if pages and id(parameter) not in pages:
            # An adapter's, as PEFT makes it on a model of this dtype.
            wide = torch.promote_types(dtype, torch.float32)
            parameter.data = parameter.data.to(wide)
    (model if pages else model.to(device)).eval()
    policy = Policy(
        model=model,
        tokenizer=load_tokenizer(files.tokenizer, files.trust_remote_code),
        parameters=trainable_parameters(model),
        files=files,
        dtype=dtype,
        device=device,
        stored=stored,
        mapped=frozenset(n for n, p in model.named_parameters() if id(p) in pages),
        unread=unread,
        read_whole=read_whole,
    )
    if not policy.parameters:
        raise InputError(
            f"{files.adapter or files.base}: has no trainable parameters; is the "
            "adapter one without weights?"
        )
    if not pages:
        require_finite_weights(model)
    return policy


def _mapped_base(files: CheckpointFiles, *given: Any) -> nn.Module | str:
    """The base model with its weights in their files, or why they have to be read."""
    if files.weights is not None and files.adapter is not None:
        return "its weights are not those of the base model's files"
    with quiet_transformers():
        model = _unallocated_base(*given)
    if files.weights is not None:
        return reserve_weights(model) or model
    reason = map_weights(model, files.base)
    _, dtype, *_ = given
    is_narrower = any(p.dtype != torch.float64 for p in model.parameters())
    if reason is None and files.adapter and dtype == torch.float64 and is_narrower:
        # An adapter is made of its base's dtype, and then has no more digits.
        return "it is wanted in float64, and stored with less"
    return reason or model


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id; None if the folder has none.

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


def require_finite_weights(model: nn.Module) -> None:
    """Check the weights of a model, or this rank's parts of them.

    Raises:
        InputError: one is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        weights = parameter.detach()
        weights = weights.to_local() if hasattr(weights, "to_local") else weights
        if not bool(weights.isfinite().all()):
            raise InputError(
                f"checkpoint: expected finite weights, found NaN or infinity in {name}; "
                "take an earlier checkpoint"
            )


def load_base(
    base: str, dtype: torch.dtype, attention: str, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a folder or hub id with its weights.

    Raises:
        InputError: it cannot be loaded, needs code that may not be run, or weights are
            missing, surplus or of another shape.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(base)
    pickled = folder.is_dir() and weight_file(folder) not in (None, *SAFE_FILES)

    def describe(reason: str) -> str:
        if needs_own_code(reason):
            return own_code_refused(f"base model {base}")
        hint = _base_hint(folder, base, pickled)
        return f"base model {base}: cannot be loaded ({reason}); {hint}"

    with fault_of_file(f"base model {base}", describe), quiet_transformers():
        model, report = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=supported_attention(base, attention, trust_remote_code),
            use_safetensors=not pickled,
            weights_only=True,
            trust_remote_code=trust_remote_code,
            # Reported below, by name.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(_describe(entry) for entry in report[kind])
            raise InputError(
                f"base model {base}: {len(names)} {kind.replace('_', ' ')}, the first "
                f"is {names[0]}; the weights do not belong to its config.json"
            )
    return model


def empty_base(
    base: str, dtype: torch.dtype, attention: str, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a folder or hub id with weights that are still to be set.

    Its buffers, which no checkpoint holds, are as its configuration makes them.

    Raises:
        InputError: its configuration cannot be read, or needs code that may not be run.
    """
    model = _unallocated_base(base, dtype, attention, trust_remote_code)
    replace_parameters(model, lambda p: torch.empty_like(p, device="cpu"))
    return model


def _unallocated_base(
    base: str, dtype: torch.dtype, attention: str, trust_remote_code: bool
) -> nn.Module:
    """The model of a folder or hub id, whose weights have no memory yet."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(base)

    def describe(reason: str) -> str:
        if needs_own_code(reason):
            return own_code_refused(f"base model {base}")
        hint = "set checkpoint.base to the folder or hub id of the model"
        return (
            f"base model {base}: its configuration cannot be loaded ({reason}); {hint}"
        )

    with fault_of_file(f"base model {base}", describe), quiet_transformers():
        trust = {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(base, **trust)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=supported_attention(
                    base, attention, trust_remote_code
                ),
                **trust,
            )
        model.tie_weights()
        if not folder.is_dir() or (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(base)
    return model


def needs_own_code(reason: str) -> bool:
    """Whether transformers refused files because they need code of their own."""
    return "custom code" in reason or "trust_remote_code" in reason


def own_code_refused(source: str) -> str:
    """The message about files that need code of their own."""
    return (
        f"{source}: needs the Python code that comes with it, which is not run unasked; "
        "read that code, and give --trust-remote-code if you trust it"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the context, the libraries print no reports of their own: errors only."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    before = logging.get_verbosity(), hub.get_verbosity()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before[0])
        hub.set_verbosity(before[1])


def _base_hint(folder: Path, base: str, pickled: bool) -> str:
    """What to do about a base model that cannot be loaded."""
    if pickled:
        return (
            "pickled weights are read as tensors only, no code is run from them; save "
            "them as safetensors with save_pretrained"
        )
    if folder.is_dir():
        refuse_unreadable(folder, "whole weights")
        if (folder / "config.json").is_file() and weight_file(folder) is not None:
            return "copy its files again, or set checkpoint.base to another folder"
        return "set checkpoint.base to its folder or hub id"
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base):
        return (
            "it is no folder here, and as a hub id it is neither in the cache nor can "
            f"it be downloaded: run `hf download {base}` where there is a network, or "
            "set checkpoint.base to its folder"
        )
    return "there is no such folder; set checkpoint.base to where it is now"


def _describe(entry: Any) -> str:
    """A key of a loading report, with its shapes if they are what is wrong."""
    if isinstance(entry, str):
        return entry
    name, found, expected = entry
    return f"{name} (found {tuple(found)}, expected {tuple(expected)})"


def load_adapter(model: nn.Module, adapter: Path, name: str) -> nn.Module:
    """The model with an adapter of this name around it, trainable.

    Raises:
        InputError: the adapter cannot be read, or does not fit the model.
    """
    from peft import PeftModel

    settings = read_adapter_config(adapter)
    stored = read_adapter(adapter)
    _require_base_of(model, adapter, settings.get("base_model_name_or_path"))
    with _misfit(adapter), warnings.catch_warnings():
        # They are told below, as an error.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        wrapped = PeftModel.from_pretrained(
            model, str(adapter), adapter_name=name, is_trainable=True
        )
    require_same_adapter_names(wrapped, adapter, name, stored)
    return wrapped


def _require_base_of(model: nn.Module, adapter: Path, named: Any) -> None:
    """Check a base model against the one that an adapter names, where that is a folder.

    Adapters of two kinds of models can have the same names and shapes.

    Raises:
        InputError: it is of another kind.
    """
    file = Path(str(named)) / "config.json"
    if not isinstance(named, str) or not file.is_file():
        return
    if getattr(model.config, "auto_map", None):
        # Code of its own gives a model a name of its own.
        return

    def describe(reason: str) -> str:
        return f"base model {file}: cannot be read ({reason}); copy it again"

    with fault_of_file(str(file), describe):
        expected = json.loads(file.read_text(encoding="utf-8"))
        kind = expected["model_type"]
    found = model.config.model_type
    if kind != found:
        raise InputError(
            f"adapter {adapter}: expected the base model {named}, a {kind}, found a "
            f"{found}; is checkpoint.base the model it was trained on?"
        )


def require_same_adapter_names(
    model: nn.Module, adapter: Path, name: str, stored: Mapping[str, Tensor]
) -> None:
    """Check that a file of adapter weights has the tensors of the model's adapter.

    Raises:
        InputError: one is missing on either side, or of another shape.
    """
    from peft import get_peft_model_state_dict

    # Left to itself, PEFT compares the vocabulary with the base model's, and asks the hub
    # for it where its folder is not to be found.
    expected, with_embeddings = (
        get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=embeddings
        )
        for embeddings in (False, True)
    )
    if with_embeddings.keys() == stored.keys():
        expected = with_embeddings
    require_same_tensors(f"adapter {adapter}", "the adapter file", stored, expected)


def require_same_tensors(
    source: str,
    place: str,
    stored: Mapping[str, Tensor] | Mapping[str, StoredTensor],
    expected: Mapping[str, Tensor],
) -> None:
    """Check names and shapes of stored tensors.

    Args:
        source: what is opened, for the message.
        place: where the tensors are from, for the message.
        expected: tensors of the names and shapes that they should have.

    Raises:
        InputError: names are missing or surplus, or a shape is another; with the first
            and their number.
    """
    differing = sorted(expected.keys() ^ stored.keys())
    for name in differing:
        where = place if name in expected else "the model"
        raise InputError(
            f"{source}: {name} is missing from {where} ({len(differing)} of "
            f"{len(expected.keys() | stored.keys())} names differ); is checkpoint.base "
            "the model it was trained on?"
        )
    wrong = sorted(n for n in expected if stored[n].shape != expected[n].shape)
    for name in wrong:
        raise InputError(
            f"{source}: {name} should be {tuple(expected[name].shape)}, found "
            f"{tuple(stored[name].shape)} ({len(wrong)} of {len(expected)} tensors have "
            "another shape); is checkpoint.base the model it was trained on?"
        )


def make_adapter(model: nn.Module, adapter: Path, name: str) -> nn.Module:
    """The model with an adapter as configured around it, its weights still to be set.

    Raises:
        InputError: the configuration does not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    read_adapter_config(adapter)
    with _misfit(adapter):
        config = LoraConfig.from_pretrained(str(adapter))
        config.inference_mode = False
        return get_peft_model(model, config, adapter_name=name)


def _misfit(adapter: Path) -> AbstractContextManager[None]:
    return fault_of_file(
        f"adapter {adapter}",
        lambda reason: (
            f"adapter {adapter}: does not fit the base model ({reason}); is "
            "checkpoint.base the model it was trained on?"
        ),
    )


def load_state(
    model: nn.Module,
    weights: Path,
    adapter_name: str = "default",
    later: Collection[int] = (),
) -> tuple[dict[str, str], bool, dict[str, StoredTensor]]:
    """Fill a model with weights by name, of whatever format.

    They are those of the whole model, or of what is trained alone, as trainers save an
    adapter without its base. Every tensor is read once, and of this size only one at a
    time.

    Args:
        later: ids of parameters that are not to be filled.

    Returns:
        The dtypes that they are stored in, as `stored_dtypes` gives them, whether they
        are of what is trained alone, and what was left for later, by name.

    Raises:
        InputError: names or shapes are not the model's.
    """
    stored = {
        _with_adapter(unwrapped_name(name), adapter_name): tensor
        for name, tensor in stored_weights(weights).items()
    }
    expected = model.state_dict()
    # Of tensors that share their memory, a safetensors file has one name only.
    present = {t.data_ptr() for n, t in expected.items() if n in stored}
    tied = {
        n for n, t in expected.items() if n not in stored and t.data_ptr() in present
    }
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    is_partial = bool(frozen) and frozen.isdisjoint(stored)
    if is_partial:
        buffers = {name for name, _ in model.named_buffers()}
        tied |= frozen | (buffers - stored.keys())
    required = {n: t for n, t in expected.items() if n not in tied}
    require_same_tensors(str(weights), described_weights(weights), stored, required)
    names = {id(p): name for name, p in model.named_parameters() if id(p) in later}
    variables, unread = model.state_dict(keep_vars=True), {}
    with torch.no_grad():
        for name, tensor in required.items():
            if id(variables[name]) in names:
                unread[names[id(variables[name])]] = stored[name]
            else:
                tensor.copy_(stored[name].read())
    counts = Counter(str(t.dtype).removeprefix("torch.") for t in stored.values())
    dtypes = {"state": ", ".join(name for name, _ in counts.most_common())}
    return dtypes, is_partial, unread


def _with_adapter(name: str, adapter_name: str) -> str:
    """The name of a tensor with its adapter's, which PEFT leaves out of one alone."""
    return re.sub(r"(\.lora_[A-Za-z_]+)\.weight$", rf"\1.{adapter_name}.weight", name)


def require_reference(policy: Policy) -> None:
    """Check that the base model of the checkpoint is the reference of its KL term.

    Raises:
        InputError: the policy has no adapter, or was trained against another adapter.
    """
    from peft import PeftModel

    files = policy.files
    if not isinstance(policy.model, PeftModel):
        raise InputError(
            f"update.kl_coefficient: expected an adapter in {files.base}, as the "
            "reference policy is the model without it, found full weights; set "
            "update.kl_coefficient: 0 to probe the step without the KL term"
        )
    if files.adapter is None:
        return
    copy = files.adapter / REFERENCE_ADAPTER / "adapter_config.json"
    if copy.is_file():
        raise InputError(
            f"update.kl_coefficient: expected the model without the adapter to be the "
            f"reference policy, found a reference adapter of its own in {copy.parent}; "
            "set update.kl_coefficient: 0 to probe the step without the KL term"
        )


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """Within the context, the model is the one that the adapter was put on."""
    assert isinstance(model, nn.Module)
    # PEFT sets these anew when it enables the adapter again.
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
