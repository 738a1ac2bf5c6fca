"""Rows about whole probes and about ranks."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import write_run
from benchmarks.comparison import Comparison, Setting, time_in_turns
from benchmarks.models import TINY, Lengths, Shape, make_direction
from benchmarks.processes import run_module
from benchmarks.worker import UNDIVIDED_PHASES
from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.model.response_tokens import TokenScores
from entropy_ddp.probe.opening import open_session
from entropy_ddp.probe.passes import loss_gradient
from entropy_ddp.probe.pipeline import run
from entropy_ddp.probe.session import Session, no_progress

SMALL = Shape(
    hidden=128, intermediate=352, layers=2, heads=4, kv_heads=2, vocabulary=512
)


@contextmanager
def saved_run(setting: Setting, evaluation: int) -> Iterator[dict[str, Any]]:
    """The configuration of a probe of a small model that lasts as long as the context.

    Args:
        setting: size and device.
        evaluation: number of sequences of E.
    """
    shape = setting.pick(TINY, SMALL, SMALL)
    tokens = setting.pick(
        {"prompt": 4, "response": 4},
        *[{"prompt": 16, "response": 24, "shortest": 12}] * 2,
    )
    update = Lengths(groups=setting.pick(2, 16, 16), per_group=4, **tokens)
    with tempfile.TemporaryDirectory() as folder:
        config = write_run(
            Path(folder), shape, Lengths(groups=evaluation, **tokens), update
        )
        config["compute"] = {"device": setting.device.type}
        yield config


def probe_row(setting: Setting) -> Iterator[Comparison]:
    """A probe / the passes that it cannot do without, and its two second orders."""
    yield _probe(1, setting)
    yield _probe(2, setting)
    yield _second_orders(setting)


def _probe(order: int, setting: Setting) -> Comparison:
    sequences = setting.pick(6, 2048, 4096)
    with saved_run(setting, sequences) as document:
        document["curvature"] = {"enabled": order == 2}
        config = Config.model_validate(document)
        session = open_session(config, World(), None, no_progress)
        timings = time_in_turns(
            lambda: run("probe", config, World(), None, no_progress),
            _passes_alone(session, order),
            setting,
        )
    probed, scores = timings.results
    entropy = float(scores.entropy.mean())
    return timings.comparison(
        f"probe {'without' if order == 1 else 'with'} second order, |E| = {sequences}",
        f"probe / pull_back U, order 0, 1{', 1' if order == 2 else ''} of E",
        target=1.10,
        difference=abs(probed.results.truth.H_orig - entropy) / entropy,
        details={
            "E": asdict(probed.results.E),
            "U": asdict(probed.results.U),
            "phases": probed.results.run.seconds,
        },
    )


def _passes_alone(session: Session, order: int) -> Callable[[], TokenScores]:
    passes = session.passes
    shard = session.shard("E")
    direction = make_direction(passes)

    def run() -> TokenScores:
        loss_gradient(session)
        for _ in range(order):
            passes.score(shard, direction)
        return passes.score(shard)

    return run


def _second_orders(setting: Setting) -> Comparison:
    """A probe with the slope in the middle of the step / with second derivatives."""
    sequences = setting.pick(6, 2048, 4096)
    with saved_run(setting, sequences) as document:
        first, second = (
            Config.model_validate(document | {"curvature": {"method": method}})
            for method in ("midpoint", "taylor")
        )
        timings = time_in_turns(
            lambda: run("probe", first, World(), None, no_progress),
            lambda: run("probe", second, World(), None, no_progress),
            setting,
        )
    middle, taylor = (probed.results for probed in timings.results)
    entropy = taylor.truth.H_orig
    return timings.comparison(
        f"second order, |E| = {sequences}",
        "probe with midpoint / with taylor",
        target=0.8,
        difference=abs(middle.truth.H_orig - entropy) / entropy,
        details={"phases": [r.run.seconds for r in (middle, taylor)]},
    )


def ranks_row(setting: Setting) -> Iterator[Comparison]:
    """Sequences per second of two ranks / twice those of one."""
    sequences = setting.pick(6, 1024, 4096)
    with saved_run(setting, sequences) as config:
        config["compute"] = {"device": "cpu"}
        pairs = [
            [run_module("benchmarks.worker", config, ranks) for ranks in (1, 2)]
            for _ in range(min(setting.repeats, 3))
        ]
    seconds = [[cost["divided_seconds"] for cost in pair] for pair in pairs]
    one, two = pairs[-1]
    yield Comparison(
        part=f"2 ranks of one thread, |E| = {sequences}",
        over="sequences/s / twice those of 1 rank",
        values=[alone / (2 * both) for alone, both in seconds],
        target=0.9,
        at_least=True,
        difference=abs(one["slope"] - two["slope"]) / max(1.0, abs(one["slope"])),
        details={
            "seconds": seconds,
            "phases": [one["phases"], two["phases"]],
            "not_counted": UNDIVIDED_PHASES,
        },
    )


def reduction_row(setting: Setting) -> Iterator[Comparison]:
    """All-reduce of 400 tensors as one buffer / one by one, two ranks."""
    count, numel = setting.pick((5, 3), (400, 8192), (400, 8192))
    sizes = {"count": count, "numel": numel, "repeats": setting.repeats}
    measured = run_module("benchmarks.reduction", sizes, 2)
    flat, single = measured["seconds"]
    yield Comparison(
        part=f"all-reduce of {count} tensors ({4 * count * numel / 1e6:.2g} MB), 2 ranks",
        over="one collective / one by one",
        values=[a / b for a, b in zip(flat, single, strict=True)],
        target=1 / 7,
        difference=measured["difference"],
        details=measured,
    )


def scale_rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """What a probe costs at growing sizes of E, each in a process of its own.

    Yields:
        What `worker.probe` gives, smallest E first.
    """
    sizes = setting.pick((4, 8), (256, 512, 1024, 2048), (1024, 4096, 16_384, 65_536))
    for sequences in sizes:
        with saved_run(setting, sequences) as config:
            config["compute"] = {"device": "cpu"}
            yield run_module("benchmarks.worker", config)
