"""Does a job pass over the model as often as it must, and not once more?"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference as ref
from jobs import run_attribution, run_audit, run_probe, run_sweep
from thread_ranks import run_thread_ranks
from tiny_runs import TinyRun, make_run

from entropy_ddp.data.batch import Shard
from entropy_ddp.data.microbatch import plan_microbatches
from entropy_ddp.distributed import World
from entropy_ddp.probe import reverse_mode
from entropy_ddp.probe.audits import step
from entropy_ddp.results import Probed

pytestmark = pytest.mark.usefixtures("models_checked_once")

SAMPLE = 12  # sequences of E that an audit samples here
BLOCKS = 8  # of E, in an attribution
ETAS = [1e-4, 3e-4, 2e-3]
Counts = dict[tuple[str, str], int]

GRADIENT, TRUTH, SLOPE, CURVATURE = (
    ("pull_back", "U"),
    ("score order 0", "E"),
    ("score order 1", "E"),
    ("score order 2", "E"),
)
DUALITY, SHARES = ("pull_back", "E"), ("score order 1", "U")


def quiet(phase: str, done: int, total: int) -> None:
    """Shows no progress."""


def probe(config: Any, out: Path) -> Probed:
    return run_probe(config, World(), out, quiet)


def audit(config: Any, out: Path) -> Probed:
    return run_audit(config, World(), out, quiet)


def attribute(config: Any, out: Path) -> Probed:
    return run_attribution(config, World(), out, quiet)


def sweep_over(config: Any, out: Path) -> Probed:
    return run_sweep(config, World(), out, quiet)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """More sequences in E than the audits' sample, which are as short as they are many."""
    run = make_run(tmp_path_factory.mktemp("run"), "qwen2", targets=["q_proj"])
    rows = ref.random_rows(
        8,
        groups=SAMPLE + 6,
        responses=1,
        vocabulary=run.saved.model.config.vocab_size,
        with_empty=True,
    )
    return replace(run, E=rows)


def in_sequences(n_e: int, n_u: int) -> dict[str, Counts]:
    """What each job must pass over, by its name."""
    plain = {GRADIENT: n_u, TRUTH: n_e, SLOPE: n_e, DUALITY: SAMPLE}
    # At theta, and in the middle of the step.
    curved = plain | {SLOPE: 2 * n_e}
    # Its backward pass runs in the same microbatches: a sample is scored once more. U is
    # scored along each of the blocks of E.
    shares = {DUALITY: n_e, SHARES: BLOCKS * n_u, TRUTH: n_e + SAMPLE}
    # Along the momentum of the step and its decay.
    parts = 2 * n_e
    return {
        "probe": curved,
        "probe without curvature": plain,
        "probe with attribution": curved | shares | {SLOPE: 2 * n_e + parts},
        "attribute": plain | shares | {SLOPE: n_e + parts},
        "sweep": curved | {TRUTH: (1 + len(ETAS)) * n_e},
        "sweep with the step itself": curved | {TRUTH: (1 + len(ETAS)) * n_e},
        "audit": curved | {DUALITY: n_e, GRADIENT: 2 * n_u},
    }


JOBS: dict[str, tuple[Callable[[Any, Path], Probed], dict[str, Any]]] = {
    "probe": (probe, {}),
    "probe without curvature": (probe, {"curvature": {"enabled": False}}),
    "probe with attribution": (probe, {"attribution": {"enabled": True}}),
    "attribute": (attribute, {}),
    "sweep": (sweep_over, {"sweep": {"etas": ETAS}}),
    "sweep with the step itself": (sweep_over, {}),
    "audit": (audit, {}),
}


@pytest.mark.parametrize("budget", [1, 10_000])
@pytest.mark.parametrize("job", JOBS)
def test_no_pass_too_many(
    tiny: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    budget: int,
) -> None:
    monkeypatch.setattr(reverse_mode, "SAMPLE_SEQUENCES", SAMPLE)
    run_job, sections = JOBS[job]
    if job == "sweep with the step itself":
        rate = tiny.saved.optimizer.param_groups[0]["lr"]
        sections = {"sweep": {"etas": [*ETAS, rate]}}
    compute = {"device": "cpu", "tokens_per_microbatch": budget}
    probed = run_job(
        tiny.config(gradient_dot={"enabled": False}, compute=compute, **sections),
        tmp_path,
    )
    sizes = len(tiny.E), len(tiny.U)
    assert SAMPLE < sizes[0]
    sample = tiny.E[:SAMPLE]
    assert (
        sum(len(row.prompt_ids) + len(row.response_ids) for row in sample)
        <= reverse_mode.SAMPLE_TOKENS
    )
    rows = {(row["pass"], row["batch"]): row for row in probed.results.run.passes}
    assert {key: row["sequences"] for key, row in rows.items()} == in_sequences(*sizes)[
        job
    ]
    lengths = {
        split: [len(row.response_ids) for row in batch]
        for split, batch in (("E", tiny.E), ("U", tiny.U))
    }
    for (kind, split), row in rows.items():
        whole = row["sequences"] // len(lengths[split])
        rest = row["sequences"] % len(lengths[split])
        expected = whole * sum(lengths[split]) + sum(lengths[split][:rest])
        assert row["tokens"] == expected, (kind, split)


def test_every_rank_plans_its_own_microbatches_again(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the audit of the derivative's scale: of all ranks together each sequence once."""
    planned: list[int] = []

    def counted(shard: Shard, *rest: Any, **options: Any) -> Any:
        planned.append(len(shard.positions))
        return plan_microbatches(shard, *rest, **options)

    monkeypatch.setattr(step, "plan_microbatches", counted)
    config = tiny.config(curvature={"enabled": False}, gradient_dot={"enabled": False})
    found = run_thread_ranks(3, lambda world: run_probe(config, world, None, quiet))
    assert sum(planned) == len(tiny.E)
    for probed in found:
        (row,) = (r for r in probed.results.audit if r.name == "sum_deriv_scales")
        assert row.verdict == "ok"


def test_operations_are_counted_on_request(tiny: TinyRun, tmp_path: Path) -> None:
    taylor = {"curvature": {"method": "taylor"}}
    plain = probe(tiny.config(**taylor), tmp_path)
    assert all("operations" not in row for row in plain.results.run.passes)
    counting = {"device": "cpu", "count_operations": True}
    counted = probe(tiny.config(compute=counting, **taylor), tmp_path / "counted")
    by_pass = {
        (row["pass"], row["batch"]): row["operations"] / row["positions"]
        for row in counted.results.run.passes
    }
    assert all(operations > 0 for operations in by_pass.values())
    # Per position that went through the model; order 2 is two passes of order 1, without
    # the projections of hidden states that baselines use.
    assert 1.9 < by_pass[SLOPE] / by_pass[TRUTH] < 2.6
    assert by_pass[CURVATURE] == pytest.approx(by_pass[SLOPE], rel=0.05)
    slopes = [probed.results.linear.slope for probed in (counted, plain)]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-10)
