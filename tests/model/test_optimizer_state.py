"""The saved AdamW state: every parameter gets its own, whoever saved it."""

import copy
import io
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from checkpoints import FAMILIES, TARGETS, Saved, save_checkpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
)
from trained import train
from transformers import Adafactor, GPT2Config, GPT2LMHeadModel

from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.checkpoint.optimizer import (
    _require_same_names as require_same_names,
)
from entropy_ddp.checkpoint.optimizer import load_optimizer
from entropy_ddp.checkpoint.policy import load_policy
from entropy_ddp.config import Checkpoint, Precision
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import trainable_parameters

State = dict[str, Any]
CPU = torch.device("cpu")
MOMENTS = ("exp_avg", "exp_avg_sq")


def require_own_state(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    expected: dict[str, dict[str, Tensor]],
) -> None:
    """Every parameter has the state that is expected under its name, bit for bit."""
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        found = optimizer.state[parameter]
        assert found.keys() == expected[name].keys(), name
        for key, value in expected[name].items():
            assert torch.equal(found[key], value.to(found[key].dtype)), (name, key)


# What real trainers save


def with_all_biases(model: nn.Module, family: str) -> nn.Module:
    """A LoRA adapter that trains the base model's biases too."""
    config = LoraConfig(
        r=2,
        target_modules=TARGETS[family],
        bias="all",
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


@pytest.mark.parametrize("lora", [True, False], ids=["lora, all biases", "full"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_every_parameter_gets_the_state_it_had_in_the_trainer(
    tmp_path: Path, family: str, lora: bool
) -> None:
    """Compared by identity with the optimizer of a Trainer that ran two steps."""
    model = FAMILIES[family](3).float()
    model.save_pretrained(tmp_path / "base")
    if lora:
        model = with_all_biases(model, family)
    trainer = train(tmp_path / "run", model)
    section = {"path": str(tmp_path / "run" / "checkpoint-2")}
    if lora:
        section["base"] = str(tmp_path / "base")
    files = find_checkpoint(Checkpoint(**section))
    policy = load_policy(files, Precision(), "sdpa", CPU)
    optimizer = load_optimizer(files.optimizer, policy.model, policy.parameters)
    trained = trainable_parameters(trainer.model)
    original = trainer.optimizer.optimizer
    require_own_state(
        optimizer,
        policy.parameters,
        {name: original.state[p] for name, p in trained.items()},
    )
    for name, parameter in policy.parameters.items():
        assert torch.equal(parameter, trained[name]), name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert sizes == [len(group["params"]) for group in original.param_groups]
    # Llama has neither biases nor trainable norms under an adapter.
    assert (sizes[1] == 0) == (family == "llama" and lora)


def test_the_next_step_is_the_trainer_s_next_step(tmp_path: Path) -> None:
    """One step with the same gradient gives the same bits as the trainer's optimizer."""
    model = FAMILIES["gpt2"](3).float()
    trainer = train(tmp_path, model, adam_beta2=0.98, adam_epsilon=1e-6)
    files = find_checkpoint(Checkpoint(path=str(tmp_path / "checkpoint-2")))
    policy = load_policy(files, Precision(), "sdpa", CPU)
    optimizer = load_optimizer(files.optimizer, policy.model, policy.parameters)
    trained = trainable_parameters(trainer.model)
    original = trainer.optimizer.optimizer
    for group in original.param_groups:
        group.update(fused=None, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.parameters.items():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        trained[name].grad = parameter.grad.clone()
    optimizer.step()
    original.step()
    for name, parameter in policy.parameters.items():
        assert torch.equal(parameter, trained[name]), name


# Layouts


def deep_model() -> nn.Module:
    """Twelve layers: layers.10 sorts before layers.2 in a file."""
    config = GPT2Config(
        vocab_size=7, n_positions=8, n_embd=4, n_layer=12, n_head=1, use_cache=False
    )
    return GPT2LMHeadModel(config)


def marked(optimizer: torch.optim.Adam, parameters: dict[str, nn.Parameter]) -> State:
    """Give every parameter a state of its own and return it by name."""
    for number, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    optimizer.step()
    return {name: optimizer.state[p] for name, p in parameters.items()}


def decay_groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The Trainer's two groups of a GPT-2, by the names of its modules."""
    plain = [n for n in parameters if not re.search(r"bias|\.ln_", n)]
    return [
        {"params": [parameters[n] for n in plain], "weight_decay": 0.1},
        {
            "params": [p for n, p in parameters.items() if n not in plain],
            "weight_decay": 0.0,
        },
    ]


LAYOUTS: dict[str, Callable[[dict[str, nn.Parameter]], list[Any]]] = {
    "decay and no decay": decay_groups,
    "flat": lambda parameters: list(parameters.values()),
    "named and shuffled": lambda parameters: sorted(parameters.items(), reverse=True),
    "named groups": lambda parameters: [
        {"params": [(n, p) for n, p in parameters.items() if ("ln" in n) == last]}
        for last in (True, False)
    ],
    "named as if wrapped": lambda parameters: [
        (f"module.{name}", p) for name, p in sorted(parameters.items())
    ],
}


@pytest.mark.parametrize("lora", [True, False], ids=["lora, all biases", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_are_matched_by_name_in_deep_models(
    tmp_path: Path, layout: str, lora: bool
) -> None:
    """Twelve layers of equal shapes: a wrong order would fit without a sound."""
    model = deep_model()
    if lora:
        model = with_all_biases(model, "gpt2")
    parameters = trainable_parameters(model)
    saved = torch.optim.AdamW(LAYOUTS[layout](parameters), lr=1e-3)
    expected = marked(saved, parameters)
    torch.save(saved.state_dict(), tmp_path / "optimizer.pt")
    other = copy.deepcopy(model)
    loaded = load_optimizer(
        tmp_path / "optimizer.pt", other, trainable_parameters(other)
    )
    require_own_state(loaded, trainable_parameters(other), expected)


def test_an_empty_second_group_is_the_trainer_s_plain_lora(tmp_path: Path) -> None:
    """Without biases or norms among them, all parameters decay."""
    saved = save_checkpoint(tmp_path, "llama")
    assert [len(g["params"]) for g in saved.optimizer.param_groups] == [12, 0]
    parameters = reference.trainable(saved.model)
    loaded = load_optimizer(saved.folder / "optimizer.pt", saved.model, parameters)
    expected = {name: saved.optimizer.state[p] for name, p in parameters.items()}
    require_own_state(loaded, parameters, expected)


def test_hyper_parameters_come_from_the_saved_groups(tmp_path: Path) -> None:
    """Learning rate, betas, epsilon and decay of each group; no library default."""
    model = deep_model()
    parameters = trainable_parameters(model)
    saved = torch.optim.AdamW(decay_groups(parameters), lr=1.0)
    marked(saved, parameters)
    for number, group in enumerate(saved.param_groups):
        group.update(lr=0.5 + number, betas=(0.7, 0.8), eps=1e-5 * (1 + number))
    torch.save(saved.state_dict(), tmp_path / "optimizer.pt")
    loaded = load_optimizer(tmp_path / "optimizer.pt", model, parameters)
    found = [
        (g["lr"], tuple(g["betas"]), g["eps"], g["weight_decay"])
        for g in loaded.param_groups
    ]
    assert found == [
        (0.5, (0.7, 0.8), 1e-5, 0.1),
        (1.5, (0.7, 0.8), 2e-5, 0.0),
    ]


@pytest.mark.parametrize("flags", [{}, {"amsgrad": True}, {"maximize": True}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_the_next_step_is_that_of_the_optimizer_that_was_saved(
    tmp_path: Path, kind: type[torch.optim.Adam], flags: dict[str, bool]
) -> None:
    """Decay added to the gradient or to the weights, and torch's other variants."""
    model = deep_model()
    parameters = trainable_parameters(model)
    saved = kind(parameters.values(), lr=0.1, weight_decay=0.3, foreach=False, **flags)
    marked(saved, parameters)
    torch.save(saved.state_dict(), tmp_path / "optimizer.pt")
    other = copy.deepcopy(model)
    loaded = load_optimizer(
        tmp_path / "optimizer.pt", other, trainable_parameters(other)
    )
    assert type(loaded) is kind
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    saved.step()
    loaded.step()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_states_saved_before_the_flag_existed_are_adamw(tmp_path: Path) -> None:
    """Older versions of torch did not write `decoupled_weight_decay`."""
    saved = save_checkpoint(tmp_path, "gpt2")
    state = saved.optimizer.state_dict()
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"]
    torch.save(state, saved.folder / "optimizer.pt")
    parameters = reference.trainable(saved.model)
    loaded = load_optimizer(saved.folder / "optimizer.pt", saved.model, parameters)
    assert type(loaded) is torch.optim.AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_take_the_dtype_of_the_parameters(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """A float32 state serves a float64 measurement."""
    saved = save_checkpoint(tmp_path, "qwen2")
    state = saved.optimizer.state_dict()
    for entry in state["state"].values():
        for key in MOMENTS:
            entry[key] = entry[key].float()
    torch.save(state, saved.folder / "optimizer.pt")
    model = copy.deepcopy(saved.model).to(dtype)
    parameters = reference.trainable(model)
    loaded = load_optimizer(saved.folder / "optimizer.pt", model, parameters)
    for parameter in parameters.values():
        assert {loaded.state[parameter][key].dtype for key in MOMENTS} == {dtype}


VARIANTS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
    "learning rate in a tensor": {"lr": torch.tensor(0.1), "foreach": False},
    "amsgrad and fused": {"amsgrad": True, "fused": True},
    "differentiable": {"differentiable": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_variants_of_the_kernel_are_read_and_stepped_plainly(
    tmp_path: Path, kind: type[torch.optim.Adam], variant: str
) -> None:
    """The state is the same; the next step is the variant's up to its rounding."""
    flags = VARIANTS[variant]
    model = deep_model().double()
    parameters = trainable_parameters(model)
    plain = {"capturable": False, "differentiable": False}
    # These two step on a GPU, or through autograd: only their flags are of interest.
    settings = {k: v for k, v in flags.items() if k not in plain}
    saved = kind(parameters.values(), **{"lr": 0.1, "weight_decay": 0.3} | settings)
    expected = marked(saved, parameters)
    state = saved.state_dict()
    for group in state["param_groups"]:
        group.update({k: v for k, v in flags.items() if k in plain})
    torch.save(state, tmp_path / "optimizer.pt")
    other = copy.deepcopy(model)
    loaded = load_optimizer(
        tmp_path / "optimizer.pt", other, trainable_parameters(other)
    )
    require_own_state(loaded, trainable_parameters(other), expected)
    (group,) = loaded.param_groups
    assert not any(group[k] for k in ("fused", "foreach", *plain))
    assert isinstance(group["lr"], float)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    saved.step()
    loaded.step()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_every_group_keeps_its_learning_rate(tmp_path: Path) -> None:
    """Two groups of the Trainer's, the second ten times as fast."""
    model = deep_model()
    parameters = trainable_parameters(model)
    groups = decay_groups(parameters)
    for group, rate in zip(groups, (1e-3, 1e-2)):
        group["lr"] = rate
    saved = torch.optim.AdamW(groups)
    marked(saved, parameters)
    torch.save(saved.state_dict(), tmp_path / "optimizer.pt")
    other = copy.deepcopy(model)
    loaded = load_optimizer(
        tmp_path / "optimizer.pt", other, trainable_parameters(other)
    )
    assert [group["lr"] for group in loaded.param_groups] == [1e-3, 1e-2]
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    for group in saved.param_groups:
        group["foreach"] = False
    saved.step()
    loaded.step()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("lora", [True, False], ids=["lora, all biases", "full"])
def test_a_gathered_state_is_read_by_its_names(tmp_path: Path, lora: bool) -> None:
    """What the refusal of FSDP checkpoints tells users to save, by torch itself."""
    model = deep_model()
    if lora:
        model = with_all_biases(model, "gpt2")
    parameters = trainable_parameters(model)
    saved = torch.optim.AdamW(LAYOUTS["decay and no decay"](parameters), lr=1e-3)
    expected = marked(saved, parameters)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_optimizer_state_dict(model, saved, options=options)
    assert "transformer.wpe.weight" in gathered["state"] or lora
    torch.save(gathered, tmp_path / "optimizer.pt")
    other = copy.deepcopy(model)
    loaded = load_optimizer(
        tmp_path / "optimizer.pt", other, trainable_parameters(other)
    )
    require_own_state(loaded, trainable_parameters(other), expected)
    assert [g["weight_decay"] for g in loaded.param_groups] == [0.1, 0.0]


# What is refused


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A checkpoint whose optimizer state the tests damage."""
    return save_checkpoint(tmp_path, "qwen2")


def refused(saved: Saved, message: str, state: Any = None) -> None:
    """Require that opening the state fails with the path and this message."""
    path = saved.folder / "optimizer.pt"
    if state is not None:
        torch.save(state, path)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: .*{message}"):
        load_optimizer(path, saved.model, reference.trainable(saved.model))


def test_a_cold_state_is_refused(saved: Saved) -> None:
    """A fresh optimizer would step in another direction."""
    fresh = torch.optim.AdamW(reference.trainable(saved.model).values())
    message = "no state for .*lora_A.*; was the checkpoint saved before the first step"
    refused(saved, message, fresh.state_dict())


def test_a_parameter_without_state_is_named(saved: Saved) -> None:
    """One missing entry is as bad as all."""
    state = saved.optimizer.state_dict()
    del state["state"][5]
    name = list(reference.trainable(saved.model))[5]
    refused(saved, f"no state for {re.escape(name)}", state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: e.pop("exp_avg"),
            "expected AdamW's exp_avg for .*, found exp_avg_sq",
        ),
        (lambda e: e.pop("step"), "expected AdamW's step for"),
        (
            lambda e: e.update(exp_avg=e["exp_avg"][:1]),
            r"exp_avg of .* should be \(2, 16\), found \(1, 16\)",
        ),
        (
            lambda e: e.update(exp_avg_sq=e["exp_avg_sq"].T.contiguous()),
            r"exp_avg_sq of .* should be \(2, 16\), found \(16, 2\)",
        ),
        (
            lambda e: e.update(exp_avg_sq=0.5),
            r"exp_avg_sq of .* should be \(2, 16\), found float",
        ),
        (
            lambda e: e["exp_avg"].view(-1)[3].fill_(torch.nan),
            "exp_avg of .* has NaN or infinite values",
        ),
        (
            lambda e: e["exp_avg_sq"].view(-1)[3].fill_(torch.inf),
            "exp_avg_sq of .* has NaN or infinite values",
        ),
    ],
)
def test_an_entry_that_no_adamw_has_is_refused(
    saved: Saved, change: Callable[[State], Any], message: str
) -> None:
    """Keys, shapes and values of every entry are looked at; the parameter is named."""
    state = copy.deepcopy(saved.optimizer.state_dict())
    change(state["state"][0])
    refused(saved, message, state)


def test_the_state_of_other_parameters_is_refused(saved: Saved, tmp_path: Path) -> None:
    """Another number of parameters, or the same number with other shapes."""
    parameters = list(reference.trainable(saved.model).values())
    fewer = torch.optim.AdamW(parameters[1:])
    message = r"expected param groups of \[12\] parameters .*, found \[11\]"
    refused(saved, message, fewer.state_dict())
    other = save_checkpoint(tmp_path / "other", "llama")
    message = r"should be \(2, 24\), found \(2, 16\); it is the state of other"
    refused(saved, message, other.optimizer.state_dict())


def test_groups_built_in_another_way_are_refused(saved: Saved) -> None:
    """Two groups that are not decay and no decay; three groups."""
    parameters = list(reference.trainable(saved.model).values())
    for cuts in ([4, 8], [4, 4, 4]):
        pieces = iter(parameters)
        groups = [{"params": [next(pieces) for _ in range(cut)]} for cut in cuts]
        state = torch.optim.AdamW(groups).state_dict()
        message = r"expected param groups of .*, found " + re.escape(str(cuts))
        refused(saved, message, state)


def test_stored_names_of_other_parameters_are_refused(saved: Saved) -> None:
    """The first name that is missing on either side is told."""
    named = dict(reference.trainable(saved.model))
    named["an.other.name"] = named.pop(next(iter(named)))
    optimizer = torch.optim.AdamW(named.items())
    marked(optimizer, named)
    message = "parameter an.other.name is missing from the model's trainable ones"
    refused(saved, message, optimizer.state_dict())


def test_names_are_compared_once_each() -> None:
    """A mixture of experts has ten thousand of them."""
    compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str(self) == other

    names = [f"layers.{number}.weight" for number in range(300)]
    parameters: Any = dict.fromkeys(map(Name, names))
    require_same_names(Path("optimizer.pt"), [*map(Name, names)], parameters)
    assert compared <= 3 * len(names)
    with pytest.raises(InputError, match="parameter layers.7.weight stands in its gro"):
        require_same_names(Path("optimizer.pt"), [*names, names[7]], parameters)


def test_a_gathered_state_of_other_parameters_is_refused(saved: Saved) -> None:
    """By the name that stands in no group."""
    state = saved.optimizer.state_dict()
    names = list(reference.trainable(saved.model))
    group = state["param_groups"][0] | {"params": names[:-1]}
    entries = dict(zip(names, state["state"].values(), strict=True))
    message = f"state for {re.escape(names[-1])}, which is in no group"
    refused(saved, message, {"state": entries, "param_groups": [group]})
    del entries[names[-1]]
    message = f"{re.escape(names[-1])} is missing from the optimizer state"
    refused(saved, message, {"state": entries, "param_groups": [group]})


def test_surplus_state_is_refused(saved: Saved) -> None:
    """An entry that belongs to no parameter."""
    state = saved.optimizer.state_dict()
    state["state"][99] = state["state"][0]
    refused(saved, "state for id 99, which is in no group", state)


def momentum_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def plain_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD without any state."""
    return torch.optim.SGD(parameters, lr=0.1)


def muon(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Muon over matrices, which are all that an adapter has."""
    return torch.optim.Muon(parameters, lr=0.1)


def trainer_adafactor(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The Trainer's `optim: adafactor`."""
    return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)


OTHER_KINDS = {
    "SGD": momentum_sgd,
    "SGD without momentum": plain_sgd,
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adafactor of torch": torch.optim.Adafactor,
    "Adafactor": trainer_adafactor,
    "Muon": muon,
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_the_state_of_another_kind_of_optimizer_is_refused_by_name(
    saved: Saved, name: str
) -> None:
    """Even where it has both moments: its step is another one."""
    parameters = reference.trainable(saved.model)
    optimizer = OTHER_KINDS[name](list(parameters.values()))
    marked(optimizer, parameters)
    kind = name.split()[0]
    message = f"found that of {kind} .*update.delta: the next checkpoint measures"
    refused(saved, message, optimizer.state_dict())


BYTES = torch.zeros(32, dtype=torch.uint8)
# What libraries that are not installed here leave: (keys of a group, a state, name).
FOREIGN: dict[str, tuple[set[str], State, str]] = {
    "bitsandbytes, 8 bit": (
        {"params", "lr", "betas", "eps", "weight_decay", "alpha", "t_alpha"},
        {
            "step": 3,
            "state1": BYTES,
            "qmap1": torch.zeros(256),
            "absmax1": torch.ones(1),
            "state2": BYTES,
            "qmap2": torch.zeros(256),
            "absmax2": torch.ones(1),
        },
        "an 8-bit optimizer of bitsandbytes",
    ),
    "bitsandbytes, parameters too small for 8 bit": (
        {"params", "lr", "betas", "eps", "weight_decay"},
        {"step": 3, "state1": torch.zeros(32), "state2": torch.zeros(32)},
        "an optimizer of bitsandbytes",
    ),
    "Lion": (
        {"params", "lr", "betas", "weight_decay"},
        {"exp_avg": torch.zeros(32)},
        "Lion",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_the_states_of_other_libraries_are_refused_by_name(
    saved: Saved, name: str
) -> None:
    """By the keys of their groups and states."""
    keys, entry, kind = FOREIGN[name]
    state = saved.optimizer.state_dict()
    groups = [{key: group.get(key) for key in keys} for group in state["param_groups"]]
    entries = {number: dict(entry) for number in state["state"]}
    message = f"found that of {kind} .*other optimizers are not supported"
    refused(saved, message, {"state": entries, "param_groups": groups})


def test_groups_that_mix_adam_and_adamw_are_refused(saved: Saved) -> None:
    """One optimizer has one rule of decay."""
    state = saved.optimizer.state_dict()
    state["param_groups"][0]["decoupled_weight_decay"] = False
    refused(saved, "its param groups mix Adam and AdamW", state)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2, 3],
        {"state": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        torch.ones(3),
    ],
)
def test_a_file_of_another_structure_is_refused(saved: Saved, content: Any) -> None:
    """A whole training state, say; what was found is listed."""
    message = "expected an optimizer state with `state` and `param_groups`, found"
    refused(saved, message, content)


@pytest.mark.parametrize(
    "groups",
    [
        [],
        {},
        [{"lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}],
        [7],
    ],
)
def test_param_groups_that_are_none_are_refused(saved: Saved, groups: Any) -> None:
    """A damaged or foreign file is an input error, not a crash."""
    refused(saved, "", {"state": {}, "param_groups": groups})


DAMAGED = [
    b"",
    b"hello\n",
    b"PK\x03\x04",
    b"\x80\x02}q\x00.",
    b"\x80\x04\x95",
    b"\x1f\x8b\x08",
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_file_that_is_no_pickle_of_tensors_is_refused(
    saved: Saved, content: bytes
) -> None:
    """Empty, text, or cut off: one line that names the file."""
    (saved.folder / "optimizer.pt").write_bytes(content)
    refused(saved, "")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_state_is_refused(saved: Saved, share: float) -> None:
    """A copy that was cut off."""
    path = saved.folder / "optimizer.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(saved, "not a readable optimizer state")


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return subprocess.check_call, (["touch", str(self.path)],)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_is_run_from_an_optimizer_file(
    saved: Saved, tmp_path: Path, zipped: bool
) -> None:
    """Both file formats of torch; loaded without care, the same bytes do run code."""
    sprung = tmp_path / "sprung"
    state = saved.optimizer.state_dict() | {"extra": Trap(sprung)}
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    (saved.folder / "optimizer.pt").write_bytes(buffer.getvalue())
    refused(saved, "not a readable optimizer state .*no code is run from it")
    assert not sprung.exists()
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert sprung.exists()


@pytest.mark.parametrize("named", [False, True])
def test_frozen_parameters_in_the_groups_are_left_out(
    tmp_path: Path, named: bool
) -> None:
    """verl gives all parameters of a model under an adapter to the optimizer."""
    saved = save_checkpoint(tmp_path, "qwen2")
    parameters = reference.trainable(saved.model)
    everything = list(saved.model.named_parameters())
    given: Any = everything if named else [p for _, p in everything]
    optimizer = torch.optim.AdamW(given, lr=1e-3)
    expected = marked(optimizer, parameters)
    assert len(optimizer.param_groups[0]["params"]) > len(parameters)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = load_optimizer(tmp_path / "optimizer.pt", saved.model, parameters)
    require_own_state(loaded, parameters, expected)
