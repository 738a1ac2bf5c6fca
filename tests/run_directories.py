"""Run directories written by hand, with any numbers and texts."""

import copy
import gzip
import json
import random
from pathlib import Path
from typing import Any

import yaml

CONFIG: dict[str, Any] = {
    "checkpoint": {"path": "out/checkpoint-20"},
    "batches": {"E": {"file": "E.jsonl"}, "U": {"file": "U.jsonl"}},
}
DOCUMENT: dict[str, Any] = {
    "schema_version": 1,
    "status": "ok",
    "run": {
        "versions": {"entropy_ddp": "0.1.0", "torch": "2.13.0"},
        "world_size": 2,
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": {"step": 0.5, "truth": 1.25},
        "passes": [],
    },
    "E": {"num_groups": 40, "num_sequences": 40, "num_tokens": 200},
    "U": {"num_groups": 2, "num_sequences": 6, "num_tokens": 30},
    "update": {
        "loss": "dr_grpo",
        "learning_rate_used": 1e-3,
        "param_update_l2": 0.0374,
        "grad_norm": 0.0641,
        "clip_coef": 1.0,
        "num_optimizer_steps": 1,
        "top_parameters": [{"name": "model.layers.1.mlp.up_proj.weight", "l2": 0.0132}],
    },
    "truth": {
        "normalize": "per_token",
        "is_mode": "snis",
        "H_orig": 0.25,
        "H_upd": 0.248,
        "H_orig_se": 0.006,
        "H_upd_se": 0.0059,
        "noise_floor": 2e-8,
        "delta_h_true": -0.002,
        "se": 0.0001,
        "ess": 39.5,
        "ess_fraction": 0.9875,
        "log_weight": {"min": -0.25, "median": 0.0125, "max": 0.375},
        "clip_fraction": 0.0,
    },
    "truth_all": [
        {"is_mode": "snis", "delta_h_true": -0.002, "se": 0.0001, "ess_fraction": 0.98}
    ],
    "linear": {
        "normalize": "per_token",
        "score": "full",
        "baseline": "none",
        "control_variates": False,
        "slope": -2.1,
        "delta_h1": -0.0021,
        "se": 0.12,
        "se_jackknife": 0.121,
        "terms": {"score": 0.5, "pathwise": -1.6, "denominator": -1.0},
        "duality_gap": 3e-7,
        "difference_se": 8e-6,
    },
    "linear_all": [
        {
            "score": "full",
            "baseline": "none",
            "control_variates": False,
            "slope": -2.1,
            "se": 0.12,
        }
    ],
    "audit": [
        {
            "name": "trainable tensors",
            "value": 28,
            "expected": "> 0",
            "verdict": "ok",
            "hint": "",
        },
        {
            "name": "duality gap",
            "value": 3e-7,
            "expected": "<= 1e-04",
            "verdict": "ok",
            "hint": "",
        },
    ],
}
CURVATURE = {"second_derivative": 45.0, "se": 17.0, "delta_h2": -0.00199, "step": 1e-3, "eta_star": 0.09, "delta_h2_se": 1.1e-4, "difference_se": 4e-7, "eta_star_se": 0.034}  # fmt: skip
GRADIENT_DOT = {
    "direction": "step", "weighting": "dr_grpo", "bars_dot": -0.0018, "u_cross": 0.0018,
    "deltaH1": -0.0018, "learning_rate": 1.0, "V_X": 1e-7, "V_Y": 4e-8,
    "se_deltaH1": 3.7e-4, "frac_var": 0.043, "x_norm": 1.0, "y_norm": 0.04,
    "u_statistic": False,
}  # fmt: skip


# What a run writes of its intervals: jackknife errors with Student's t of 39 degrees.
INTERVALS: dict[str, dict[str, Any]] = {
    "truth": {
        "se_jackknife": 0.00011, "interval": [-0.0022225, -0.0017775],
        "H_orig_se_jackknife": 0.0062, "H_upd_se_jackknife": 0.0061,
        "effective_degrees_of_freedom": 31.0, "largest_share": 0.08,
        "largest_sequence": 17, "control_variates": False,
    },
    "linear": {
        "interval": [-0.00234475, -0.00185525],
        "difference_se_jackknife": 9e-6, "difference_interval": [8.18e-5, 1.182e-4],
    },
    "curvature": {
        **CURVATURE, "method": "midpoint", "se_jackknife": 17.0,
        "delta_h2_se_jackknife": 1.2e-4, "interval": [-0.0022325, -0.0017475],
        "difference_se_jackknife": 5e-7, "difference_interval": [-1.1e-5, -9e-6],
        "eta_star_interval": [0.053, 0.41],
    },
}  # fmt: skip


def with_intervals(document: dict[str, Any], **truth: Any) -> dict[str, Any]:
    """A document as versions write it that know intervals; its truth has these values."""
    parts = {name: document.get(name, {}) | INTERVALS[name] for name in INTERVALS}
    parts["truth"] |= truth
    return document | parts


def sweep_part(sign: int = 1) -> dict[str, Any]:
    """`sweep` and its summary: a change of this sign, nearly linear in eta."""
    points = [
        {
            "eta": eta,
            "delta_h_true": sign * (2 * eta - 10 * eta**2),
            "se": 0.1 * eta,
            "ess_fraction": 1 - 10 * eta,
            "delta_h1": sign * 2 * eta,
            "delta_h1_se": 0.1 * eta,
            "delta_h2": sign * (2 * eta - 9 * eta**2),
            "delta_h2_se": 0.1 * eta,
            "difference_se": 0.01 * eta,
            "trusted": True,
        }
        for eta in (1e-4, 1e-3, 1e-2)
    ]
    summary = {
        "exponent": 0.99, "exponent_se": 0.004, "agreement": [1e-4, 1e-3],
        "noise_floor": 2e-8,
    }  # fmt: skip
    return {"sweep": points, "sweep_summary": summary}


def attribution_part(texts: list[list[str]], context: list[str]) -> dict[str, Any]:
    """`attribution` of responses of these tokens."""
    count = sum(len(tokens) for tokens in texts)
    judged = {"spearman": -0.1, "top_overlap": {"0.01": 0.5, "0.05": 0.25, "0.2": 0.4}}
    return {
        "attribution": {
            "momentum": -0.0017,
            "weight_decay": 0.0,
            "gradient": -0.0004,
            "total": -0.0021,
            "attribution_gap": 4e-7,
            "covariance": judged,
            "proxies": {"surprisal": judged},
            "concentration": 0.034,
            "summaries": {
                "advantage": [
                    {"label": "A < 0", "share": 1e-4, "num_tokens": count // 2},
                    {"label": "A > 0", "share": -5e-4, "num_tokens": count // 2},
                ]
            },
            "what_if": [
                {"rule": "all tokens with A > 0", "num_tokens": 9, "delta_h1": -0.0016}
            ],
            "top_tokens": [
                {
                    "index": 0, "k": 1, "share": -9.5e-5, "logp": -3.25, "entropy": 0.875,
                    "advantage": 0.5, "context": context,
                }
            ],
        }
    }  # fmt: skip


def sequence_rows(document: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of per_sequence.jsonl, as many as the document says."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index in range(document["E"]["num_sequences"]):
        weight = draw.gauss(0, 0.1)
        rows.append(
            {
                "split": "E", "index": index, "group": index,
                "num_tokens": draw.randint(1, 30), "logp": -3.0, "entropy": 1.5,
                "logp_upd": -3.0 + weight, "entropy_upd": 1.5, "log_weight": weight,
                "contribution_true": 1e-4 * weight + draw.gauss(0, 1e-6),
                "contribution_linear": 1e-4 * weight,
            }
        )  # fmt: skip
    return rows


def update_rows(texts: list[list[str]], prompts: list[str]) -> list[dict[str, Any]]:
    """Rows of per_sequence.jsonl of U, with shares."""
    return [
        {
            "split": "U", "index": index, "group": index // 3, "num_tokens": len(tokens),
            "logp": -3.0, "entropy": 1.5, "reward": float(index % 2),
            "advantage": index % 2 - 0.5, "share": -1e-4, "prompt": prompt,
        }
        for index, (tokens, prompt) in enumerate(zip(texts, prompts, strict=True))
    ]  # fmt: skip


def token_rows(texts: list[list[str]]) -> list[dict[str, Any]]:
    """Rows of tokens.jsonl.gz: the first token of every response matters most."""
    return [
        {
            "index": index, "k": k, "token_id": k, "text": text, "logp": -3.25 / k,
            "entropy": 0.875, "advantage": index % 2 - 0.5, "covariance": 0.0625 * k,
            "share": (-1) ** index * 9.5e-5 / k**2,
        }
        for index, tokens in enumerate(texts)
        for k, text in enumerate(tokens, start=1)
    ]  # fmt: skip


def write_run(
    folder: Path,
    changes: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    texts: list[list[str]] | None = None,
    prompt: str | list[str] = "2+2=",
) -> Path:
    """A run directory.

    Args:
        folder: is made.
        changes: keys of results.json; a dotted key names one of a section.
        config: the same of config.yaml.
        texts: tokens of the responses of U of an attribution.
        prompt: every response's prompt, or one for each.
    """
    document, settings = copy.deepcopy(DOCUMENT), copy.deepcopy(CONFIG)
    rows: list[dict[str, Any]] = []
    folder.mkdir(parents=True)
    if texts is not None:
        prompts = [prompt] * len(texts) if isinstance(prompt, str) else prompt
        document |= attribution_part(
            texts, [prompts[0], texts[0][0], "".join(texts[0][1:])]
        )
        rows = update_rows(texts, prompts)
        with gzip.open(folder / "tokens.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in token_rows(texts))
    _apply(document, changes or {})
    _apply(settings, config or {})
    rows = sequence_rows(document) + rows
    with (folder / "per_sequence.jsonl").open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "results.json").write_text(json.dumps(document))
    return folder


def _apply(document: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        *sections, key = name.split(".")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
