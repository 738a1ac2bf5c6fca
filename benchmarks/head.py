"""Rows about the output layer: log p and H of hidden states, a large vocabulary."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.comparison import Comparison, Setting, time_in_turns
from benchmarks.memory import peak_bytes
from benchmarks.models import QWEN_05B, TINY, make_base
from benchmarks.passes import relative_difference
from entropy_ddp.model.response_tokens import ResponseTokens, ScoringSettings

# Rows of logits in which the plain route takes its entropies: its memory is then that of
# the logits and of their log_softmax, two copies, and not of temporaries.
PLAIN_ROWS = 16


@torch.no_grad()
def statistics(
    tokens: ResponseTokens, hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """log p and H of hidden states [m, d], as `score` computes them; [m] each."""
    values = tokens.statistics(hidden, targets)
    return values["logp"], values["entropy"]


@torch.no_grad()
def plain_statistics(
    tokens: ResponseTokens, hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by all logits and their log_softmax in the model's dtype."""
    logits = tokens.output_layer(hidden)
    logs = logits.log_softmax(-1)
    logp = logs.gather(-1, targets[:, None])[:, 0]
    entropy = [-(rows.exp() * rows).sum(-1) for rows in logs.split(PLAIN_ROWS)]
    return logp, torch.cat(entropy)


def head_row(setting: Setting) -> Iterator[Comparison]:
    """Head at vocabulary 151,936 against the bare product and against full logits."""
    # The body is not used: one layer is enough.
    shape = replace(setting.pick(TINY, QWEN_05B, QWEN_05B), layers=1)
    base = make_base("qwen2", shape, device=setting.device)
    tokens = ResponseTokens(base, ScoringSettings())
    for count in setting.pick((6,), (128,), (128, 1024)):
        yield _against_product(tokens, count, setting)
    yield from _against_full_logits(tokens, setting.pick(24, 1024, 4096), setting)


def _inputs(tokens: ResponseTokens, count: int) -> tuple[Tensor, Tensor]:
    weight = tokens.output_layer.weight
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(count, weight.shape[1], generator=generator)
    targets = torch.randint(weight.shape[0], (count,), generator=generator)
    return hidden.to(weight), targets.to(weight.device)


def _against_product(
    tokens: ResponseTokens, count: int, setting: Setting
) -> Comparison:
    hidden, targets = _inputs(tokens, count)

    @torch.no_grad()
    def product() -> Tensor:
        return tokens.output_layer(hidden)

    timings = time_in_turns(
        lambda: statistics(tokens, hidden, targets), product, setting
    )
    (logp, entropy), logits = timings.results
    distribution = torch.distributions.Categorical(logits=logits.double())
    return timings.comparison(
        f"head, vocabulary {logits.shape[1]:,}, {count} tokens",
        "log p and H / bare product",
        target=1.6,
        difference=max(
            relative_difference(logp, distribution.log_prob(targets)),
            relative_difference(entropy, distribution.entropy()),
        ),
        details={"hidden": hidden.shape[1]},
    )


def _against_full_logits(
    tokens: ResponseTokens, count: int, setting: Setting
) -> Iterator[Comparison]:
    hidden, targets = _inputs(tokens, count)
    runs = [
        lambda: statistics(tokens, hidden, targets),
        lambda: plain_statistics(tokens, hidden, targets),
    ]
    timings = time_in_turns(runs[0], runs[1], setting)
    pairs = zip(*timings.results, strict=True)
    difference = max(relative_difference(*pair) for pair in pairs)
    vocabulary = tokens.output_layer.weight.shape[0]
    part = f"head, vocabulary {vocabulary:,}, {count} tokens"
    yield timings.comparison(
        f"{part}: time",
        "in chunks / full logits",
        target=1.2,
        difference=difference,
    )
    peaks = [peak_bytes(run, setting.device) for run in runs]
    yield Comparison(
        part=f"{part}: peak memory",
        over="in chunks / full logits",
        values=[peaks[0] / peaks[1]],
        target=1 / 15,
        difference=difference,
        details={"peak_bytes": peaks},
    )
