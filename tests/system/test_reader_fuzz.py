"""Random and damaged files into every reader: it reads them, or says what is wrong.

Nothing but an InputError (or a RunError, where a file asks for more memory than there
is) may come out, nothing may take long, and no memory may be taken that the file does
not hold.
"""

import gzip
import io
import json
import pickle
import resource
import shutil
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from checkpoints import Saved, run_config, save_checkpoint, write_rows
from dumps import TEMPLATE, VOCABULARY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import (
    damaged_bytes,
    damaged_json,
    damaged_lines,
    damaged_safetensors,
    damaged_value,
)
from pyarrow import parquet
from reference import random_rows
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entropy_ddp.checkpoint.change import read_change
from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.checkpoint.optimizer import load_optimizer
from entropy_ddp.checkpoint.policy import Policy, load_policy
from entropy_ddp.checkpoint.trainer_settings import with_training_arguments
from entropy_ddp.checkpoint.weights import stored_dtypes, stored_tensors
from entropy_ddp.config import Checkpoint, Precision, Prompts, load_config
from entropy_ddp.data.files import read_batch, require_rewards
from entropy_ddp.data.rows import TokenLimits
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.importers.records import Source, Tokenising, make_rows
from entropy_ddp.importers.run import READERS
from entropy_ddp.sampling.prompts import encode_prompt, read_prompts

LIMITS = TokenLimits(vocabulary_size=17, max_positions=64)
SECONDS = 10.0  # a case takes milliseconds; a machine may be busy
GROWTH_MIB = 700.0
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What readers need beside the damaged file, and where that is written."""

    saved: Saved
    folder: Path
    policy: Policy
    tokenizer: PreTrainedTokenizerFast

    def write(self, name: str, content: bytes) -> Path:
        """The damaged file."""
        path = self.folder / name
        path.write_bytes(content)
        return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny adapter, opened, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("bench")
    saved = save_checkpoint(folder, "qwen2")
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"ab|.|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<turn>", "</turn>"],
    )
    wrapped.chat_template = TEMPLATE
    files = find_checkpoint(Checkpoint(**saved.section))
    policy = load_policy(files, Precision(model="float64"), "sdpa", CPU)
    return Bench(saved=saved, folder=folder, policy=policy, tokenizer=wrapped)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Files of one kind: `make` damages a valid one, `read` reads it."""

    make: Callable[[Bench, Random], Path]
    read: Callable[[Bench, Path], Any]


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# Rollouts


def make_rollouts(bench: Bench, random: Random) -> Path:
    path = write_rows(
        bench.folder / "good.jsonl",
        random_rows(2, groups=3, responses=[2, 3, 2], vocabulary=17),
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"finished": True, "sampling_logprobs": None, "extra": {"a": [1, None]}}
    content = damaged_lines(random, json_lines(rows))
    if random.random() < 0.3:
        packed = gzip.compress(content, mtime=0)
        if random.random() < 0.7:
            packed = damaged_bytes(random, packed)
        return bench.write("batch.jsonl.gz", packed)
    return bench.write("batch.jsonl", content)


def read_rollouts(bench: Bench, path: Path) -> None:
    batch = read_batch(path, "U", LIMITS, bench.tokenizer)
    require_rewards(batch, path)


# Configuration


def make_config(bench: Bench, random: Random) -> Path:
    document = run_config(bench.saved, Path("E.jsonl"), Path("U.jsonl")) | {
        "objective": {"integrand": "rb", "temperature": 1.0},
        "truth": {"is_mode": "clip", "clip_c": 10},
        "sweep": {"etas": [0.1, 0.2]},
        "seed": 3,
    }
    sample = {"prompts": "p.jsonl", "num_prompts": 2, "max_new_tokens": 2}
    reward = [{"regex": "a", "weight": 2.0}, {"math": "answer"}]
    if random.random() < 0.5:
        document["batches"] = {"E": {"sample": sample}, "U": {"sample": sample | {
            "prompts": {"dataset": "x", "split": "train", "keep": ["a"]},
            "reward": reward, "responses_per_prompt": 2,
        }}}  # fmt: skip
    if random.random() < 0.6:
        document = damaged_value(random, document)
    content = json.dumps(document) if random.random() < 0.3 else yaml.dump(document)
    raw = content.encode("utf-8", "surrogatepass")
    if random.random() < 0.6:
        raw = damaged_bytes(random, raw)
    return bench.write("run.yaml", raw)


# Importers


def imports(kind: str, name: str, rows: list[dict[str, Any]]) -> Family:
    """JSON lines of another trainer."""

    def make(bench: Bench, random: Random) -> Path:
        return bench.write(name, damaged_lines(random, json_lines(rows)))

    return Family(make=make, read=importer(kind))


def importer(kind: str) -> Callable[[Bench, Path], None]:
    """Reads a dump and makes rows of it."""

    def read(bench: Bench, path: Path) -> None:
        records = READERS[kind](path, Source())
        tokenising = Tokenising(tokenizer=bench.tokenizer, end_ids={1}, max_length=20)
        make_rows(records, tokenising)

    return read


def make_csv(bench: Bench, random: Random) -> Path:
    text = (
        b"prompt,response,reward,group,finished\n"
        b'a+b=,"c",1.5,g,true\na+b=,"d ""x""",0,g,false\nx,y,-1e3,h,\n'
    )
    return bench.write("table.csv", damaged_bytes(random, text))


def make_completions(bench: Bench, random: Random) -> Path:
    rows = [
        {
            "step": 5,
            "prompt": prompt,
            "completion": completion,
            "right": right,
            "advantage": right - 0.5,
        }
        for prompt, completion, right in [
            ("x", "c", 1.0),
            ("x", "d", 0.0),
            ("x", "", 0.5),
        ]
    ]
    stream = io.BytesIO()
    try:
        changed = damaged_value(random, rows) if random.random() < 0.7 else rows
        parquet.write_table(pyarrow.Table.from_pylist(changed), stream)
    except (
        pyarrow.ArrowException,
        TypeError,
        AttributeError,
        ValueError,
        OverflowError,
    ):
        # What is no table.
        stream = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    content = stream.getvalue()
    if random.random() < 0.4:
        content = damaged_bytes(random, content)
    return bench.write("completions_00005.parquet", content)


TABLE = [
    {"prompt": "a+b=", "response": "c", "reward": 1.0, "group": 1, "more": [1]},
    {"prompt": "a+b=", "response": "d", "reward": 0, "group": 1, "finished": True},
    {
        "prompt": [{"role": "user", "content": "x"}],
        "response": "y",
        "reward": 0.5,
        "group": "g",
    },
]
VERL = [
    {
        "input": "user\na\nassistant\n",
        "output": out,
        "gts": "1",
        "score": 0.5,
        "step": 4,
        "uid": uid,
    }
    for out, uid in (("b", "u"), ("c", "u"), ("d", "v"))
]
PRIME = [
    {
        "token_ids": [5, 6, 7, 1],
        "loss_mask": [False, False, True, True],
        "advantages": [None, None, 0.5, 0.5],
        "rewards": [0, 0, 1.0, 1.0],
        "inference_logprobs": [0.0, 0.0, -1.0, -0.5],
        "export_step": 4,
        "run_id": "r",
    }
]
NEMO = [
    {
        "token_ids": [[5, 6, 7, 1, 0]],
        "token_loss_mask": [[0, 0, 1, 1, 0]],
        "advantages": [[0, 0, 0.5, 0.5, 0]],
        "generation_logprobs": [[0, 0, -1.0, -0.5, 0]],
        "input_lengths": [4],
        "rewards": [1.0],
        "sample_loss_mask": [1.0],
    }
]

# Prompts


def make_prompts(bench: Bench, random: Random) -> Path:
    rows = [
        {"prompt": "a+b=", "answer": "1"},
        {"prompt_ids": [5, 6], "answer": 2},
        {"prompt": [{"role": "user", "content": "x"}], "answer": None},
    ]
    return bench.write("prompts.jsonl", damaged_lines(random, json_lines(rows)))


def read_all_prompts(bench: Bench, path: Path) -> None:
    limits = TokenLimits(vocabulary_size=len(VOCABULARY), max_positions=None)
    source = Prompts(file=str(path))
    for prompt in read_prompts(source):
        encode_prompt(prompt, source, limits, bench.tokenizer)


# Weights


def make_weights(bench: Bench, random: Random) -> Path:
    folder = bench.folder / "state"
    folder.mkdir(exist_ok=True)
    content = (bench.saved.base / "model.safetensors").read_bytes()
    path = folder / "model.safetensors"
    path.write_bytes(damaged_safetensors(random, content))
    return path


def read_weights(bench: Bench, path: Path) -> None:
    for tensor in stored_tensors(path.parent).values():
        tensor.read()
    stored_dtypes(base=str(path.parent), adapter=None)


def make_delta(bench: Bench, random: Random) -> Path:
    path = bench.folder / "delta.safetensors"
    save_file({n: p.detach() for n, p in bench.policy.parameters.items()}, path)
    return bench.write(path.name, damaged_safetensors(random, path.read_bytes()))


def read_delta(bench: Bench, path: Path) -> None:
    change = read_change(str(path), bench.policy, Precision(model="float64"), "sdpa")
    assert bool(change.isfinite().all())


def make_checkpoint_files(bench: Bench, random: Random) -> Path:
    """One of the files of an adapter, or of its base model, is damaged."""
    adapter, base = bench.folder / "adapter", bench.folder / "other-base"
    for source, target in ((bench.saved.folder, adapter), (bench.saved.base, base)):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    path, damage = random.choice(
        [
            (adapter / "adapter_config.json", damaged_json),
            (adapter / "adapter_model.safetensors", damaged_safetensors),
            (base / "config.json", damaged_json),
            (base / "generation_config.json", damaged_json),
            (base / "model.safetensors", damaged_safetensors),
        ]
    )
    path.write_bytes(damage(random, path.read_bytes()))
    return adapter


def read_checkpoint(bench: Bench, path: Path) -> None:
    section = {"path": str(path), "base": str(bench.folder / "other-base")}
    files = find_checkpoint(Checkpoint(**section))
    load_policy(files, Precision(model="float64"), "sdpa", CPU)


# Pickles


def make_optimizer(bench: Bench, random: Random) -> Path:
    state = torch.load(bench.saved.folder / "optimizer.pt", weights_only=True)
    odd = [torch.zeros(3), torch.zeros(2, 16).long(), torch.zeros(2, 16).to_sparse()]
    if random.random() < 0.8:
        state = damaged_value(random, state)
    if random.random() < 0.2 and isinstance(state, dict) and state.get("state"):
        entries = state["state"]
        first = next(iter(entries.values())) if isinstance(entries, dict) else None
        if isinstance(first, dict):
            key = random.choice(["exp_avg", "exp_avg_sq", "step"])
            first[key] = random.choice(odd)
    stream = io.BytesIO()
    torch.save(state, stream)
    content = stream.getvalue()
    if random.random() < 0.3:
        content = damaged_bytes(random, content)
    return bench.write("optimizer.pt", content)


def read_optimizer(bench: Bench, path: Path) -> None:
    load_optimizer(path, bench.policy.model, bench.policy.parameters)


SETTINGS = {
    "loss_type": "dr_grpo",
    "max_completion_length": 32,
    "epsilon": 0.2,
    "epsilon_high": None,
    "beta": 0.0,
    "use_bias_correction_kl": False,
    "max_grad_norm": 1.0,
    "scale_rewards": "none",
    "temperature": 1.0,
    "num_generations": 4,
    "reward_weights": [1.0],
}


def make_settings(bench: Bench, random: Random) -> Path:
    values = damaged_value(random, SETTINGS) if random.random() < 0.7 else SETTINGS
    values = values if isinstance(values, dict) else {"a": values}
    holder = Namespace()
    vars(holder).update(values)
    raw = pickle.dumps(holder)
    if random.random() < 0.4:
        raw = damaged_bytes(random, raw)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("training_args/data.pkl", raw)
    content = stream.getvalue()
    if random.random() < 0.2:
        content = damaged_bytes(random, content)
    folder = bench.folder / "trained"
    folder.mkdir(exist_ok=True)
    (folder / "training_args.bin").write_bytes(content)
    return folder


def read_settings(bench: Bench, path: Path) -> None:
    batches = {"E": {"file": "E.jsonl"}, "U": {"file": "U.jsonl"}}
    section = {"checkpoint": {"path": str(path)}, "batches": batches}
    config = path / "run.yaml"
    config.write_text(yaml.dump(section | {"update": {"from_checkpoint": True}}))
    with_training_arguments(load_config(config, ()))


FAMILIES: dict[str, Family] = {
    "rollouts": Family(make=make_rollouts, read=read_rollouts),
    "configuration": Family(
        make=make_config, read=lambda bench, path: load_config(path, ())
    ),
    "table": imports("table", "table.jsonl", TABLE),
    "table csv": Family(make=make_csv, read=importer("table")),
    "verl": imports("verl", "4.jsonl", VERL),
    "prime-rl": imports("prime-rl", "rank_0.jsonl", PRIME),
    "nemo-rl": imports("nemo-rl", "train_data_step4.jsonl", NEMO),
    "trl": Family(make=make_completions, read=importer("trl")),
    "prompts": Family(make=make_prompts, read=read_all_prompts),
    "weights": Family(make=make_weights, read=read_weights),
    "delta": Family(make=make_delta, read=read_delta),
    "checkpoint": Family(make=make_checkpoint_files, read=read_checkpoint),
    "optimizer": Family(make=make_optimizer, read=read_optimizer),
    "training arguments": Family(make=make_settings, read=read_settings),
}


def is_read(family: Family, bench: Bench, seed: int) -> bool:
    """Whether one damaged file, made from the seed, is read; else it is refused."""
    path = family.make(bench, Random(seed))
    begin, text = time.monotonic(), None
    try:
        family.read(bench, path)
    except (InputError, RunError) as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 3000
    # Where weights are of another shape, transformers first draws those of a model as
    # large as the configuration says.
    if text is None or "mismatched keys" not in text:
        assert time.monotonic() - begin < SECONDS
    return text is None


def run_cases(name: str, bench: Bench, count: int) -> None:
    """The same cases every time; a failing one prints its seed."""
    family = FAMILIES[name]
    outcomes: set[bool] = set()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(min_value=0, max_value=2**48))
    def cases(seed: int) -> None:
        outcomes.add(is_read(family, bench, seed))

    cases()
    assert outcomes == {True, False}
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) / 1024 < GROWTH_MIB


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_damaged_file_is_read_or_refused(name: str, bench: Bench) -> None:
    """250 cases of each kind."""
    run_cases(name, bench, 250)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_many_damaged_files_are_read_or_refused(name: str, bench: Bench) -> None:
    """10,000 cases of each kind."""
    run_cases(name, bench, 10_000)
