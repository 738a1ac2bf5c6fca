"""Is the cause of a predicted change that is zero or looks wrong named, and no other?

Each fault is planted in a run in which everything is in order: in the checkpoint on
disk, in a batch, in the configuration, or in the process. The audit must complain about
exactly that.
"""

import copy
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted
import pytest
import reference as ref
import torch
from checkpoints import save_checkpoint
from jobs import run_probe
from planted import END, Document, Scene
from reference import LossSettings, Objective
from rich.console import Console
from thread_ranks import run_thread_ranks
from tiny_runs import TinyRun
from torch import Tensor, nn

from entropy_ddp.answers.words import short_name
from entropy_ddp.checkpoint.policy import Policy
from entropy_ddp.distributed import World
from entropy_ddp.errors import RunError
from entropy_ddp.probe import opening, session
from entropy_ddp.probe.audits import model, truth
from entropy_ddp.probe.audits.batch import batch_rows
from entropy_ddp.probe.audits.step import scale_checks
from entropy_ddp.results import AuditRow, Probed, Results
from entropy_ddp.terminal.commands import print_diagnosis, print_results
from entropy_ddp.update import step

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-10  # the contract's bar for float64
TEN_DIGITS = 5e-10  # relative error of a number that is printed with ten digits
PROPORTIONALITY = 1e-6  # of the ratio 10, in float64

COVERAGE = ("gradient coverage: entropy (X)", "gradient coverage: loss (Y)")
CHANGE = "norm of the parameter change"
UNCHANGED = "share of elements that did not change"
RATIOS = (f"{CHANGE} at lr / at lr/10", "delta_h1 at lr / at lr/10")
SIGNAL = "norm of the gradient of mean log p"
RMS = "rms of the step / learning rate"
MOMENTS = ("second moments equal to 0", "second moments below eps^2")
GROUPS = "U groups with std(A) > 0"
STEP = "U step of the trainer"
SURPRISAL = "E surprisal against entropy, in SD"
SAMPLER = {split: f"{split} sampler mismatch, mean |Δ log p|" for split in "EU"}
NOISE = "noise floor of delta_h_true"
ESS, CURVED = "ESS / N", "eta / eta*"
COUNTED, EARLY = "ESS, responses", "step t of the optimizer, for V_Y"
DIFFERENCE = "|true - first order| / SE of the truth"
RESTORED = "restored bits: parameters and optimizer state"
RANKS = (
    "parameters before the step",
    "parameters after the step",
    "parameters after the restore",
    "frozen parameters",
)


# Of 60 responses of an untrained model one may well make a fifth of the squared error:
# that is no fault, and has tests of its own.
OF_FEW = {
    "effective degrees of freedom of the error",
    "largest share of one response in the squared error",
}


def complaints(probed: Probed) -> dict[str, str]:
    """The checks that are not ok, with their verdicts, but for those of a small E."""
    rows = (row for row in probed.results.audit if row.name not in OF_FEW)
    return {row.name: row.verdict for row in rows if row.verdict != "ok"}


def find(probed: Probed, name: str) -> AuditRow:
    """The audit of this name."""
    (row,) = (row for row in probed.results.audit if row.name == name)
    return row


# Runs in which everything is in order


def in_float32(scene: Scene, root: Path) -> Scene:
    return scene.with_sections(precision={"model": "float32"})


def with_sampler(scene: Scene, root: Path) -> Scene:
    """Both batches as a sampler reports them that computes in float64."""
    batches = {}
    for split, rows in (("E", scene.E), ("U", scene.U)):
        scores = ref.scores(scene.saved.model, planted.reference_rows(rows), 1.0)
        batches[split] = [
            row | {"sampling_logprobs": logp.tolist()}
            for row, (logp, _) in zip(rows, scores, strict=True)
        ]
    return replace(scene, **batches)


def of_single_tokens(scene: Scene, root: Path) -> Scene:
    """E of 180 first tokens after three prompts: the change has a small error."""
    generator = torch.Generator().manual_seed(9)
    rows: list[Document] = []
    for row in scene.E[:3]:
        prompt = row["prompt_ids"]
        for response in planted.sample_responses(
            scene.saved.model, torch.tensor([prompt] * 60), generator, max_tokens=1
        ):
            given = {"prompt_ids": prompt, "response_ids": response}
            rows.append({"group": len(rows)} | given)
    return replace(scene, E=rows)


HEALTHY: dict[str, Callable[[Scene, Path], Scene]] = {
    "plain": lambda scene, root: scene,
    "gpt2": lambda scene, root: planted.make_scene(root, "gpt2"),
    "float32": in_float32,
    "sampler": with_sampler,
    "single tokens": of_single_tokens,
    "no decay": lambda scene, root: planted.make_scene(root, weight_decay=0.0),
}
Runs = dict[str, tuple[Scene, Probed]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run without a fault, with its audit."""
    plain = planted.make_scene(tmp_path_factory.mktemp("plain"))
    found = {}
    for name, make in HEALTHY.items():
        root = tmp_path_factory.mktemp("healthy")
        scene = make(plain, root)
        found[name] = scene, scene.audit(root)
    return found


@pytest.fixture(scope="module")
def plain(runs: Runs) -> Scene:
    return runs["plain"][0]


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_wrong_without_a_fault(runs: Runs, name: str) -> None:
    probed = runs[name][1]
    assert complaints(probed) == {}
    assert probed.results.status == "ok"


@pytest.mark.parametrize("name", ["plain", "gpt2"])
def test_the_step_is_proportional_to_the_learning_rate(runs: Runs, name: str) -> None:
    for ratio in RATIOS:
        value = find(runs[name][1], ratio).value
        assert abs(value - 10) <= 10 * PROPORTIONALITY, ratio


def test_an_adapter_saved_for_inference_is_trainable(runs: Runs) -> None:
    """PEFT marks every adapter it saves as frozen (`inference_mode`)."""
    scene, probed = runs["plain"]
    config = json.loads((scene.saved.folder / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    parameters = ref.trainable(scene.saved.model)
    assert find(probed, "trainable tensors").value == len(parameters)
    covered = f"{len(parameters)} of {len(parameters)} tensors"
    assert [find(probed, name).value for name in COVERAGE] == [covered, covered]


# One fault each


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, and everything that the audit must and may say about it.

    `complaints` are the verdicts of the checks that must complain, of which the first
    names the cause in these words. `perhaps` are consequences that hang on rounding.
    """

    plant: Callable[[Scene, Path], Scene]
    complaints: dict[str, str]
    cause: str
    of: str = "plain"
    perhaps: frozenset[str] = field(default_factory=frozenset)


def warned(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "warn")


def failed(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "fail")


def zeroed(*words: str) -> Callable[[str, Tensor], Tensor]:
    """Zero the parameters whose name has one of these words."""

    def change(name: str, values: Tensor) -> Tensor:
        hit = any(word in name for word in words)
        return torch.zeros_like(values) if hit else values

    return change


def in_every_tenth(change: dict[str, Any]) -> Callable[[Scene, str], Scene]:
    """Every tenth row of a batch replaced in part."""

    def plant(scene: Scene, split: str) -> Scene:
        rows = [
            row | change if number % 10 == 0 else row
            for number, row in enumerate(getattr(scene, split))
        ]
        return replace(scene, **{split: rows})

    return plant


emptied = in_every_tenth({"response_ids": [], "finished": False})


def late_mask(row: Document) -> Document:
    """The response mask begins one token late: the first token belongs to neither."""
    if len(row["response_ids"]) == 1:
        return row
    lists = ("response_ids", "sampling_logprobs")
    return row | {key: row[key][1:] for key in lists if key in row}


def truncated_sampler(row: Document) -> Document:
    """Every token is likelier than in the whole distribution, by a little."""
    return row | {"sampling_logprobs": [x + 0.02 for x in row["sampling_logprobs"]]}


def renumbered(rows: list[Document]) -> list[Document]:
    """The same responses, last first, in groups of other numbers."""
    return [row | {"group": 1000 + row["group"]} for row in reversed(rows)]


def noisy_sampler(scene: Scene, split: str, size: float) -> Scene:
    """Log-probabilities with an error of this standard deviation and no pattern."""
    generator = torch.Generator().manual_seed(5)

    def noisy(row: Document) -> Document:
        exact = torch.tensor(row["sampling_logprobs"])
        noise = size * torch.randn(exact.shape, generator=generator)
        return row | {"sampling_logprobs": (exact + noise).tolist()}

    return scene.with_rows(split, noisy)


def of_another_checkpoint(scene: Scene, split: str) -> Scene:
    """A batch that a neighbouring adapter sampled, with its log-probabilities."""
    rows: list[Document] = sampled_nearby(scene.saved.model)[split]
    return replace(scene, E=rows) if split == "E" else replace(scene, U=rows)


@cache
def sampled_nearby(policy: nn.Module) -> dict[str, list[Document]]:
    """Both batches as an adapter near this one sampled them."""
    model = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in ref.trainable(model).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * parameter.std() * noise)
    batches = planted.sample_batches(model)
    for rows in batches.values():
        scores = ref.scores(model, planted.reference_rows(rows), 1.0)
        for row, (logp, _) in zip(rows, scores, strict=True):
            row["sampling_logprobs"] = logp.tolist()
    return batches


def with_one_surprise(scene: Scene) -> Scene:
    """Line 7 of E is made of the least probable tokens there are."""
    ids = torch.tensor([scene.E[6]["prompt_ids"]])
    with torch.no_grad(), ref.true_float64():
        for _ in range(60):
            worst = scene.saved.model(input_ids=ids).logits[:, -1:].argmin(-1)
            ids = torch.cat([ids, worst], dim=1)
    response = ids[0, len(scene.E[6]["prompt_ids"]) :].tolist()
    row = scene.E[6] | {"response_ids": response, "finished": False}
    return replace(scene, E=[*scene.E[:6], row, *scene.E[7:]])


def stripped(row: Document) -> Document:
    """A finished response without the token that ended it, if another one is left."""
    ids = row["response_ids"]
    return row | {"response_ids": ids[:-1] if ids[-1] == END and ids[:-1] else ids}


def cut_off(row: Document) -> Document:
    """The response of a sampler that stops after four tokens."""
    ids = row["response_ids"][:4]
    return row | {"response_ids": ids, "finished": ids[-1] == END}


def after_three_steps(scene: Scene, root: Path) -> Scene:
    """The checkpoint says how many steps it has behind it."""
    saved = planted.copy_checkpoint(scene.saved, root)
    (saved.folder / "trainer_state.json").write_text('{"global_step": 3}')
    return replace(scene, saved=saved)


FAULTS: dict[str, Fault] = {
    "a step below the rounding of most weights": Fault(
        of="float32",
        plant=lambda scene, root: scene.with_step(lr_override=1e-9),
        complaints=warned(UNCHANGED, *RATIOS),
        cause="tiny against the rounding of the weights",
        perhaps=frozenset({NOISE, DIFFERENCE}),
    ),
    "B matrices still zero": Fault(
        plant=lambda scene, root: scene.with_weights(root, zeroed("lora_B")),
        complaints=warned(*COVERAGE),
        cause="B matrices still zero",
    ),
    "one layer without a gradient": Fault(
        plant=lambda scene, root: scene.with_weights(
            root, zeroed("layers.1.mlp.down_proj.lora_B")
        ),
        complaints=warned(*COVERAGE),
        cause="some trainable tensors get no gradient",
    ),
    "empty responses in E": Fault(
        plant=lambda scene, root: emptied(scene, "E"),
        complaints=warned("E responses without tokens"),
        cause="they count in N with entropy 0",
    ),
    "empty responses in U": Fault(
        plant=lambda scene, root: emptied(scene, "U"),
        complaints=warned("U responses without tokens"),
        cause="they count in N with entropy 0",
    ),
    "misaligned masks": Fault(
        plant=lambda scene, root: scene.with_rows("E", late_mask),
        complaints=failed(SURPRISAL),
        cause="prompt and response are misaligned",
    ),
    "misaligned masks, sampler known": Fault(
        of="sampler",
        plant=lambda scene, root: scene.with_rows("E", late_mask),
        complaints=failed(SAMPLER["E"], SURPRISAL),
        cause="prompt and response are misaligned",
    ),
    "one response of another prompt": Fault(
        plant=lambda scene, root: with_one_surprise(scene),
        complaints=warned(SURPRISAL),
        cause="one response, line 7, is most of it",
    ),
    "temperature too low": Fault(
        plant=lambda scene, root: scene.with_sections(objective={"temperature": 0.7}),
        complaints=failed(SURPRISAL),
        cause="as of a higher temperature (0.7 is set; about 1",
    ),
    "temperature too high": Fault(
        plant=lambda scene, root: scene.with_sections(objective={"temperature": 1.4}),
        complaints=failed(SURPRISAL),
        cause="as of a lower temperature (1.4 is set; about 1",
    ),
    "temperature too low, sampler known": Fault(
        of="sampler",
        plant=lambda scene, root: scene.with_sections(objective={"temperature": 0.7}),
        complaints=failed(SAMPLER["E"], SAMPLER["U"], SURPRISAL),
        cause="they fit a temperature of about 0.98, not 0.7: set objective.temperature",
    ),
    "temperature a little too low, sampler known": Fault(
        of="sampler",
        plant=lambda scene, root: scene.with_sections(objective={"temperature": 0.98}),
        complaints=failed(SAMPLER["E"], SAMPLER["U"]),
        cause="they fit a temperature of about 1, not 0.98",
    ),
    "a truncated sampler of E": Fault(
        of="sampler",
        plant=lambda scene, root: scene.with_rows("E", truncated_sampler),
        complaints=failed(SAMPLER["E"]),
        cause="off to one side, as of a truncated distribution",
    ),
    "a sampler of U that rounds to bfloat16": Fault(
        of="sampler",
        plant=lambda scene, root: noisy_sampler(scene, "U", 0.015),
        complaints=warned(SAMPLER["U"]),
        cause="of a sampler that computes in bfloat16",
    ),
    "E of another checkpoint": Fault(
        of="sampler",
        plant=lambda scene, root: of_another_checkpoint(scene, "E"),
        complaints=failed(SAMPLER["E"]),
        cause="the rollouts come from other weights",
    ),
    "U of another checkpoint": Fault(
        of="sampler",
        plant=lambda scene, root: of_another_checkpoint(scene, "U"),
        complaints=failed(SAMPLER["U"]),
        cause="the rollouts come from other weights",
    ),
    "U of another checkpoint, weighed by the ratio": Fault(
        of="sampler",
        plant=lambda scene, root: of_another_checkpoint(scene, "U").with_step(
            ratio="clipped"
        ),
        complaints=warned(SAMPLER["U"]),
        cause="allows a batch that was sampled some steps earlier",
    ),
    "U of another temperature, weighed by the ratio": Fault(
        of="sampler",
        plant=lambda scene, root: scene.with_sections(
            objective={"temperature": 0.98}
        ).with_step(ratio="clipped"),
        complaints=failed(SAMPLER["U"], SAMPLER["E"]),
        cause="they fit a temperature of about 1",
    ),
    "E and U are one file": Fault(
        plant=lambda scene, root: replace(scene, E=scene.U),
        complaints=warned("E and U are different rollouts", COUNTED, EARLY),
        cause="the part of U's own gradient is biased",
    ),
    "U is among the responses of E, in another order": Fault(
        plant=lambda scene, root: replace(scene, E=[*scene.E, *renumbered(scene.U)]),
        complaints=warned("E and U are different rollouts"),
        cause="the part of U's own gradient is biased",
    ),
    "second moments that crush the step": Fault(
        of="no decay",
        plant=lambda scene, root: scene.with_moments(root, exp_avg_sq=1e8),
        complaints=warned(RMS),
        cause="second moments crush the step",
    ),
    "second moments that crush all but weight decay": Fault(
        plant=lambda scene, root: scene.with_moments(root, exp_avg_sq=1e8),
        complaints=warned(RMS),
        cause="second moments crush the step",
    ),
    "no moments": Fault(
        plant=lambda scene, root: scene.with_moments(root, exp_avg=0.0, exp_avg_sq=0.0),
        complaints=warned(*MOMENTS),
        cause="the optimizer has hardly seen a gradient",
    ),
    "tiny second moments": Fault(
        of="no decay",
        plant=lambda scene, root: scene.with_moments(
            root, exp_avg=0.0, exp_avg_sq=1e-18
        ),
        complaints=warned(MOMENTS[1]),
        cause="crushed by eps",
    ),
    "effective sample size below the warning": Fault(
        plant=lambda scene, root: scene.with_step(lr_override=0.08),
        complaints=warned(ESS, COUNTED),
        cause="too large for importance sampling",
        perhaps=frozenset({CURVED, DIFFERENCE}),
    ),
    "effective sample size below trust": Fault(
        plant=lambda scene, root: scene.with_step(lr_override=0.5),
        complaints={ESS: "fail", COUNTED: "warn"},
        cause="too large for importance sampling",
        perhaps=frozenset({CURVED, DIFFERENCE}),
    ),
    "few effective responses, though most of E": Fault(
        plant=lambda scene, root: scene.with_sections(truth={"ess_least": 61}),
        complaints=warned(COUNTED),
        cause="so few responses",
    ),
    "a step near the edge of the linear regime": Fault(
        of="single tokens",
        plant=lambda scene, root: scene.with_step(lr_override=0.2),
        complaints=warned(CURVED, DIFFERENCE, ESS),
        cause="leaves the linear regime",
    ),
    "a change that is not linear": Fault(
        of="single tokens",
        plant=lambda scene, root: scene.with_step(lr_override=0.1),
        complaints=warned(DIFFERENCE),
        cause="leaves the linear regime",
    ),
    "end tokens stripped from E": Fault(
        plant=lambda scene, root: scene.with_rows("E", stripped),
        complaints=warned("E finished responses that end in an end token"),
        cause="the end-of-sequence token was stripped",
    ),
    "end tokens stripped from U": Fault(
        plant=lambda scene, root: scene.with_rows("U", stripped),
        complaints=warned("U finished responses that end in an end token"),
        cause="the end-of-sequence token was stripped",
    ),
    "U of another step than the checkpoint's next": Fault(
        plant=lambda scene, root: after_three_steps(scene, root).with_rows(
            "U", lambda row: row | {"step": 2}
        ),
        complaints={STEP: "fail"},
        cause="name the file of step 4",
    ),
    "most responses cut off": Fault(
        plant=lambda scene, root: scene.with_rows("E", cut_off).with_step(
            lr_override=1e-5
        ),
        complaints=warned("E truncated responses"),
        cause="sample the batch with a larger one",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_nothing_else(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    fault = FAULTS[name]
    probed = fault.plant(runs[fault.of][0], tmp_path).audit(tmp_path)
    found = complaints(probed)
    assert fault.complaints.items() <= found.items()
    assert found.keys() - fault.complaints.keys() <= fault.perhaps
    assert fault.cause in find(probed, next(iter(fault.complaints))).hint
    require_complete(probed.results)


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (4, "which is the trainer's own limit"),
        (100, "limit (the trainer's is 100), sample"),
    ],
)
def test_whose_limit_cut_the_responses_off(
    plain: Scene, tmp_path: Path, limit: int, said: str
) -> None:
    """Where it is the trainer's, nothing in the probe is to be raised."""
    saved = planted.copy_checkpoint(plain.saved, tmp_path)
    settings = SimpleNamespace(max_completion_length=limit)
    torch.save(settings, saved.folder / "training_args.bin")
    cut = replace(plain.with_rows("E", cut_off), saved=saved)
    opened = opening.open_session(
        cut.config(tmp_path), World(), None, session.no_progress
    )
    rows = batch_rows(opened)
    hint = next(row.hint for row in rows if row.name == "E truncated responses")
    assert "cut off, the longest after 4 tokens" in hint and said in hint


# Responses from text


@pytest.fixture(scope="module")
def peaked(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A policy that is sure of most tokens, and batches sampled from it."""
    root = tmp_path_factory.mktemp("peaked")
    model = ref.tiny_qwen2(11, attention="sdpa")
    with torch.no_grad():
        model.model.norm.weight.mul_(8.0)
    saved = save_checkpoint(root, "qwen2", model=model)
    return Scene(
        saved=saved,
        **planted.sample_batches(saved.model),
        sections={"compute": planted.COMPUTE, "update": {"lr_override": 1e-5}},
    )


def from_text(row: Document) -> Document:
    """As the importer has it: where the response had ended, the end was put back."""
    return row | {"ids_from_text": ["end restored"] if row["finished"] else []}


@pytest.fixture(scope="module")
def cut_and_ended(peaked: Scene) -> tuple[Scene, int, float]:
    """A response of U that was cut off gets an end; its place, and the end's log p."""
    scene = peaked.with_rows("U", from_text)
    cuts = [
        (
            place,
            row | {"response_ids": [*row["response_ids"][:k], END], "finished": True},
        )
        for place, row in enumerate(scene.U)
        for k in range(1, len(row["response_ids"]))
    ]
    ends = [end_logp(scene, row) for _, row in cuts]
    least = min(range(len(cuts)), key=ends.__getitem__)
    place, row = cuts[least]
    rows = [*scene.U]
    rows[place] = from_text(row) | {"ids_from_text": ["near the limit", "end restored"]}
    return replace(scene, U=rows), place, ends[least]


@torch.no_grad()
def end_logp(scene: Scene, row: Document) -> float:
    """Log p of a row's last token by the reference."""
    keys = ("group", "prompt_ids", "response_ids")
    given = ref.Row(**{key: row[key] for key in keys})
    return float(ref.token_scores(scene.saved.model, given, 1.0)[0][-1])


def test_genuine_ends_from_text_are_in_no_doubt(peaked: Scene, tmp_path: Path) -> None:
    """The rows are counted; the least probable end is that of the reference."""
    scene = peaked.with_rows("U", from_text).with_rows(
        "E", lambda row: row | {"ids_from_text": ["log differs"]}
    )
    probed = run_probe(scene.config(tmp_path), World(), None, session.no_progress)
    assert find(probed, "U responses with ids from text").value == len(scene.U)
    assert find(probed, "U responses with ids in doubt").verdict == "ok"
    row = find(probed, "U restored end of sequence, least log p")
    expected = min(end_logp(scene, row) for row in scene.U if row["finished"])
    assert row.verdict == "ok" and row.value == pytest.approx(expected, rel=1e-9)
    doubtful = find(probed, "E responses with ids in doubt")
    assert (doubtful.value, doubtful.verdict) == (str(len(scene.E)), "warn")
    names = [row.name for row in probed.results.audit]
    assert "E restored end of sequence, least log p" not in names


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_false_end_of_sequence_is_named_by_its_line(
    cut_and_ended: tuple[Scene, int, float], tmp_path: Path, ranks: int
) -> None:
    """A response that was cut off and got an end makes the run untrusted."""
    scene, place, logp = cut_and_ended
    config = scene.config(tmp_path)
    probed = run_thread_ranks(
        ranks, lambda world: run_probe(config, world, None, session.no_progress)
    )[0]
    row = find(probed, "U restored end of sequence, least log p")
    assert row.verdict == "fail" and probed.results.status == "untrusted"
    assert row.value == pytest.approx(logp, rel=1e-9)
    assert row.hint.startswith(f"line {place + 1}: ")
    doubtful = find(probed, "U responses with ids in doubt")
    assert (doubtful.value, doubtful.verdict) == (f"1 (line {place + 1})", "warn")
    rows = [r for r in probed.sequences if r["split"] == "U"]
    assert rows[place]["ids_from_text"] == ["near the limit", "end restored"]


def test_a_false_end_that_moves_nothing_is_a_warning(
    cut_and_ended: tuple[Scene, int, float], tmp_path: Path
) -> None:
    scene, place, _ = cut_and_ended
    group = scene.U[place]["group"]
    rows = [row | ({"reward": 1.0} if row["group"] == group else {}) for row in scene.U]
    config = replace(scene, U=rows).config(tmp_path)
    probed = run_probe(config, World(), None, session.no_progress)
    assert find(probed, "U restored end of sequence, least log p").verdict == "warn"


def test_no_more_than_the_announced_share_of_batches_has_such_an_end() -> None:
    """Whatever the policy: ends drawn with probabilities of any size."""
    draw = torch.Generator().manual_seed(0)
    shape = (20_000, 40)
    # From 1e-6 to 1, and so that rare ends are as frequent as can be.
    ends = 10 ** (-6 * torch.rand(shape, generator=draw, dtype=torch.float64) ** 0.5)
    sampled = torch.rand(shape, generator=draw, dtype=torch.float64) < ends
    for share in (1e-2, 1e-1):
        improbable = sampled & (ends.log() < math.log(share / shape[1]))
        found = improbable.any(dim=1).double().mean()
        assert 0 < found <= share


def require_complete(results: Results) -> None:
    """Each complaint has a hint and nothing else has one; the status follows from all.

    The document has the contract's keys, JSON types, and each name once.
    """
    verdicts = [row.verdict for row in results.audit]
    assert results.status == ("untrusted" if "fail" in verdicts else "ok")
    assert all((row.hint != "") == (row.verdict != "ok") for row in results.audit)
    document = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    keys = {"name", "value", "expected", "verdict", "hint"}
    assert all(row.keys() == keys for row in document["audit"])
    names = [row["name"] for row in document["audit"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", HEALTHY)
def test_the_document_is_complete_without_a_fault(runs: Runs, name: str) -> None:
    require_complete(runs[name][1].results)


# Nothing moves, nothing flows


def test_a_step_that_rounding_swallows_whole(runs: Runs, tmp_path: Path) -> None:
    """A learning rate far below the rounding of float32: the change is exactly zero."""
    probed = runs["float32"][0].with_step(lr_override=1e-12).audit(tmp_path)
    found = complaints(probed)
    assert found[CHANGE] == "fail"
    assert found[UNCHANGED] == "warn"
    assert found.keys() <= {CHANGE, UNCHANGED, RMS, NOISE, DIFFERENCE, *RATIOS}
    assert "below the rounding of the weights" in find(probed, CHANGE).hint
    assert probed.results.linear.delta_h1 == 0
    require_complete(probed.results)


def test_an_adapter_of_zeros_gives_no_gradient(plain: Scene, tmp_path: Path) -> None:
    """A = B = 0: no parameter reaches the policy to first order."""
    probed = plain.with_weights(tmp_path, zeroed("lora_")).audit(tmp_path)
    found = complaints(probed)
    assert {SIGNAL: "fail", **dict.fromkeys(COVERAGE, "fail")}.items() <= found.items()
    assert found.keys() <= {SIGNAL, *COVERAGE, NOISE, RATIOS[1]}
    assert "no gradient flows through the responses" in find(probed, SIGNAL).hint
    assert "its matrices are zero" in find(probed, SIGNAL).hint
    assert probed.results.linear.slope == 0
    require_complete(probed.results)


@pytest.mark.parametrize(
    "bypass",
    [
        lambda model: model.disable_adapter_layers(),
        lambda model: model.merge_adapter(),
    ],
    ids=["disabled", "merged"],
)
def test_an_adapter_that_is_not_in_use_is_refused(
    plain: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bypass: Callable[[nn.Module], None],
) -> None:
    load = opening.load_policy

    def load_bypassed(*arguments: Any) -> Policy:
        policy = load(*arguments)
        bypass(policy.model)
        return policy

    monkeypatch.setattr(opening, "load_policy", load_bypassed)
    with pytest.raises(RunError, match="adapter merged or disabled"):
        plain.audit(tmp_path)


@pytest.mark.parametrize("learning_rate", [1e-9, 3e-9, 1e-8])
def test_a_change_of_rounding_alone_is_below_the_noise_floor(
    runs: Runs, tmp_path: Path, learning_rate: float
) -> None:
    """The truth in float32 is off by more than its size: float64 says so."""
    changes = {}
    for name in ("plain", "float32"):
        scene = runs[name][0].with_step(lr_override=learning_rate)
        probed = scene.audit(tmp_path)
        changes[name] = probed.results.truth.delta_h_true
    assert abs(changes["float32"] - changes["plain"]) > abs(changes["plain"])
    assert find(probed, NOISE).verdict == "fail"
    assert "as small as the rounding" in find(probed, NOISE).hint
    assert "precision.model: float64" in find(probed, NOISE).hint


@pytest.mark.parametrize(
    ("noise", "change", "verdict"),
    [
        (1e-8, (-2e-3, 1e-4), "ok"),
        (3e-4, (-2e-3, 1e-3), "warn"),
        (2e-4, (-2e-3, 1e-4), "fail"),  # above the error
        (6e-4, (2e-4, 1e-3), "fail"),  # above the change
        (
            1e-8,
            (1e-9, 1e-4),
            "warn",
        ),  # above a change that is nothing, lost in its error
        (0.0, (0.0, 0.0), "ok"),
    ],
)
def test_rounding_is_held_against_the_change_and_its_error(
    noise: float, change: tuple[float, float], verdict: str
) -> None:
    """In bfloat16 float32 is enough, and no step size mends it."""
    row = truth.noise_row(noise, *change, "bfloat16")
    assert row.verdict == verdict
    if verdict != "ok":
        assert "precision.model: float32" in row.hint
        assert "float64" not in row.hint and "linear" not in row.hint
    if noise > change[1]:
        rows = truth.linearity_rows(1e-3, 1e-3, 0.1, change[1], noise, 2.0)
        assert {r.verdict for r in rows} == {"ok"}


@pytest.mark.parametrize(
    ("flags", "native"),
    [("avx2 fma", False), ("avx2 avx512_bf16", True), ("asimd bf16 i8mm", True)],
)
def test_bfloat16_without_its_instructions_is_said(
    tmp_path: Path, flags: str, native: bool
) -> None:
    """With what it costs; other precisions and devices have no such row."""
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"processor : 0\nflags : fpu {flags}\n")
    assert model.multiplies_bfloat16(facts) is native
    assert model.multiplies_bfloat16(tmp_path / "absent") is None
    (row,) = model.precision_rows("cpu", "bfloat16", native)
    assert row.verdict == ("ok" if native else "warn")
    assert native or "four times the cost" in row.hint
    assert not model.precision_rows("cpu", "float32", native)
    assert not model.precision_rows("cuda", "bfloat16", native)


# Rewards without a signal


@pytest.fixture(scope="module")
def equal_rewards(
    plain: Scene, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Scene, Probed]:
    """Every response of U is given the same reward."""
    scene = plain.with_rows("U", lambda row: row | {"reward": 1.0})
    # The mode of the reference.
    scene = scene.with_sections(truth={"is_mode": "snis"})
    return scene, scene.audit(tmp_path_factory.mktemp("equal"))


def test_equal_rewards_leave_momentum_and_decay(
    equal_rewards: tuple[Scene, Probed], tmp_path: Path
) -> None:
    """No group has a signal, and the change that is left is that of a zero gradient."""
    scene, probed = equal_rewards
    row = find(probed, GROUPS)
    assert (row.verdict, row.value) == ("warn", 0.0)
    assert "what remains is momentum and weight decay" in row.hint
    results = probed.results
    assert results.update.grad_norm == 0
    E, U = map(planted.reference_rows, (scene.E, scene.U))
    run = TinyRun(saved=scene.saved, E=E, U=U, folder=tmp_path)
    expected = run.naive_step(
        LossSettings(), max_grad_norm=1.0, learning_rate=planted.LEARNING_RATE
    )
    model = scene.saved.model
    before = ref.scores(model, E, 1.0)
    with ref.parameters_shifted(model, expected.delta, 1.0):
        after = ref.scores(model, E, 1.0)
    truth = ref.delta_h_true(E, before, after, Objective())
    error = results.truth.delta_h_true - truth.delta_h_true
    assert truth.delta_h_true != 0
    assert abs(error) <= RTOL * truth.H_orig


def test_equal_rewards_are_not_blamed_on_the_adapter(
    equal_rewards: tuple[Scene, Probed],
) -> None:
    """The result is right, and the rewards are the only thing to complain about."""
    probed = equal_rewards[1]
    assert complaints(probed) == warned(GROUPS)
    assert probed.results.status == "ok"


def test_equal_rewards_without_momentum_and_decay_move_nothing(
    runs: Runs, tmp_path: Path
) -> None:
    """Nothing is left of the step: a change of exactly zero, and why."""
    scene = runs["no decay"][0].with_rows("U", lambda row: row | {"reward": 1.0})
    probed = scene.with_moments(tmp_path, exp_avg=0.0).audit(tmp_path)
    found = complaints(probed)
    assert {CHANGE: "fail", GROUPS: "warn"}.items() <= found.items()
    assert "every group's rewards are all equal" in find(probed, GROUPS).hint
    assert probed.results.linear.delta_h1 == 0
    assert probed.results.update.param_update_l2 == 0


def test_share_and_histogram_of_the_groups_with_a_signal(
    plain: Scene, tmp_path: Path
) -> None:
    """Two of six groups have unequal rewards; the rest is in the first bin."""
    rewards = {0: [1.0, 0.0, 0.0], 1: [0.5, 0.5, 0.25]}
    rows = [
        row | {"reward": rewards.get(row["group"], [1.0] * 3)[number % 3]}
        for number, row in enumerate(plain.U)
    ]
    probed = replace(plain, U=rows).audit(tmp_path)
    assert complaints(probed) == {}
    assert find(probed, GROUPS).value == pytest.approx(2 / 6, rel=RTOL)
    histogram = find(probed, "histogram of std(A) over U groups").value
    spreads = [math.sqrt(2) / 3, math.sqrt(2) / 12]  # population standard deviations
    place = int(5 * spreads[1] / spreads[0])
    expected = [4, 0, 0, 0, 1]
    expected[place] += 1
    assert list(histogram.values()) == expected


# Faults of the process


@pytest.mark.parametrize("kind", ["everything", "the optimizer"])
def test_a_restore_that_fails(
    plain: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Copies are taken and not put back, or those of the parameters only."""

    @contextmanager
    def not_preserved(
        tensors: Iterable[Tensor], device: torch.device | None = None
    ) -> Iterator[list[Tensor]]:
        tensors = list(tensors)
        copies = [tensor.detach().clone() for tensor in tensors]
        yield copies
        with torch.no_grad():
            for tensor, saved in zip(tensors, copies, strict=True):
                if kind == "the optimizer" and isinstance(tensor, nn.Parameter):
                    tensor.copy_(saved)

    monkeypatch.setattr(step, "preserved", not_preserved)
    probed = plain.audit(tmp_path)
    found = complaints(probed)
    assert found.pop(RESTORED) == "fail"
    # Consequences: scores at other weights, steps from another state.
    assert found.keys() <= {
        "noise floor of delta_h_true",
        "norm of the parameter change at lr / at lr/10",
        "delta_h1 at lr / at lr/10",
        DIFFERENCE,
    }
    assert "the probe changed the model in memory" in find(probed, RESTORED).hint
    require_complete(probed.results)


@dataclass(kw_only=True)
class TwoFaced(World):
    """Another rank answers too, with one fingerprint of its own."""

    place: int = 0

    def gather_objects(self, value: Any) -> list[Any]:
        answers = super().gather_objects(value)
        if isinstance(value, tuple) and len(value) == len(RANKS):
            other = list(value)
            other[self.place] = "another fingerprint"
            answers.append(tuple(other))
        return answers


@pytest.mark.parametrize("place", range(len(RANKS)), ids=RANKS)
def test_ranks_that_differ(plain: Scene, tmp_path: Path, place: int) -> None:
    probed = plain.audit(tmp_path, TwoFaced(place=place))
    name = f"equal on all ranks: {RANKS[place]}"
    assert complaints(probed) == {name: "fail"}
    assert "ranks hold different weights" in find(probed, name).hint
    require_complete(probed.results)


@pytest.mark.parametrize(
    ("scale_sum", "tokens", "name"),
    [
        (0.02, (100, 100), "sum_deriv_scales"),
        (0.04, (100, 100), "sum_deriv_scales"),
        (0.03, (99, 100), "total_tokens_used"),
        (0.03, (101, 100), "total_tokens_used"),
    ],
)
def test_a_microbatch_lost_or_counted_twice(
    scale_sum: float, tokens: tuple[int, int], name: str
) -> None:
    """Three microbatches of a batch of 100 tokens, or not."""
    rows = scale_checks(scale_sum, 0.03, *tokens)
    assert [row.name for row in rows if row.verdict == "fail"] == [name]
    rows = scale_checks(0.03, 0.03, 100, 100)
    assert {row.verdict for row in rows} == {"ok"}


# What is shown


def shown(printer: Callable[..., None], results: Results) -> str:
    """What a terminal of 120 columns shows."""
    console = Console(file=io.StringIO(), width=120)
    printer(console, results, None)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def troubled(
    plain: Scene, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Probed, dict[str, str]]:
    """A run with a warning that stands before a failure in the list of checks."""
    scene = plain.with_sections(truth={"ess_warn": 1.0})
    probed = scene.audit(tmp_path_factory.mktemp("troubled"), TwoFaced())
    found = complaints(probed)
    assert list(found.values()) == ["warn", "fail"]
    return probed, found


@pytest.mark.parametrize("printer", [print_diagnosis, print_results])
def test_failures_are_shown_first(
    troubled: tuple[Probed, dict[str, str]], printer: Callable[..., None]
) -> None:
    """Failures, then warnings, each with its next step; then every table."""
    probed, found = troubled
    text = shown(printer, probed.results)
    words = " ".join(text.split())
    warning, failure = found
    places = [
        words.index(f"FAILED: {failure}"),
        words.index(find(probed, failure).hint),
        words.index(f"warning: {warning}"),
        words.index(find(probed, warning).hint),
        words.index("Entropy change of one Dr. GRPO step"),
        words.index("┃ check ┃"),
    ]
    assert places == sorted(places)


def test_a_run_in_order_says_so(runs: Runs) -> None:
    text = shown(print_diagnosis, runs["single tokens"][1].results)
    assert "No check complains." in text
    assert "FAILED" not in text and "warning" not in text


def table_values(text: str) -> dict[str, str]:
    """The second column of a table by its first."""
    rows = [line.split("│") for line in text.splitlines() if line.startswith("│")]
    return {row[1].strip(): row[2].strip() for row in rows if len(row) == 6}


@pytest.mark.parametrize("name", ["plain", "float32", "sampler"])
def test_values_are_shown_with_ten_digits(runs: Runs, name: str) -> None:
    """Nothing that is not 0 is shown as 0, however small it is."""
    results = runs[name][1].results
    values = table_values(shown(print_diagnosis, results))
    seen = 0
    for row in results.audit:
        if not isinstance(row.value, float):
            continue
        printed = float(values[row.name])
        assert abs(printed - row.value) <= TEN_DIGITS * abs(row.value), row.name
        assert (printed == 0) == (row.value == 0), row.name
        seen += 1
    assert seen > 20
    fixed, scientific = (
        find(runs[name][1], f"delta_h1, ten {kind}").value
        for kind in ("decimals", "digits")
    )
    assert re.fullmatch(r"-?\d+\.\d{10}", fixed)
    assert re.fullmatch(r"-?\d\.\d{10}e-\d\d", scientific)
    change = results.linear.delta_h1
    assert abs(float(scientific) - change) <= TEN_DIGITS * abs(change)


def test_products_with_the_step_are_shown_one_by_one(runs: Runs) -> None:
    """The first three parameters, and the ten with the largest products."""
    results = runs["plain"][1].results
    values = table_values(shown(print_diagnosis, results))
    first, largest = (
        find(runs["plain"][1], f"entropy gradient . v, {which}").value
        for which in ("first three parameters", "ten largest")
    )
    assert (len(first), len(largest)) == (3, 10)
    sizes = [abs(value) for value in largest.values()]
    assert sizes == sorted(sizes, reverse=True)
    for name, value in {**first, **largest}.items():
        printed = float(values[short_name(name)])
        assert abs(printed - value) <= TEN_DIGITS * abs(value), name


def test_v_y_is_warned_of_before_the_optimizers_step_20() -> None:
    """The saved state has taken one step less than the probed one makes it."""
    rows = {saved: truth.gain_row(saved) for saved in (0, 18, 19)}
    found = {saved: (row.value, row.verdict) for saved, row in rows.items()}
    assert found == {0: (1, "warn"), 18: (19, "warn"), 19: (20, "ok")}
    assert "step t = 19" in rows[18].hint and not rows[19].hint
