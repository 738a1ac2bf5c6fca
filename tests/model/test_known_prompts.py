"""Does a probe of E know the set that E's prompts were drawn from, and E's own size?

The errors are computed once more from the rows that the run leaves, one unit at a time.
"""

import json
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from checkpoints import run_config, save_checkpoint, write_rows
from jobs import run_probe
from reference import drawn_from, random_rows
from thread_ranks import run_thread_ranks

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.quantiles import student_quantile
from entropy_ddp.results import Probed

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-10
SET_SIZE = 9
EXPLICIT: dict[str, Any] = {
    "truth": {"is_mode": "snis", "resolve": 0.5},
    "linear": {"score": "full", "baseline": "none"},
    "curvature": {"enabled": False},
}


class Scene:
    """A tiny checkpoint, and E with two or three responses to each of six prompts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved = save_checkpoint(folder, "qwen2")
        vocabulary = self.saved.model.config.vocab_size
        rows = random_rows(
            3, groups=6, responses=[2, 3, 2, 2, 3, 2], vocabulary=vocabulary
        )
        rows = drawn_from(self.saved.model, rows, 5)
        write_rows(folder / "E.jsonl", rows)
        self.U = write_rows(folder / "U.jsonl", random_rows(4, vocabulary=vocabulary))
        lines = (folder / "E.jsonl").read_text().splitlines()
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def config(self, rows: list[dict[str, Any]]) -> Config:
        path = self.folder / "E.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Config.model_validate(run_config(self.saved, path, self.U, **EXPLICIT))

    def probe(self, rows: list[dict[str, Any]], world_size: int = 1) -> Probed:
        config = self.config(rows)

        def run(world: World) -> Probed:
            return run_probe(config, world, None, lambda *progress: None)

        if world_size == 1:
            return run(World())
        return run_thread_ranks(world_size, run)[0]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("known"))


def drawn(
    rows: list[dict[str, Any]], total: int = SET_SIZE, again: bool = False
) -> list[dict[str, Any]]:
    """The rows, saying that their prompts are of a set of this size."""
    return [
        row | {"num_prompts_total": total, "with_replacement": again} for row in rows
    ]


def in_passes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each response in a group of its own: two passes over the set, and a third."""
    taken: dict[int, int] = defaultdict(int)
    passes = []
    for row in rows:
        number = taken[row["group"]]
        taken[row["group"]] += 1
        if number < 2:
            passes.append(row | {"group": f"{row['group']}, pass {number}"})
    return passes


def expected_errors(
    probed: Probed, unit_of: list[Any], total: int | None
) -> list[float]:
    """Errors by both methods of the measured change by `snis`, and the share between.

    Args:
        unit_of: of each row of E.
        total: size of the known set; None for independent units.
    """
    rows = [row for row in probed.sequences if row["split"] == "E"]

    def change(weights: list[float]) -> float:
        sums = [0.0] * 4
        for weight, row in zip(weights, rows, strict=True):
            w = weight * math.exp(row["log_weight"])
            parts = (w * row["entropy_upd"], w * row["num_tokens"])
            parts += (weight * row["entropy"], weight * row["num_tokens"])
            sums = [s + p for s, p in zip(sums, parts)]
        return sums[0] / sums[1] - sums[2] / sums[3]

    units = sorted(set(unit_of))
    n, here = len(units), range(len(rows))
    f = 0.0 if total is None else n / total
    size = {u: unit_of.count(u) for u in units}
    # d change / d weight of a row, by central differences.
    step = 1e-5
    psi = [
        (
            change([1 + step * (i == j) for j in here])
            - change([1 - step * (i == j) for j in here])
        )
        / (2 * step)
        for i in here
    ]
    total_of = {u: sum(psi[i] for i in here if unit_of[i] == u) for u in units}
    mean = sum(total_of.values()) / n
    between = n / (n - 1) * sum((x - mean) ** 2 for x in total_of.values())
    within = sum(
        size[u] / max(1, size[u] - 1) * (psi[i] - total_of[u] / size[u]) ** 2
        for i, u in enumerate(unit_of)
    )
    without = [change([float(unit_of[i] != u) for i in here]) for u in units]
    average = sum(without) / n
    jackknife = (n - 1) / n * sum((x - average) ** 2 for x in without)
    inside = 0.0
    for u in units:
        mine = [i for i in here if unit_of[i] == u]
        if size[u] == 1:
            continue
        left = [
            change(
                [
                    0.0 if j == i else size[u] / (size[u] - 1) if j in mine else 1.0
                    for j in here
                ]
            )
            for i in mine
        ]
        centre = sum(left) / size[u]
        inside += (size[u] - 1) / size[u] * sum((x - centre) ** 2 for x in left)
    return [
        math.sqrt((1 - f) * between + f * within),
        math.sqrt((1 - f) * jackknife + f * inside),
        max(0.0, 1 - within / between),
    ]


def prompts_of(rows: list[dict[str, Any]]) -> list[str]:
    return [str(row["prompt_ids"]) for row in rows]


@pytest.mark.parametrize("case", ["unknown", "known", "all", "again", "passes"])
def test_the_errors_are_those_of_the_draws(scene: Scene, case: str) -> None:
    """By hand: of independent prompts, of a known set, and in balanced passes."""
    rows = {
        "unknown": scene.rows,
        "known": drawn(scene.rows),
        "all": drawn(scene.rows, 6),
        "again": drawn(scene.rows, again=True),
        "passes": drawn(in_passes(scene.rows), 6),
    }[case]
    total = {"known": SET_SIZE, "all": 6, "passes": 6}.get(case)
    probed = scene.probe(rows)
    truth, facts, power = (getattr(probed.results, p) for p in ("truth", "E", "power"))
    se, jackknife, between = expected_errors(probed, prompts_of(rows), total)
    assert truth.se == pytest.approx(se, rel=1e-7)
    assert truth.se_jackknife == pytest.approx(jackknife, rel=RTOL)
    assert power.between_prompts == pytest.approx(between, rel=1e-6)
    assert (facts.num_prompts_total, facts.with_replacement) == (
        rows[0].get("num_prompts_total"),
        rows[0].get("with_replacement"),
    )
    assert facts.responses_per_prompt == (2 if case == "passes" else None)


def test_what_an_e_can_tell(scene: Scene) -> None:
    """Its interval, the smallest change, and the size for a fifth of the change."""
    probed = scene.probe(drawn(scene.rows))
    truth, power = probed.results.truth, probed.results.power
    assert power is not None
    t, error = (
        student_quantile(0.975, 5),
        math.hypot(truth.se_jackknife, truth.noise_floor),
    )
    low, high = truth.interval
    assert (high - low) / 2 == pytest.approx(t * error, rel=RTOL)
    assert power.resolved == (low > 0 or high < 0)
    assert power.smallest_change == pytest.approx(
        (t + student_quantile(0.8, 5)) * error, rel=RTOL
    )
    aim = abs(truth.delta_h_true) if power.resolved else 0.5 * truth.H_orig
    assert power.change == pytest.approx(aim, rel=RTOL)


@pytest.mark.parametrize("case", ["known", "passes"])
def test_neither_order_nor_ranks_change_the_errors(scene: Scene, case: str) -> None:
    rows = drawn(scene.rows) if case == "known" else drawn(in_passes(scene.rows), 6)
    expected = scene.probe(rows).results.to_dict()
    shuffled = rows.copy()
    random.Random(2).shuffle(shuffled)
    for other in (
        scene.probe(shuffled),
        scene.probe(rows, 2),
        scene.probe(shuffled, 3),
    ):
        found = other.results.to_dict()
        assert found["E"] == expected["E"]
        for part, name in (
            ("truth", "se"), ("truth", "se_jackknife"), ("linear", "se_jackknife"),
            ("linear", "difference_se"), ("truth", "effective_degrees_of_freedom"),
            ("power", "between_prompts"), ("power", "smallest_change"),
        ):  # fmt: skip
            assert found[part][name] == pytest.approx(
                expected[part][name], rel=1e-8, abs=1e-14
            ), name


def test_one_prompt_in_passes_is_one_unit(scene: Scene) -> None:
    """However many groups it has: there is no spread between prompts."""
    rows = [row | {"group": n} for n, row in enumerate(scene.rows[:2])]
    with pytest.raises(InputError, match="at least 2 groups with response tokens"):
        scene.probe(drawn(rows, 1))
