"""A model in parts on several ranks gives what it gives whole: bits, sums, whole runs.

Real processes with gloo on the CPU. What the ranks do is in tests/sharded_ranks.py: the
checks of a group of processes are made one after another, as starting it takes the time.
"""

import copy
import json
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import launching
import pytest
import sharded_ranks
import torch
import transformers
import yaml
from checkpoints import run_config, save_checkpoint, write_rows, write_sampling_run
from families import plain_model
from peft import LoraConfig, get_peft_model
from reference import Row, random_rows
from shortages import close
from torch.distributed import checkpoint

from entropy_ddp.config import Config
from entropy_ddp.distributed import World

RANKS = launching.REPOSITORY / "tests" / "sharded_ranks.py"
TOLERANCE = 1e-10
SECTIONS = (
    "E", "U", "update", "truth", "truth_all", "linear", "linear_all", "curvature",
    "gradient_dot", "attribution", "sweep",
)  # fmt: skip
ALL = sharded_ranks.ALL
# Family, and the projections with an adapter.
ADAPTERS: dict[str, tuple[str, list[str]]] = {
    "qwen2, tied": ("qwen2", ["v_proj", "down_proj"]),
    "llama": ("llama", ALL),
    "gemma2": ("gemma2", ["q_proj", "v_proj"]),
    "qwen3-moe": ("qwen3-moe", ["q_proj", "v_proj"]),
}
FULL = {"qwen2 full": "qwen2", "llama full": "llama", "gemma2 full": "gemma2",
        "qwen3-moe full": "qwen3-moe"}  # fmt: skip
# The audits need all sequences of E; attributions and paired batches passes of their own.
SAME_ROLLOUTS = {"gradient_dot": {"enabled": True}}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "probe 1": ("qwen2, tied", {"linear": {"baseline": "action_value"}}),
    "probe 2": ("llama", {"gradient_dot": {"variance_method": "backward"}}),
    "probe 3": ("gemma2", {"curvature": {"enabled": True, "method": "taylor"}}),
    "probe 4": ("qwen3-moe", {}),
    "probe same": ("llama", SAME_ROLLOUTS),
    "probe kl": ("llama", {"update": {"kl_coefficient": 0.1, "max_grad_norm": 0.5}}),
    "sweep": ("llama", {"sweep": {"etas": [1e-4, 1e-3]}}),
    "attribute": ("qwen2, tied", {"attribution": {"verify": True, "blocks": 2}}),
    "audit": ("llama", {}),
}
FULL_JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "probe full 1": ("qwen2 full", {"linear": {"baseline": "action_value"}}),
    "probe full 2": (
        "llama full",
        {"curvature": {"enabled": True, "method": "taylor"}},
    ),
    "probe full 3": ("gemma2 full", {"gradient_dot": {"direction": "preconditioned"}}),
    "probe full 4": ("qwen3-moe full", {}),
    "sweep full": ("llama full", {"sweep": {"etas": [1e-4, 1e-3]}}),
    "attribute full": ("qwen2 full", {"attribution": {"verify": True, "blocks": 2}}),
    "audit full": ("llama full", {"update": {"save_delta": True}}),
}


def ranks(size: int, checks: str, folder: Path) -> None:
    command = launching.python(RANKS, checks, folder)
    finished = launching.run_ranks(size, command, launching.HELPERS, 300.0)
    for one in finished:
        assert one.returncode == 0, "\n".join(f.stderr for f in finished)


def long(size: int, checks: str) -> Any:
    return pytest.param(size, checks, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("size", "checks"), [long(1, "base"), (2, "base,shortage,order"), long(3, "base")]
)
def test_layers_in_parts_change_no_bit(size: int, checks: str, tmp_path: Path) -> None:
    """And ranks with more work, less and none end together; as they do when memory runs
    out on one of them, forward or backward."""
    ranks(size, checks, tmp_path)


@pytest.mark.parametrize(
    ("size", "checks"),
    [
        (1, "full shortage"),
        (2, "full,planted"),
        long(1, "full"),
        long(3, "full,full shortage"),
    ],
)
def test_a_model_in_parts_gives_what_it_gives_whole(
    size: int, checks: str, tmp_path: Path
) -> None:
    """Scores, derivatives, sums of gradients; also after memory ran out on a rank. What
    would be wrong without a word is found by the self-check."""
    ranks(size, checks, tmp_path)


def test_groups_of_ranks_each_hold_a_model(tmp_path: Path) -> None:
    ranks(4, "groups", tmp_path)


def test_a_model_is_cut_from_its_files(tmp_path: Path) -> None:
    """Of narrower and of the same dtype, in one file and in several, with and without
    an adapter, and in shares that a training left; a mixture's files name weights in
    another way, and are read whole."""
    for name, family, stored, precision in (
        ("shares", "qwen2", torch.float32, "float64"),
        ("shares, narrow", "llama", torch.bfloat16, "float32"),
        ("narrow", "qwen2", torch.bfloat16, "float32"),
        ("same", "llama", torch.float32, "float32"),
        ("wide", "gemma2", torch.float64, "float64"),
        ("into narrow", "llama", torch.float32, "bfloat16"),
        ("moe", "qwen3-moe", torch.float32, "float32"),
    ):
        changes = {"tie_word_embeddings": True} if family == "qwen2" else {}
        for full in (True, False):
            root = tmp_path / f"{name} {full}"
            root.mkdir()
            model = plain_model(family, **changes).to(stored)
            options = {} if full else {"targets": ["q_proj", "v_proj"]}
            saved = save_checkpoint(root, "", model=model, full=full, **options)
            section = dict(saved.section)
            if name.startswith("shares") and full:
                folder = root / "pytorch_model_fsdp_0"
                state = {"model": model.state_dict()}
                checkpoint.save(state, checkpoint_id=folder, no_dist=True)
                section["weights"] = str(folder)
                for file in Path(saved.base).glob("*.safetensors"):
                    file.unlink()
            if name == "same":
                again = plain_model(family, **changes).to(stored)
                again.save_pretrained(saved.base, max_shard_size="4KB")
            config = run_config(saved, Path("E"), Path("U")) | {
                "checkpoint": section,
                "precision": {"model": precision},
                "compute": {"device": "cpu", "shard": "full" if full else "base"},
            }
            (tmp_path / f"{name} {full}.yaml").write_text(yaml.safe_dump(config))
    ranks(2, "mapped", tmp_path)


def rows(seed: int, responses: list[int]) -> list[Row]:
    return random_rows(
        seed, groups=len(responses), responses=responses, max_response=7,
        vocabulary=sharded_ranks.VOCABULARY, with_empty=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Configuration and results of every job, by one process with the whole model."""
    root = tmp_path_factory.mktemp("whole")
    evaluation, update = rows(1, [3, 2, 2, 3]), rows(2, [3, 2])
    saved = {}
    for case, (family, targets) in ADAPTERS.items():
        changes = {"tie_word_embeddings": True} if "tied" in case else {}
        model = plain_model(family, **changes)
        (root / case).mkdir()
        saved[case] = save_checkpoint(root / case, "", model=model, targets=targets)
    for case, family in FULL.items():
        changes = {"tie_word_embeddings": True} if family == "qwen2" else {}
        model = plain_model(family, **changes)
        saved[case] = save_checkpoint(root / case, "", model=model, full=True)
    found: dict[str, Any] = {}
    for name, (case, sections) in (JOBS | FULL_JOBS).items():
        e, u = (evaluation, update)
        if sections is SAME_ROLLOUTS:
            u = e
        files = [
            write_rows(root / f"{name}-{split}.jsonl", of)
            for split, of in (("E", e), ("U", u))
        ]
        document = run_config(saved[case], *files) | sections
        job = sharded_ranks.JOBS[name.partition(" ")[0]]
        probed = job(Config.model_validate(document), World(), None, lambda *_: None)
        found[name] = document, json.loads(json.dumps(probed.results.to_dict()))
    return found


def require_same_runs(
    size: int, folder: Path, whole: dict[str, Any], names: Iterable[str], shard: str
) -> None:
    """These jobs, of a sharded model on so many ranks, against the whole model's."""
    for name in names:
        document, _ = whole[name]
        compute = document["compute"] | {"shard": shard}
        text = yaml.safe_dump(document | {"compute": compute})
        (folder / f"{name}.yaml").write_text(text)
    ranks(size, "jobs", folder)
    for name in names:
        found = json.loads((folder / name / "results.json").read_text())
        expected = copy.deepcopy(whole[name][1])
        assert found["status"] == expected["status"], name
        # A share of a change of 1e-7 of the entropies whose difference it is.
        shares = [shares_missed(results) for results in (found, expected)]
        close(*shares, f"{name} sweep.missed", 1e-6)
        for section in SECTIONS:
            where = f"{name} {section}"
            close(found.get(section), expected.get(section), where, TOLERANCE)


def shares_missed(results: dict[str, Any]) -> list[float]:
    """What first order misses of each point of a sweep, taken out of the results."""
    points = results.get("sweep") or []
    return [p.pop(key) for p in points for key in ("missed", "missed_se") if key in p]


def test_runs_of_a_divided_base_are_those_of_the_whole_model(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    require_same_runs(2, tmp_path, whole, JOBS, "base")


def test_runs_of_a_model_in_parts_are_those_of_the_whole_model(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    require_same_runs(2, tmp_path, whole, FULL_JOBS, "full")


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 3, 4])
def test_runs_of_a_model_in_parts_on_any_number_of_ranks(
    size: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    require_same_runs(size, tmp_path, whole, FULL_JOBS, "full")


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 3, 4])
def test_runs_of_a_divided_base_on_any_number_of_ranks(
    size: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    require_same_runs(size, tmp_path, whole, JOBS, "base")


def test_a_divided_base_samples_what_the_whole_model_samples(tmp_path: Path) -> None:
    """With three ranks, two of which sample longer than the third."""
    run = write_sampling_run(tmp_path)
    out = {shard: tmp_path / shard for shard in ("none", "base")}
    for shard, folder in out.items():
        options = ("--config", run, "--out", folder, "--set", f"compute.shard={shard}")
        command = launching.python(*launching.PACKAGE, "sample", *options)
        helpers = {"PYTHONPATH": str(tmp_path)}
        for one in launching.run_ranks(3, command, helpers):
            one.require_success()
    for split in ("E", "U"):
        texts = [(folder / f"{split}.jsonl").read_text() for folder in out.values()]
        assert texts[0] == texts[1], split


def test_an_interrupted_run_goes_on_with_other_parts(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    """On three ranks and on one process with what two left, of a model in parts."""
    document, expected = whole["attribute full"]
    document = document | {"out": str(tmp_path / "kept")}
    found = []
    for size in (2, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        compute = document["compute"] | {"shard": "full"}
        text = yaml.safe_dump(document | {"compute": compute})
        (folder / "attribute.yaml").write_text(text)
        ranks(size, "jobs", folder)
        found.append(json.loads((folder / "attribute" / "results.json").read_text()))
    job = sharded_ranks.JOBS["attribute"]
    config = Config.model_validate(document)
    probed = job(config, World(), tmp_path / "kept", lambda *_: None)
    found.append(json.loads(json.dumps(probed.results.to_dict())))
    for number, results in enumerate(found):
        # What was kept is read: no pass is made again.
        assert ("gradient of U" in results["run"]["seconds"]) == (number == 0)
        for section in SECTIONS:
            close(results.get(section), expected.get(section), section, TOLERANCE)


SECONDS_TO_END = 10.0
# Of the second of three ranks, in the middle of a pass: what is printed, and its code.
FAULTS = {
    "fails": r"error: rank 1: planted: not finite\n",
    "is killed": r"error: rank 1 has not answered for \d s: stopped, killed .*\n",
    "is interrupted": r"interrupted\n",
    "hangs": r"error: rank \d: the ranks have waited \d+ s for rank 1, which .*\n",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_others_wait_in_a_gather_ends_all(
    fault: str, tmp_path: Path
) -> None:
    """Within seconds, with one line."""
    command = launching.python(RANKS, "fault", tmp_path)
    given = launching.HELPERS | {"FAULT": fault, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    processes = launching.start_ranks(3, command, given)
    end = time.monotonic() + 100
    while len(list(tmp_path.glob("*.pid"))) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    # Until the others wait.
    time.sleep(1.0)
    begin = time.monotonic()
    if fault == "is interrupted":
        os.kill(int((tmp_path / "0.pid").read_text()), signal.SIGINT)
    finished = [launching.finish(process, 60.0) for process in processes]
    assert time.monotonic() - begin < SECONDS_TO_END
    printed = "".join(one.stderr for one in finished)
    assert re.fullmatch(FAULTS[fault], printed), printed
    killed = fault == "is killed"
    codes = [one.returncode for one in finished]
    assert codes == [1, -signal.SIGKILL if killed else 1, 1]


@pytest.mark.long
def test_a_rank_has_no_more_memory_than_the_formula_says(tmp_path: Path) -> None:
    """A model of 100 million parameters on four ranks: opened whole, and divided."""
    shape = {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 8000,
        "max_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.LlamaConfig(**shape)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(model, adapter).save_pretrained(tmp_path / "adapter")
    for shard in ("base", "full"):
        path = tmp_path / ("base" if shard == "full" else "adapter")
        document = {
            "checkpoint": {"path": str(path), "base": str(tmp_path / "base")},
            "batches": {"E": {"file": "E"}, "U": {"file": "U"}},
            "compute": {"device": "cpu", "shard": shard},
        }
        (tmp_path / f"{shard}.yaml").write_text(yaml.safe_dump(document))
    ranks(4, "memory", tmp_path)
    found = json.loads((tmp_path / "memory.json").read_text())
    for shard, bytes_of in found.items():
        expected = bytes_of["expected"]
        assert abs(bytes_of["in a pass"] / expected - 1) < 0.15, (shard, bytes_of)
        assert bytes_of["while it was opened"] < 1.15 * expected, (shard, bytes_of)
    assert found["full"]["opened"] < 0.26 * found["full"]["whole"]
