"""The tables of the page: every number of the files, rounded in view, whole on hover."""

import math
from collections.abc import Sequence
from typing import Any

from entropy_ddp.names import short_name
from entropy_ddp.report.answer import as_text, is_trusted
from entropy_ddp.report.figures.change import estimator_rows
from entropy_ddp.report.view import (
    Cell,
    Table,
    digits,
    given_e,
    in_context,
    measured,
    words,
)
from entropy_ddp.report.words import (
    GIVEN_E,
    UNITS,
    linear_error,
    percent,
    relative_error,
    typeset,
)

Document = dict[str, Any]
AUDITS_ID = "audits"


def _share(value: float | None) -> Cell:
    if value is None:
        return Cell(text="–", is_number=True)
    return Cell(text=percent(value), title=repr(value), is_number=True)


def estimators(document: Document) -> Table:
    """Every estimator of the change as numbers."""
    rows = []
    for row in estimator_rows(document):
        label = row.label + (" (configured)" if row.strong else "")
        rows.append(
            [words(label), digits(row.value, signed=True), digits(row.error, 3)]
        )
    unit = UNITS[document["truth"]["normalize"]]
    return Table(
        title="All estimators as numbers",
        columns=("estimator", f"change, {unit}", "standard error"),
        rows=rows,
        caption="cv: control variates removed.",
        folded=True,
    )


def change(document: Document) -> Table:
    """The headline's numbers."""
    truth, linear = document["truth"], document["linear"]
    numbers = {
        "entropy before": truth["H_orig"],
        "its standard error, of another E": truth.get("H_orig_se"),
        "entropy after": truth["H_upd"],
        "its standard error too": truth.get("H_upd_se"),
        "measured change": truth["delta_h_true"],
        "its standard error": truth["se"],
        "rounding in it": truth.get("noise_floor"),
        "first-order change": linear["delta_h1"],
        "its standard error, given the step": linear_error(document),
        "standard error of their difference": linear["difference_se"],
        "effective sample size, responses": truth["ess"],
        "effective sample size over N": truth["ess_fraction"],
        "responses with a clipped weight, share": truth["clip_fraction"],
    }
    rows = [[words(name), digits(value, 5)] for name, value in numbers.items()]
    unit = UNITS[truth["normalize"]]
    return Table(
        title="The change as numbers",
        columns=("quantity", "value"),
        rows=rows,
        caption=f"Entropies in {unit}; importance weights: {truth['is_mode']}.",
        folded=True,
    )


def step(document: Document) -> Table:
    """The step and the terms of the slope."""
    update, linear = document["update"], document["linear"]
    eta = update["learning_rate_used"]
    rate = "learning rate" if "delta" not in update else "η of the given change"
    pairs: dict[str, Any] = {
        rate: eta,
        "norm of the parameter change": update["param_update_l2"],
        "gradient norm before clipping": update.get("grad_norm"),
        "clip coefficient": update.get("clip_coef"),
        f"slope, nats per unit {rate}": linear["slope"],
    }
    for name, term in linear["terms"].items():
        pairs[f"{name} term of the slope"] = term
    pairs["error of the slope, delta method"] = linear["se"]
    pairs["error of the slope, jackknife"] = linear["se_jackknife"]
    curvature = document.get("curvature", {})
    pairs["second derivative"] = curvature.get("second_derivative")
    pairs["its error, jackknife"] = curvature.get("se")
    pairs["change, second order"] = curvature.get("delta_h2")
    pairs["standard error of that"] = curvature.get("delta_h2_se")
    pairs["η*, where both orders are equal"] = curvature.get("eta_star")
    pairs["standard error of η*"] = curvature.get("eta_star_se")
    rows = [
        [words(name), digits(value, 5)]
        for name, value in pairs.items()
        if value is not None
    ]
    return Table(
        title="The step and the terms of the slope",
        columns=("quantity", "value"),
        rows=rows,
        folded=True,
    )


def parameters(document: Document) -> Table:
    """The parameters that moved most."""
    rows = [
        [Cell(text=short_name(row["name"]), title=row["name"]), digits(row["l2"])]
        for row in document["update"]["top_parameters"]
    ]
    return Table(
        title="The parameters that moved most",
        columns=("parameter", "norm of its change"),
        rows=rows,
        folded=True,
    )


def sweep(document: Document) -> Table:
    """The points of a sweep."""
    floor = document["sweep_summary"]["noise_floor"]
    rows = []
    for point in document["sweep"]:
        second = digits(None)
        if "delta_h2_se" in point:
            second = measured(point["delta_h2"], point["delta_h2_se"])
        share = digits(point["ess_fraction"])
        if not is_trusted(point):
            share = Cell(text=f"{share.text} ×", title=share.title, is_number=True)
        rows.append(
            [
                digits(point["eta"]),
                measured(point["delta_h_true"], math.hypot(point["se"], floor)),
                measured(point["delta_h1"], point["delta_h1_se"]),
                second,
                share,
            ]
        )
    columns = ("learning rate", "measured", "first order", "second order", "ESS / N")
    return Table(
        title="The sweep as numbers",
        columns=columns,
        rows=rows,
        caption=(
            f"Changes in {UNITS[document['truth']['normalize']]}. ×: too few effective "
            "responses, outside every statement."
        ),
        folded=True,
    )


def gradient_dot(document: Document) -> Table:
    """The gradient-dot form as numbers."""
    dot = document["gradient_dot"]
    names = {
        "bars_dot": "⟨X̄, Ȳ⟩",
        "u_cross": "U_cross = −⟨X̄, Ȳ⟩",
        "deltaH1": "entropy change",
        "learning_rate": "learning rate",
        "V_X": "variance of ⟨X̄, Ȳ⟩ due to E",
        "V_Y": "variance of ⟨X̄, Ȳ⟩ due to U",
        "se_deltaH1": "standard error of the change",
        "frac_var": "variance over the square of ⟨X̄, Ȳ⟩",
        "x_norm": "norm of X̄",
        "y_norm": "norm of Ȳ",
        "se_paired": "standard error with the covariance of X and Y",
    }
    rows = [
        [words(text), digits(dot[key], 5)] for key, text in names.items() if key in dot
    ]
    caption = "E and U are the same rollouts: the diagonal was removed."
    return Table(
        title=f"Direction {dot['direction']}, weighting {dot['weighting']}",
        columns=("quantity", "value"),
        rows=rows,
        caption=caption if dot["u_statistic"] else "",
        folded=True,
    )


def top_tokens(document: Document) -> Table:
    """The tokens with the largest shares, in their context."""
    return token_table(
        "The tokens that matter most",
        document["attribution"]["top_tokens"],
        UNITS[document["linear"]["normalize"]],
        relative_error(document),
    )


def token_table(
    title: str,
    tokens: list[dict[str, Any]],
    unit: str,
    relative: float,
    runs: Sequence[str] = (),
) -> Table:
    """Tokens in their context.

    Args:
        title: what they are.
        tokens: rows of `attribution.top_tokens`.
        unit: of shares.
        relative: error of the first-order change over its size.
        runs: names the run that each is of; empty if there is only one.
    """
    rows = [_token_cells(token, relative) for token in tokens]
    columns = [
        "share", "token in its context", "log p", "entropy", "advantage",
        "line of U", "position",
    ]  # fmt: skip
    if runs:
        rows = [[*row, words(run)] for row, run in zip(rows, runs, strict=True)]
        columns.append("run")
    return Table(
        title=title,
        columns=columns,
        rows=rows,
        caption=(
            f"Shares in {unit}; a negative one lowers the entropy. An improbable token "
            "that is rewarded lowers it where the policy was sure of another, and raises it otherwise. "
            f"{GIVEN_E}"
        ),
    )


def _token_cells(row: dict[str, Any], relative: float) -> list[Cell]:
    return [
        given_e(row["share"], relative * abs(row["share"])),
        in_context(row["share"], row.get("context", ("", "–", ""))),
        digits(row["logp"]),
        digits(row["entropy"], 3),
        digits(row["advantage"], 3, signed=True),
        digits(row["index"] + 1),
        digits(row["k"]),
    ]


def proxies(document: Document) -> Table:
    """How well cheap scores rank tokens."""
    found = document["attribution"]
    scores = {"covariance": found["covariance"], **found["proxies"]}
    fractions = list(found["covariance"]["top_overlap"])
    rows = [
        [
            words(name.replace("_", " ")),
            digits(judged.get("spearman"), 2, signed=True),
            *(_share(judged["top_overlap"].get(fraction)) for fraction in fractions),
        ]
        for name, judged in scores.items()
    ]
    overlaps = (f"of the top {percent(float(f), 1)}" for f in fractions)
    return Table(
        title="How well cheap scores rank tokens against their exact share",
        columns=("score", "Spearman", *overlaps),
        rows=rows,
        caption=(
            "A score that predicts entropy loss has a rank correlation near −1 with the "
            "share. The other columns: how many of the tokens that matter most are among "
            "as many with the most extreme scores."
        ),
    )


def what_if(document: Document) -> Table:
    """The what-if rules as numbers."""
    found = document["attribution"]["what_if"]
    error, floor = linear_error(document), document["truth"].get("noise_floor") or 0.0
    verified = any("delta_h_true" in row for row in found)
    rows = []
    for row in found:
        cells = [
            words(row["rule"]), digits(row["num_tokens"]),
            given_e(row["delta_h1"], error),
        ]  # fmt: skip
        if verified:
            cells.append(measured(row["delta_h_true"], math.hypot(row["se"], floor)))
        rows.append(cells)
    columns = ["left out", "tokens", "first order"] + ["step taken"] * verified
    return Table(
        title="What if, as numbers",
        columns=columns,
        rows=rows,
        caption=f"Changes in {UNITS[document['linear']['normalize']]}. {GIVEN_E}",
        folded=True,
    )


def audits(document: Document) -> Table:
    """Every check with its verdict."""
    rows = []
    for row in document["audit"]:
        value = row["value"]
        title = value if isinstance(value, str) else repr(value)
        verdict = Cell(text=row["verdict"], verdict=row["verdict"])
        rows.append(
            [
                words(row["name"]),
                Cell(text=as_text(value), title=title),
                words(typeset(row["expected"])),
                verdict,
            ]
        )
    return Table(
        title="All audits",
        columns=("check", "found", "expected", "verdict"),
        rows=rows,
        folded=True,
        id=AUDITS_ID,
    )


def facts(document: Document, folders: list[str]) -> Table:
    """Batches, machine and versions."""
    run = document["run"]
    pairs: dict[str, Any] = {"run directory": ", ".join(folders)}
    for split in ("E", "U"):
        if split in document:
            batch = document[split]
            pairs[f"batch {split}"] = (
                f"{batch['num_sequences']:,} responses in {batch['num_groups']:,} groups, "
                f"{batch['num_tokens']:,} response tokens"
            )
    if "delta" in document["update"]:
        pairs["change in place of a step"] = document["update"]["delta"]
    ranks = "1 rank" if run["world_size"] == 1 else f"{run['world_size']} ranks"
    pairs["computed by"] = f"{ranks} on {run['device']}, {run['dtype']}"
    pairs["seed"] = run["seed"]
    pairs["started"] = run["started"]
    pairs["took"] = f"{sum(run['seconds'].values()):,.1f} seconds"
    pairs |= run["versions"]
    rows = [[words(name), words(value)] for name, value in pairs.items()]
    return Table(title="Batches, machine, versions", columns=("", ""), rows=rows)


def costs(document: Document) -> Table:
    """Seconds of each phase."""
    rows = [
        [words(name), digits(seconds, 3)]
        for name, seconds in document["run"]["seconds"].items()
    ]
    return Table(
        title="Time of each phase", columns=("phase", "seconds"), rows=rows, folded=True
    )
