"""The demo's policy, again and again: do its intervals cover, and how small are they?

The demo is trained and probed once. Its policy is then known prefix by prefix, so that
E can be drawn as often as one likes, and each time every estimate is made as the probe
makes it. What is told of an estimator is the spread of its values over these draws, in
units of the spread of `full` on the very same data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import yaml
from demo_policy import ETA, Tree
from enumerable import draws_of
from safetensors.torch import load_file
from simulated import Pieces, Repeated, exact, per_token_estimates, repeated
from state_policies import StatePolicy
from test_network_denied import run_commands
from torch import Tensor

from entropy_ddp.estimators.standard_errors import Draws, Estimate

pytestmark = pytest.mark.long

NEGLIGIBLE = 5e-3  # of prefixes: a third of their number at 1e-3, and the same entropy
COVERAGE = (0.93, 0.97)
# What first order misses: there the jackknife may err on the side of caution.
SECOND_ORDER, CAUTIOUS = ("difference", "curvature"), (0.93, 0.99)
# Root mean square error over the spread, from 64 responses on.
ERROR_RATIO = (0.9, 1.1)
BEST = "slope to_go action_value"


@dataclass(frozen=True, kw_only=True)
class Design:
    """How E is drawn.

    Attributes:
        prompts: number of prompts.
        batches: how many times.
        responses: to each prompt.
        known: the prompts are drawn without replacement from all there are.
    """

    prompts: int
    batches: int
    responses: int = 1
    known: bool = False

    def draws(self, policy: StatePolicy) -> Draws:
        """What its errors are told."""
        draws = draws_of(self.prompts, self.responses)
        return replace(
            draws, num_prompts_total=policy.num_prompts if self.known else None
        )

    def draw(self, policy: StatePolicy, generator: torch.Generator) -> Tensor:
        """Prompt of each sequence, [N]."""
        if self.known:
            prompts = torch.randperm(policy.num_prompts, generator=generator)
            prompts = prompts[: self.prompts]
        else:
            prompts = torch.randint(
                policy.num_prompts, (self.prompts,), generator=generator
            )
        return prompts.repeat_interleave(self.responses)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> StatePolicy:
    """The demo's, along the step that a probe of it takes."""
    folder = tmp_path_factory.mktemp("whole") / "demo"
    config, out = folder.parent / "run.yaml", folder.parent / "out"
    document = {
        "checkpoint": {"path": str(folder / "checkpoint-20")},
        "batches": {split: {"file": str(folder / f"{split}.jsonl")} for split in "EU"},
        "update": {"save_delta": True},
    }
    config.write_text(yaml.safe_dump(document))
    ended = run_commands(
        ["demo", "--out", str(folder), "--quiet"],
        ["probe", "--config", str(config), "--out", str(out), "--quiet"],
        timeout=280,
    )
    assert [code for code, *_ in ended] == [0, 0], ended
    delta = load_file(out / "delta_theta.safetensors")
    return Tree(folder, delta, NEGLIGIBLE).policy()


@pytest.fixture(scope="module")
def simulate(policy: StatePolicy) -> Callable[[Design], dict[str, Repeated]]:
    """Every estimate of E drawn by a design."""
    moves = policy.table(ETA)

    @cache
    def run(design: Design) -> dict[str, Repeated]:
        generator = torch.Generator().manual_seed(design.prompts)
        draws = design.draws(policy)

        def one() -> dict[str, Estimate]:
            prompts = design.draw(policy, generator)
            batch = policy.responses(prompts, generator).table(moves)
            pieces = Pieces([batch], batch.select)
            every = torch.arange(len(prompts))
            return per_token_estimates(pieces, ETA, every, draws)

        with torch.no_grad():
            return repeated(one() for _ in range(design.batches))

    return run


@pytest.mark.parametrize(
    "design",
    [
        Design(prompts=16, batches=600),
        Design(prompts=32, batches=400),
        Design(prompts=64, batches=800),
        Design(prompts=256, batches=500),
    ],
    ids=lambda design: str(design.prompts),
)
def test_intervals_cover_and_errors_are_the_spread(
    policy: StatePolicy,
    simulate: Callable[[Design], dict[str, Repeated]],
    design: Design,
) -> None:
    """Up to two standard deviations of what this many batches can tell."""
    chance = 2 * math.sqrt(0.95 * 0.05 / design.batches)
    wrong = {}
    for name, found in simulate(design).items():
        second = name.startswith(SECOND_ORDER)
        low, high = CAUTIOUS if second else COVERAGE
        covered = found.coverage(exact(policy, ETA, name, design.prompts))
        ratio = found.error_ratio(found.se_jackknife)
        holds = low - chance < covered < high + chance
        if design.prompts >= 64 and not second:
            holds = holds and ERROR_RATIO[0] < ratio < ERROR_RATIO[1]
        if not holds:
            wrong[name] = covered, ratio
    assert wrong == {}


THOUSAND = Design(prompts=1000, batches=250)
KNOWN = Design(prompts=500, responses=2, known=True, batches=250)


@pytest.mark.parametrize(
    ("design", "of_full", "at_most"),
    [
        (Design(prompts=64, batches=800), None, 0.75),
        (Design(prompts=256, batches=500), None, 0.65),
        (THOUSAND, None, 0.55),
        # .44 +- .02 over some hundred draws of each.
        (KNOWN, None, 0.50),
        # .49 +- .02 over 300 draws of two generators.
        (Design(prompts=500, responses=4, known=True, batches=150), None, 0.55),
        # As many responses: what knowing the prompts is worth is in it.
        (KNOWN, THOUSAND, 0.42),
    ],
)
def test_the_default_has_a_fraction_of_the_error_of_full(
    simulate: Callable[[Design], dict[str, Repeated]],
    design: Design,
    of_full: Design | None,
    at_most: float,
) -> None:
    """Slope and truth, by their spread.

    Args:
        of_full: how E is drawn for `full`; by default in the same way, the very data.
    """
    found, plain = simulate(design), simulate(of_full or design)
    for best, full in (
        (BEST, "slope full none"),
        ("truth adjusted per_decision", "truth snis"),
    ):
        ratio = found[best].value.std() / plain[full].value.std()
        assert float(ratio) < at_most, (best, float(ratio))
