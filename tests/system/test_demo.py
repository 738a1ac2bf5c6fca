"""The demo checkpoint: the task's reward, the folder that is written, repeatability."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_network_denied import run_commands

from entropy_ddp import demo
from entropy_ddp.demo import DemoCheckpoint, running_total_reward, train_demo
from entropy_ddp.errors import InputError

SHORT = {"supervised_steps": 3, "grpo_steps": 2}
TRAINER_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
}


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        ("3+4+8=", "7+8=15", 1.0),
        ("8+4=", "12", 1.0),
        ("1+2+3+4=", "3+3+4=6+4=10", 1.0),
        ("3+4+8=", "15", 1.0),
        ("3+4+8=", "9+9=15", 1.0),
        ("3+4+8=", "7+8=16", 0.0),
        ("3+4+8=", "7+8=", 0.0),
        ("3+4+8=", "7+8=15=", 0.0),
        ("3+4+8=", "7+8", 0.0),
        ("3+4+8=", "7+8=015", 0.0),
        ("3+4+8=", "", 0.0),
    ],
)
def test_only_what_follows_the_last_equals_sign_is_rewarded(
    prompt: str, response: str, reward: float
) -> None:
    """Garbled or skipped totals cost nothing; a wrong or missing sum does."""
    answer = str(sum(int(term) for term in prompt.rstrip("=").split("+")))
    assert running_total_reward(prompt, response, {"answer": answer}) == reward


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    """Training would take half a minute before it failed to take the folder's place."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="remove it"):
        train_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_library_is_named_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an ImportError, and an InputError that the command line prints."""
    found = demo.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "trl" else found(name)
    )
    with pytest.raises(demo.DemoRequirementError, match=r"trl.*entropy_ddp\[demo\]"):
        train_demo(tmp_path / "demo")
    assert issubclass(demo.DemoRequirementError, ImportError)


@contextmanager
def process_state_checked() -> Iterator[None]:
    """Fail if threads or random streams are not what they were before."""
    threads = torch.get_num_threads()
    # Another number than the one inside, so that a forgotten restore shows.
    torch.set_num_threads(2)
    before = random.getstate(), torch.get_rng_state().tolist()
    try:
        yield
        assert torch.get_num_threads() == 2
        assert (random.getstate(), torch.get_rng_state().tolist()) == before
    finally:
        torch.set_num_threads(threads)


def trained_tensors(made: DemoCheckpoint) -> dict[str, torch.Tensor]:
    """Weights of base and adapter and the optimizer's moments, by name."""
    optimizer = torch.load(made.checkpoint / "optimizer.pt", weights_only=True)
    moments = {
        f"{index}.{key}": value
        for index, state in optimizer["state"].items()
        for key, value in state.items()
    }
    base = load_file(made.base / "model.safetensors")
    return base | load_file(made.checkpoint / "adapter_model.safetensors") | moments


def assert_same_training(first: DemoCheckpoint, second: DemoCheckpoint) -> None:
    """Every bit of what was trained, and the prompts."""
    ours, theirs = trained_tensors(first), trained_tensors(second)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert first.prompts.read_bytes() == second.prompts.read_bytes()


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, int, int]]:
    """What `short_demo` reported of its progress."""
    return []


@pytest.fixture(scope="module")
def short_demo(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> DemoCheckpoint:
    """A policy that has learned next to nothing, trained in a few seconds."""
    folder = tmp_path_factory.mktemp("short") / "demo"
    with process_state_checked():
        return train_demo(folder, **SHORT, on_step=lambda *step: steps.append(step))


def test_the_checkpoint_is_an_ordinary_trainer_folder(
    short_demo: DemoCheckpoint,
) -> None:
    """Base, adapter with optimizer state, completions; nothing else is left over."""
    folder = short_demo.base.parent
    assert {path.name for path in short_demo.checkpoint.iterdir()} >= TRAINER_FILES
    assert (short_demo.base / "tokenizer.json").is_file()
    assert len(list((folder / "completions").glob("*.parquet"))) == SHORT["grpo_steps"]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert list(folder.parent.iterdir()) == [folder]


def test_files_name_the_final_folder_only(short_demo: DemoCheckpoint) -> None:
    """Training ran in another one, which no longer exists."""
    config = json.loads((short_demo.checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(short_demo.base)
    files = [path for path in short_demo.base.parent.rglob("*") if path.is_file()]
    assert not [path for path in files if b"/.demo-" in path.read_bytes()]


def test_the_prompts_are_distinct_and_their_answers_right(
    short_demo: DemoCheckpoint,
) -> None:
    """With two, three and four terms."""
    rows = [json.loads(line) for line in short_demo.prompts.open()]
    assert len({row["prompt"] for row in rows}) == len(rows) == demo.NUM_PROMPTS
    terms = [[int(t) for t in row["prompt"].rstrip("=").split("+")] for row in rows]
    assert {len(t) for t in terms} == {2, 3, 4}
    assert [str(sum(t)) for t in terms] == [row["answer"] for row in rows]


@pytest.mark.usefixtures("short_demo")
def test_every_step_of_both_phases_is_reported(
    steps: list[tuple[str, int, int]],
) -> None:
    """In order, so that a progress bar can follow."""
    supervised = [("supervised", done, 3) for done in (1, 2, 3)]
    assert steps == [*supervised, ("grpo", 1, 2), ("grpo", 2, 2)]


def test_training_again_is_silent_and_gives_the_same_bits(
    short_demo: DemoCheckpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An empty folder is accepted; the libraries print nothing."""
    assert_same_training(short_demo, train_demo(tmp_path, **SHORT))
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    """Neither the folder nor the one it was made in."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_demo(tmp_path / "demo", **SHORT, on_step=interrupt)
    assert not list(tmp_path.iterdir())


def test_the_whole_demo_is_worth_probing_and_asks_the_network_nothing(
    tmp_path: Path,
) -> None:
    """Made, checked and probed: right half of the time, undecided, a warm optimizer."""
    folder = tmp_path / "demo"
    made = DemoCheckpoint(
        base=folder / "base",
        checkpoint=folder / "checkpoint-20",
        prompts=folder / "prompts.jsonl",
    )
    batches = {split: {"file": str(folder / f"{split}.jsonl")} for split in "EU"}
    document = {"checkpoint": {"path": str(made.checkpoint)}, "batches": batches}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(document))
    out = str(tmp_path / "out")
    ended = run_commands(
        ["demo", "--out", str(folder), "--quiet"],
        ["check", "--config", str(config), "--quiet"],
        ["probe", "--config", str(config), "--out", out, "--quiet"],
        timeout=280,
    )
    assert [(code, asked) for code, asked, _ in ended] == [(0, [])] * 3, ended

    state = json.loads((made.checkpoint / "trainer_state.json").read_text())
    last = [step for step in state["log_history"] if "reward" in step][-5:]
    mean = {key: sum(step[key] for step in last) / len(last) for key in last[0]}
    assert 0.45 < mean["reward"] < 0.75
    assert 0.2 < mean["entropy"] < 0.4
    assert mean["frac_reward_zero_std"] < 0.25
    tensors = trained_tensors(made)
    moments = [value for name, value in tensors.items() if "exp_avg" in name]
    assert moments and all(bool((value != 0).all()) for value in moments)


@pytest.mark.long
def test_the_whole_demo_again_gives_the_same_bits(tmp_path: Path) -> None:
    """As the short one above does."""
    made, again = (train_demo(tmp_path / name) for name in ("first", "second"))
    assert_same_training(made, again)
