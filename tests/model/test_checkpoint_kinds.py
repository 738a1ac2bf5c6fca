"""Folders that the real libraries write: opened with their very weights, and described.

And folders that cannot be read: named for what they are, with the export that helps.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from checkpoints import save_checkpoint, write_rows
from huggingface_hub import constants
from jobs import run_probe
from rich.console import Console
from trained import (
    KINDS,
    Made,
    accelerate_loop,
    lora_config,
    trainer_full,
    trainer_lora,
)

from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.checkpoint.optimizer import load_optimizer
from entropy_ddp.checkpoint.policy import Policy, load_policy
from entropy_ddp.config import Checkpoint, Config, Precision
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.probe.check import inspect_run
from entropy_ddp.probe.opening import require_optimizer
from entropy_ddp.terminal.commands import print_inspection

CPU = torch.device("cpu")


def quiet(phase: str, done: int, total: int) -> None:
    """Shows no progress."""


def opened(section: dict[str, str], **precision: Any) -> Policy:
    """The policy of a `checkpoint` section."""
    files = find_checkpoint(Checkpoint(**section))
    return load_policy(files, Precision(**precision), "sdpa", CPU)


def config_of(root: Path, section: dict[str, str]) -> Config:
    """A configuration with small batches."""
    batches = {
        split: {
            "file": str(
                write_rows(
                    root / f"{split}.jsonl",
                    reference.random_rows(
                        seed, responses=[2, 3, 2], groups=3, vocabulary=13
                    ),
                )
            )
        }
        for split, seed in (("E", 3), ("U", 4))
    }
    return Config.model_validate({"checkpoint": section, "batches": batches})


def described(config: Config) -> str:
    """What `check` prints in 100 columns, its cells' lines joined."""
    console = Console(file=io.StringIO(), width=100)
    print_inspection(console, inspect_run(config, World(), quiet))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    return text


def squeezed(text: str) -> str:
    """Without what a table puts between words, and without spaces."""
    return re.sub(r"[\s│┃]", "", text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_opened_with_its_weights_and_described(
    tmp_path: Path, kind: str
) -> None:
    """Every parameter under its name, its own first moment, and `check`'s table."""
    made = KINDS[kind].make(tmp_path)
    policy = opened(made.section)
    expected = reference.trainable(made.model)
    assert list(policy.parameters) == list(expected)
    found = dict(policy.model.named_parameters())
    for name, parameter in made.model.named_parameters():
        if ".ref." not in name:
            assert torch.equal(found[name], parameter.float()), name
    assert policy.files.optimizer is not None
    optimizer = load_optimizer(policy.files.optimizer, policy.model, policy.parameters)
    for name, parameter in policy.parameters.items():
        moment = optimizer.state[parameter]["exp_avg"]
        assert torch.equal(moment, made.moments[name].float()), name
    text = described(config_of(tmp_path, made.section))
    for words in KINDS[kind].says:
        assert squeezed(words) in squeezed(text), (words, text)


@pytest.mark.parametrize(
    "kind", ["accelerate, LoRA", "full, sharded", "full, bfloat16"]
)
def test_a_folder_is_probed(tmp_path: Path, kind: str) -> None:
    """From the folder to results whose audits find nothing wrong with the state."""
    made = KINDS[kind].make(tmp_path)
    results = run_probe(config_of(tmp_path, made.section), World(), None, quiet).results
    rows = {row.name: row for row in results.audit}
    assert rows["parameters without optimizer state"].verdict == "ok"
    assert rows["restored bits: parameters and optimizer state"].verdict == "ok"
    row = rows.get("weights of the base are stored as")
    found = None if row is None else (row.value, row.expected)
    expected = ("bfloat16", "used as float32") if "bfloat16" in kind else None
    assert found == expected
    assert results.update.learning_rate_used == 1e-2
    assert results.update.param_update_l2 > 0


# Names that are not settled


def test_several_adapters_must_be_chosen_by_name(tmp_path: Path) -> None:
    """Both are listed; a name or a folder settles it."""
    made = KINDS["several adapters"].make(tmp_path)
    path = made.section["path"]
    message = "holds 2 adapters: default, ref; set checkpoint.adapter to the name"
    with pytest.raises(InputError, match=message):
        find_checkpoint(Checkpoint(path=path))
    by_name = find_checkpoint(Checkpoint(path=path, adapter="ref"))
    by_folder = find_checkpoint(Checkpoint(path=path, adapter=f"{path}/ref"))
    assert by_name == by_folder
    assert by_name.adapter == Path(path) / "ref"
    policy = opened({"path": path, "adapter": "ref"})
    assert all(".ref." in name for name in policy.parameters)
    assert policy.model.peft_config["ref"].r == 4


def test_an_unknown_adapter_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    """A name that is neither a folder nor an adapter."""
    made = KINDS["several adapters"].make(tmp_path)
    path = made.section["path"]
    with pytest.raises(InputError, match="nobody: .*has the adapters default, ref"):
        find_checkpoint(Checkpoint(path=path, adapter="nobody"))


def test_a_base_can_be_a_folder_that_wins_over_the_adapter_s(tmp_path: Path) -> None:
    """adapter_config.json names it; checkpoint.base is another copy."""
    made = trainer_lora(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="no such folder; set checkpoint.base"):
        opened(made.section)
    assert opened(made.section | {"base": str(tmp_path / "moved")}).parameters


def test_a_hub_id_that_is_not_here_says_what_to_download(tmp_path: Path) -> None:
    """Offline, as tests are."""
    made = trainer_lora(tmp_path)
    message = "run `hf download nobody/no-such-model` where there is a network, or set"
    with pytest.raises(InputError, match=message):
        opened(made.section | {"base": "nobody/no-such-model"})


def test_a_hub_id_in_the_cache_is_opened_and_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a download leaves it."""
    made = trainer_lora(tmp_path)
    cached = tmp_path / "hub" / "models--somebody--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abc")
    (cached / "snapshots").mkdir()
    (tmp_path / "base").rename(cached / "snapshots" / "0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    policy = opened(made.section | {"base": "somebody/tiny"})
    assert policy.files.base == "somebody/tiny"
    assert policy.stored == {"base": "float32", "adapter": "float32"}


# accelerate


def test_a_state_needs_the_settings_of_its_adapter(tmp_path: Path) -> None:
    """Rank can be read from shapes, alpha cannot."""
    made = accelerate_loop(tmp_path, lora=True)
    section = {k: v for k, v in made.section.items() if k != "adapter"}
    message = (
        "holds a PEFT model, and its settings .* set checkpoint.adapter to a folder"
    )
    with pytest.raises(InputError, match=message):
        find_checkpoint(Checkpoint(**section))


def test_a_state_needs_a_model(tmp_path: Path) -> None:
    """Weights without a config.json."""
    made = accelerate_loop(tmp_path, lora=False)
    with pytest.raises(InputError, match="without a config.json, as accelerate's"):
        find_checkpoint(Checkpoint(path=made.section["path"]))


def test_a_state_of_full_weights_has_no_adapter(tmp_path: Path) -> None:
    """An adapter that is named beside it would not be used."""
    made = accelerate_loop(tmp_path, lora=False)
    lora_config("qwen2").save_pretrained(str(tmp_path / "adapter"))
    section = made.section | {"adapter": str(tmp_path / "adapter")}
    with pytest.raises(
        InputError, match="has no LoRA weights; leave checkpoint.adapter"
    ):
        find_checkpoint(Checkpoint(**section))


def test_a_state_of_another_adapter_is_refused(tmp_path: Path) -> None:
    """Another rank: the first tensor and how many."""
    made = accelerate_loop(tmp_path, lora=True)
    lora_config("qwen2", r=4).save_pretrained(made.section["adapter"])
    message = r"lora_A.default.weight should be \(4, 24\), found \(2, 24\) \(12 of"
    with pytest.raises(InputError, match=message):
        opened(made.section)


def test_a_state_of_several_adapters_is_refused(tmp_path: Path) -> None:
    """Which of them is trained cannot be told."""
    made = accelerate_loop(tmp_path, lora=True)
    path = Path(made.section["path"]) / "model.safetensors"
    tensors = made.model.state_dict()
    extra = {
        n.replace("default", "ref"): t + 1 for n, t in tensors.items() if "lora" in n
    }
    path.unlink()
    torch.save(tensors | extra, path.with_name("pytorch_model.bin"))
    with pytest.raises(InputError, match="expected one adapter .* found default, ref"):
        find_checkpoint(Checkpoint(**made.section))


# What other trainers leave

REFUSED: dict[str, tuple[list[str], str, str]] = {
    "Megatron": (
        ["latest_checkpointed_iteration.txt", "iter_0000100/common.pt"],
        "a Megatron checkpoint",
        "Megatron-Bridge",
    ),
    "Megatron of verl": (
        ["actor/dist_ckpt/common.pt"],
        "a Megatron checkpoint",
        "verl.model_merger merge --backend megatron",
    ),
    "LOCAL_STATE_DICT": (
        ["pytorch_model_fsdp_rank0.bin", "pytorch_model_fsdp_rank1.bin"],
        "a checkpoint of FSDP's LOCAL_STATE_DICT",
        "SHARDED_STATE_DICT or FULL_STATE_DICT",
    ),
    "DeepSpeed, no optimizer states": (
        ["zero_to_fp32.py", "latest", "global_step7/mp_rank_00_model_states.pt"],
        "a DeepSpeed checkpoint without ZeRO's optimizer states",
        "copy the \\*_optim_states.pt of every rank",
    ),
    "DCP without its description": (
        ["__0_0.distcp", "__1_0.distcp"],
        "without its .metadata",
        "copy .metadata too",
    ),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_a_checkpoint_that_is_not_read_is_named_with_what_helps(
    tmp_path: Path, layout: str
) -> None:
    """Without weights at once; with them when the optimizer is asked for."""
    names, kind, advice = REFUSED[layout]
    saved = save_checkpoint(tmp_path, "qwen2", full=True)
    (saved.folder / "optimizer.pt").unlink()
    shards = tmp_path / "shards"
    for folder in (shards, saved.folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    for section in (
        {"path": str(shards)},
        # Nor is the base measured in place of them.
        {"path": str(shards), "base": str(saved.base)},
        {"base": str(saved.base), "weights": str(shards)},
        {"base": str(saved.base), "optimizer": str(shards)},
    ):
        with pytest.raises(InputError, match=f"found .*{kind}.*{advice}"):
            find_checkpoint(Checkpoint(**section))
    files = find_checkpoint(Checkpoint(path=str(saved.folder)))
    with pytest.raises(InputError, match=f"found .*{kind}.*{advice}.*update.delta"):
        require_optimizer(files)


@pytest.mark.parametrize("key", ["weights", "optimizer"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, key: str) -> None:
    """What is there is listed."""
    saved = save_checkpoint(tmp_path, "qwen2", full=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    section = {"base": str(saved.base), key: str(tmp_path / "other")}
    with pytest.raises(InputError, match=f"checkpoint.{key}: .*notes.txt"):
        find_checkpoint(Checkpoint(**section))


def test_weights_may_be_named_beside_a_base(tmp_path: Path) -> None:
    """Those of another folder take the place of the base's."""
    made = accelerate_loop(tmp_path, lora=False)
    section = {"base": made.section["base"], "weights": made.section["path"]}
    expected = reference.trainable(made.model)
    for name, tensor in opened(section).parameters.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_folder_without_optimizer_says_what_would_do(tmp_path: Path) -> None:
    """The state, or a change in place of a step."""
    saved = save_checkpoint(tmp_path, "qwen2")
    (saved.folder / "optimizer.pt").unlink()
    files = find_checkpoint(Checkpoint(**saved.section))
    with pytest.raises(
        InputError, match="no optimizer.pt .* or measure .*update.delta"
    ):
        require_optimizer(files)


TESTED: dict[str, Callable[[Path], Made]] = {
    "adapter": trainer_lora,
    "full": lambda root: trainer_full(root, "qwen2"),
}


@pytest.mark.parametrize("kind", TESTED)
def test_pickled_weights_are_read_as_tensors(tmp_path: Path, kind: str) -> None:
    """Where there is no safetensors file."""
    made = TESTED[kind](tmp_path)
    folder = Path(made.section["path"])
    name, pickle = "model.safetensors", "pytorch_model.bin"
    if kind == "adapter":
        name, pickle = "adapter_model.safetensors", "adapter_model.bin"
    from safetensors.torch import load_file

    tensors = load_file(folder / name)
    (folder / name).unlink()
    torch.save(tensors, folder / pickle)
    expected = reference.trainable(made.model)
    for parameter, tensor in opened(made.section).parameters.items():
        assert torch.equal(tensor, expected[parameter]), parameter
