"""Every kind of wrong input, through the command line, in the words a stranger reads.

One line that names file, line or key, what was expected, what was found; exit code 2;
nothing written, not even an empty folder; no traceback; no code run.
"""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
import yaml
from checkpoints import Saved, run_config, save_checkpoint, write_rows
from click.testing import CliRunner, Result
from reference import drawn_from, random_rows
from safetensors.torch import load_file, save_file

from entropy_ddp.cli import main

ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return subprocess.check_call, (["touch", str(self.path)],)


@dataclass(frozen=True, kw_only=True)
class Good:
    """A run in which everything is right: its files are never changed."""

    saved: Saved
    folder: Path

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.folder / "run.yaml"


@dataclass(frozen=True, kw_only=True)
class Spoilt:
    """A folder in which one input of a good run is spoilt."""

    good: Good
    folder: Path

    @property
    def sprung(self) -> Path:
        """What a trap would make."""
        return self.folder / "sprung"

    def file(self, name: str, content: bytes | str) -> Path:
        """A new file of this content."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def config(self, content: bytes | str) -> list[str]:
        """Another configuration file."""
        return ["--config", str(self.file("bad.yaml", content))]

    def bytes_of(self, split: str) -> bytes:
        """The good batch file."""
        return (self.good.folder / f"{split}.jsonl").read_bytes()

    def batch(self, content: bytes, name: str = "E.jsonl") -> list[str]:
        """Another batch file, by the first letter of its name."""
        path = self.file(name, content)
        return ["--set", f"batches.{name[0]}.file={path}"]

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The good batch's rows."""
        return [json.loads(line) for line in self.bytes_of(split).splitlines()]

    def changed(self, split: str, line: int, **keys: Any) -> list[str]:
        """A batch with keys of one row replaced; None leaves a key out."""
        rows = self.rows(split)
        row = rows[line - 1] | keys
        rows[line - 1] = {key: value for key, value in row.items() if value is not None}
        return self.batch(lines_of(rows), f"{split}.jsonl")

    def mapped(self, split: str, change: Callable[[int, Any], Any]) -> list[str]:
        """A batch with every row changed, by its number from 0."""
        rows = [change(number, row) for number, row in enumerate(self.rows(split))]
        return self.batch(lines_of(rows), f"{split}.jsonl")

    def checkpoint(self, change: Callable[[Path, Path], Any]) -> list[str]:
        """A copy of adapter and base folder, changed."""
        adapter, base = self.folder / "adapter", self.folder / "base"
        shutil.copytree(self.good.saved.folder, adapter)
        shutil.copytree(self.good.saved.base, base)
        change(adapter, base)
        settings = (f"checkpoint.path={adapter}", f"checkpoint.base={base}")
        return [x for setting in settings for x in ("--set", setting)]

    def optimizer(self, change: Callable[[Any], Any]) -> list[str]:
        """Another optimizer file: the state changed in place, or bytes in its place."""
        state = torch.load(self.good.saved.folder / "optimizer.pt", weights_only=True)
        content = change(state)
        if isinstance(content, bytes):
            path = self.file("optimizer.pt", content)
        else:
            path = self.folder / "optimizer.pt"
            torch.save(state, path)
        return ["--set", f"checkpoint.optimizer={path}"]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def pickled(content: Any) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    """A Qwen2 adapter with two batches."""
    folder = tmp_path_factory.mktemp("good")
    saved = save_checkpoint(folder, "qwen2")
    evaluation = random_rows(1, groups=12, responses=[1, 2, 3] * 4, vocabulary=17)
    evaluation = drawn_from(saved.model, evaluation, 3)
    update = random_rows(2, groups=3, responses=[2, 3, 2], vocabulary=17)
    files = [
        write_rows(folder / f"{split}.jsonl", rows)
        for split, rows in (("E", evaluation), ("U", update))
    ]
    (folder / "run.yaml").write_text(yaml.safe_dump(run_config(saved, *files)))
    return Good(saved=saved, folder=folder)


@pytest.fixture
def spoilt(good: Good, tmp_path: Path) -> Iterator[Spoilt]:
    """Where one input is spoilt; no trap may have sprung at the end."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    scene = Spoilt(good=good, folder=folder)
    yield scene
    assert not scene.sprung.exists()


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of this process run alone."""
    for name in launching.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def set_keys(*settings: str) -> Callable[[Spoilt], list[str]]:
    """Keys set on the command line."""
    return lambda scene: [x for setting in settings for x in ("--set", setting)]


def config(content: bytes | str) -> Callable[[Spoilt], list[str]]:
    """Another configuration file."""
    return lambda scene: scene.config(content)


def batch(
    change: Callable[[bytes], bytes], name: str = "E.jsonl"
) -> Callable[[Spoilt], list[str]]:
    """A batch file made of the bytes of the good one."""
    return lambda scene: scene.batch(change(scene.bytes_of(name[0])), name)


def row(split: str, line: int, **keys: Any) -> Callable[[Spoilt], list[str]]:
    """A batch with one row changed."""
    return lambda scene: scene.changed(split, line, **keys)


def weights(name: str, change: Callable[[bytes], bytes]) -> Callable[..., list[str]]:
    """A file of weights made of the bytes of the good one."""

    def spoil(adapter: Path, base: Path) -> None:
        path = (adapter if name == ADAPTER else base) / name
        path.write_bytes(change(path.read_bytes()))

    return lambda scene: scene.checkpoint(spoil)


def tensors(name: str, change: Callable[[Any], Any]) -> Callable[[Spoilt], list[str]]:
    """A file of weights with its tensors changed."""

    def spoil(adapter: Path, base: Path) -> None:
        path = (adapter if name == ADAPTER else base) / name
        stored = load_file(path)
        change(stored[min(stored)].view(-1))
        save_file(stored, path, metadata={"format": "pt"})

    return lambda scene: scene.checkpoint(spoil)


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A safetensors file that says another thing about its first tensor."""

    def rewritten(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + size])
        change(entries[min(name for name in entries if name != "__metadata__")])
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    return rewritten


def adapter_setting(**keys: Any) -> Callable[[Spoilt], list[str]]:
    """An adapter_config.json with other keys."""

    def spoil(adapter: Path, base: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return lambda scene: scene.checkpoint(spoil)


def adapter_file(content: bytes) -> Callable[[Spoilt], list[str]]:
    """An adapter_config.json of these bytes."""
    return lambda scene: scene.checkpoint(
        lambda adapter, base: (adapter / "adapter_config.json").write_bytes(content)
    )


def state(change: Callable[[Any], Any]) -> Callable[[Spoilt], list[str]]:
    """Another optimizer state."""
    return lambda scene: scene.optimizer(change)


def entry(**keys: Any) -> Callable[[Spoilt], list[str]]:
    """An optimizer state with other values for its first parameter."""
    return state(lambda saved: saved["state"][0].update(keys))


def setting(**keys: Any) -> Callable[[Spoilt], list[str]]:
    """An optimizer state with other values in its first group."""
    return state(lambda saved: saved["param_groups"][0].update(keys))


def trap_in(name: str, remove: str | None = None) -> Callable[[Spoilt], list[str]]:
    """A checkpoint one of whose pickles runs code where it is unpickled."""

    def make(scene: Spoilt) -> list[str]:
        def spoil(adapter: Path, base: Path) -> None:
            folder = base if name == "pytorch_model.bin" else adapter
            if remove is not None:
                (folder / remove).unlink()
            (folder / name).write_bytes(pickled({"state": Trap(scene.sprung)}))

        return scene.checkpoint(spoil)

    return make


def pipe(scene: Spoilt) -> list[str]:
    """A pipe that nobody writes to."""
    os.mkfifo(scene.folder / "E.jsonl")
    return ["--set", f"batches.E.file={scene.folder / 'E.jsonl'}"]


def pipe_as_config(scene: Spoilt) -> list[str]:
    """The same in place of the configuration."""
    os.mkfifo(scene.folder / "pipe.yaml")
    return ["--config", str(scene.folder / "pipe.yaml")]


def folder_as_batch(scene: Spoilt) -> list[str]:
    """A folder with the name of a batch file."""
    (scene.folder / "E.jsonl").mkdir()
    return ["--set", f"batches.E.file={scene.folder / 'E.jsonl'}"]


def key_in(text: str) -> Callable[[bytes], bytes]:
    """One more key in the first row."""
    return lambda content: content.replace(b"{", b"{" + text.encode() + b", ", 1)


def nested(depth: int) -> str:
    """A JSON value of lists in one another."""
    return "[" * depth + "]" * depth


ALIASES = "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
BOMB = f"a0: &a0 [x, x]\n{ALIASES}"
NAN = float("nan")
SAMPLE = "sample: {prompts: p.jsonl, num_prompts: 1, max_new_tokens: 2"

CASES: dict[str, tuple[Callable[[Spoilt], list[str]], str]] = {
    # Configuration: keys
    "key": (
        set_keys("update.los=nll"),
        r"unknown key `update.los`; did you mean `loss`",
    ),
    "key of the file": (
        config("sed: 1\n"),
        r"unknown key `sed`; did you mean `seed`\?",
    ),
    "key at the top": (set_keys("updat.loss=nll"), "`updat`; did you mean `update`"),
    "key of a batch": (set_keys("batches.E.fil=x"), r"`batches.E.fil`; did you mean"),
    "key of a sample": (
        set_keys(f"batches.U={{{SAMPLE}, num_prompt: 3}}}}"),
        "`batches.U.sample.num_prompt`; did you mean `num_prompts`",
    ),
    "key of a reward": (
        set_keys(f"batches.U={{{SAMPLE}, reward: [{{regex: a, weigth: 2}}]}}}}"),
        "`batches.U.sample.reward.weigth`; did you mean `weight`",
    ),
    "key with a hyphen": (set_keys("update.max-grad-norm=1"), "`max_grad_norm`"),
    "no key": (set_keys(".=3"), r"--set \.=3: expected key.sub=value"),
    "half a key": (set_keys("update..loss=nll"), r"expected key.sub=value"),
    "no section": (set_keys("seed.x=3"), "unknown key|`seed` is not a section|seed:"),
    "number as key": (config("7: 8\n"), "expected names as keys, found 7"),
    "number as section": (
        set_keys("update=5"),
        "update: expected a section of keys, f",
    ),
    # Configuration: values
    "type": (set_keys("seed=x"), "seed: expected a valid integer, found 'x'"),
    "range": (
        set_keys("objective.temperature=0"),
        "expected a value greater than 0, f",
    ),
    "infinite": (
        set_keys("update.lr_override=.inf"),
        "expected a finite number, found i",
    ),
    "choice": (
        set_keys("update.loss=ppo"),
        "update.loss: expected 'dr_grpo', 'grpo', ",
    ),
    "huge integer": (
        set_keys("seed=99999999999999999999"),
        "expected a value less than",
    ),
    "endless integer": (
        config("seed: " + "9" * 5000),
        "not valid YAML: Exceeds the li",
    ),
    "NUL in a path": (
        set_keys(r'batches.E.file="a\0b.jsonl"'),
        "without NUL characters",
    ),
    "half a surrogate": (set_keys(r'checkpoint.path="\ud800"'), "without NUL char"),
    # Configuration: file
    "YAML": (config("update: {loss: [\n"), "bad.yaml: not valid YAML: .*line 2"),
    "YAML on the line": (set_keys("update.loss=[a"), "the value is not valid YAML"),
    "tab": (config("update:\n\tloss: nll\n"), r"not valid YAML: .*'\\t'.* in line 2"),
    "key twice": (config("seed: 1\nseed: 2\n"), "key 'seed' stands twice in line 1"),
    "empty": (config(""), "expected a mapping of sections, found nothing"),
    "list": (config("- a\n"), "expected a mapping of sections, found list"),
    "not UTF-8": (config(b"seed: \xe9"), "bad.yaml: not valid YAML: 'utf-8' codec"),
    "NUL": (config(b"seed: \0"), "not valid YAML: unacceptable character #x0000"),
    "deep": (config("[" * 1500), "bad.yaml: not valid YAML: maximum recursion depth"),
    "deep on the line": (
        set_keys("seed=" + "[" * 1500),
        r"the value is not valid YAML",
    ),
    "bad date": (
        config("seed: 2020-99-99\n"),
        "not valid YAML: month must be in 1..12",
    ),
    "bad tag": (config("seed: !!bool x\n"), "not valid YAML: KeyError: 'x'"),
    "aliases": (config(BOMB), "not valid YAML: more than 100000 values"),
    "alias of itself": (
        config("seed: &a [*a]\n"),
        "an anchor contains itself in line 1",
    ),
    "python tag": (
        config("seed: !!python/name:os.system\n"),
        "could not determine a c",
    ),
    "no file": (
        lambda scene: ["--config", "absent.yaml"],
        "absent.yaml: cannot be read",
    ),
    "folder": (lambda scene: ["--config", str(scene.folder)], "Is a directory"),
    "pipe": (pipe_as_config, "pipe.yaml: expected a file, found a pipe; write it to a"),
    # Batch files
    "batch missing": (set_keys("batches.E.file=no.jsonl"), "no.jsonl: .*No such file"),
    "batch empty": (
        batch(lambda b: b""),
        "E.jsonl:1: expected at least one row, found a",
    ),
    "batch cut": (
        batch(lambda b: b[:-20]),
        r"E.jsonl:24: .*invalid JSON .* column \d+",
    ),
    "batch not UTF-8": (
        batch(lambda b: b.replace(b"tag", b"\xff", 1)),
        "E.jsonl:1: expected UTF-8 text, found byte 0xff at byte",
    ),
    "batch with NUL": (
        batch(lambda b: b[:40] + b"\0" + b[40:]),
        "E.jsonl:1: .*invalid J",
    ),
    "byte-order mark": (batch(lambda b: b"\xef\xbb\xbf" + b), "a byte-order mark"),
    "blank line": (batch(lambda b: b + b"\n"), r"E.jsonl:25: .*found a blank line"),
    "gzip cut": (
        batch(lambda b: gzip.compress(b)[:-40], "E.jsonl.gz"),
        "found a damaged",
    ),
    "gzip damaged": (
        batch(lambda b: gzip.compress(b)[:20] + b"\xff" * 8, "E.jsonl.gz"),
        r"E.jsonl.gz:1: expected gzip data, found a damaged or cut file",
    ),
    "gzip checksum": (
        batch(lambda b: gzip.compress(b)[:-8] + bytes(8), "E.jsonl.gz"),
        "CRC check failed",
    ),
    "no gzip": (batch(lambda b: b, "E.jsonl.gz"), "Not a gzipped file"),
    "gzip by another name": (batch(gzip.compress), r"gzip data: name it \.jsonl\.gz"),
    "batch of another kind": (batch(lambda b: b, "E.json"), "name ending in .jsonl or"),
    "batch a folder": (folder_as_batch, "E.jsonl: .*found Is a directory"),
    "batch a pipe": (pipe, "E.jsonl: expected a file, found a pipe"),
    # Rows
    "no object": (
        batch(lambda b: b"[1]\n"),
        r"E.jsonl:1: expected a JSON object, found",
    ),
    "NaN": (
        batch(key_in('"x": NaN')),
        "E.jsonl:1: expected finite numbers in `x`, found",
    ),
    "Infinity": (
        batch(key_in('"x": [{"y": -Infinity}]')),
        "finite numbers in `x`, found",
    ),
    "1e999": (batch(key_in('"x": 1e999')), "finite numbers in `x`, found inf"),
    "key of a row twice": (batch(key_in('"a": 1, "a": 2')), "'a' stands twice"),
    "deep row": (batch(key_in(f'"x": {nested(900)}')), "at most 100 lists and objects"),
    "deeper row": (batch(key_in(f'"x": {nested(10**5)}')), "invalid JSON .*recursion"),
    "endless number": (
        batch(key_in('"x": ' + "9" * 5000)),
        "invalid JSON .*4300 digits",
    ),
    "no group": (
        row("E", 1, group=None),
        "E.jsonl:1: expected the key `group`, found n",
    ),
    "group of a type": (
        row("E", 1, group=True),
        "`group` to be an integer or a string",
    ),
    "no prompt": (row("E", 2, prompt_ids=None), "E.jsonl:2: expected `prompt_ids` or"),
    "empty prompt": (row("E", 1, prompt_ids=[]), "at least one prompt token, found"),
    "bool as token": (
        row("E", 1, response_ids=[True]),
        "`response_ids` to be a list of",
    ),
    "float as token": (
        row("E", 1, response_ids=[1.0]),
        "`response_ids` to be a list of",
    ),
    "token too large": (
        row("E", 2, response_ids=[3, 17]),
        "E.jsonl:2: .* 0 to 16, .*17",
    ),
    "token negative": (
        row("E", 2, response_ids=[-1]),
        "found -1 at place 0; use the chec",
    ),
    "token endless": (row("E", 2, response_ids=[10**30]), "token ids from 0 to 16"),
    "prompt token": (
        row("U", 1, prompt_ids=[17]),
        "U.jsonl:1: .*in `prompt_ids`, found 17",
    ),
    "too long": (
        row("E", 1, response_ids=[3] * 70),
        r"E.jsonl:1: expected a sequence of at most 64 positions, found \d+",
    ),
    "prompts of a group": (
        row("U", 2, prompt_ids=[3]),
        "U.jsonl:2: .*found another pr",
    ),
    "log-probs positive": (
        row("U", 1, sampling_logprobs=[2.0] * 99),
        "one for each resp",
    ),
    "finished": (
        row("E", 1, finished="yes"),
        "`finished` to be true or false, found 'y",
    ),
    "text, no tokenizer": (
        row("E", 1, response_ids=None, response="a", finished=True),
        "as no tokenizer was given",
    ),
    # Rewards and groups
    "no reward": (
        row("U", 2, reward=None),
        "U.jsonl:2: expected `reward` or `advantage`",
    ),
    "reward a text": (
        row("U", 2, reward="1"),
        "U.jsonl:2: expected `reward` to be a num",
    ),
    "reward a bool": (row("U", 2, reward=True), "`reward` to be a number, found True"),
    "reward NaN": (
        row("U", 2, reward=NAN),
        "U.jsonl:2: expected finite numbers in `rew",
    ),
    "reward infinite": (
        row("U", 2, reward=-1e999),
        "finite numbers in `reward`, found -i",
    ),
    "reward endless": (row("U", 2, reward=10**400), "expected `reward` to be a number"),
    "advantage for some": (row("U", 1, advantage=1.0), "`advantage` for all responses"),
    "one response": (
        lambda scene: [
            *scene.mapped("U", lambda number, row: row | {"group": number}),
            *("--set", "batches.advantage=standardized"),
        ],
        "group 0: expected at least 2 responses for standardized advantages .*, found 1",
    ),
    "one response in E": (
        lambda scene: [
            *scene.mapped("E", lambda number, row: row | {"group": number}),
            *("--set", "gradient_dot.enabled=true"),
        ],
        "needs at least 2 responses in every group of E, found 1 in group 0",
    ),
    "E without tokens": (
        lambda scene: scene.mapped("E", lambda _, row: row | {"response_ids": []}),
        "batch E: .*E.jsonl: expected response tokens, found none in 24 sequences",
    ),
    "U without tokens": (
        lambda scene: scene.mapped("U", lambda _, row: row | {"response_ids": []}),
        "batch U: .*U.jsonl: expected response tokens, found none in 7 sequences",
    ),
    "E of one group": (
        batch(lambda b: b.splitlines(keepends=True)[0]),
        "batch E: expected at least 2 groups",
    ),
    "no log-probs": (
        set_keys("update.ratio=clipped"),
        "clipped needs sampling_logprobs",
    ),
    # Weights
    **{
        f"{name} {case}": (make(name), message)
        for name in (ADAPTER, MODEL)
        for case, make, message in [
            ("empty", lambda n: weights(n, lambda b: b""), "header too small"),
            ("cut", lambda n: weights(n, lambda b: b[:-9]), "incomplete metadata"),
            (
                "random",
                lambda n: weights(n, lambda b: b"\x93" * 99),
                "header too large",
            ),
            (
                "with a lying header",
                lambda n: weights(n, header(lambda e: e.update(shape=[1 << 40, 3]))),
                "Error while deserializing header",
            ),
            (
                "with lying offsets",
                lambda n: weights(
                    n, header(lambda e: e.update(data_offsets=[0, 1 << 50]))
                ),
                "Error while deserializing header",
            ),
            (
                "with NaN",
                lambda n: tensors(n, lambda x: x[:1].fill_(NAN)),
                "checkpoint: expected finite weights, found NaN or infinity in base_m",
            ),
            (
                "with infinity",
                lambda n: tensors(n, lambda x: x[-1:].fill_(-1e999)),
                "checkpoint: expected finite weights, found NaN or infinity in base_m",
            ),
        ]
    },
    "no adapter": (
        lambda scene: scene.checkpoint(lambda a, b: (a / ADAPTER).unlink()),
        f"expected {ADAPTER}, found .*adapter_config.json",
    ),
    "rank": (
        adapter_setting(r=7),
        r"does not fit the base model \(size mismatch for .*",
    ),
    "targets": (
        adapter_setting(target_modules=["no"]),
        r"Target modules .*not found in",
    ),
    "kind": (adapter_setting(peft_type="IA3"), "expected peft_type LORA, found IA3"),
    "base no name": (
        adapter_setting(base_model_name_or_path=5),
        "expected a name as b",
    ),
    "adapter empty": (
        adapter_file(b""),
        "adapter_config.json: not a readable adapter co",
    ),
    "adapter list": (
        adapter_file(b"[]"),
        "adapter_config.json: expected a mapping, found",
    ),
    "adapter deep": (
        adapter_file(b"[" * 10**5),
        "not a readable adapter configuration",
    ),
    "another base": (
        lambda scene: scene.checkpoint(
            lambda adapter, base: (
                shutil.rmtree(base),
                save_checkpoint(base.parent / "other", "gpt2"),
                shutil.copytree(base.parent / "other" / "base", base),
            )
        ),
        r"adapter .*: expected the base model .*, a qwen2, found a gpt2; is checkpoint",
    ),
    "missing checkpoint": (
        set_keys("checkpoint.path=absent"),
        "absent: expected a checkp",
    ),
    "hub id": (set_keys("checkpoint.base=some/where"), "hf download some/where"),
    # Optimizer state
    "state empty": (
        state(lambda s: b""),
        "optimizer.pt: not a readable optimizer state",
    ),
    "state cut": (
        state(lambda s: pickled(s)[:-99]),
        "optimizer.pt: not a readable opti",
    ),
    "state of bytes": (state(lambda s: b"\x93" * 99), "it is no file of torch.save"),
    "state of others": (
        state(lambda s: s["param_groups"][0].update(params=[0])),
        r"expected param groups of \[12, 0\] parameters .*found \[1, 0\]",
    ),
    "moment's shape": (
        entry(exp_avg=torch.zeros(3)),
        r"should be \(2, 16\), found \(3,\)",
    ),
    "moment NaN": (
        entry(exp_avg=torch.full((2, 16), NAN)),
        "exp_avg of .* has NaN or inf",
    ),
    "moment infinite": (
        entry(exp_avg_sq=torch.full((2, 16), 1e999)),
        "exp_avg_sq of .* has NaN or infinite values",
    ),
    "moment negative": (
        entry(exp_avg_sq=-torch.ones(2, 16)),
        "has negative values, and",
    ),
    "moment integer": (
        entry(exp_avg=torch.ones(2, 16).long()),
        "floating-point numbers",
    ),
    "step count": (entry(step="3"), "expected the number of steps taken as `step` of"),
    "steps negative": (
        entry(step=torch.tensor(-3.0)),
        "expected the number of steps tak",
    ),
    "learning rate": (
        setting(lr=NAN),
        "expected a finite number of at least 0 as lr of",
    ),
    "learning rate text": (setting(lr="x"), "as lr of param group 0, found 'x'"),
    "betas": (setting(betas=(0.9,)), "two numbers from 0 to less than 1 as betas"),
    "epsilon": (setting(eps=-1.0), "as eps of param group 0, found -1.0"),
    "params": (setting(params=5), "a list of numbers, or of names as params of"),
    "entry": (
        state(lambda s: s["state"].update({0: 5})),
        "a mapping for each parameter",
    ),
    "groups": (
        state(lambda s: s.update(param_groups=None)),
        "expected param groups, found",
    ),
    # Pickles that would run code
    "trap in optimizer": (
        trap_in("optimizer.pt", "optimizer.pt"),
        "no code is run from",
    ),
    "plain pickle": (
        lambda scene: scene.optimizer(lambda s: pickle.dumps(Trap(scene.sprung))),
        "no code is run from it",
    ),
    "trap in adapter": (
        trap_in("adapter_model.bin", ADAPTER),
        "no code is run from it",
    ),
    "trap in base": (
        trap_in("pytorch_model.bin", MODEL),
        "base model .*: cannot be load",
    ),
    "trap in settings": (
        lambda scene: [
            *trap_in("training_args.bin")(scene),
            *("--set", "update.from_checkpoint=true"),
        ],
        "training_args.bin: expected the pickled settings of a trainer, found",
    ),
    "trap for a batch": (
        lambda scene: scene.batch(pickled(Trap(scene.sprung))),
        "E.jsonl:1: expected UTF-8 text",
    ),
}


def invoke(*arguments: str | Path) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_good_run_is_good(good: Good, tmp_path: Path) -> None:
    """Whatever is refused below is refused for the one thing that was changed."""
    result = invoke("probe", "--config", good.config, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_line_and_leaves_nothing(
    spoilt: Spoilt, tmp_path: Path, case: str
) -> None:
    """`probe` and `check` say the same, and neither writes anything anywhere."""
    make, message = CASES[case]
    options = make(spoilt)
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "new" / "out"
    base = ["--config", str(spoilt.good.config)]
    for command, more in (("probe", ["--out", str(out)]), ("check", [])):
        # Of two --config the last one counts.
        result = invoke(command, *base, *more, *options)
        assert result.exit_code == 2, (result.stderr, result.exception)
        assert re.match(rf"error: .*({message})", result.stderr), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert len(result.stderr) < 1500
        assert result.stdout == ""
        assert sorted(tmp_path.rglob("*")) == before


def earlier_results(tmp_path: Path) -> Path:
    """A run directory that is in use."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    return tmp_path / "out"


def file_in_the_way(tmp_path: Path) -> Path:
    """A file with the name of the folder."""
    (tmp_path / "out").write_text("")
    return tmp_path / "out"


def folder_as_results(tmp_path: Path) -> Path:
    """A folder with the name of the results."""
    (tmp_path / "out" / "results.json").mkdir(parents=True)
    return tmp_path / "out"


FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (file_in_the_way, "out: cannot be written: File exists"),
    "below a file": (lambda path: file_in_the_way(path) / "x", "Not a directory"),
    "not writable": (
        lambda path: Path("/proc/no/out"),
        "/proc/no/out: cannot be written",
    ),
    "a device": (lambda path: Path("/dev/null"), "/dev/null: cannot be written"),
    "too long": (
        lambda path: path / ("x" * 300),
        "cannot be written: File name too long",
    ),
    "in use": (
        earlier_results,
        "out: holds the results of an earlier run; give --overwr",
    ),
    "a folder as results": (folder_as_results, "results.json: expected a file or none"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_first(
    good: Good, tmp_path: Path, case: str
) -> None:
    """Before the checkpoint is opened: here there is none."""
    make, message = FOLDERS[case]
    out = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    absent = ("--set", "checkpoint.path=absent")
    result = invoke("probe", "--config", good.config, "--out", out, *absent)
    assert result.exit_code == 2
    assert re.match(rf"error: .*({message})", result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_trap_that_is_unpickled_springs(tmp_path: Path) -> None:
    """The traps above prove something."""
    torch.load(io.BytesIO(pickled(Trap(tmp_path / "sprung"))), weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_two_ranks_tell_several_faults_once(good: Good, tmp_path: Path) -> None:
    """All faults of a configuration in one line, from one rank; nothing is written."""
    out = tmp_path / "out"
    settings = ("--set", "update.los=nll", "--set", "seed=x", "--set", "truth.clip_c=0")
    arguments = ("probe", "--config", good.config, "--out", out, *settings)
    command = launching.torchrun(2, *launching.PACKAGE, *arguments)
    finished = launching.run(command, timeout_seconds=100)
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if "error: " in line]
    (line,) = [line for line in lines if "unknown key `update.los`" in line]
    for part in ("seed: expected a valid integer", "truth.clip_c: expected a value"):
        assert part in line
    assert not [text for text in lines if "Traceback" in text]
    assert not out.exists()


@pytest.mark.parametrize("error", [MemoryError(), "out of memory", "allocate"])
def test_memory_that_runs_out_is_not_the_input_s_fault(
    good: Good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    """While a file is read: one line and exit code 1."""
    text = {"allocate": "DefaultCPUAllocator: can't allocate memory: you tried"}
    raised = RuntimeError(text.get(error, error)) if isinstance(error, str) else error

    def fail(*arguments: Any, **named: Any) -> None:
        raise raised

    monkeypatch.setattr("peft.PeftModel.from_pretrained", fail)
    result = invoke("check", "--config", good.config)
    assert result.exit_code == 1
    assert re.match("error: adapter .*: no memory to read it", result.stderr)
    assert result.stderr.count("\n") == 1
