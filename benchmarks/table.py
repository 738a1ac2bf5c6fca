"""The comparisons as a table in the terminal and as a document."""

import json
import platform
import statistics
from collections.abc import Collection, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import Comparison, Setting
from entropy_ddp import __version__
from entropy_ddp.files import written_whole

LIBRARIES = ("torch", "transformers", "peft", "numpy")


def print_comparisons(console: Console, comparisons: Collection[Comparison]) -> None:
    """The table: one line for each comparison."""
    table = Table(title="What every part costs")
    for heading in ("part", "what / what"):
        table.add_column(heading)
    for heading in ("min - median - max", "CPU s", "operations", "target"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("met")
    for line in comparisons:
        table.add_row(
            line.part,
            line.over,
            _range(line.values) if line.values else "did not run",
            _number(sorted(line.cpu)[len(line.cpu) // 2]) if line.cpu else "",
            "" if line.flops is None else _number(line.flops),
            _target(line),
            {True: "yes", False: "NO", None: ""}[line.met],
        )
    console.print(table)
    for line in comparisons:
        if line.says:
            console.print(f"{line.part}, {line.over}: {line.says}")
    console.print(
        "Ratios of repetitions that ran in turns. CPU s: the median by CPU seconds; "
        "operations: the same ratio in operations of matrix products, the floor."
    )


def _range(values: list[float]) -> str:
    if len(values) == 1:
        return _number(values[0])
    ordered = sorted(values)
    middle = statistics.median(ordered)
    return " - ".join(map(_number, (ordered[0], middle, ordered[-1])))


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def _target(line: Comparison) -> str:
    if line.target is None:
        return ""
    return f"{'≥' if line.at_least else '≤'} {_number(line.target)}"


def print_scale(console: Console, costs: Iterable[dict[str, Any]]) -> None:
    """The table of a probe's cost by the size of E, opening the model left out."""
    table = Table(title="A probe by the size of its evaluation batch")
    headings = ("sequences", "seconds", "ms / sequence", "peak MiB", "above start")
    for heading in (*headings, "collectives"):
        table.add_column(heading, justify="right")
    for cost in costs:
        kinds = cost["collectives"].items()
        peak, before = cost["peak_bytes"], cost["peak_bytes_before"]
        table.add_row(
            f"{cost['num_sequences']:,}",
            f"{cost['divided_seconds']:.2f}",
            f"{1e3 * cost['divided_seconds'] / cost['num_sequences']:.2f}",
            f"{peak / 2**20:.0f}",
            f"{(peak - before) / 2**20:.0f}",
            ", ".join(f"{number} {purpose}" for purpose, (number, _) in kinds),
        )
    console.print(table)


def document_of(setting: Setting, **content: Any) -> dict[str, Any]:
    """What is written: the machine, the versions, the setting, and this content."""
    cuda = setting.device.type == "cuda"
    return {
        "versions": {"entropy_ddp": __version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name(setting.device) if cuda else None,
        "threads": torch.get_num_threads(),
        "size": setting.size,
        "repeats": setting.repeats,
        "device": str(setting.device),
    } | content


def as_document(comparison: Comparison) -> dict[str, Any]:
    """A comparison with its derived values."""
    derived = {"median": comparison.median, "met": comparison.met}
    return asdict(comparison) | derived


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write JSON, whole or not at all.

    Raises:
        RunError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as stream:
        stream.write(json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")
