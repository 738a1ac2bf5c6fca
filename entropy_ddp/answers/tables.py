"""Every table of a run, from what results.json holds; each is built here and only here."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from entropy_ddp.answers.cells import (
    Cell,
    Row,
    Table,
    change,
    context,
    decimal,
    entry,
    expression,
    head,
    interval,
    level,
    number,
    part,
    place,
    share,
    share_part,
    size,
    text,
    verdict,
)
from entropy_ddp.answers.headline import (
    Document,
    described,
    doubt_of_entropy,
    edge,
    is_trusted,
    second_order,
    subject_of,
)
from entropy_ddp.answers.shares import (
    blocks_sentence,
    is_reliable,
    left_at_first_order,
    left_in_truth,
    not_reliable,
    part_error,
    reliability_sentence,
)
from entropy_ddp.answers.words import (
    AXIS_UNITS,
    GIVEN_E,
    UNITS,
    entropy_error,
    error_of,
    linear_error,
    missed,
    missed_interval,
    name_of_kind,
    percent,
    quantile_of,
    relative_error,
    short_name,
    shown_error,
    title_of_kinds,
    with_error,
)
from entropy_ddp.answers.words import (
    number as in_words,
)

AUDITS_ID = "audits"
# What a probe shows of its audits: the sums, counts and gaps by which it can be wrong.
CENTRAL_AUDITS = (
    "gradient coverage: entropy (X)",
    "gradient coverage: loss (Y)",
    "delta_h1, ten decimals",
    "delta_h1, ten digits",
    "optimizer steps",
    "sum_deriv_scales",
    "total_tokens_used",
    "duality gap",
    "attribution gap",
    "noise floor of delta_h_true",
    "restored bits: parameters and optimizer state",
    "equal on all ranks: parameters after the step",
    "collectives: parameter buffers",
)


# The change


def answer(document: Document) -> Table:
    """Truth, prediction and their difference in standard errors, on one row."""
    truth, linear = document["truth"], document["linear"]
    curvature, known = document.get("curvature", {}), "interval" in truth
    missed_by, paired = missed(document, "linear")
    unit = AXIS_UNITS[truth["normalize"]]
    before, spread = truth["H_orig"], entropy_error(truth)
    entropy = f"{in_words(before, 2)} {unit}"
    if spread is not None:
        pairs = [
            with_error(before / per, spread / per, signed=False)
            for per in (1.0, math.log(2))
        ]
        entropy = f"{pairs[0]} {unit} = {pairs[1]} bits"
    notes = [
        f"{entropy}; ± is one standard error{', below 95 % intervals' * known}.",
        "The difference has a (paired) error of its own: it is what first order misses"
        + (
            ",\nestimated by a truth and a slope that share all their noise."
            if "matched_difference" in linear
            else "."
        ),
        second_order(document),
        edge(document["curvature"]) if "eta_star_interval" in curvature else "",
        doubt_of_entropy(document),
    ]
    row = (
        level(before, spread),
        change(truth["delta_h_true"], shown_error(truth)),
        change(linear["delta_h1"], linear_error(document)),
        change(missed_by, paired),
        number(missed_by / paired if paired else None, 2, signed=True),
    )
    intervals = (
        interval(entropy_interval(document), signed=False),
        interval(truth.get("interval")),
        interval(linear.get("interval")),
        interval(missed_interval(document, "linear")),
        text(""),
    )
    subject = subject_of(document["update"])
    return Table(
        title=f"Entropy change of {subject[0].lower()}{subject[1:]}, {unit}",
        columns=(
            "H before", "ΔH true", "ΔH first order", "true - first order", "in SE",
        ),
        rows=[row, intervals] if known else [row],
        caption="\n".join(note for note in notes if note),
    )  # fmt: skip


def entropy_interval(document: Document) -> tuple[float, float] | None:
    """95 % interval of the entropy before the step; None where none was written."""
    truth = document["truth"]
    error = entropy_error(truth)
    if error is None or "interval" not in truth:
        return None
    half = quantile_of(document) * error
    return truth["H_orig"] - half, truth["H_orig"] + half


def measured(document: Document) -> Table:
    """The numbers behind it, each by itself."""
    truth, linear = document["truth"], document["linear"]
    curvature = document.get("curvature", {})
    matched = linear.get("matched_difference", {})
    numbers = {
        "entropy before": truth["H_orig"],
        "its standard error, of another E": entropy_error(truth),
        "its 95 % interval": entropy_interval(document),
        "entropy after": truth["H_upd"],
        "its standard error too": error_of(truth, "H_upd_se")
        if "H_upd_se" in truth
        else None,
        "measured change": truth["delta_h_true"],
        "standard error of the measured change": error_of(truth),
        "the same by the delta method": truth["se"] if "interval" in truth else None,
        "rounding in it": truth.get("noise_floor"),
        "95 % interval of the measured change": truth.get("interval"),
        "first-order change": linear["delta_h1"],
        "its standard error, given the step": linear_error(document),
        "95 % interval of the first-order change": linear.get("interval"),
        "standard error of their difference": error_of(linear, "difference_se"),
        "95 % interval of their difference": linear.get("difference_interval"),
        "the difference by the matched pair": matched.get("value"),
        "its standard error, matched": error_of(matched) if matched else None,
        "its 95 % interval, matched": matched.get("interval"),
        "second-order change": curvature.get("delta_h2"),
        "95 % interval of the second-order change": curvature.get("interval"),
        "effective sample size, responses": truth["ess"],
        "effective sample size over N": truth["ess_fraction"],
        "groups that tell the error of the change": truth.get(
            "effective_degrees_of_freedom"
        ),
        "largest share of one response in its square": truth.get("largest_share"),
        "responses with a clipped weight, share": truth["clip_fraction"],
    }
    unit = UNITS[truth["normalize"]]
    rows = [
        (
            text(name),
            interval(value) if isinstance(value, (list, tuple)) else number(value, 5),
        )
        for name, value in numbers.items()
        if value is not None
    ]
    return Table(
        title="The change as numbers",
        columns=("quantity", "value"),
        rows=rows,
        caption=f"Entropies in {unit}; importance weights: {truth['is_mode']}.",
        folded=True,
    )


def estimators(document: Document) -> Table:
    """Every estimator of the same two numbers, with its error."""
    rows: list[Row] = [head("ΔH true")]
    first = error_of(document["truth_all"][0])
    adjusted_is_configured = document["truth"].get("control_variates", False)
    for row in document["truth_all"]:
        configured_mode = row["is_mode"] == document["truth"]["is_mode"]
        marks = [
            "*" if configured_mode and adjusted == adjusted_is_configured else ""
            for adjusted in (False, True)
        ]
        adjusted_error = row.get("se_jackknife_adjusted", row.get("se_adjusted"))
        cells = _estimate(row["delta_h_true"], error_of(row), first, marks[0])
        cells += _estimate(
            row.get("delta_h_true_adjusted"), adjusted_error, first, marks[1]
        )
        rows.append((text(row["is_mode"]), *cells))
    rows.append(head("ΔH first order"))
    eta, linear = document["update"]["learning_rate_used"], document["linear"]
    configured = (linear["score"], linear["baseline"], linear["control_variates"])
    first = abs(eta) * error_of(document["linear_all"][0])
    by_kind: dict[tuple[str, str], dict[bool, Document]] = {}
    for row in document["linear_all"]:
        kind = (row["score"], row["baseline"])
        by_kind.setdefault(kind, {})[row["control_variates"]] = row
    for (score, baseline), found in by_kind.items():
        cells = ()
        for with_variates in (False, True):
            value = error = None
            if with_variates in found:
                row = found[with_variates]
                value, error = eta * row["slope"], abs(eta) * error_of(row)
            mark = "*" if configured == (score, baseline, with_variates) else ""
            cells += _estimate(value, error, first, mark)
        name = "full" if score == "full" else f"{score}, {baseline}"
        rows.append((text(name), *cells))
    return Table(
        title="All estimators of this run",
        columns=("estimator", "ΔH", "needed", "with control variates", "needed"),
        rows=rows,
        caption=(
            "* the configured one. Control variates: quantities of mean zero are removed, "
            "of the truth what the best slope shows; that may also make the error larger. "
            "Needed: sequences for the error of the first row of each kind. Choose before "
            "you look: the smallest of several errors is itself too small. "
            f"In {UNITS[document['truth']['normalize']]}."
        ),
        folded=True,
    )


def _estimate(
    value: float | None, error: float | None, first: float, mark: str = ""
) -> tuple[Cell, ...]:
    """An estimate, and the share of the responses that its error would need."""
    if value is None or error is None:
        return text(""), text("")
    needed = (error / first) ** 2 if first else None
    return change(value, error, mark), share(needed, 3)


def step(document: Document) -> Table:
    """The step, and the terms of the slope along it."""
    update, linear = document["update"], document["linear"]
    eta, error = update["learning_rate_used"], linear_error(document)
    rate = "eta of the change" if "delta" in update else "learning rate"
    exact = {
        rate: eta,
        "norm of the change": update["param_update_l2"],
        "gradient norm, unclipped": update.get("grad_norm"),
        "clip coefficient": update.get("clip_coef"),
    }
    rows: list[Row] = [head("the step")]
    rows += [(text(n), number(v, 7)) for n, v in exact.items() if v is not None]
    rows += [
        head("ΔH first order by term"),
        *((text(name), part(eta * v, error)) for name, v in linear["terms"].items()),
        head("slope and curvature"),
        (text("slope, nats / eta"), change(linear["slope"], error_of(linear))),
        (text("its error, delta method"), size(linear["se"], 2)),
    ]
    curvature = document.get("curvature", {})
    for name, value, its_error in (
        ("second derivative H''", "second_derivative", "se"),
        ("ΔH second order", "delta_h2", "delta_h2_se"),
        ("eta*, edge of linearity", "eta_star", "eta_star_se"),
    ):
        ends = curvature.get("eta_star_interval") if value == "eta_star" else None
        if ends is not None:
            # An error to first order means nothing where H'' is not resolved.
            # From 0 on is no bound.
            bounds = [ends[0] or None, ends[1]]
            rows.append((text(name), interval(bounds, signed=False)))
        elif value in curvature and its_error in curvature:
            error = error_of(curvature, its_error)
            rows.append((text(name), change(curvature[value], error)))
    moved = update["top_parameters"][0]
    caption = f"moved most: {short_name(moved['name'])}, by {in_words(moved['l2'])}"
    if curvature and curvature["se"] > abs(curvature["second_derivative"]):
        caption += (
            "\nthe error of H'' is above H'': --set curvature.enabled=false leaves it "
            "out, and its pass over E"
        )
    return Table(
        title="The step and the terms of ΔH first order",
        columns=("quantity", "value"),
        rows=rows,
        caption=caption,
        folded=True,
    )


def parameters(document: Document) -> Table:
    """The parameters that moved most."""
    return Table(
        title="The parameters that moved most",
        columns=("parameter", "norm of its change"),
        rows=[
            (text(short_name(row["name"]), whole=row["name"]), number(row["l2"]))
            for row in document["update"]["top_parameters"]
        ],
        folded=True,
    )


def sweep(document: Document) -> Table:
    """Truth and predictions by step size."""
    floor = document["sweep_summary"]["noise_floor"]
    rows = [
        (
            size(point["eta"]),
            change(point["delta_h_true"], math.hypot(error_of(point), floor)),
            change(point["delta_h1"], point["delta_h1_se"]),
            change(point.get("delta_h2"), point.get("delta_h2_se")),
            Cell(
                value=point["ess_fraction"],
                kind="number",
                mark="" if is_trusted(point) else "×",
            ),
        )
        for point in document["sweep"]
    ]
    caption = ""
    if not all(map(is_trusted, document["sweep"])):
        caption = "×: too few effective responses, outside every statement."
    return Table(
        title=f"Entropy change by step size, {AXIS_UNITS[document['truth']['normalize']]}",
        columns=(
            "learning rate", "ΔH true", "ΔH first order", "ΔH second order", "ESS / N",
        ),
        rows=rows,
        caption=caption,
        folded=True,
    )  # fmt: skip


def gradient_dot(document: Document) -> Table:
    """The gradient-dot form, its variance, and the terms it comes from."""
    dot = document["gradient_dot"]
    rows: list[Row] = [
        (text("entropy change"), change(dot["deltaH1"], dot["se_deltaH1"])),
        (
            text("⟨X, Y⟩ = −U_cross"),
            change(dot["bars_dot"], math.sqrt(dot["V_X"] + dot["V_Y"])),
        ),
    ]
    held = ", gain held fixed" if dot["direction"] == "step" else ""
    # Variances, known to a few percent at best, and norms of noisy vectors.
    sizes = {
        "variance of ⟨X, Y⟩ due to E, V_X": dot["V_X"],
        f"variance of ⟨X, Y⟩ due to U, V_Y{held}": dot["V_Y"],
        "variance over the square of ⟨X, Y⟩": dot.get("frac_var"),
        "norm of X": dot["x_norm"],
        "norm of Y": dot["y_norm"],
        "error with the covariance of X and Y": dot.get("se_paired"),
        "learning rate": dot["learning_rate"],
    }
    rows += [(text(n), size(v, 2)) for n, v in sizes.items() if v is not None]
    form = f"direction {dot['direction']}, weighting {dot['weighting']}"
    means = "X and Y: mean gradients over E and over U."
    same = " E and U are the same rollouts: the diagonal was removed."
    return Table(
        title=f"Gradient-dot form, {form}",
        columns=("quantity", "value"),
        rows=rows,
        caption=means + same * dot["u_statistic"],
        folded=True,
    )


# The attribution


def parts(document: Document) -> Table:
    """The parts of the change, and how concentrated the gradient's is."""
    found, error = document["attribution"], linear_error(document)
    total = found["total"]
    names = {
        "momentum": "momentum (earlier batches)",
        "weight_decay": "weight decay",
        "gradient": "gradient of U",
    }
    rows: list[Row] = []
    for key, name in names.items():
        value, own = found[key], part_error(document, key)
        # A part that the step does not have is exactly 0.
        cell = change(value, own) if own else part(value, error)
        rows.append((text(name), cell, share_part(value, total, error)))
    whole = (text("total"), change(total, error), share_part(total, total, error))
    given = GIVEN_E if part_error(document, "gradient") is None else ""
    notes = (reliability_sentence(document), given)
    return Table(
        title="ΔH first order by part of the step",
        columns=("part", "nats", "of the total"),
        rows=[*rows, whole],
        caption=(
            f"attribution gap {in_words(found['attribution_gap'], 3)}; half of the sum of "
            f"|share| is in {percent(found['concentration'])} of U's tokens. "
            f"{' '.join(filter(None, notes))}"
        ),
        folded=True,
    )


def top_tokens(document: Document) -> Table:
    """The tokens with the largest shares, in their context."""
    tokens = document["attribution"]["top_tokens"]
    title = f"The {len(tokens)} tokens that matter most"
    if not is_reliable(document):
        title = f"The {len(tokens)} largest shares of tokens, {not_reliable(document)}"
    return token_table(
        title,
        tokens,
        UNITS[document["linear"]["normalize"]],
        relative_error(document),
    )


def token_table(
    title: str,
    tokens: Sequence[dict[str, Any]],
    unit: str,
    relative: float,
    runs: Sequence[str] = (),
) -> Table:
    """Tokens in their context.

    Args:
        tokens: rows of `attribution.top_tokens`.
        relative: error of the first-order change over its size.
        runs: names the run that each is of; empty if there is only one.
    """
    columns = ["share", "log p", "entropy", "A", "line", "k"]
    rows = [
        [
            part(token["share"], relative * abs(token["share"])),
            decimal(token["logp"]),
            decimal(token["entropy"]),
            decimal(token["advantage"], signed=True),
            place(token["index"] + 1),
            place(token["k"]),
        ]
        for token in tokens
    ]
    if runs:
        columns.append("run")
        for row, run in zip(rows, runs, strict=True):
            row.append(text(run))
    for row, token in zip(rows, tokens, strict=True):
        pieces = token.get("context", ("", "–", ""))
        row.append(context(pieces, falls=token["share"] < 0))
    return Table(
        title=title,
        columns=[*columns, "token in its context"],
        rows=rows,
        caption=(
            f"Shares in {unit}; a negative one lowers the entropy. By itself, making an "
            "improbable token likelier (log p below −H) raises the entropy, and making a "
            "probable one likelier lowers it. A: the advantage; line of U and k-th token "
            "of its response."
        ),
    )


def kinds_of_tokens(document: Document) -> Table:
    """Shares summed by several kinds of tokens; of each kind they add up to the same."""
    error = linear_error(document)
    rows: list[Row] = []
    for name, found in document["attribution"]["summaries"].items():
        rows.append(head(f"by {title_of_kinds(name)}"))
        for row in found:
            cell = part(row["share"], error)
            if row.get("se"):
                cell = change(row["share"], row["se"])
            label = text(name_of_kind(name, row["label"]))
            rows.append((label, cell, number(row["num_tokens"], 9)))
    return Table(
        title="Shares summed by kind of token",
        columns=("kind", "nats", "tokens"),
        rows=rows,
        caption=blocks_sentence(document),
        folded=True,
    )


def proxies(document: Document) -> Table:
    """How well cheap scores rank tokens."""
    found = document["attribution"]
    scores = {"covariance": found["covariance"], **found["proxies"]}
    fractions = list(found["covariance"]["top_overlap"])
    rows = [
        (
            text(name.replace("_", " ")),
            decimal(judged.get("spearman"), 2, signed=True),
            *(share(judged["top_overlap"].get(fraction)) for fraction in fractions),
        )
        for name, judged in scores.items()
    ]
    overlaps = (f"top {percent(float(fraction), 1)}" for fraction in fractions)
    return Table(
        title="How well cheap scores rank tokens by their share",
        columns=("score", "Spearman", *overlaps),
        rows=rows,
        caption=(
            "A score that predicts entropy loss has a Spearman correlation near −1 with "
            "the share. Top: how many of the tokens that matter most are among as many "
            "with the most extreme scores."
        ),
    )


def what_if(document: Document) -> Table:
    """The change had some tokens been left out of the update."""
    found, error = document["attribution"]["what_if"], linear_error(document)
    floor = document["truth"].get("noise_floor") or 0.0
    verified = any("delta_h_true" in row for row in found)
    rows = []
    for row in found:
        cells = [text(row["rule"]), number(row["num_tokens"], 9)]
        value, own = left_at_first_order(row)
        cells.append(part(value, error) if own is None else change(value, own))
        if verified:
            value, own = left_in_truth(row)
            cells.append(change(value, math.hypot(own, floor)))
        rows.append(cells)
    crossed = (
        " Tokens that a rule ranks by share are chosen on one half of E and evaluated on "
        "the other, swapped and averaged."
        if any("delta_h1_cross_fitted" in row for row in found)
        else ""
    )
    return Table(
        title="What if these tokens had been left out of the update",
        columns=["left out", "tokens", "ΔH first order"] + ["ΔH true"] * verified,
        rows=rows,
        caption=(
            f"In {UNITS[document['linear']['normalize']]}. First order: with the Adam "
            f"denominator of the whole update; true: the masked step taken.{crossed}"
        ),
        folded=True,
    )


# The run


def audits(document: Document) -> Table:
    """Every check: what was found, what it should be, the verdict."""
    return _audits("All audits", document["audit"])


def central_audits(document: Document) -> Table:
    """Those that every result stands on."""
    rows = document["audit"]
    chosen = [row for name in CENTRAL_AUDITS for row in rows if row["name"] == name]
    note = (
        f"{len(chosen)} of {len(rows)} audits; all are in results.json, and the command "
        "audit prints them"
    )
    return _audits("Central audits", chosen, note)


def _audits(title: str, checks: Iterable[dict[str, Any]], caption: str = "") -> Table:
    rows: list[Row] = []
    for row in checks:
        value = row["value"]
        # A line for each entry: names are too long for a column of values.
        entries = value.items() if isinstance(value, dict) else ()
        rows.append(
            (
                text(row["name"]),
                text("") if isinstance(value, dict) else found(value),
                expression(row["expected"]),
                verdict(row["verdict"]),
            )
        )
        rows += [
            (entry(short_name(name)), found(item), text(""), text(""))
            for name, item in entries
        ]
    return Table(
        title=title,
        columns=("check", "found", "expected", ""),
        rows=rows,
        caption=caption,
        folded=True,
        id=AUDITS_ID,
    )


def found(value: Any) -> Cell:
    """A cell of what a check found, with all the digits that tell runs apart."""
    if isinstance(value, bool):
        # As JSON and the column of what is expected spell it.
        return expression(str(value).lower())
    if isinstance(value, (int, float)):
        return number(value, 11)
    return expression(str(value))


def facts(document: Document, folders: Sequence[str]) -> Table:
    """Batches, machine and versions."""
    run = document["run"]
    pairs = {
        "run directory": ", ".join(folders),
        **described(document),
        "started": run["started"],
        "took": f"{sum(run['seconds'].values()):,.1f} seconds",
        **run["versions"],
    }
    return Table(
        title="Batches, machine, versions",
        columns=("", ""),
        rows=[(text(name), text(value)) for name, value in pairs.items()],
    )


def costs(document: Document) -> Table:
    """Seconds of each phase."""
    seconds = document["run"]["seconds"]
    return Table(
        title="Time of each phase",
        columns=("phase", "seconds"),
        rows=[(text(name), number(value, 3)) for name, value in seconds.items()],
        folded=True,
    )
