"""Opening a checkpoint: its very weights, none of its code, every mistake named."""

import io
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from checkpoints import TARGETS, Saved, save_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils

from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.checkpoint.policy import Policy, load_policy
from entropy_ddp.config import Checkpoint, Precision
from entropy_ddp.errors import InputError

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


def opened(model: str = "float64", **section: Any) -> Policy:
    """The policy of a `checkpoint` section."""
    files = find_checkpoint(Checkpoint(**section))
    return load_policy(files, Precision(model=model), "sdpa", CPU)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the content of a safetensors file."""
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
@pytest.mark.parametrize("full", [False, True])
def test_the_policy_has_the_very_weights_of_the_checkpoint(
    tmp_path: Path, family: str, full: bool
) -> None:
    """Every bit of every parameter, trainable and frozen, under the same names."""
    saved = save_checkpoint(tmp_path, family, full=full)
    policy = opened(**saved.section)
    original = dict(saved.model.named_parameters())
    found = dict(policy.model.named_parameters())
    assert found.keys() == original.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, original[name]), name
        assert parameter.dtype == torch.float64
        assert parameter.requires_grad == original[name].requires_grad
    assert list(policy.parameters) == list(reference.trainable(saved.model))
    assert not any(module.training for module in policy.model.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_has_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    """Frozen weights are rounded to it, whatever the file holds."""
    saved = save_checkpoint(tmp_path, "qwen2")
    policy = opened(dtype, **saved.section)
    frozen = [p for p in policy.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {getattr(torch, dtype)}


def test_all_biases_of_a_lora_adapter_are_trainable(tmp_path: Path) -> None:
    """`bias="all"` trains the base model's biases; they come from the adapter file."""
    base = reference.tiny_gpt2(11, attention="sdpa")
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2, target_modules=TARGETS["gpt2"], bias="all", fan_in_fan_out=True
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False).double()
    with torch.no_grad():
        for parameter in reference.trainable(model).values():
            parameter += 0.125
    model.save_pretrained(tmp_path / "adapter")
    policy = opened(base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    original = reference.trainable(model)
    assert list(policy.parameters) == list(original)
    assert sum(name.endswith("bias") for name in original) > 8
    for name, parameter in policy.parameters.items():
        assert torch.equal(parameter, original[name]), name


def test_a_folder_names_the_rest(tmp_path: Path) -> None:
    """Base from adapter_config.json, optimizer from the folder."""
    saved = save_checkpoint(tmp_path, "qwen2")
    files = find_checkpoint(Checkpoint(path=str(saved.folder)))
    assert files.base == str(saved.base)
    assert files.adapter == saved.folder
    assert files.optimizer == saved.folder / "optimizer.pt"


def test_every_part_can_be_named_by_itself(tmp_path: Path) -> None:
    """What is named wins over what the folder holds."""
    first = save_checkpoint(tmp_path / "first", "qwen2")
    second = save_checkpoint(tmp_path / "second", "qwen2")
    optimizer = first.folder / "optimizer.bin"
    (first.folder / "optimizer.pt").rename(optimizer)
    assert find_checkpoint(Checkpoint(path=str(first.folder))).optimizer == optimizer
    files = find_checkpoint(
        Checkpoint(
            path=str(first.folder),
            base=str(second.base),
            adapter=str(second.folder),
            optimizer=str(second.folder / "optimizer.pt"),
        )
    )
    assert files.base == str(second.base)
    assert files.adapter == second.folder
    assert files.optimizer == second.folder / "optimizer.pt"


def test_full_weights_of_the_folder_are_not_passed_over(tmp_path: Path) -> None:
    """With `base` set as well, either the folder's weights are used or it is refused.

    The optimizer state of the folder fits both models: measuring the other one would
    go unnoticed.
    """
    saved = save_checkpoint(tmp_path, "qwen2", full=True)
    reference.tiny_qwen2(5).save_pretrained(tmp_path / "base")
    try:
        policy = opened(path=str(saved.folder), base=str(tmp_path / "base"))
    except InputError:
        return
    for name, parameter in saved.model.named_parameters():
        assert torch.equal(policy.parameters[name], parameter), name


# What is missing


def remove(name: str) -> Callable[[Saved], None]:
    """A change: a file of the checkpoint folder is gone."""
    return lambda saved: (saved.folder / name).unlink()


def test_a_missing_folder_is_named() -> None:
    """Before any library tries to download it."""
    with pytest.raises(InputError, match="absent: expected a checkpoint folder, found"):
        find_checkpoint(Checkpoint(path="absent"))
    with pytest.raises(InputError, match="absent: expected a checkpoint folder, found"):
        find_checkpoint(Checkpoint(adapter="absent"))


def test_a_folder_without_weights_is_refused_with_its_content(tmp_path: Path) -> None:
    """The message says what was looked for and what is there."""
    (tmp_path / "trainer_state.json").write_text("{}")
    message = (
        r"expected adapter_config.json \(an adapter\) or model.safetensors "
        r"\(full weights\), found .*trainer_state.json"
    )
    with pytest.raises(InputError, match=message):
        find_checkpoint(Checkpoint(path=str(tmp_path)))


def test_an_adapter_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    """`adapter` names a PEFT folder."""
    with pytest.raises(InputError, match="expected a PEFT adapter folder with adapter"):
        find_checkpoint(Checkpoint(base="base", adapter=str(tmp_path)))


def test_an_adapter_that_names_no_base_needs_one(tmp_path: Path) -> None:
    """The message says which key to set."""
    saved = save_checkpoint(tmp_path, "qwen2")
    edit_json(saved.folder / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(InputError, match="names no base model; set checkpoint.base"):
        find_checkpoint(Checkpoint(path=str(saved.folder)))


def test_a_named_optimizer_that_is_missing_is_refused(tmp_path: Path) -> None:
    """No fall-back to the folder's own."""
    saved = save_checkpoint(tmp_path, "qwen2")
    with pytest.raises(InputError, match=r"checkpoint.optimizer: .* is not a file"):
        find_checkpoint(Checkpoint(**saved.section, optimizer=str(tmp_path / "no.pt")))


# What does not fit


def first_changed(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """A change of the first tensor of a file."""

    def changed(tensors: Tensors) -> Tensors:
        name = min(tensors)
        return tensors | {name: change(tensors[name]).contiguous()}

    return changed


def with_nan(tensor: Tensor) -> Tensor:
    """The same tensor with one element that is not a number."""
    return tensor.index_fill(0, torch.tensor([0]), torch.nan)


def without_first(tensors: Tensors) -> Tensors:
    """The same tensors but the first."""
    return {name: tensors[name] for name in sorted(tensors)[1:]}


def with_surplus(tensors: Tensors) -> Tensors:
    """The same tensors and one of another layer."""
    name = next(name for name in tensors if "layers.0" in name)
    return tensors | {name.replace("layers.0", "layers.7"): tensors[name].clone()}


FIRST_ADAPTER_KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_A"
ADAPTER_CONTENTS = [
    (without_first, f"{FIRST_ADAPTER_KEY}.weight is missing from the adapter file"),
    (with_surplus, r"layers\.7\.[a-z_.]+lora_A.weight is missing from the model"),
    (first_changed(with_nan), f"found NaN or infinity in {FIRST_ADAPTER_KEY}"),
    (first_changed(lambda t: t[:1]), f"{FIRST_ADAPTER_KEY}"),
]


@pytest.mark.parametrize(("change", "message"), ADAPTER_CONTENTS)
def test_an_adapter_file_of_other_content_is_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    """Missing, surplus, not finite, or of another shape: the tensor is named."""
    saved = save_checkpoint(tmp_path, "qwen2")
    edit_tensors(saved.folder / "adapter_model.safetensors", change)
    with pytest.raises(InputError, match=message):
        opened(**saved.section)


ADAPTER_CONFIGS = [
    ({"r": 4}, r"layers\.0\.self_attn\.q_proj\.lora_A.*\[2, 16\]"),
    ({"target_modules": ["q_proj"]}, "lora_A.weight is missing from the model"),
    (
        {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]},
        "k_proj.lora_A.weight is missing from the adapter file",
    ),
    ({"target_modules": ["c_attn"]}, "c_attn.* not found in the base model"),
    ({"use_dora": True}, "lora_magnitude_vector is missing from the adapter file"),
    ({"peft_type": "IA3"}, "expected peft_type LORA, found IA3"),
    ({"peft_type": None}, "expected peft_type LORA, found None"),
]


@pytest.mark.parametrize(("changes", "message"), ADAPTER_CONFIGS)
def test_an_adapter_of_another_configuration_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Rank, targets and kind must be those of the weights."""
    saved = save_checkpoint(tmp_path, "qwen2")
    edit_json(saved.folder / "adapter_config.json", **changes)
    with pytest.raises(InputError, match=message):
        opened(**saved.section)


@pytest.mark.parametrize("text", ["{", "[]", '"LORA"', "null"])
def test_an_adapter_configuration_that_is_no_object_is_refused(
    tmp_path: Path, text: str
) -> None:
    """The message names the file."""
    saved = save_checkpoint(tmp_path, "qwen2")
    (saved.folder / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match="adapter_config.json: "):
        opened(**saved.section)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, family: str) -> None:
    """The message asks whether it is the base that the adapter was trained on."""
    saved = save_checkpoint(tmp_path / "qwen2", "qwen2")
    other = save_checkpoint(tmp_path / family, family)
    message = "is checkpoint.base the model it was trained on"
    with pytest.raises(InputError, match=message):
        opened(path=str(saved.folder), base=str(other.base))


def test_an_adapter_of_a_wider_base_is_refused(tmp_path: Path) -> None:
    """The same module names with other shapes: the first such tensor is named."""
    saved = save_checkpoint(tmp_path, "llama")
    wide = tmp_path / "wide"
    config = LlamaConfig.from_pretrained(saved.base, hidden_size=32)
    LlamaForCausalLM(config).save_pretrained(wide)
    with pytest.raises(InputError, match=r"layers\.0\.(mlp|self_attn)\..*lora_A"):
        opened(path=str(saved.folder), base=str(wide))


BASE_CONTENTS = [
    (without_first, "2 missing keys, the first is lm_head.weight"),
    (with_surplus, r"1 unexpected keys, the first is model\.layers\.7\."),
    (
        first_changed(with_nan),
        r"found NaN or infinity in .*model\.embed_tokens\.weight",
    ),
    (first_changed(lambda t: t[:, :8]), r"model\.embed_tokens\.weight"),
]


@pytest.mark.parametrize(("change", "message"), BASE_CONTENTS)
def test_base_weights_of_other_content_are_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    """Missing, surplus, not finite, or of another shape: the tensor is named."""
    saved = save_checkpoint(tmp_path, "qwen2")
    edit_tensors(saved.base / "model.safetensors", change)
    with pytest.raises(InputError, match=message):
        opened(**saved.section)


@pytest.mark.parametrize(
    "changes", [{"model_type": "no-such-model"}, {"num_hidden_layers": 3}]
)
def test_a_base_configuration_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """In one line that names the folder, whatever the library raised."""
    saved = save_checkpoint(tmp_path, "qwen2")
    edit_json(saved.base / "config.json", **changes)
    with pytest.raises(InputError, match=f"base model {re.escape(str(saved.base))}: "):
        opened(**saved.section)


# Damaged files


@pytest.mark.parametrize("keep", [0, 5, 200])
@pytest.mark.parametrize("part", ["adapter", "base"])
def test_a_truncated_safetensors_file_is_refused(
    tmp_path: Path, part: str, keep: int
) -> None:
    """The message names the folder: a download or a copy that was cut off."""
    saved = save_checkpoint(tmp_path, "qwen2")
    folder = saved.folder if part == "adapter" else saved.base
    name = "adapter_model.safetensors" if part == "adapter" else "model.safetensors"
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=re.escape(str(folder))):
        opened(**saved.section)


@pytest.mark.parametrize("part", ["adapter", "base"])
def test_a_missing_weights_file_is_refused(tmp_path: Path, part: str) -> None:
    """It is not looked for elsewhere."""
    saved = save_checkpoint(tmp_path, "qwen2")
    folder = saved.folder if part == "adapter" else saved.base
    name = "adapter_model.safetensors" if part == "adapter" else "model.safetensors"
    (folder / name).unlink()
    with pytest.raises(InputError, match=re.escape(str(folder))):
        opened(**saved.section)


TOKENIZER_FILES = [
    {"tokenizer_config.json": "{"},
    {
        "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "tokenizer.json": "{}",
    },
]


@pytest.mark.parametrize("files", TOKENIZER_FILES)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    """A checkpoint without one has none; a broken one is an error."""
    saved = save_checkpoint(tmp_path, "qwen2")
    assert opened(**saved.section).tokenizer is None
    for name, text in files.items():
        (saved.base / name).write_text(text)
    with pytest.raises(InputError, match="tokenizer .*: cannot be loaded"):
        opened(**saved.section)


# Code in a checkpoint


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return subprocess.check_call, (["touch", str(self.path)],)


@pytest.fixture
def sprung(tmp_path: Path) -> Iterator[Path]:
    """A file that must not exist at the end: code of the checkpoint wrote it."""
    path = tmp_path / "sprung"
    yield path
    assert not path.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    """Loaded without care, the pickle does run code: the tests below prove something."""
    buffer = io.BytesIO()
    torch.save({"w": Trap(tmp_path / "sprung")}, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_pickled_adapter_runs_no_code(tmp_path: Path, sprung: Path) -> None:
    """adapter_model.bin is refused, or read as tensors only."""
    saved = save_checkpoint(tmp_path, "qwen2")
    (saved.folder / "adapter_model.safetensors").unlink()
    torch.save({"w": Trap(sprung)}, saved.folder / "adapter_model.bin")
    with pytest.raises(InputError, match=re.escape(str(saved.folder))):
        opened(**saved.section)


def test_a_pickled_base_runs_no_code(tmp_path: Path, sprung: Path) -> None:
    """pytorch_model.bin is not read at all."""
    saved = save_checkpoint(tmp_path, "qwen2")
    (saved.base / "model.safetensors").unlink()
    torch.save({"w": Trap(sprung)}, saved.base / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"base model .*: cannot be loaded"):
        opened(**saved.section)


def test_training_arguments_are_not_unpickled(tmp_path: Path, sprung: Path) -> None:
    """The Trainer's pickled files beside the weights are left alone."""
    saved = save_checkpoint(tmp_path, "qwen2")
    for name in ("training_args.bin", "scheduler.pt", "rng_state.pth"):
        torch.save(Trap(sprung), saved.folder / name)
    opened(**saved.section)


@pytest.mark.parametrize("answer", ["y", "n"])
def test_model_code_in_the_checkpoint_is_never_run(
    tmp_path: Path, sprung: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """Nobody is asked whether to: an answer would count for one rank of many."""
    saved = save_checkpoint(tmp_path, "qwen2")
    auto_map = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    edit_json(saved.base / "config.json", model_type="own", auto_map=auto_map)
    code = f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n"
    (saved.base / "own.py").write_text(code + "class C: pass\nclass M: pass\n")
    asked: list[str] = []
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.setattr("builtins.input", lambda *p: asked.append(str(p)) or answer)
    with pytest.raises(InputError, match="base model .*--trust-remote-code if you"):
        opened(**saved.section)
    assert not asked
