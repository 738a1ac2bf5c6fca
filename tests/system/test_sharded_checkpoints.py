"""Checkpoints in shares of ranks are read bit for bit, whoever wrote them.

FSDP2's are written here, by accelerate, torch and transformers on two gloo ranks
(`sharded_training.py`). DeepSpeed's were (`zero_training.py`), and are again where
deepspeed is installed: it is no requirement of the tests, as libraries import it wherever
they find it.
"""

import importlib.util
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import launching
import pytest
import reference
import torch
from checkpoints import save_character_tokenizer, write_rows
from jobs import run_probe
from rich.console import Console
from safetensors.torch import load_file
from sharded_training import lora_settings, tiny_policy, trained_model
from torch import Tensor, distributed
from torch.distributed import checkpoint

from entropy_ddp.checkpoint import dcp, deepspeed, inert
from entropy_ddp.checkpoint.change import read_change
from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.checkpoint.formats import stored_optimizer, stored_weights
from entropy_ddp.checkpoint.optimizer import load_optimizer
from entropy_ddp.checkpoint.policy import Policy, load_policy
from entropy_ddp.checkpoint.stored import Part, StoredTensor
from entropy_ddp.config import Checkpoint, Config, Precision
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.importers.records import Source
from entropy_ddp.importers.run import import_rollouts
from entropy_ddp.model.parameters import ParameterLayout
from entropy_ddp.probe.check import inspect_run
from entropy_ddp.terminal.commands import print_inspection

CPU = torch.device("cpu")
HERE = Path(__file__).resolve().parent.parent
LAYOUTS = ("accelerate", "accelerate, whole", "prime-rl", "verl", "transformers")
# Layouts by kind of policy; transformers cannot write tied weights in this one.
CASES = [
    (kind, layout)
    for kind in ("full", "lora")
    for layout in LAYOUTS
    if (kind, layout) != ("full", "transformers")
]
ZERO_CASES = (
    "stage 1", "stage 2, bfloat16", "stage 2, LoRA", "stage 3", "stage 3, bfloat16",
    "stage 3, LoRA",
)  # fmt: skip
UNIVERSAL_CASES = ("stage 2, bfloat16", "stage 3")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that FSDP2 leaves."""
    folder = tmp_path_factory.mktemp("sharded")
    script = HERE / "sharded_training.py"
    command = launching.torchrun(2, script, folder)
    launching.run(command, launching.HELPERS).require_success()
    return folder


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What DeepSpeed left."""
    folder = tmp_path_factory.mktemp("zero")
    with tarfile.open(HERE / "data" / "zero.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    add_models(folder)
    return folder


def add_models(folder: Path) -> None:
    """The configuration, the base and the adapter's settings beside checkpoints."""
    tiny_policy("full").config.save_pretrained(folder / "config")
    tiny_policy("lora").save_pretrained(folder / "base")
    lora_settings().save_pretrained(str(folder / "adapter"))


def section_of(folder: Path, kind: str, **places: Path) -> dict[str, str]:
    """A `checkpoint` section."""
    section = {"base": str(folder / ("base" if kind == "lora" else "config"))}
    if kind == "lora":
        section["adapter"] = str(folder / "adapter")
    return section | {key: str(place) for key, place in places.items()}


def opened(section: dict[str, str]) -> tuple[Policy, torch.optim.Adam]:
    """The policy of a section and its optimizer."""
    files = find_checkpoint(Checkpoint(**section))
    policy = load_policy(files, Precision(), "sdpa", CPU)
    assert files.optimizer is not None
    optimizer = load_optimizer(files.optimizer, policy.model, policy.parameters)
    return policy, optimizer


def require_bits(
    truth_folder: Path, policy: Policy, optimizer: torch.optim.Adam
) -> None:
    """Weights, moments, counts and groups are those of the live optimizer."""
    truth = load_file(truth_folder / "truth.safetensors")
    names = {parameter: name for name, parameter in policy.parameters.items()}
    assert {name for name in truth if name.endswith("|step")} == {
        f"{name}|step" for name in names.values()
    }
    for name, parameter in policy.model.named_parameters():
        if name in truth:
            assert torch.equal(parameter, truth[name]), name
    for parameter, name in names.items():
        assert name in truth
        for key in ("exp_avg", "exp_avg_sq", "step"):
            found = optimizer.state[parameter][key]
            assert torch.equal(torch.as_tensor(found), truth[f"{name}|{key}"]), name
            assert found.dtype == truth[f"{name}|{key}"].dtype
    groups = json.loads((truth_folder / "groups.json").read_text())
    found_groups = {
        tuple(sorted(names[p] for p in group["params"])): {
            key: group[key] for key in ("lr", "eps", "weight_decay")
        } | {"betas": list(group["betas"])}
        for group in optimizer.param_groups
    }  # fmt: skip
    assert found_groups == {
        tuple(sorted(group.pop("names"))): group for group in groups
    }


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_what_fsdp_wrote_is_read_bit_for_bit(
    written: Path, kind: str, layout: str
) -> None:
    """Two ranks wrote, one reads; the folder alone tells the format."""
    section = section_of(written, kind, path=written / kind / layout)
    require_bits(written / kind, *opened(section))


def test_what_fsdp1_wrote_is_read_bit_for_bit(written: Path) -> None:
    """By accelerate, whose default it is: blocks of DCP too."""
    folder = written / "full, FSDP1"
    section = section_of(written, "full", path=folder / "accelerate")
    require_bits(folder, *opened(section))


@pytest.mark.parametrize("case", ZERO_CASES)
def test_what_deepspeed_wrote_is_read_bit_for_bit(zero: Path, case: str) -> None:
    """Stages 1 to 3, masters of bfloat16, adapters; groups stepped on in parts."""
    kind = "lora" if "LoRA" in case else "full"
    section = section_of(zero, kind, path=zero / case / "checkpoint")
    require_bits(zero / case, *opened(section))


@pytest.mark.parametrize("case", UNIVERSAL_CASES)
def test_a_universal_checkpoint_is_read_bit_for_bit(zero: Path, case: str) -> None:
    """Named by its own folder, as the other is there too."""
    place = zero / case / "checkpoint" / "global_step3_universal"
    section = section_of(zero, "full", weights=place, optimizer=place)
    require_bits(zero / case, *opened(section))


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
def test_what_deepspeed_writes_now_is_read_bit_for_bit(tmp_path: Path) -> None:
    """All cases, where it is installed."""
    command = launching.torchrun(2, HERE / "zero_training.py", tmp_path)
    launching.run(command, launching.HELPERS).require_success()
    add_models(tmp_path)
    for case in ZERO_CASES:
        kind = "lora" if "LoRA" in case else "full"
        section = section_of(tmp_path, kind, path=tmp_path / case / "checkpoint")
        require_bits(tmp_path / case, *opened(section))


def save_dcp(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Weights alone, as torch saves them in one process."""
    checkpoint.save({"model": tensors}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("named", [True, False])
def test_an_adapter_alone_is_put_on_its_base(
    written: Path, tmp_path: Path, named: bool
) -> None:
    """As the Trainer saves it: without frozen weights; PEFT leaves its name out."""
    truth = load_file(written / "lora" / "truth.safetensors")
    adapter = {n: t for n, t in truth.items() if "lora_" in n and "|" not in n}
    if not named:
        adapter = {n.replace(".default.", "."): t for n, t in adapter.items()}
    weights = save_dcp(tmp_path / "weights", adapter)
    optimizer = written / "lora" / "prime-rl"
    section = section_of(written, "lora", weights=weights, optimizer=optimizer)
    policy, state = opened(section)
    require_bits(written / "lora", policy, state)
    assert policy.stored == {"state": "float32", "base": "float32"}


@pytest.mark.parametrize("missing", ["lora_B", "base_layer"])
def test_a_weight_that_is_missing_is_named(
    written: Path, tmp_path: Path, missing: str
) -> None:
    """Of the adapter, or one of the frozen ones where the others are there."""
    truth = load_file(written / "lora" / "truth.safetensors")
    weights = {n: t for n, t in truth.items() if "|" not in n}
    name = next(n for n in weights if missing in n)
    del weights[name]
    place = save_dcp(tmp_path / "weights", weights)
    optimizer = written / "lora" / "prime-rl"
    with pytest.raises(InputError, match=f"{name} is missing from .*DCP"):
        opened(section_of(written, "lora", weights=place, optimizer=optimizer))


def test_values_that_are_not_finite_are_named(written: Path, tmp_path: Path) -> None:
    """Found when they are read, by the checks of every format."""
    truth = load_file(written / "full" / "truth.safetensors")
    weights = {n: t for n, t in truth.items() if "|" not in n}
    name = next(iter(weights))
    weights[name][0, 0] = torch.inf
    place = save_dcp(tmp_path / "weights", weights)
    optimizer = written / "full" / "prime-rl"
    with pytest.raises(InputError, match=f"found NaN or infinity in {name}"):
        opened(section_of(written, "full", weights=place, optimizer=optimizer))


# A part of it


def places(written: Path, zero: Path) -> dict[str, tuple[Path, Path]]:
    """Where the truth is and where the checkpoint, by format."""
    found = {
        f"{kind}, {layout}": (written / kind, written / kind / layout)
        for kind, layout in CASES
        if layout != "accelerate, whole"
    }
    return found | {
        case: (zero / case, zero / case / "checkpoint") for case in ZERO_CASES
    }


def test_a_rank_reads_its_part(written: Path, zero: Path) -> None:
    """Of every tensor of every format: rows that no rank of the training had as such."""
    for name, (truth_folder, place) in places(written, zero).items():
        truth = load_file(truth_folder / "truth.safetensors")
        state = stored_optimizer(place)["state"]
        stored = dict(stored_weights(place))
        for parameter, entry in state.items():
            if isinstance(parameter, str):
                moments = {f"{parameter}|{key}": entry[key] for key in entry}
                stored |= {n: t for n, t in moments.items() if hasattr(t, "read")}
        assert len(stored) > len(state)
        for tensor_name, tensor in stored.items():
            expected = truth.get(tensor_name)
            if expected is None or not expected.ndim:
                continue
            rows = len(expected)
            region = (slice(rows // 3, rows - rows // 4),)
            found = tensor.read(region)
            assert torch.equal(found, expected[region].to(found.dtype)), (
                name,
                tensor_name,
            )
            assert tensor.shape == expected.shape


def test_an_optimizer_over_parts_has_the_parts_of_the_moments(written: Path) -> None:
    """As a rank makes it that holds shards of the parameters."""
    section = section_of(written, "full", path=written / "full" / "prime-rl")
    policy, whole = opened(section)
    parts, shards = {}, {}
    for name, parameter in policy.parameters.items():
        half = slice(len(parameter) // 2, len(parameter))
        parts[name] = Part(parameter.shape, (half,))
        shards[name] = torch.nn.Parameter(parameter.detach()[half].clone())
    place = policy.files.optimizer
    assert place is not None
    optimizer = load_optimizer(place, policy.model, shards, parts)
    for name, shard in shards.items():
        expected = whole.state[policy.parameters[name]]
        for key in ("exp_avg", "exp_avg_sq"):
            region = parts[name].region
            assert torch.equal(optimizer.state[shard][key], expected[key][region])


# The same numbers as from plain files


def batches_of(folder: Path) -> dict[str, Any]:
    """Small batches."""
    return {
        split: {
            "file": str(
                write_rows(
                    folder / f"{split}.jsonl",
                    reference.random_rows(
                        seed, responses=[2, 3, 2], groups=3, vocabulary=13
                    ),
                )
            )
        }
        for split, seed in (("E", 3), ("U", 4))
    }


def write_plain(folder: Path, truth_folder: Path, kind: str) -> None:
    """The same checkpoint as the Trainer leaves it: safetensors and optimizer.pt."""
    truth = load_file(truth_folder / "truth.safetensors")
    model: Any = trained_model(kind)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            if name in truth:
                parameter.copy_(truth[name])
    groups = json.loads((truth_folder / "groups.json").read_text())
    for group in groups:
        group["params"] = [own[name] for name in group.pop("names")]
        group["betas"] = tuple(group["betas"])
    optimizer = torch.optim.AdamW(groups)
    for name, parameter in own.items():
        if f"{name}|step" in truth:
            optimizer.state[parameter] = {
                key: truth[f"{name}|{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


PROBED = {
    "DCP of prime-rl": "full, prime-rl",
    "DCP of accelerate, LoRA": "lora, accelerate",
    "ranks of verl": "full, verl",
    "transformers": "lora, transformers",
    "ZeRO 2": "stage 2, LoRA",
    "ZeRO 3": "stage 3",
}


@pytest.mark.parametrize("family", PROBED)
def test_a_probe_gives_the_numbers_of_plain_files(
    written: Path, zero: Path, tmp_path: Path, family: str
) -> None:
    """Every number of results.json, bit for bit."""
    name = PROBED[family]
    truth_folder, place = places(written, zero)[name]
    kind = "lora" if "lora" in name.lower() else "full"
    write_plain(tmp_path / "plain", truth_folder, kind)
    models = written if place.is_relative_to(written) else zero
    plain = {"path": str(tmp_path / "plain")}
    if kind == "lora":
        plain["base"] = str(models / "base")
    found = []
    for section in (plain, section_of(models, kind, path=place)):
        document = {"checkpoint": section, "batches": batches_of(tmp_path)}
        config = Config.model_validate(document)
        results = run_probe(config, World(), None, lambda *_: None).results
        found.append(
            {
                part: getattr(results, part)
                for part in ("truth", "linear", "curvature", "update")
            }
        )
    assert repr(found[0]) == repr(found[1])
    assert found[0]["update"].param_update_l2 > 0


DESCRIBED = {
    "full, prime-rl": "torch.distributed.checkpoint (DCP), written by 2 ranks",
    "lora, accelerate": "torch.distributed.checkpoint (DCP), written by 2 ranks",
    "full, verl": "a file of DTensors for each rank, written by 2 ranks",
    "stage 2, LoRA": "DeepSpeed ZeRO, written by 2 ranks",
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_check_tells_what_it_found(
    written: Path, zero: Path, tmp_path: Path, name: str
) -> None:
    """Format, files, ranks that wrote them, steps, learning rate, groups."""
    truth_folder, place = places(written, zero)[name]
    models = written if place.is_relative_to(written) else zero
    kind = "lora" if "lora" in name.lower() else "full"
    groups = json.loads((truth_folder / "groups.json").read_text())
    document = {
        "checkpoint": section_of(models, kind, path=place),
        "batches": batches_of(tmp_path),
    }
    found = inspect_run(Config.model_validate(document), World(), lambda *_: None)
    assert found["model"]["weights from"] == str(place)
    assert found["model"]["format of the weights"] == DESCRIBED[name]
    assert found["optimizer"]["format"] == DESCRIBED[name]
    assert found["optimizer"]["steps taken"] == 3
    rates = [group["lr"] for group in found["optimizer"]["groups"]]
    assert rates == [group["lr"] for group in groups]
    console = Console(file=io.StringIO(), width=100)
    print_inspection(console, found)


def test_texts_are_imported_for_shares_of_ranks(written: Path, tmp_path: Path) -> None:
    """The tokenizer is beside the model; settings of the adapter are not needed."""
    base = tmp_path / "base"
    shutil.copytree(written / "base", base)
    save_character_tokenizer(base)
    rows = [{"prompt": "1+", "response": r, "reward": 1.0} for r in ("2", "3=")]
    dump = tmp_path / "table.jsonl"
    dump.write_text(
        "".join(json.dumps(row | {"finished": True}) + "\n" for row in rows)
    )
    place = written / "lora" / "accelerate"
    arguments = "table", [dump], place, tmp_path / "U.jsonl", Source()
    with pytest.raises(InputError, match="set checkpoint.base to the folder"):
        import_rollouts(*arguments)
    found = import_rollouts(*arguments, base=str(base))
    assert found["sequences"] == 2


@pytest.mark.parametrize(
    "name", ["full, prime-rl", "lora, accelerate", "stage 2, LoRA"]
)
def test_a_second_checkpoint_in_shares_is_a_change(
    written: Path, zero: Path, tmp_path: Path, name: str
) -> None:
    """`update.delta`: theirs minus the plain one's, in which one weight is another."""
    truth_folder, place = places(written, zero)[name]
    models = written if place.is_relative_to(written) else zero
    kind = "lora" if "lora" in name.lower() else "full"
    write_plain(tmp_path / "plain", truth_folder, kind)
    section = {"path": str(tmp_path / "plain")}
    section |= {"base": str(models / "base")} if kind == "lora" else {}
    policy, _ = opened(section)
    changed, parameter = list(policy.parameters.items())[1]
    with torch.no_grad():
        parameter.add_(0.25)
    if kind == "full":
        # Its model is told by the first one's.
        policy = replace(
            policy, files=replace(policy.files, base=str(models / "config"))
        )
    found = read_change(str(place), policy, Precision(), "sdpa")
    layout = ParameterLayout.of(policy.parameters)
    for of_name, change in layout.views(found).items():
        expected = -0.25 if of_name == changed else 0.0
        assert torch.allclose(change, torch.full_like(change, expected), atol=1e-6)


ADAM = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


def test_deepspeed_s_own_adam_is_read_as_torch_s() -> None:
    """FusedAdam and CPUAdam have other keys; without bias correction it is another."""
    own = ADAM | {"bias_correction": True, "params": ["x"], "step": 3}
    expected = ADAM | {"params": ["x"], "amsgrad": False}
    for optimizer, decoupled in (
        (None, True),
        ({"type": "AdamW"}, True),
        ({"type": "Adam"}, True),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, False),
    ):
        found = deepspeed._as_torch(Path("x"), own, {"optimizer": optimizer})
        assert found == expected | {"decoupled_weight_decay": decoupled}
    torch_group = ADAM | {"params": ["x"]}
    assert deepspeed._as_torch(Path("x"), torch_group, {}) == torch_group
    with pytest.raises(InputError, match="expected Adam with bias correction"):
        deepspeed._as_torch(Path("x"), own | {"bias_correction": False}, {})


def damaged(random: Random, data: bytes) -> bytes:
    """Cut off, or with other bytes, more often where the structure is."""
    if random.random() < 0.2:
        return data[: random.randrange(len(data))]
    found, first = bytearray(data), data.find(b"data.pkl")
    low = first if first >= 0 and random.random() < 0.6 else 0
    for _ in range(random.choice((1, 1, 2, 5))):
        found[random.randrange(low, len(data))] = random.randrange(256)
    return bytes(found)


@pytest.mark.parametrize(
    "name", ["full, prime-rl", "lora, accelerate", "full, verl", "stage 1", "stage 3"]
)
def test_damaged_shares_are_read_or_refused(
    written: Path, zero: Path, tmp_path: Path, name: str
) -> None:
    """One file of a checkpoint; whatever is raised names it."""
    _, place = places(written, zero)[name]
    random, refused = Random(3), 0
    for number in range(15):
        copy = tmp_path / str(number)
        shutil.copytree(place, copy)
        file = random.choice(sorted(f for f in copy.rglob("*") if f.is_file()))
        file.write_bytes(damaged(random, file.read_bytes()))
        try:
            for tensor in stored_weights(copy).values():
                tensor.read()
            stored_optimizer(copy)
        except InputError as error:
            refused += 1
            assert str(copy) in str(error)
    assert refused


# Pickles that would run something


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def planted_archive(folder: Path) -> bytes:
    """A file of torch.save that runs something."""
    stream = io.BytesIO()
    torch.save({"state": Planted(folder)}, stream)
    return stream.getvalue()


def planted_metadata(folder: Path) -> bytes:
    """A .metadata that runs something."""
    return pickle.dumps(Planted(folder))


PLANTED: dict[str, tuple[str, str, Callable[[Path], bytes]]] = {
    "DCP, .metadata": ("full, prime-rl", ".metadata", planted_metadata),
    "DCP, weights": (
        "lora, accelerate", "pytorch_model_fsdp_0/.metadata", planted_metadata,
    ),
    "DCP, optimizer": ("lora, accelerate", "optimizer_0/.metadata", planted_metadata),
    "verl, weights": (
        "full, verl", "model_world_size_2_rank_1.pt", planted_archive,
    ),
    "verl, optimizer": (
        "full, verl", "optim_world_size_2_rank_1.pt", planted_archive,
    ),
    "ZeRO, model": (
        "stage 1", "global_step3/mp_rank_00_model_states.pt", planted_archive,
    ),
    "ZeRO, optimizer": (
        "stage 1", "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        planted_archive,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED)
def test_a_pickle_that_runs_something_is_refused(
    written: Path, zero: Path, tmp_path: Path, case: str
) -> None:
    """In every file that is a pickle, of every format; and nothing has run."""
    name, file, plant = PLANTED[case]
    _, place = places(written, zero)[name]
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    (copy / file).write_bytes(plant(tmp_path / "ran"))
    with pytest.raises(InputError, match=r"names posix\.mkdir"):
        stored_weights(copy)
        stored_optimizer(copy)
    assert not (tmp_path / "ran").exists()
    # It would have run.
    data = plant(tmp_path / "ran")
    if plant is planted_archive:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            data = archive.read("archive/data.pkl")
    pickle.loads(data)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("what", ["block", "value"])
def test_a_planted_block_of_dcp_is_refused(
    written: Path, tmp_path: Path, what: str
) -> None:
    """The archives that .metadata points to are pickles too."""
    copy = tmp_path / "copy"
    shutil.copytree(written / "full" / "prime-rl", copy)
    # Every block's place, filled with an archive that runs something.
    data = planted_archive(tmp_path / "ran")
    for file in copy.glob("*.distcp"):
        file.write_bytes(data)
    contents = dcp.read_contents(copy)
    item = next(iter(contents.items.values()))
    planted = replace(item, start=0, length=len(data))
    for key in contents.items:
        contents.items[key] = planted
    with pytest.raises(InputError, match=r"names posix\.mkdir"):
        if what == "value":
            names = [n for n in contents.places if n not in contents.tensors]
            contents.value(names[0])
        else:
            dcp._fetch(copy, "x", planted, (1,), (slice(0, 1),))
    assert not (tmp_path / "ran").exists()


def test_a_planted_universal_file_is_refused(zero: Path, tmp_path: Path) -> None:
    """Of one parameter."""
    copy = tmp_path / "copy"
    shutil.copytree(zero / "stage 3" / "checkpoint" / "global_step3_universal", copy)
    (file,) = copy.glob("zero/model.norm.weight/exp_avg.pt")
    file.write_bytes(planted_archive(tmp_path / "ran"))
    with pytest.raises(InputError, match=r"names posix\.mkdir"):
        stored_optimizer(copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["pytorch_model_fsdp.bin", "optimizer.bin"])
def test_a_planted_whole_file_is_refused(
    written: Path, tmp_path: Path, file: str
) -> None:
    """FULL_STATE_DICT."""
    copy = tmp_path / "copy"
    shutil.copytree(written / "full" / "accelerate, whole", copy)
    (copy / file).write_bytes(planted_archive(tmp_path / "ran"))
    with pytest.raises(InputError, match="no code is run from it"):
        opened(section_of(written, "full", path=copy))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_changes_nothing_that_it_names() -> None:
    """By setting attributes of what stands for a name, which outlives the file."""
    known = inert._tensor_names() | dcp._known() | deepspeed._KNOWN
    for name, value in known.items():
        module, _, own = name.rpartition(".")
        # The name, a mapping for attributes beside __dict__, and BUILD.
        data = f"c{module}\n{own}\n(N}}Vname\nVplanted\nstb.".encode()
        with pytest.raises((pickle.UnpicklingError, TypeError, AttributeError)):
            inert.read_pickle(data, known)
        assert getattr(value, "name", None) != "planted", name


# Shares that are missing or of something else


def test_a_missing_rank_is_named(written: Path, zero: Path, tmp_path: Path) -> None:
    """Half of a checkpoint is none."""
    verl, stage = tmp_path / "verl", tmp_path / "zero"
    shutil.copytree(written / "full" / "verl", verl)
    (verl / "model_world_size_2_rank_0.pt").unlink()
    with pytest.raises(InputError, match="a file of every rank from 0 to 1, found 1"):
        stored_weights(verl)
    shutil.copytree(zero / "stage 3" / "checkpoint", stage)
    (stage / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(InputError, match="optimizer states of 2 ranks, found 1 files"):
        stored_optimizer(stage)


def test_a_cut_off_file_is_refused(written: Path, tmp_path: Path) -> None:
    """A copy that did not end: at opening, or when the block is read."""
    copy = tmp_path / "copy"
    shutil.copytree(written / "full" / "prime-rl", copy)
    file = copy / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(InputError, match="__1_0.distcp: .*copy the folder again"):
        opened(section_of(written, "full", path=copy))


def test_the_state_of_other_parameters_is_refused(written: Path, zero: Path) -> None:
    """Of an adapter, for full weights: a name is missing."""
    lora = written / "lora" / "prime-rl"
    section = section_of(written, "full", path=written / "full" / "verl")
    with pytest.raises(InputError, match="is missing from the model's trainable ones"):
        opened(section | {"optimizer": str(lora)})
    with pytest.raises(InputError, match="set checkpoint.adapter to a folder"):
        opened(section_of(written, "full", path=lora))
    with pytest.raises(
        InputError, match="has no LoRA weights; leave checkpoint.adapter"
    ):
        opened(section_of(zero, "lora", path=zero / "stage 1" / "checkpoint"))


# What is not read


def test_names_of_torchtitan_are_refused(tmp_path: Path) -> None:
    """DCP, of a model with other names."""
    save_dcp(tmp_path, {"tok_embeddings.weight": torch.ones(3, 2)})
    with pytest.raises(
        InputError, match="torchtitan's .*convert_to_hf.py.*update.delta"
    ):
        stored_weights(tmp_path)


def sharded_tensor() -> Any:
    """A tensor as FSDP1 holds it, of a group of one rank."""
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    return sharded_tensor.zeros(ChunkShardingSpec(0, ["rank:0/cpu"]), 4, 2)


def test_what_fsdp1_of_verl_wrote_is_named(tmp_path: Path) -> None:
    """ShardedTensor, pickled with its process group's."""
    distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=distributed.HashStore()
    )
    try:
        tensors = {"model.norm.weight": sharded_tensor()}
        torch.save(tensors, tmp_path / "model_world_size_1_rank_0.pt")
    finally:
        distributed.destroy_process_group()
    with pytest.raises(InputError, match="FSDP1.*verl.model_merger merge"):
        stored_weights(tmp_path)


def test_a_tensor_parallel_share_is_refused(written: Path, tmp_path: Path) -> None:
    """Placements that are no split over ranks that follow one another."""
    from entropy_ddp.checkpoint import rank_files
    from entropy_ddp.checkpoint.inert import ShardOfTensor
    from entropy_ddp.checkpoint.layouts import RANKS, Layout
    from entropy_ddp.checkpoint.stored import in_memory

    layout = Layout(kind=RANKS, place=tmp_path, files=(tmp_path, tmp_path))
    for placements in ((0, 1), ("_StridedShard", 0), ("Partial",)):
        shard = ShardOfTensor((4, 2), in_memory(torch.ones(2, 2)), placements)
        with pytest.raises(InputError, match="tensor parallelism"):
            rank_files._merged(layout, [{"x": shard}, {"x": shard}], "")


def test_copies_on_further_ranks_are_left_alone(tmp_path: Path) -> None:
    """Two groups of two ranks, of which the second holds copies (HSDP)."""
    from entropy_ddp.checkpoint import rank_files
    from entropy_ddp.checkpoint.inert import ShardOfTensor
    from entropy_ddp.checkpoint.layouts import RANKS, Layout
    from entropy_ddp.checkpoint.stored import in_memory

    whole = torch.arange(10.0).reshape(5, 2)
    layout = Layout(kind=RANKS, place=tmp_path, files=(tmp_path,) * 4)
    shards = [
        ShardOfTensor((5, 2), in_memory(part), (None, 0))
        for part in (whole[:3], whole[3:], whole[:3], whole[3:])
    ]
    found: StoredTensor = rank_files._merged(layout, shards, "x")
    assert torch.equal(found.read(), whole)
    copies: list[Tensor] = [whole, whole]
    layout = replace(layout, files=(tmp_path,) * 2)
    replicated = [ShardOfTensor((5, 2), in_memory(c), (None,)) for c in copies]
    assert torch.equal(rank_files._merged(layout, replicated, "x").read(), whole)
