"""What is the right answer? A slow float64 reference for everything the tests check.

One sequence at a time: no padding, no microbatches, no ranks, the full logits of
``model(input_ids).logits``. It shares no code with the package.

Derivatives are explicit formulas over per-token reverse-mode gradients; the same
numbers come from :func:`slope_by_central_difference` of the estimators' values.

Notation: sequence i has T_i response tokens; log p_{i,k} and H_{i,k} are the log
probability of token k and the entropy of the distribution it was drawn from;
l_i = sum_k log p_{i,k}; w_i = exp(l_i(theta') - l_i(theta)). Shapes: [N] sequences,
[T_i] tokens, [n] groups. Units: nats.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

Scores = list[tuple[Tensor, Tensor]]
"""(log p [T_i], H [T_i]) of every sequence."""

NORMALIZATIONS = ("per_token", "per_sequence", "per_sequence_token_mean", "sum")


@dataclass(frozen=True)
class Row:
    """One sequence of a batch, as plain lists."""

    group: int | str
    prompt_ids: list[int]
    response_ids: list[int]
    reward: float | None = None
    advantage: float | None = None
    sampling_logprobs: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which entropy of a batch is meant, and how it is importance-weighted."""

    normalize: str = "per_token"
    integrand: str = "rb"
    """``rb``: H_{i,k}; ``surprisal``: -log p_{i,k}."""
    is_mode: str = "snis"
    """``snis``, ``clip`` (needs ``clip_c``) or ``per_decision``."""
    clip_c: float = math.inf
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"unknown normalize {self.normalize!r}")
        if self.is_mode == "per_decision" and (
            self.normalize == "per_sequence_token_mean" or self.integrand != "rb"
        ):
            raise ValueError(f"per_decision does not apply to {self}")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Which policy-gradient loss is meant."""

    loss: str = "dr_grpo"
    length_norm: str | int = "group_max"
    average_over: str = "groups"
    ratio: str = "on_policy"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    temperature: float = 1.0


# Models


class _Float32IsFloat64(TorchFunctionMode):
    """Read every mention of float32 in a call of a torch function as float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        args = tuple(widen(value) for value in args)
        return func(*args, **{key: widen(v) for key, v in (kwargs or {}).items()})


def true_float64() -> TorchFunctionMode:
    """Context in which a float64 model computes in float64 throughout.

    RMSNorm, rotary embeddings and eager softmax of transformers cast to float32
    whatever the model's dtype, which stops central differences at about 1e-4.

    Returns:
        A context manager; enter it once.
    """
    return _Float32IsFloat64()


def _randomize(model: nn.Module, seed: int, scale: float) -> None:
    """Normal weights of standard deviation scale; norms near 1, biases near 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
            if parameter.ndim > 1:
                parameter.copy_(scale * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(1.0 + 0.2 * noise)


def _tiny(model_class: type, config: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = model_class(config).double().eval()
    _randomize(model, seed, scale=0.35)
    return model


def tiny_gpt2(
    seed: int, *, vocabulary: int = 13, attention: str = "eager"
) -> nn.Module:
    """GPT-2: 2 layers, hidden 16, 2 heads, tied embeddings; float64, eval mode."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return _tiny(GPT2LMHeadModel, config, seed)


def _llama_shape(vocabulary: int, attention: str, *, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attn_implementation": attention,
    }


def tiny_qwen2(
    seed: int, *, vocabulary: int = 17, attention: str = "eager"
) -> nn.Module:
    """Qwen2: 2 layers, hidden 16, 4 heads on 2, tied embeddings; float64, eval."""
    config = Qwen2Config(**_llama_shape(vocabulary, attention, tied=True))
    return _tiny(Qwen2ForCausalLM, config, seed)


def tiny_llama(
    seed: int, *, vocabulary: int = 15, attention: str = "eager"
) -> nn.Module:
    """Llama: 2 layers, hidden 16, 4 heads on 2, untied; float64, eval mode."""
    config = LlamaConfig(**_llama_shape(vocabulary, attention, tied=False))
    return _tiny(LlamaForCausalLM, config, seed)


def with_lora(
    model: nn.Module,
    seed: int,
    targets: Sequence[str],
    *,
    rank: int = 2,
    **options: Any,
) -> nn.Module:
    """Model (changed in place) under a PEFT LoRA adapter with random A and B != 0."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(targets),
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3, generator=generator)
    return adapted.eval()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by their name in ``model.named_parameters()``."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_direction(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Isotropic direction in the space of trainable parameters, of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in trainable(model).items()
    }
    norm = math.sqrt(sum(float(v.square().sum()) for v in direction.values()))
    return {name: v / norm for name, v in direction.items()}


@contextmanager
def parameters_shifted(
    model: nn.Module, direction: Mapping[str, Tensor], eta: float
) -> Iterator[None]:
    """Model at theta + eta * direction; afterwards the very bits of theta are back."""
    parameters = dict(model.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in direction}
    try:
        with torch.no_grad():
            for name, v in direction.items():
                parameters[name].copy_(saved[name] + eta * v)
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                parameters[name].copy_(value)


# Batches


def random_rows(
    seed: int,
    *,
    groups: int = 4,
    responses: int | Sequence[int] = 2,
    vocabulary: int = 13,
    max_prompt: int = 4,
    max_response: int = 5,
    with_empty: bool = False,
) -> list[Row]:
    """Ragged batch of random tokens, one prompt and reward scale per group.

    Args:
        seed: Of the only source of randomness.
        groups: Number of groups, named 0, 1, ...
        responses: Responses of every group, or one number for each group.
        vocabulary: Token ids are below this.
        max_prompt: Prompts have 1 to this many tokens.
        max_response: Responses have 1 to this many tokens.
        with_empty: Make every fifth response empty, from the second on.

    Returns:
        Rows in the order of the groups.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    counts = [responses] * groups if isinstance(responses, int) else list(responses)
    rows: list[Row] = []
    for group, count in enumerate(counts):
        prompt = integers(0, vocabulary, integers(1, max_prompt + 1, 1)[0])
        for _ in range(count):
            length = integers(1, max_response + 1, 1)[0]
            if with_empty and len(rows) % 5 == 1:
                length = 0
            response = integers(0, vocabulary, length)
            reward = torch.rand((), generator=generator, dtype=torch.float64).item()
            rows.append(Row(group, prompt, response, reward=reward))
    return rows


def drawn_from(model: nn.Module, rows: Sequence[Row], seed: int) -> list[Row]:
    """The same rows with responses of the same lengths drawn from the model.

    Responses go on after an end token: every token is a draw all the same.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in rows:
        ids = list(row.prompt_ids)
        with torch.no_grad(), true_float64():
            for _ in row.response_ids:
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
                draw = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                ids.append(int(draw))
        found.append(replace(row, response_ids=ids[len(row.prompt_ids) :]))
    return found


def all_rows(prompt: list[int], vocabulary: int, eos: int, length: int) -> list[Row]:
    """Every response there is: it ends at eos or at the given length."""
    open_rows: list[list[int]] = [[]]
    closed: list[list[int]] = []
    for _ in range(length):
        grown = [ids + [v] for ids in open_rows for v in range(vocabulary)]
        closed += [ids for ids in grown if ids[-1] == eos]
        open_rows = [ids for ids in grown if ids[-1] != eos]
    return [Row(i, prompt, ids) for i, ids in enumerate(closed + open_rows)]


def with_sampling_logprobs(
    model: nn.Module, rows: list[Row], seed: int, *, noise: float = 0.0
) -> list[Row]:
    """Rows as a sampler at temperature 1 reports them: log p plus normal noise, <= 0."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for row, (logp, _) in zip(rows, scores(model, rows, 1.0), strict=True):
        error = torch.randn(logp.shape, generator=generator, dtype=logp.dtype)
        sampled = (logp + noise * error).clamp(max=0).tolist()
        result.append(replace(row, sampling_logprobs=sampled))
    return result


def _group_index(rows: Sequence[Row]) -> list[int]:
    """Position of each row's group in the order of first appearance. [N]"""
    order = {group: i for i, group in enumerate(dict.fromkeys(r.group for r in rows))}
    return [order[row.group] for row in rows]


# Scores


def token_scores(
    model: nn.Module, row: Row, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p_k and H_k = -sum_v pi(v) log pi(v), pi = softmax(logits / temperature).

    Returns:
        log p [T_i] and H [T_i], differentiable in the parameters.
    """
    ids = torch.tensor([row.prompt_ids + row.response_ids])
    with true_float64():
        logits = model(input_ids=ids, use_cache=False).logits[0]
        first = len(row.prompt_ids) - 1  # logits at position t predict token t + 1
        logits = logits[first : first + len(row.response_ids)] / temperature
        log_pi = torch.log_softmax(logits, dim=-1)
        chosen = torch.tensor(row.response_ids, dtype=torch.long)
        logp = log_pi[torch.arange(len(chosen)), chosen]
        entropy = -(log_pi.exp() * log_pi).sum(dim=-1)
    return logp, entropy


@torch.no_grad()
def scores(model: nn.Module, rows: Sequence[Row], temperature: float) -> Scores:
    """:func:`token_scores` of every row, detached."""
    return [token_scores(model, row, temperature) for row in rows]


def scores_along(
    model: nn.Module,
    rows: Sequence[Row],
    direction: Mapping[str, Tensor],
    temperature: float,
) -> Callable[[float], Scores]:
    """The function eta -> scores at theta + eta * direction; remembers its values."""

    @cache
    def scores_at(eta: float) -> Scores:
        with parameters_shifted(model, direction, eta):
            return scores(model, rows, temperature)

    return scores_at


# The entropy of a batch, importance-weighted


@dataclass(frozen=True)
class Truth:
    """Change of the importance-weighted entropy between two parameter values."""

    H_orig: float
    H_upd: float
    delta_h_true: float
    contributions: list[float]
    """c_i [N], which sum to ``delta_h_true``."""
    se: float
    H_orig_se: float
    H_upd_se: float
    ess: float
    log_weights: list[float]
    """l_i(theta') - l_i(theta) [N], unclipped."""


def _integrand(logp: Tensor, entropy: Tensor, objective: Objective) -> list[float]:
    return (entropy if objective.integrand == "rb" else -logp).tolist()


def log_weights(old: Scores, new: Scores) -> list[float]:
    """log w_i = l_i(theta') - l_i(theta). [N]"""
    return [
        math.fsum(after.tolist()) - math.fsum(before.tolist())
        for (before, _), (after, _) in zip(old, new, strict=True)
    ]


def _weights(old: Scores, new: Scores, objective: Objective) -> list[float]:
    """w_i, or min(w_i, clip_c). [N]"""
    weights = [math.exp(value) for value in log_weights(old, new)]
    if objective.is_mode == "clip":
        weights = [min(w, objective.clip_c) for w in weights]
    return weights


def _per_decision_parts(
    before: list[float], after: list[float], values: list[float]
) -> tuple[float, float]:
    """sum_k w_{<k} H_k and sum_k w_{<k}, w_{<k} the ratio of the tokens before k."""
    numerator = prefix_weights = log_ratio = 0.0
    for old_logp, new_logp, value in zip(before, after, values, strict=True):
        numerator += math.exp(log_ratio) * value
        prefix_weights += math.exp(log_ratio)
        log_ratio += new_logp - old_logp
    return numerator, prefix_weights


def ratio_parts(
    rows: Sequence[Row], old: Scores, new: Scores, objective: Objective
) -> tuple[list[float], list[float]]:
    """Every sequence's share of the numerator and of the denominator of H(theta').

    For ``sum`` the denominator is the constant 1 and the second list is of no use.

    Returns:
        Numerators [N] and denominators [N].
    """
    numerators, denominators = [], []
    weights = _weights(old, new, objective)
    for row, w, before, after in zip(rows, weights, old, new, strict=True):
        num_tokens = len(row.response_ids)
        values = _integrand(*after, objective)
        if objective.is_mode == "per_decision":
            numerator, prefix_weights = _per_decision_parts(
                before[0].tolist(), after[0].tolist(), values
            )
            per_token = objective.normalize == "per_token"
            numerators.append(numerator)
            denominators.append(prefix_weights if per_token else 1.0)
            continue
        total = math.fsum(values)
        if objective.normalize == "per_sequence_token_mean":
            total = total / num_tokens if num_tokens else 0.0
        numerators.append(w * total)
        denominators.append(w * num_tokens if objective.normalize == "per_token" else w)
    return numerators, denominators


def _denominator(denominators: list[float], objective: Objective) -> float:
    return 1.0 if objective.normalize == "sum" else math.fsum(denominators)


def entropy_value(
    rows: Sequence[Row], old: Scores, new: Scores, objective: Objective
) -> float:
    """H(theta'), from the scores at theta and at theta'.

    H = sum_i w_i H_i / sum_i w_i T_i for ``per_token`` and likewise for the others.
    """
    numerators, denominators = ratio_parts(rows, old, new, objective)
    return math.fsum(numerators) / _denominator(denominators, objective)


def entropy_along(
    rows: Sequence[Row], scores_at: Callable[[float], Scores], objective: Objective
) -> Callable[[float], float]:
    """The function eta -> H(theta + eta v) on this batch; scores of scores_along."""
    old = scores_at(0.0)
    return lambda eta: entropy_value(rows, old, scores_at(eta), objective)


def effective_sample_size(weights: Sequence[float]) -> float:
    """(sum w)^2 / sum w^2."""
    return math.fsum(weights) ** 2 / math.fsum(w * w for w in weights)


def clustered_standard_error(rows: Sequence[Row], influence: list[float]) -> float:
    """sqrt(n/(n-1) sum_g (t_g - mean t)^2), t_g = sum of the influences of group g.

    For a ratio the influences sum to 0, so the centring does nothing; for ``sum``
    it makes the groups n independent draws. NaN for a single group.
    """
    index = _group_index(rows)
    n = max(index) + 1
    totals = [
        math.fsum(value for value, g in zip(influence, index, strict=True) if g == b)
        for b in range(n)
    ]
    if n == 1:
        return math.nan
    mean = math.fsum(totals) / n
    return math.sqrt(n / (n - 1) * math.fsum((t - mean) ** 2 for t in totals))


def delta_h_true(
    rows: Sequence[Row], old: Scores, new: Scores, objective: Objective
) -> Truth:
    """H(theta') - H(theta), shares c_i = a'_i/D' - a_i/D and delta-method error.

    The influence of sequence i is (a'_i - H' d'_i)/D' - (a_i - H d_i)/D, where a and
    d are its parts of numerator and denominator; for ``sum`` it is c_i. The two terms
    are its influences on H' and on H. The effective
    sample size is that of the sequence weights in use, clipped ones for ``clip``,
    and of w_i for ``per_decision``.
    """
    a0, d0 = ratio_parts(rows, old, old, objective)
    a1, d1 = ratio_parts(rows, old, new, objective)
    D0, D1 = _denominator(d0, objective), _denominator(d1, objective)
    before, after = math.fsum(a0) / D0, math.fsum(a1) / D1
    contributions = [x1 / D1 - x0 / D0 for x0, x1 in zip(a0, a1, strict=True)]
    influence = contributions
    if objective.normalize != "sum":
        influence = [
            c - (after * s1 / D1 - before * s0 / D0)
            for c, s0, s1 in zip(contributions, d0, d1, strict=True)
        ]
    of_before, of_after = (
        [(a - H * d) / D for a, d in zip(parts, sizes, strict=True)]
        for parts, sizes, H, D in ((a0, d0, before, D0), (a1, d1, after, D1))
    )
    if objective.normalize == "sum":
        of_before, of_after = a0, a1
    return Truth(
        H_orig=before,
        H_upd=after,
        delta_h_true=after - before,
        contributions=contributions,
        se=clustered_standard_error(rows, influence),
        H_orig_se=clustered_standard_error(rows, of_before),
        H_upd_se=clustered_standard_error(rows, of_after),
        ess=effective_sample_size(_weights(old, new, objective)),
        log_weights=log_weights(old, new),
    )


# Derivatives by finite differences


def _extrapolate(estimates: list[float]) -> float:
    """Richardson: estimates at h, h/2, h/4, ... with errors in h^2, h^4, ..."""
    power = 4
    while len(estimates) > 1:
        estimates = [
            (power * fine - coarse) / (power - 1)
            for coarse, fine in pairwise(estimates)
        ]
        power *= 4
    return estimates[0]


def slope_by_central_difference(
    f: Callable[[float], float], h: float, *, levels: int = 3
) -> float:
    """f'(0) from (f(h) - f(-h)) / 2h at h, h/2, h/4, extrapolated to h = 0."""
    steps = [h / 2**level for level in range(levels)]
    return _extrapolate([(f(step) - f(-step)) / (2 * step) for step in steps])


def curvature_by_central_difference(
    f: Callable[[float], float], h: float, *, levels: int = 3
) -> float:
    """f''(0) from (f(h) - 2 f(0) + f(-h)) / h^2 at h, h/2, h/4, extrapolated."""
    steps = [h / 2**level for level in range(levels)]
    middle = f(0.0)
    return _extrapolate([(f(s) - 2 * middle + f(-s)) / s**2 for s in steps])


# The first-order prediction

TokenDerivatives = tuple[Tensor, Tensor, Tensor, Tensor]
"""log p, H, log p' and H' of one sequence, each [T_i]."""


@dataclass(frozen=True)
class SlopePieces:
    """Per-sequence sums [N] of which the slope is a function.

    slope = (sum score + sum pathwise - Hbar sum remaining) / D,
    Hbar = sum value / D, D = sum size (1 for ``sum``).
    """

    score: Tensor
    """``full``: l'_i H_i; ``to_go``: sum_k (G_{i,k} - b_{i,k}) log p'_{i,k}."""
    pathwise: Tensor
    """H'_i."""
    remaining: Tensor
    """What Hbar multiplies: T_i l'_i, l'_i or sum_k R_{i,k} log p'_{i,k}."""
    value: Tensor
    """H_i (or H_i / T_i)."""
    size: Tensor
    """T_i or 1."""


@dataclass(frozen=True)
class Slope:
    """The slope, its three terms, and what they are made of."""

    slope: float
    score: float
    pathwise: float
    denominator: float
    contributions: list[float]
    """Derivative of each c_i of the truth, [N]; they sum to ``slope``."""
    pieces: SlopePieces


def token_derivatives(
    model: nn.Module, row: Row, direction: Mapping[str, Tensor], temperature: float
) -> TokenDerivatives:
    """log p, H and their derivatives along direction, one backward pass for each.

    Returns:
        log p [T_i], H [T_i], log p' [T_i], H' [T_i], detached.
    """
    parameters = dict(model.named_parameters())
    targets = [parameters[name] for name in direction]

    def along(value: Tensor) -> float:
        gradients = torch.autograd.grad(
            value, targets, retain_graph=True, allow_unused=True
        )
        return math.fsum(
            float((gradient * v).sum())
            for gradient, v in zip(gradients, direction.values(), strict=True)
            if gradient is not None
        )

    logp, entropy = token_scores(model, row, temperature)
    with true_float64():
        d_logp = torch.tensor([along(x) for x in logp], dtype=torch.float64)
        d_entropy = torch.tensor([along(x) for x in entropy], dtype=torch.float64)
    return logp.detach(), entropy.detach(), d_logp, d_entropy


def _full_parts(
    values: list[float], d_values: list[float], d_logp: list[float], normalize: str
) -> list[float]:
    """(score, pathwise, remaining, value, size) of a sequence for ``score: full``."""
    num_tokens = len(values)
    share = 1.0
    if normalize == "per_sequence_token_mean":
        share = 1.0 / num_tokens if num_tokens else 0.0
    value, d_sequence = share * math.fsum(values), math.fsum(d_logp)
    size = float(num_tokens) if normalize == "per_token" else 1.0
    remaining = 0.0 if normalize == "sum" else size * d_sequence
    return [d_sequence * value, share * math.fsum(d_values), remaining, value, size]


def _to_go_parts(
    values: list[float],
    baselines: list[float] | None,
    d_values: list[float],
    d_logp: list[float],
    normalize: str,
) -> list[float]:
    """(score, pathwise, remaining, value, size) of a sequence for ``score: to_go``."""
    num_tokens = len(values)
    score = remaining = 0.0
    for k in range(num_tokens):
        weight = math.fsum(values[k:])  # G_k, what is to come from step k on
        count = num_tokens - k  # R_k, with k counted from 0 here
        if baselines is not None:
            weight -= baselines[k]
            count -= 1
        score += weight * d_logp[k]
        remaining += count * d_logp[k]
    per_token = normalize == "per_token"
    size = float(num_tokens) if per_token else 1.0
    remaining = remaining if per_token else 0.0
    return [score, math.fsum(d_values), remaining, math.fsum(values), size]


def slope(
    model: nn.Module,
    rows: Sequence[Row],
    direction: Mapping[str, Tensor],
    objective: Objective,
    *,
    score: str = "full",
    baseline: str = "none",
) -> Slope:
    """d/d eta at 0 of the entropy of this batch along direction.

    ``full``: the derivative of the ``snis`` value. ``to_go`` with ``hk``: that of the
    ``per_decision`` value. ``to_go`` with ``none``: same expectation as the latter.
    ``hk`` subtracts the entropy H_{i,k} whatever the integrand: the surprisal of
    y_k is not known before y_k, and subtracting it would be biased.

    Returns:
        The slope, its terms and its per-sequence pieces.
    """
    tokens = [
        token_derivatives(model, row, direction, objective.temperature) for row in rows
    ]
    return slope_from_tokens(tokens, objective, score=score, baseline=baseline)


def slope_from_tokens(
    tokens: Sequence[TokenDerivatives],
    objective: Objective,
    *,
    score: str = "full",
    baseline: str = "none",
) -> Slope:
    """:func:`slope` from every row's :func:`token_derivatives`.

    Raises:
        ValueError: If score, baseline and normalization do not go together.
    """
    normalize = objective.normalize
    if (score, baseline) not in {("full", "none"), ("to_go", "none"), ("to_go", "hk")}:
        raise ValueError(f"no such pair: score {score!r}, baseline {baseline!r}")
    if score == "to_go" and normalize == "per_sequence_token_mean":
        raise ValueError("per_sequence_token_mean has no to-go form")
    parts = []
    for logp, entropy, d_logp, d_entropy in tokens:
        values = _integrand(logp, entropy, objective)
        d_values = _integrand(d_logp, d_entropy, objective)
        if score == "full":
            parts.append(_full_parts(values, d_values, d_logp.tolist(), normalize))
        else:
            known = entropy.tolist() if baseline == "hk" else None
            parts.append(
                _to_go_parts(values, known, d_values, d_logp.tolist(), normalize)
            )
    pieces = SlopePieces(*torch.tensor(parts, dtype=torch.float64).unbind(dim=1))
    return assemble_slope(pieces, normalize)


def _slope_terms(
    pieces: SlopePieces, normalize: str, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, pathwise and denominator term when sequence i is there weights_i times."""
    D = (weights * pieces.size).sum()
    if normalize == "sum":
        D = torch.ones_like(D)
    mean_entropy = (weights * pieces.value).sum() / D
    return (
        (weights * pieces.score).sum() / D,
        (weights * pieces.pathwise).sum() / D,
        -mean_entropy * (weights * pieces.remaining).sum() / D,
    )


def assemble_slope(pieces: SlopePieces, normalize: str) -> Slope:
    """The slope of the per-sequence pieces."""
    ones = torch.ones_like(pieces.score)
    terms = [float(term) for term in _slope_terms(pieces, normalize, ones)]
    D = 1.0 if normalize == "sum" else float(pieces.size.sum())
    denominator_slope = float(pieces.remaining.sum()) / D
    shares = pieces.score + pieces.pathwise - pieces.value * denominator_slope
    shares = shares / D
    return Slope(math.fsum(terms), *terms, shares.tolist(), pieces)


def slope_standard_error(
    rows: Sequence[Row], pieces: SlopePieces, normalize: str
) -> float:
    """Delta method as the infinitesimal jackknife, differentiated by autograd.

    Group g gets a weight w_g = 1; SE^2 = n/(n-1) sum_g (s_g - mean s)^2 with
    s_g = d slope / d w_g. NaN for a single group.
    """
    index = torch.tensor(_group_index(rows))
    group_weights = torch.ones(int(index.max()) + 1, dtype=torch.float64)
    group_weights.requires_grad_()
    n = len(group_weights)
    if n == 1:
        return math.nan
    total = torch.stack(_slope_terms(pieces, normalize, group_weights[index])).sum()
    (influence,) = torch.autograd.grad(total, group_weights)
    spread = (influence - influence.mean()).square().sum()
    return math.sqrt(n / (n - 1) * float(spread))


def jackknife(
    rows: Sequence[Row], estimate: Callable[[list[int]], float], normalize: str
) -> float:
    """sqrt((n-1)/n sum_g (t_g - mean t)^2), t_g the estimate without group g.

    Args:
        rows: The batch.
        estimate: The estimator as a function of the row numbers that are kept.
        normalize: For ``sum`` the estimates are scaled to n groups by n/(n-1).

    Returns:
        The leave-one-group-out standard error.
    """
    index = _group_index(rows)
    n = max(index) + 1
    scale = n / (n - 1) if normalize == "sum" else 1.0
    left_out = [
        scale * estimate([i for i, g in enumerate(index) if g != b]) for b in range(n)
    ]
    mean = math.fsum(left_out) / n
    return math.sqrt((n - 1) / n * math.fsum((t - mean) ** 2 for t in left_out))


def slope_jackknife(rows: Sequence[Row], pieces: SlopePieces, normalize: str) -> float:
    """Leave-one-group-out standard error of the slope, reassembled n times."""

    def estimate(keep: list[int]) -> float:
        kept = {name: values[keep] for name, values in vars(pieces).items()}
        return assemble_slope(SlopePieces(**kept), normalize).slope

    return jackknife(rows, estimate, normalize)


# The update step


def advantages(rows: Sequence[Row], kind: str) -> list[float]:
    """r - mean(r) (``centered``), or that / (std + 1e-4) (``standardized``). [N]

    Mean and unbiased standard deviation are those of the group; a row's own
    ``advantage`` overrides what its reward gives. A group of one has deviation 0.

    Raises:
        ValueError: If the kind is unknown, or a row has neither.
    """
    if kind not in {"centered", "standardized"}:
        raise ValueError(f"expected centered or standardized, got {kind!r}")
    result = []
    for row in rows:
        if row.advantage is not None:
            result.append(row.advantage)
            continue
        rewards = [r.reward for r in rows if r.group == row.group]
        if row.reward is None or None in rewards:
            raise ValueError(f"group {row.group!r} has rows without a reward")
        mean = math.fsum(rewards) / len(rewards)
        value = row.reward - mean
        if kind == "standardized":
            squares = math.fsum((r - mean) ** 2 for r in rewards)
            value /= math.sqrt(squares / max(len(rewards) - 1, 1)) + 1e-4
        result.append(value)
    return result


def _surrogate(
    model: nn.Module, row: Row, advantage: float, settings: LossSettings
) -> Tensor:
    """sum_k A log p_k, or sum_k min(rho A, clip(rho, 1 - low, 1 + high) A)."""
    logp, _ = token_scores(model, row, settings.temperature)
    if settings.ratio == "on_policy":
        return advantage * logp.sum()
    sampler = torch.tensor(row.sampling_logprobs, dtype=torch.float64)
    rho = (logp - sampler).exp()
    clipped = rho.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
    return torch.minimum(rho * advantage, clipped * advantage).sum()


def _divergence(model: nn.Module, row: Row, settings: LossSettings) -> Tensor:
    """sum_k (p_ref / p - log(p_ref / p) - 1), p_ref without the adapter; times p / q.

    q is the sampler's probability, or p itself held fixed, with ``k3_weighted``; with
    ``k3`` there is no such factor.

    Raises:
        ValueError: If the estimator is unknown.
    """
    logp, _ = token_scores(model, row, settings.temperature)
    with torch.no_grad(), model.disable_adapter():
        reference, _ = token_scores(model, row, settings.temperature)
    odds = (reference - logp).exp()
    terms = odds - odds.log() - 1
    if settings.kl_estimator == "k3_weighted":
        sampler = logp.detach()
        if settings.ratio == "clipped":
            sampler = torch.tensor(row.sampling_logprobs, dtype=torch.float64)
        terms = terms * logp.exp() / sampler.exp()
    elif settings.kl_estimator != "k3":
        raise ValueError(f"unknown estimator {settings.kl_estimator!r}")
    return terms.sum()


def rl_loss(
    model: nn.Module,
    rows: Sequence[Row],
    advantage: Sequence[float],
    settings: LossSettings,
) -> Tensor:
    """The loss of the batch, differentiable in the parameters. []

    dr_grpo: -(1/N_b) sum_b (1/G_b) sum_g (1/L_b) S, or averaged over responses
    -(1/N) sum_i (1/L_b) S;  grpo: -(1/N) sum_i (1/T_i) S;
    dapo: -sum_i S / sum_i T_i;  nll: dapo with A = 1;  S the row's surrogate.
    Empty responses count in N and G_b and add 0, whatever they are divided by. With
    ``kl_coefficient`` beta, S is less beta times the row's :func:`_divergence`.

    Raises:
        ValueError: If the loss is unknown, or ``nll`` is to be clipped.
    """
    loss, total = settings.loss, torch.zeros((), dtype=torch.float64)
    if loss not in {"dr_grpo", "grpo", "dapo", "nll"}:
        raise ValueError(f"unknown loss {loss!r}")
    if loss == "nll" and settings.ratio != "on_policy":
        raise ValueError("nll has no advantage and no ratio")
    num_groups = len({row.group for row in rows})
    for row, row_advantage in zip(rows, advantage, strict=True):
        if not row.response_ids:
            continue
        group = [len(r.response_ids) for r in rows if r.group == row.group]
        longest = settings.length_norm
        if longest == "group_max":
            longest = max(group)
        of_one = num_groups * len(group)
        if settings.average_over == "responses":
            of_one = len(rows)
        divisor = {
            "dr_grpo": of_one * longest,
            "grpo": len(rows) * len(row.response_ids),
            "dapo": sum(len(r.response_ids) for r in rows),
            "nll": sum(len(r.response_ids) for r in rows),
        }[loss]
        scale = 1.0 if loss == "nll" else row_advantage
        value = _surrogate(model, row, scale, settings)
        if settings.kl_coefficient:
            value = value - settings.kl_coefficient * _divergence(model, row, settings)
        total = total - value / divisor
    return total


def clip_gradients(
    gradients: Mapping[str, Tensor], max_norm: float
) -> tuple[dict[str, Tensor], float, float]:
    """Gradients times min(1, max_norm / (norm + 1e-6)); max_norm 0 leaves them.

    Returns:
        The clipped gradients, their global norm before clipping, the coefficient.
    """
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    coefficient = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
    return {name: coefficient * g for name, g in gradients.items()}, norm, coefficient


def adamw_step_naive(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    state: Mapping[str, Mapping[str, Any]],
    group_settings: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """One AdamW step, by names, in float64; the arguments are not changed.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  t = t + 1
    theta = theta (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        parameters: Values by name.
        gradients: By name, after clipping; a parameter without one stays as it is.
        state: ``step``, ``exp_avg``, ``exp_avg_sq`` by name; a name that is not there
            starts from zeros.
        group_settings: One mapping for each group: ``names``, ``lr``, ``betas``,
            ``eps``, ``weight_decay``.

    Returns:
        New parameters and new state.
    """
    new_parameters = {n: p.detach().double().clone() for n, p in parameters.items()}
    new_state = {name: dict(entry) for name, entry in state.items()}
    for group in group_settings:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for name in group["names"]:
            if name not in gradients:
                continue
            g = gradients[name].detach().double()
            zero = torch.zeros_like(g)
            old = new_state.get(name, {"step": 0, "exp_avg": zero, "exp_avg_sq": zero})
            t = int(old["step"]) + 1
            m = beta1 * old["exp_avg"].double() + (1 - beta1) * g
            v = beta2 * old["exp_avg_sq"].double() + (1 - beta2) * g * g
            new_state[name] = {"step": t, "exp_avg": m, "exp_avg_sq": v}
            denominator = (v / (1 - beta2**t)).sqrt() + group["eps"]
            decayed = new_parameters[name] * (1 - lr * group["weight_decay"])
            step = lr * (m / (1 - beta1**t)) / denominator
            new_parameters[name] = decayed - step
    return new_parameters, new_state


# A floor of the entropy


def entropy_gradient(
    model: nn.Module, rows: Sequence[Row], temperature: float
) -> tuple[float, dict[str, Tensor]]:
    """H = sum H_t / T of the rows, and 1/T sum (c_t grad log p_t + grad H_t), by name.

    c_t = (sum of H_j - H over the later tokens) - b_t, with b_t the mean of that sum at
    the same position over the sequences of other groups that reach it, 0 where none does.
    """
    for module in model.modules():
        # A lookup of this token has a derivative too.
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    with torch.no_grad():
        entropies = [token_scores(model, row, temperature)[1] for row in rows]
    count = sum(len(row.response_ids) for row in rows)
    mean = float(sum(values.sum() for values in entropies)) / count
    after = [
        [float((values[k + 1 :] - mean).sum()) for k in range(len(values))]
        for values in entropies
    ]
    parameters = trainable(model)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row, own in zip(rows, after):
        weights = []
        for k, value in enumerate(own):
            others = [
                other[k]
                for there, other in zip(rows, after)
                if there.group != row.group and len(other) > k
            ]
            weights.append(value - (sum(others) / len(others) if others else 0.0))
        logp, entropy = token_scores(model, row, temperature)
        each = torch.tensor(weights, dtype=torch.float64)
        objective = ((each * logp).sum() + entropy.sum()) / count
        _add_gradient(total, objective, parameters)
    return mean, total


def policy_gradient(
    model: nn.Module,
    rows: Sequence[Row],
    length: int,
    temperature: float,
    factor: Callable[[float, float], float],
) -> dict[str, Tensor]:
    """Gradient of -1 / (N L) sum_i A_i sum_t f_t log p_t, by name.

    Args:
        length: L, the dr_grpo loss's.
        factor: f of (log p_t, A_i), held fixed.
    """
    parameters = trainable(model)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        assert row.advantage is not None
        logp, _ = token_scores(model, row, temperature)
        factors = [factor(float(value), row.advantage) for value in logp.detach()]
        each = torch.tensor(factors, dtype=torch.float64)
        _add_gradient(
            total,
            -row.advantage * (each * logp).sum() / (len(rows) * length),
            parameters,
        )
    return total


def _add_gradient(
    total: dict[str, Tensor], value: Tensor, parameters: Mapping[str, nn.Parameter]
) -> None:
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, found, strict=True):
        if gradient is not None:
            total[name] += gradient


def dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Inner product of two vectors over parameters."""
    return math.fsum(float((left[name] * right[name]).sum()) for name in left)
