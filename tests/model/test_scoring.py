"""Do both passes give what single sequences give, without a block of all logits?"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import pytest
import reference as ref
import torch
from tiny_runs import as_batch, make_passes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from entropy_ddp.data.batch import Batch, Ragged, Shard
from entropy_ddp.errors import RunError
from entropy_ddp.model import response_tokens, scoring
from entropy_ddp.model.counting import PassCount
from entropy_ddp.model.scoring import Passes

RTOL = 1e-10  # the contract's bar for float64, of the largest value of its kind
TEMPERATURE = 1.3
HIDDEN = 16  # width of every tiny model

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2-lora": lambda: ref.with_lora(
        ref.tiny_gpt2(0, attention="sdpa"), 1, ["c_attn", "c_proj", "c_fc"]
    ),
    "gpt2-full-tied": lambda: ref.tiny_gpt2(0, attention="sdpa"),
    "gpt2-full-eager": lambda: ref.tiny_gpt2(0),
    "qwen2-lora": lambda: ref.with_lora(
        ref.tiny_qwen2(0, attention="sdpa"), 1, ["q_proj", "v_proj", "down_proj"]
    ),
    "qwen2-lora-v": lambda: ref.with_lora(
        ref.tiny_qwen2(0, attention="sdpa"), 1, ["v_proj"]
    ),
    "qwen2-full-tied": lambda: ref.tiny_qwen2(0, attention="sdpa"),
    "llama-full": lambda: ref.tiny_llama(0, attention="sdpa"),
    "llama-full-eager": lambda: ref.tiny_llama(0),
    "llama-lora-output-layer": lambda: ref.with_lora(
        ref.tiny_llama(0, attention="sdpa"), 1, ["lm_head", "k_proj"]
    ),
    "llama-lora-embedding": lambda: ref.with_lora(
        ref.tiny_llama(0, attention="sdpa"), 1, ["embed_tokens", "up_proj"]
    ),
}


@dataclass
class Case:
    """A model, a ragged batch and what the reference says of them."""

    model: nn.Module

    @cached_property
    def rows(self) -> list[ref.Row]:
        return ref.random_rows(
            3,
            responses=[1, 2, 3, 2],
            vocabulary=self.model.config.vocab_size,
            with_empty=True,
        )

    @cached_property
    def batch(self) -> Batch:
        return as_batch(self.rows, self.model.config.vocab_size)

    @property
    def shard(self) -> Shard:
        return self.batch.shard(0, 1)

    @cached_property
    def direction(self) -> dict[str, Tensor]:
        return ref.random_direction(self.model, seed=5)

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """Flat token arrays by the name of the score."""
        tokens = [
            ref.token_derivatives(self.model, row, self.direction, TEMPERATURE)
            for row in self.rows
        ]
        names = ("logp", "entropy", "dlogp", "dentropy")
        return dict(zip(names, map(torch.cat, zip(*tokens)), strict=True))

    def passes(self, **settings: Any) -> Passes:
        given = {"temperature": TEMPERATURE, "tokens_per_microbatch": 16} | settings
        return make_passes(self.model, **given)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(MODELS[request.param]())


@pytest.fixture(scope="module")
def qwen2() -> Case:
    return Case(MODELS["qwen2-lora"]())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=RTOL * scale)


def token_weights(count: int) -> tuple[Tensor, Tensor]:
    """Some a and b of each token, [t]."""
    generator = torch.Generator().manual_seed(8)
    a, b = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return a, b


def reference_gradient(case: Case) -> dict[str, Tensor]:
    """Gradient of sum(a log p + b H) by autograd, row by row."""
    parameters = ref.trainable(case.model)
    a, b = token_weights(case.batch.num_tokens)
    total, start = torch.zeros((), dtype=torch.float64), 0
    for row in case.rows:
        here = slice(start, start + len(row.response_ids))
        logp, entropy = ref.token_scores(case.model, row, TEMPERATURE)
        total = total + a[here] @ logp + b[here] @ entropy
        start = here.stop
    gradients = torch.autograd.grad(total, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


# Values


def test_scores_are_those_of_the_reference(case: Case) -> None:
    scores = case.passes().score(case.shard)
    assert_close(scores.logp, case.expected["logp"])
    assert_close(scores.entropy, case.expected["entropy"])
    assert scores.logp.dtype == scores.entropy.dtype == torch.float64


def test_derivatives_are_those_of_the_reference(case: Case) -> None:
    scores = case.passes().score(case.shard, case.direction)
    for name, expected in case.expected.items():
        values = getattr(scores, name)
        assert values.dtype == torch.float64
        assert not values.requires_grad
        assert_close(values, expected)


def test_gradient_is_that_of_the_reference(case: Case) -> None:
    """Weights see each token once, with its own log p and H."""
    passes, count = case.passes(), case.batch.num_tokens
    a, b = token_weights(count)
    seen = torch.full((2, count), torch.nan, dtype=torch.float64)

    def weights(place: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        assert seen[:, place].isnan().all()
        assert not (logp.requires_grad or entropy.requires_grad)
        seen[:, place] = torch.stack([logp, entropy])
        return a[place], b[place]

    flat, scores = passes.gradient(case.shard, weights, torch.float64)
    gradient, expected = passes.layout.views(flat), reference_gradient(case)
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        assert float(value.abs().max()) > 0, name
        assert_close(gradient[name], value)
    for name, given in zip(("logp", "entropy"), seen, strict=True):
        assert_close(getattr(scores, name), case.expected[name])
        assert torch.equal(getattr(scores, name), given)


def test_forward_and_reverse_mode_agree(case: Case) -> None:
    passes = case.passes()
    a, b = token_weights(case.batch.num_tokens)
    flat, _ = passes.gradient(
        case.shard, lambda place, *_: (a[place], b[place]), torch.float64
    )
    scores = passes.score(case.shard, case.direction)
    forward = float(a @ scores.dlogp + b @ scores.dentropy)
    reverse = float(flat @ passes.layout.flatten(case.direction, torch.float64))
    scale = float((a * scores.dlogp).abs().sum() + (b * scores.dentropy).abs().sum())
    assert abs(forward - reverse) <= RTOL * scale


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_shards_hold_the_scores_of_their_own_sequences(
    qwen2: Case, world_size: int
) -> None:
    """Each rank alone, one of them without sequences at 9 ranks for 4 groups."""
    whole = qwen2.passes().score(qwen2.shard)
    sizes = []
    for rank in range(world_size):
        shard = qwen2.batch.shard(rank, world_size)
        scores = qwen2.passes().score(shard, qwen2.direction)
        mine = torch.isin(qwen2.shard.ragged.sequence_of_token, shard.positions)
        torch.testing.assert_close(scores.logp, whole.logp[mine], rtol=RTOL, atol=0.0)
        sizes.append(len(scores.logp))
    assert sum(sizes) == qwen2.batch.num_tokens
    assert (0 in sizes) == (world_size == 9)


def test_an_empty_shard_has_no_scores_and_no_gradient(qwen2: Case) -> None:
    passes = qwen2.passes()
    shard = qwen2.batch.shard(8, 9)
    assert len(shard.positions) == 0
    assert len(passes.score(shard, qwen2.direction).dlogp) == 0
    flat, scores = passes.gradient(shard, never_called, torch.float64)
    assert len(scores.logp) == 0
    assert flat.shape == (passes.layout.numel,)
    assert not flat.any()


def never_called(*_: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("there is no token to weigh")


def test_pull_back_adds_to_gradients(qwen2: Case) -> None:
    passes = qwen2.passes()
    a, b = token_weights(qwen2.batch.num_tokens)
    try:
        for _ in range(2):
            passes.pull_back(qwen2.shard, lambda place, *_: (a[place], b[place]))
        for name, expected in reference_gradient(qwen2).items():
            assert_close(passes.parameters[name].grad, 2 * expected)
    finally:
        qwen2.model.zero_grad()


def test_gradients_are_cleared_after_success_and_failure(qwen2: Case) -> None:
    passes = qwen2.passes(tokens_per_microbatch=1)
    calls = []

    def failing(place: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(place)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.ones(len(place)), torch.ones(len(place))

    with pytest.raises(KeyboardInterrupt):
        passes.gradient(qwen2.shard, failing, torch.float64)
    assert all(p.grad is None for p in qwen2.model.parameters())
    passes.gradient(qwen2.shard, failing, torch.float64)
    assert all(p.grad is None for p in qwen2.model.parameters())


def test_microbatches_are_counted_and_reported(qwen2: Case) -> None:
    reported: list[int] = []
    passes = qwen2.passes(tokens_per_microbatch=1)
    passes.advance = reported.append
    sequences = sum(len(row.response_ids) > 0 for row in qwen2.rows)
    assert passes.score(qwen2.shard).num_microbatches == sequences
    passes.score(qwen2.shard, qwen2.direction)
    passes.score(qwen2.shard, qwen2.direction)
    ones = torch.ones(qwen2.batch.num_tokens)
    passes.gradient(qwen2.shard, lambda place, *_: (ones[place],) * 2, torch.float64)
    of_one = PassCount(
        sequences=len(qwen2.rows),
        tokens=qwen2.batch.num_tokens,
        positions=sum(
            len(row.prompt_ids) + len(row.response_ids) - 1
            for row in qwen2.rows
            if row.response_ids
        ),
        microbatches=sequences,
        operations=None,
    )
    twice = {f.name: getattr(of_one, f.name) for f in fields(of_one)}
    twice |= {name: 2 * count for name, count in twice.items() if count is not None}
    assert passes.performed == {
        ("score order 0", "E"): of_one,
        ("score order 1", "E"): PassCount(**twice),
        ("pull_back", "E"): of_one,
    }
    assert len(reported) == 4 * sequences
    assert sum(reported) == 4 * qwen2.batch.num_tokens
    assert (
        passes.with_settings(tokens_per_microbatch=10_000)
        .score(qwen2.shard)
        .num_microbatches
        == 1
    )


class Wrapper(nn.Module):
    """What DistributedDataParallel is to the module inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_other_settings_hold_for_both_passes(is_wrapped: bool, qwen2: Case) -> None:
    """Also for the backward pass, which goes through the wrapper."""
    passes = make_passes(qwen2.model)
    if is_wrapped:
        passes = replace(passes, wrapped=Wrapper(passes.tokens))
    cold = passes.with_settings(temperature=0.5)
    ones = torch.ones(qwen2.batch.num_tokens, dtype=torch.float64)

    def weights(token: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return ones[token], ones[token]

    expected = make_passes(qwen2.model, temperature=0.5)
    own, scores = expected.gradient(qwen2.shard, weights, torch.float64)
    found, again = cold.gradient(qwen2.shard, weights, torch.float64)
    assert torch.equal(found, own)
    assert torch.equal(again.logp, scores.logp)
    assert torch.equal(again.logp, cold.score(qwen2.shard).logp)
    assert not torch.equal(again.logp, passes.score(qwen2.shard).logp)


def test_a_cpu_fills_microbatches_up_to_what_its_caches_hold(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its widest layer, embeddings and output left out; a smaller budget holds."""
    passes = case.passes(tokens_per_microbatch=10_000)
    widest = {"gpt2": 4 * HIDDEN}.get(case.model.config.model_type, 24)
    assert passes.fill == min(10_000, scoring.FILL_ELEMENTS // widest)
    monkeypatch.setattr(scoring, "FILL_ELEMENTS", 16 * widest)
    monkeypatch.setattr(scoring, "LEAST_FILL", 1)
    assert passes.fill == 16
    assert case.passes(tokens_per_microbatch=9).fill == 9
    assert replace(passes, device=torch.device("meta")).fill == 10_000
    scores, cut = passes.score(case.shard), case.passes().score(case.shard)
    assert scores.num_microbatches == cut.num_microbatches > 1
    assert_close(scores.logp, case.expected["logp"])


def test_sums_over_the_vocabulary_are_float64_in_a_float32_model() -> None:
    """Entropies of nearly certain tokens, from the very logits of the pass."""
    model = ref.tiny_llama(0, attention="sdpa").float()
    with torch.no_grad():
        model.lm_head.weight *= 40.0
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda *call: logits.append(call[2].double()))
    rows = ref.random_rows(3, groups=6, vocabulary=15)
    shard = as_batch(rows, 15).shard(0, 1)
    scores = make_passes(model, tokens_per_microbatch=10_000).score(shard)
    expected = torch.distributions.Categorical(logits=torch.cat(logits)).entropy()
    # Logits of size 1,000 leave an absolute rounding of 1e-13 in float64.
    torch.testing.assert_close(
        scores.entropy.sort().values, expected.sort().values, rtol=0.0, atol=1e-12
    )
    assert float(expected.min()) < 1e-8  # float32 resolves 1e-7 beside 1


# Failures


def test_a_value_that_is_not_finite_names_line_and_token() -> None:
    """The fourth position of every row is spoilt: token 4 after a prompt of one."""
    model = ref.tiny_llama(0, attention="sdpa")
    model.model.norm.register_forward_hook(
        lambda module, args, hidden: hidden.index_fill(1, torch.tensor([3]), torch.nan)
    )
    rows = [
        ref.Row(0, [1, 2], [3, 4]),
        ref.Row(1, [1], []),
        ref.Row(2, [2], [3, 5, 7, 4, 3]),
        ref.Row(3, [2, 2, 2, 2], [1, 1]),
    ]
    passes, shard = make_passes(model), as_batch(rows, 15, "U").shard(0, 1)
    direction = {name: torch.ones_like(p) for name, p in passes.parameters.items()}
    ones = torch.ones(shard.ragged.num_tokens)
    message = "logp of batch U, line 3, response token 4 is nan"
    with pytest.raises(RunError, match=message):
        passes.score(shard)
    with pytest.raises(RunError, match=message):
        passes.score(shard, direction)
    with pytest.raises(RunError, match=message):
        passes.pull_back(shard, lambda place, *_: (ones[place], ones[place]))


@pytest.mark.parametrize("bad", [(2, 0), (2, 20), (2, 36), (0, 1)])
def test_a_gradient_that_is_not_finite_is_searched_by_halves(
    monkeypatch: pytest.MonkeyPatch, bad: tuple[int, int]
) -> None:
    """One look at each sequence, then as many as its length has digits."""
    model = ref.tiny_llama(0, attention="sdpa")
    rows = [ref.Row(0, [1], [3, 5]), ref.Row(1, [1], []), ref.Row(2, [2], [4] * 37)]
    rows += [ref.Row(3 + number, [2], [3]) for number in range(20)]
    passes, shard = make_passes(model), as_batch(rows, 15, "U").shard(0, 1)
    sequence, token = bad
    weights = torch.ones(shard.ragged.num_tokens, dtype=torch.float64)
    weights[int(shard.ragged.starts[sequence]) + token :] = torch.inf
    looks: list[int] = []
    pull_back = Passes.pull_back

    def counted(self: Passes, part: Shard, *rest: Any, **options: Any) -> Any:
        looks.append(len(part.positions))
        return pull_back(self, part, *rest, **options)

    places: list[int] = []
    whole = Ragged.sequence_of_token.fget

    def built(self: Ragged) -> Any:
        places.append(self.num_tokens)
        return whole(self)

    monkeypatch.setattr(Passes, "pull_back", counted)
    monkeypatch.setattr(Ragged, "sequence_of_token", property(built))
    message = rf"U, line {sequence + 1}, response token {token + 1} is NaN or infinite"
    with pytest.raises(RunError, match=message):
        passes.gradient(
            shard, lambda place, *_: (weights[place], 0.0 * place), torch.float64
        )
    # The pass itself, each sequence before it, the halves, the token.
    assert len(looks) <= 1 + 3 + 6 + 1
    assert shard.ragged.num_tokens not in places


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("layer", ["v_proj", "up_proj", "lm_head"])
def test_weights_that_are_not_finite_are_found(layer: str, order: int) -> None:
    model = ref.tiny_llama(0, attention="sdpa")
    module = next(m for name, m in model.named_modules() if name.endswith(layer))
    with torch.no_grad():
        module.weight[0, 0] = torch.nan
    passes = make_passes(model)
    shard = as_batch([ref.Row(0, [1, 2], [3, 4])], 15).shard(0, 1)
    direction = {name: torch.ones_like(p) for name, p in passes.parameters.items()}
    with pytest.raises(RunError, match=r"line 1, response token \d is nan"):
        passes.score(shard, direction if order else None)


def test_a_token_without_probability_is_found() -> None:
    model = ref.tiny_llama(0, attention="sdpa")
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(
            -1, torch.tensor([4]), -torch.inf
        )
    )
    shard = as_batch([ref.Row(0, [4, 4], [3, 4])], 15).shard(0, 1)
    with pytest.raises(RunError, match="line 1, response token 2 is -inf"):
        make_passes(model).score(shard)


def test_a_bypassed_adapter_gives_no_tangent() -> None:
    case = Case(MODELS["qwen2-lora"]())
    passes, direction = case.passes(), case.direction
    message = "no tangent.*merged or disabled"
    with case.model.disable_adapter(), pytest.raises(RunError, match=message):
        passes.score(case.shard, direction)
    case.model.merge_adapter()
    with pytest.raises(RunError, match=message):
        passes.score(case.shard, direction)
    case.model.unmerge_adapter()
    assert passes.score(case.shard, direction).dlogp.any()


# Memory


class LogitsSpy(TorchDispatchMode):
    """The largest number of rows of any floating-point tensor [..., V] that is made."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.rows = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor) and self.is_logits(item):
                self.rows = max(self.rows, item.numel() // self.vocabulary)
        return result

    def is_logits(self, tensor: Tensor) -> bool:
        """Not the transposed output layer [width, V]."""
        last = tensor.shape[-1:] == (self.vocabulary,)
        return last and tensor.is_floating_point() and tensor.shape[0] != HIDDEN


CHUNK = 4


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch, case: Case) -> Iterator[LogitsSpy]:
    vocabulary = case.model.config.vocab_size
    monkeypatch.setattr(response_tokens, "CHUNK_ELEMENTS", (CHUNK + 1) * vocabulary - 1)
    for fewest in ("CHUNK_TOKENS", "TRAINABLE_CHUNK_TOKENS"):
        monkeypatch.setattr(response_tokens, fewest, 1)
    yield LogitsSpy(vocabulary)


def test_the_spy_sees_all_logits_of_the_plain_model(
    case: Case, small_chunks: LogitsSpy
) -> None:
    with small_chunks, torch.no_grad():
        case.model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert small_chunks.rows == 6


@pytest.mark.parametrize("kind", ["order 0", "order 1", "gradient"])
def test_only_chunks_of_logits_exist(
    case: Case, small_chunks: LogitsSpy, kind: str
) -> None:
    """One microbatch of all sequences; no more than four rows of logits at a time."""
    passes = case.passes(tokens_per_microbatch=10_000)
    ones = torch.ones(case.batch.num_tokens, dtype=torch.float64)
    with small_chunks:
        if kind == "gradient":
            passes.gradient(
                case.shard, lambda place, *_: (ones[place], ones[place]), torch.float64
            )
        else:
            passes.score(case.shard, case.direction if kind == "order 1" else None)
    (count,) = passes.performed.values()
    assert count.microbatches == 1
    assert case.batch.num_tokens > 3 * CHUNK
    assert small_chunks.rows == CHUNK


def test_a_vocabulary_beyond_the_chunk_budget_goes_a_few_tokens_at_a_time(
    monkeypatch: pytest.MonkeyPatch, qwen2: Case
) -> None:
    expected = qwen2.passes().score(qwen2.shard)
    monkeypatch.setattr(response_tokens, "CHUNK_ELEMENTS", 3)
    monkeypatch.setattr(response_tokens, "CHUNK_TOKENS", 2)
    spy = LogitsSpy(qwen2.model.config.vocab_size)
    with spy:
        scores = qwen2.passes().score(qwen2.shard)
    assert spy.rows == 2
    assert_close(scores.entropy, expected.entropy)
    assert math.isfinite(float(scores.logp.sum()))


# Operations


def plain_operations(case: Case) -> int:
    """Of the model's own forward passes, logits of all positions, row by row."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for row in case.rows:
            if row.response_ids:
                ids = [*row.prompt_ids, *row.response_ids][:-1]
                case.model(input_ids=torch.tensor([ids]), use_cache=False)
    return counter.get_total_flops()


def counted_operations(case: Case, kind: str) -> int:
    passes = case.passes(tokens_per_microbatch=1)
    passes.count_operations = True
    ones = torch.ones(case.batch.num_tokens)
    if kind == "pull_back":
        passes.gradient(case.shard, lambda place, *_: (ones[place],) * 2, torch.float64)
    else:
        passes.score(case.shard, case.direction if kind == "score order 1" else None)
    return passes.performed[kind, "E"].operations


def test_operations_are_those_of_the_model_less_the_logits_of_prompts() -> None:
    """Eager attention: matrix products that torch's own counter knows."""
    case = Case(MODELS["llama-full-eager"]())
    vocabulary = case.model.config.vocab_size
    prompts = sum(len(r.prompt_ids) - 1 for r in case.rows if r.response_ids)
    of_prompts = 2 * prompts * HIDDEN * vocabulary
    counted = counted_operations(case, "score order 0")
    assert counted == plain_operations(case) - of_prompts


@pytest.mark.parametrize("name", ["qwen2-lora", "gpt2-lora"])
def test_fused_attention_is_counted_as_its_two_products(name: str) -> None:
    family = {"qwen2-lora": ref.tiny_qwen2, "gpt2-lora": ref.tiny_gpt2}[name]
    targets = {"qwen2-lora": ["q_proj"], "gpt2-lora": ["c_attn"]}[name]
    fused, eager = (
        counted_operations(
            Case(ref.with_lora(family(0, attention=attention), 1, targets)),
            "score order 0",
        )
        for attention in ("sdpa", "eager")
    )
    assert fused == eager


def test_derivatives_cost_at_most_twice_and_a_gradient_of_all_weights_thrice() -> None:
    case = Case(MODELS["qwen2-lora"]())
    score = counted_operations(case, "score order 0")
    assert 1.9 * score < counted_operations(case, "score order 1") < 2.5 * score
    full = Case(MODELS["llama-full-eager"]())
    score = counted_operations(full, "score order 0")
    assert 2.5 * score < counted_operations(full, "pull_back") < 3.2 * score
