"""How much memory a run is said to need, what is free, and what is said about it."""

import gc
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from tiny_runs import TinyRun, make_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_ddp import memory
from entropy_ddp.cli import main
from entropy_ddp.distributed import World
from entropy_ddp.distributed.sharding import WholeLayers
from entropy_ddp.memory import MemoryEstimate, free_host_bytes
from entropy_ddp.model.selfcheck import saved_for_backward
from entropy_ddp.probe import memory as estimates
from entropy_ddp.probe.memory import estimate_memory, limit_backward

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), "qwen2", full=True)


# What is free


def write_group(folder: Path, names: tuple[str, str], values: tuple[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, values):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text("anon 1\ninactive_file 50\n")


@pytest.mark.parametrize(
    ("lines", "root", "names"),
    [
        ("0::/job/step\n", ".", ("memory.max", "memory.current")),
        (
            "5:cpu:/\n4:memory:/job/step\n",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ),
    ],
)
def test_the_limit_of_a_control_group(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    root: str,
    names: tuple[str, str],
) -> None:
    """The nearest limit of all groups around the process; the file cache is given back."""
    own = tmp_path / "own"
    own.write_text(lines)
    monkeypatch.setattr(memory, "OWN_GROUPS", own)
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    unlimited = free_host_bytes()
    assert unlimited > 10**6
    job = tmp_path / "groups" / root / "job"
    write_group(job, names, ("1000", "300"))
    write_group(job / "step", names, ("max", "100"))
    assert free_host_bytes() == 1000 - 300 + 50
    write_group(job / "step", names, ("400", "100"))
    assert free_host_bytes() == 400 - 100 + 50
    write_group(job / "step", names, ("400", "900"))
    assert free_host_bytes() == 0
    own.unlink()
    assert free_host_bytes() > 10**6


# What is needed


def test_what_a_backward_pass_keeps_is_counted() -> None:
    """Activations once each, however often they are saved; no weights."""
    linear = torch.nn.Linear(6, 8)
    weight = torch.nn.Parameter(torch.ones(3, 5))
    rows = torch.ones(3, 5, 6, requires_grad=True)
    with saved_for_backward(3, 5) as sizes:
        hidden = linear(rows)
        squared = hidden * hidden
        total = (squared.tanh().sum(2) * weight).sum()
    # The input of the linear map, its output (twice), tanh's output, the sum over it.
    assert sum(sizes.values()) / 15 == 4 * (6 + 8 + 8 + 1)
    total.backward()


class Parts(WholeLayers):
    """What is said of the layers of full weights that ranks have in parts."""

    has_parts = True


def test_a_backward_pass_in_parts_holds_what_there_is_room_for(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be made again with less: eight tenths of what is free are divided among
    positions. Elsewhere nothing is limited."""
    compute = {"device": "cpu", "tokens_per_microbatch": 5000}
    session, megabyte = run.open(compute=compute), 10**6

    def limit(free: int) -> int | None:
        monkeypatch.setattr(estimates, "free_host_bytes", lambda: free)
        session.passes.most_backward = None
        limit_backward(session, "sample")
        return session.passes.most_backward

    assert limit(0) is None
    session.passes.layers = Parts()
    limits = [limit(size * megabyte) for size in range(1000)]
    assert limits[0] == 1 and limits[-1] is None
    between = [most for most in limits if most is not None and most > 1]
    kept = session.passes.saved_per_position
    a_megabyte = 0.8 * megabyte / (1.8 * kept)
    assert len(between) > 10
    for less, more in pairwise(between):
        assert more - less == pytest.approx(a_megabyte, abs=1)
    session.passes.layers = WholeLayers()
    shard, most = session.shard("U"), 12
    found = {}
    for most_backward in (None, most):
        session.passes.most_backward = most_backward
        found[most_backward] = session.passes.gradient(
            shard, weights_of_logp, torch.float64
        )
    (expected, whole_scores), (gradient, scores) = found.values()
    torch.testing.assert_close(gradient, expected)
    few = whole_scores.num_microbatches
    assert scores.num_microbatches > few
    # A pass forward keeps nothing, and is not cut.
    assert session.passes.score(shard).num_microbatches == few


def weights_of_logp(
    token: Tensor, logp: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of the sum of log p."""
    return torch.ones_like(logp), torch.zeros_like(entropy)


def test_vectors_of_each_phase(run: TinyRun) -> None:
    """In float64 on the CPU, bytes for one parameter: docs/cost.md, without what is."""
    elements = run.open().passes.layout.numel
    sections: list[tuple[dict[str, Any], int]] = [
        ({"gradient_dot": {"enabled": False}}, 2 * 8 + 3 * 8),
        ({"gradient_dot": {"enabled": True}}, 5 * 8 + 8),
        (
            {"gradient_dot": {"enabled": True, "direction": "preconditioned"}},
            6 * 8 + 8,
        ),
        ({"attribution": {"enabled": True, "verify": True}}, 6 * 8 + 3 * 8),
    ]
    for given, size in sections:
        # An attribution has the sum of its blocks beside the block at work.
        attributed = "attribution" in given
        audited = "gradient" if attributed else "sample"
        phases = list(estimates._phases(run.open(**given), audited))
        assert all(on_device == 0 for on_device, _, _ in phases)
        on_host = max(on_host for _, on_host, _ in phases)
        # Step counts of the optimizer beside its moments.
        assert size * elements <= on_host <= size * elements + 1000


def test_it_grows_with_the_microbatch(run: TinyRun) -> None:
    sizes = []
    for budget in (8, 24):
        compute = {"device": "cpu", "tokens_per_microbatch": budget}
        estimate = estimate_memory(run.open(compute=compute))
        sizes.append(estimate.host_more)
    assert sizes[1] > sizes[0]


def test_it_is_that_of_the_rank_that_needs_most(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another one has looked when a little less was free."""
    opened = run.open()
    alone = estimate_memory(opened)

    def with_a_second(_: World, own: tuple[str, dict[str, int]]) -> list[Any]:
        machine, found = own
        more = {"host_more": found["host_more"] + 1000}
        return [own, (machine, found | more | {"host_free": alone.host_free + 10**9})]

    monkeypatch.setattr(World, "gather_objects", with_a_second)
    both = estimate_memory(opened)
    assert both.host_more == alone.host_more + 1000
    assert both.host_free <= (alone.host_free + 10**9) // 2


def test_whether_it_fits() -> None:
    small = MemoryEstimate(host_now=1, host_more=2, host_free=2)
    assert small.fits
    assert not MemoryEstimate(host_now=1, host_more=3, host_free=2).fits
    on_device = {"device_more": 3 * GIGABYTE, "device_free": 2 * GIGABYTE}
    large = MemoryEstimate(host_now=1, host_more=2, host_free=2, **on_device)
    assert not large.fits
    assert large.line.endswith("on the GPU 3.00 GB more (2.00 GB free)")


# What is said


def test_it_is_said_before_the_run_and_in_check(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; a warning and no refusal where it does not fit; facts as JSON."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run.config().model_dump(mode="json")))

    def invoke(command: str, *options: str) -> Any:
        arguments = [command, "--config", str(config), *options]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.stderr
        return result

    probed = invoke("probe", "--out", str(tmp_path / "out"))
    assert probed.stderr.count("memory: ") == 1
    assert "may not fit" not in probed.stderr
    assert "a rank at the peak (" in probed.stdout
    facts = json.loads((tmp_path / "out" / "results.json").read_text())["run"]["memory"]
    assert facts["peak_bytes"] > 10**8 and facts["estimated_bytes"] > 10**8
    checked = json.loads(invoke("check", "--json").stdout)
    assert checked["memory"]["fits"] is True
    assert checked["memory"]["host_more"] > 0
    by_shard = checked["memory"]["bytes of weights and step, by compute.shard"]
    assert list(by_shard) == ["none", "full, 8 ranks"]
    monkeypatch.setattr(estimates, "free_host_bytes", lambda: 1000)
    sizes = {"none": 8 * 10**9, "full, 8 ranks": 10**9}
    monkeypatch.setattr(estimates, "bytes_by_shard", lambda session: sizes)
    warned = invoke("probe", "--out", str(tmp_path / "other"))
    assert warned.stderr.count("warning: the run may not fit; lower compute.") == 1
    told = "".join(warned.stderr.split())
    assert "setcompute.shard:full,withwhichweightsandsteptake1.00GBoneach" in told
    quiet = invoke("probe", "--out", str(tmp_path / "third"), "--quiet")
    assert "memory" not in quiet.stderr
    assert json.loads(invoke("check", "--json").stdout)["memory"]["fits"] is False


# What DistributedDataParallel holds


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that are made, in C++ too."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.size += made.untyped_storage().nbytes()
        return made


@pytest.fixture
def group() -> Iterator[World]:
    """A process group of one rank."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield World(store=store)
    # Wrapped modules hold the group and live in cycles.
    gc.collect()
    torch.distributed.destroy_process_group()


def tied_model() -> torch.nn.Module:
    """Large weights, two of which are one; a small one; a frozen one."""
    parts = [torch.nn.Linear(100, 100) for _ in range(4)]
    parts[3].weight = parts[0].weight
    parts[2].requires_grad_(False)
    return torch.nn.Sequential(torch.nn.Sequential(*parts))


def test_ranks_hold_no_second_copy_of_the_gradients(group: World) -> None:
    """Buckets would be one; where nothing is done about them, they are there."""

    def ratio(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> float:
        model = tied_model()
        trained = [p for p in model.parameters() if p.requires_grad]
        with Allocated() as allocated:
            wrapped = wrap(model)
        with wrapped.no_sync():
            wrapped(torch.ones(3, 100)).sum().backward()
        assert all(p.grad is not None for p in trained)
        return allocated.size / sum(p.grad.nbytes for p in trained)

    assert ratio(group.wrap) < 0.02
    assert ratio(torch.nn.parallel.DistributedDataParallel) > 0.99
