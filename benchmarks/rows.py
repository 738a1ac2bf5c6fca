"""All rows by name."""

from collections.abc import Callable, Iterator

from benchmarks.comparison import Comparison, Setting
from benchmarks.gpu_probe import gpu_probe_row
from benchmarks.head import head_row
from benchmarks.instead import instead_row
from benchmarks.passes import (
    attribution_row,
    first_order_row,
    pull_back_row,
    score_row,
    second_order_row,
)
from benchmarks.probes import probe_row, ranks_row, reduction_row
from benchmarks.prompts import shared_prompts_row

ROWS: dict[str, Callable[[Setting], Iterator[Comparison]]] = {
    "instead": instead_row,
    "score": score_row,
    "head": head_row,
    "order-1": first_order_row,
    "order-2": second_order_row,
    "shared-prompts": shared_prompts_row,
    "pull-back": pull_back_row,
    "attribution": attribution_row,
    "all-reduce": reduction_row,
    "probe": probe_row,
    "ranks": ranks_row,
    "gpu-probe": gpu_probe_row,
}
# At its default size it would take a CPU hours.
GPU_ROWS = ("gpu-probe",)


def default_rows(setting: Setting) -> list[str]:
    """The rows that are run when none are named."""
    cuda = setting.device.type == "cuda"
    return [name for name in ROWS if cuda or name not in GPU_ROWS]
