"""Are rollouts draws from the policy, the same however the work is cut up?"""

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from entropy_ddp.config import Sample
from entropy_ddp.data.files import TokenLimits, read_batch
from entropy_ddp.data.jsonlines import write_jsonl
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.memory import Allowance
from entropy_ddp.sampling.generation import (
    _InverseTransform,
    make_uniforms,
    random_bytes,
)
from entropy_ddp.sampling.rollouts import (
    merge_rows,
    plan_sampling,
    sample_rollouts,
)

Rows = list[dict[str, Any]]
# The section of the configuration, and what is added to it by name.
Settings = tuple[Sample, dict[str, Any]]
WORDS = ["<s>", "</s>", "<pad>", "<unk>", *"abcdefg"]
EOS, PAD = 1, 2
SHAPE = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": EOS}
LLAMA = SHAPE | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from uniform, so that a wrong temperature or position shows; not so far that
    # float32 itself is off by 1e-5.
    "initializer_range": 0.4,
}
GPT2 = SHAPE | {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.4,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}
PROMPTS = [
    {"prompt": "a", "answer": "b"},
    {"prompt": "abcdefgabc"},
    {"prompt_ids": [4, 9, 5]},
    {"prompt": "ffff"},
    {"prompt": "gf", "level": 3},
]


def make_model(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def make_tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    core.decoder = decoders.Fuse()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", **tokens | special
    )


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Makes settings for `PROMPTS`, with changes."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    base = {
        "prompts": path,
        "num_prompts": 5,
        "responses_per_prompt": 3,
        "with_replacement": False,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "sequences_per_call": 64,
        "seed": 1,
        "split": "E",
    }

    def make(**changes: Any) -> Settings:
        chosen = base | changes
        beside = {key: chosen.pop(key) for key in ("temperature", "seed", "split")}
        return Sample(**chosen | {"prompts": str(chosen["prompts"])}), beside

    return make


def sample(
    settings: Settings,
    model: Any = None,
    tokenizer: Any = None,
    world_size: int = 1,
) -> list[dict[str, Any]]:
    """The rows of all ranks, one after the other."""
    model = make_model() if model is None else model
    shares = [
        sample_share(settings, model, tokenizer, rank, world_size)[0]
        for rank in range(world_size)
    ]
    return merge_rows(reversed(shares))


def sample_share(
    settings: Settings,
    model: Any,
    tokenizer: Any = None,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int, int, int], None] = lambda *_: None,
    allowance: Allowance | None = None,
) -> tuple[Rows, int]:
    """The rows of one rank, and how many groups it sampled again."""
    section, beside = settings
    plan = plan_sampling(model, tokenizer or make_tokenizer(), section, **beside)
    allowance = allowance or Allowance()
    return sample_rollouts(model, plan, allowance, rank, world_size, on_progress)


@torch.no_grad()
def score(model: Any, row: dict[str, Any], temperature: float) -> torch.Tensor:
    """Log-probabilities of the response by one teacher-forced pass, alone."""
    ids = torch.tensor(row["prompt_ids"] + row["response_ids"])
    logits = model(ids[None]).logits[0].double() / temperature
    logprobs = logits.log_softmax(dim=-1)[:-1].gather(1, ids[1:, None])[:, 0]
    return logprobs[len(row["prompt_ids"]) - 1 :]


# --- the policy's distribution --------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_are_those_of_teacher_forcing(
    settings: Callable[..., Settings], family: str, temperature: float
) -> None:
    model = make_model(family)
    rows = sample(settings(temperature=temperature, responses_per_prompt=6), model)
    assert len({len(row["prompt_ids"]) for row in rows}) == 5  # much left padding
    assert {row["finished"] for row in rows} == {True, False}
    for row in rows:
        logprobs = torch.tensor(row["sampling_logprobs"], dtype=torch.float64)
        expected = score(model, row, temperature)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_responses_follow_the_policy(
    settings: Callable[..., Settings], tmp_path: Path, temperature: float
) -> None:
    model = make_model()
    prompt = [4, 9]
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt_ids": prompt}))
    num_samples = 6000
    rows = sample(
        settings(
            prompts=tmp_path / "one.jsonl",
            num_prompts=1,
            responses_per_prompt=num_samples,
            max_new_tokens=2,
            temperature=temperature,
            sequences_per_call=2000,
        ),
        model,
    )
    counts: dict[tuple[int, ...], int] = {}
    for row in rows:
        response = tuple(row["response_ids"])
        counts[response] = counts.get(response, 0) + 1
    every = [(EOS,)] + [
        (first, second)
        for first in range(len(WORDS))
        for second in range(len(WORDS))
        if first != EOS
    ]
    assert counts.keys() <= set(every)
    expected = {
        response: num_samples
        * math.exp(
            score(
                model, {"prompt_ids": prompt, "response_ids": [*response]}, temperature
            ).sum()
        )
        for response in every
    }
    assert sum(expected.values()) == pytest.approx(num_samples)
    # Cells of fewer than 5 expected responses are counted together.
    rare = [r for r in every if expected[r] < 5]
    cells = [(counts.get(r, 0), expected[r]) for r in every if r not in rare]
    cells.append((sum(counts.get(r, 0) for r in rare), sum(expected[r] for r in rare)))
    chi_square = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    assert freedom >= 15
    # About 3 standard deviations of a chi-square variable.
    assert chi_square < freedom + 3 * math.sqrt(2 * freedom)


POISON = {
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.1,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 12,
    "suppress_tokens": [4, 5, 6],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[8]],
    "forced_eos_token_id": EOS,
    "num_beams": 3,
    "max_length": 4,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "use_cache": False,
    "eos_token_id": EOS,
}


def test_the_checkpoints_generation_config_changes_nothing(
    settings: Callable[..., Settings],
) -> None:
    expected = sample(settings())
    model = make_model()
    model.generation_config = poison = GenerationConfig(**POISON)
    assert sample(settings(), model) == expected
    assert model.generation_config is poison
    assert poison == GenerationConfig(**POISON)


def test_a_large_temperature_is_nearly_uniform_and_a_small_one_greedy(
    settings: Callable[..., Settings],
) -> None:
    for row in sample(settings(temperature=1e6)):
        for logprob in row["sampling_logprobs"]:
            assert logprob == pytest.approx(-math.log(len(WORDS)), abs=1e-4)
    model = make_model()
    rows = sample(settings(temperature=1e-6), model)
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        best = model(ids).logits[0].argmax(dim=-1)[len(row["prompt_ids"]) - 1 : -1]
        assert row["response_ids"] == best.tolist()


def choose(logits: list[float], uniform: float) -> int:
    choice = _InverseTransform(torch.tensor([[uniform]], dtype=torch.float64), 3, 1.0)
    scores = choice(torch.zeros(1, 3), torch.tensor([logits]))
    assert (scores == 0).sum() == 1
    chosen = int(scores.argmax())
    logprob = torch.tensor(logits).double().log_softmax(0)[chosen]
    assert choice.logprobs.item() == logprob
    return chosen


def test_the_ends_of_the_unit_interval_choose_possible_tokens() -> None:
    impossible = -math.inf
    for logits in ([impossible, 0.0, 3.0, impossible], [-2000.0, 1.0, 0.1, -2000.0]):
        assert choose(logits, 0.0) == 1
        assert choose(logits, 1 - 2**-53) == 2
    # The cumulative probability of token 0 is 1/2 exactly, and belongs to token 1.
    assert choose([0.0, 0.0], 0.5) == 1
    assert choose([0.0, 0.0], math.nextafter(0.5, 0)) == 0


# --- streams --------------------------------------------------------------------------


def test_streams_are_uniform_and_independent() -> None:
    uniforms = make_uniforms([f"1 E {draw} 0 0" for draw in range(200)], 100)
    assert uniforms.shape == (200, 100)
    assert uniforms.dtype == torch.float64
    assert 0 <= uniforms.min() <= uniforms.max() < 1
    centred = uniforms - 0.5
    # Standard errors: 0.0020 and 0.0005.
    assert abs(centred.mean()) < 0.008
    assert abs(centred.square().mean() - 1 / 12) < 0.002
    correlation = torch.corrcoef(uniforms).fill_diagonal_(0)
    assert correlation.abs().max() < 0.5  # 5 standard errors


def test_a_stream_does_not_depend_on_how_much_of_it_is_read() -> None:
    assert torch.equal(make_uniforms(["a"], 50)[:, :7], make_uniforms(["a"], 7))
    assert random_bytes("a", 9)[:4] == random_bytes("a", 4)


# --- however the work is cut up -------------------------------------------------------


def strip(rows: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row.keys() - set(keys)} for row in rows]


def strip_logprobs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return strip(rows, "sampling_logprobs")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_rows_do_not_depend_on_batches_and_ranks(
    settings: Callable[..., Settings],
    family: str,
    batch_size: int,
    world_size: int,
) -> None:
    model = make_model(family)
    expected = sample(settings(sequences_per_call=5), model)
    rows = sample(settings(sequences_per_call=batch_size), model, world_size=world_size)
    assert strip_logprobs(rows) == strip_logprobs(expected)
    for row, other in zip(rows, expected):
        assert row["sampling_logprobs"] == pytest.approx(
            other["sampling_logprobs"], rel=0, abs=1e-5
        )


def test_a_repeated_run_gives_identical_bits_and_draws_nothing_else(
    settings: Callable[..., Settings],
) -> None:
    model = make_model()
    first = sample(settings(), model)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert sample(settings(), model) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_and_split_change_everything_drawn(
    settings: Callable[..., Settings],
) -> None:
    variants = [
        sample(settings(seed=1)),
        sample(settings(seed=2)),
        sample(settings(split="U")),
    ]
    assert (
        len({json.dumps([r["response_ids"] for r in rows]) for rows in variants}) == 3
    )
    assert (
        len({json.dumps([r["prompt_index"] for r in rows]) for rows in variants}) == 3
    )


def test_responses_of_a_group_and_repeated_draws_differ(
    settings: Callable[..., Settings],
) -> None:
    rows = sample(
        settings(num_prompts=30, with_replacement=True, max_new_tokens=40, seed=3)
    )
    assert len({row["prompt_index"] for row in rows}) == 5
    for index in range(5):
        mine = [row for row in rows if row["prompt_index"] == index]
        long = [tuple(r["response_ids"]) for r in mine if len(r["response_ids"]) > 6]
        assert len(long) > 3
        assert len(set(long)) == len(long)


# --- rows -----------------------------------------------------------------------------


def test_rows_are_rollouts(settings: Callable[..., Settings]) -> None:
    rows = sample(settings(reward=f"{__name__}:count_b"), world_size=2)
    assert [row["group"] for row in rows] == [g for g in range(5) for _ in range(3)]
    for row in rows:
        prompt = PROMPTS[row["prompt_index"]]
        ids = row["response_ids"]
        assert row["prompt"] == prompt.get("prompt", "afb")
        assert row["prompt_ids"] == [WORDS.index(letter) for letter in row["prompt"]]
        assert row["response"] == "".join(WORDS[i] for i in ids if i > 3)
        assert row["reward"] == row["response"].count("b")
        assert row["finished"] == (ids[-1] == EOS)
        assert EOS not in ids[:-1]
        assert len(ids) == 12 or row["finished"]
        assert row.get("answer") == prompt.get("answer")
        assert row.get("level") == prompt.get("level")
        assert "advantage" not in row
        assert (row["num_prompts_total"], row["with_replacement"]) == (
            len(PROMPTS),
            False,
        )
    assert {row["finished"] for row in rows} == {True, False}


def count_b(prompt: str, response: str, row: dict[str, Any]) -> float:
    """The reward of these tests; sees the row of the prompt file."""
    assert row.get("prompt", prompt) == prompt
    return response.count("b")


def test_rows_read_back(settings: Callable[..., Settings], tmp_path: Path) -> None:
    rows = sample(settings(reward=f"{__name__}:count_b"))
    path = tmp_path / "U.jsonl.gz"
    write_jsonl(path, rows)
    limits = TokenLimits(vocabulary_size=len(WORDS), max_positions=64)
    batch = read_batch(path, "U", limits)
    assert batch.num_groups == 5
    for sequence, row in zip(batch.sequences, rows, strict=True):
        assert sequence.response_ids.tolist() == row["response_ids"]
        assert sequence.sampling_logprobs.tolist() == row["sampling_logprobs"]
        assert sequence.reward == row["reward"]
        assert sequence.extra["prompt_index"] == row["prompt_index"]


def test_without_a_reward_there_is_none(
    settings: Callable[..., Settings],
) -> None:
    assert all("reward" not in row for row in sample(settings()))


@pytest.mark.parametrize(
    "special", [{"pad_token": None}, {"pad_token": "</s>"}, {"pad_token": "a"}]
)
def test_the_padding_token_changes_nothing(
    settings: Callable[..., Settings], special: dict[str, str | None]
) -> None:
    rows = sample(settings(), tokenizer=make_tokenizer(**special))
    for row, expected in zip(rows, sample(settings()), strict=True):
        for key in ("response_ids", "sampling_logprobs", "finished"):
            assert row[key] == expected[key]


@pytest.mark.parametrize("declared", [[EOS, 5], [5], 5])
def test_every_declared_end_token_ends_a_response(
    settings: Callable[..., Settings], declared: int | list[int]
) -> None:
    model = make_model()
    plain = sample(settings(), model)
    model.generation_config.eos_token_id = declared
    rows = sample(settings(), model)
    for row, longer in zip(rows, plain, strict=True):
        ids = longer["response_ids"]
        count = ids.index(5) + 1 if 5 in ids else len(ids)
        assert row["response_ids"] == ids[:count]
        assert row["finished"] == (ids[count - 1] in (EOS, 5))
    assert any(row["response_ids"][-1] == 5 for row in rows)


def test_an_empty_share_is_no_error(settings: Callable[..., Settings]) -> None:
    allowance = Allowance()
    share = sample_share(
        settings(), make_model(), rank=6, world_size=7, allowance=allowance
    )
    assert share == ([], 0) and allowance == Allowance()


def test_progress_counts_responses_and_tokens(
    settings: Callable[..., Settings],
) -> None:
    """After every token: the responses that have ended, of both calls, and tokens."""
    seen: list[tuple[int, int, int]] = []
    rows, _ = sample_share(
        settings(sequences_per_call=4),
        make_model(),
        rank=1,
        world_size=2,
        on_progress=lambda *told: seen.append(told),
    )
    done, totals, tokens = zip(*seen)
    assert set(totals) == {6}
    assert list(done) == sorted(done) and done[-1] == 6
    lengths = [len(row["response_ids"]) for row in rows]
    assert list(tokens) == sorted(set(tokens)) and tokens[-1] == sum(lengths)
    # At every token of a call every response that has not ended has one more.
    calls = [sorted(lengths[:4]), sorted(lengths[4:])]
    expected = []
    before = (0, 0)
    for call in calls:
        for k in range(1, call[-1] + 1):
            ended = sum(length <= k for length in call)
            count = sum(min(length, k) for length in call)
            expected.append((before[0] + ended, before[1] + count))
        before = expected[-1]
    assert list(zip(done, tokens)) == expected


# --- memory ---------------------------------------------------------------------------


def test_calls_that_do_not_fit_are_made_with_fewer_responses(
    settings: Callable[..., Settings],
) -> None:
    """At most three rows fit: the same rollouts, and half as many at a time from then."""
    expected = sample(settings(), make_model())
    model, sizes = make_model(), []

    def fail(module: Any, inputs: Any, output: Any) -> None:
        rows = len(output[0] if isinstance(output, tuple) else output)
        sizes.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    model.model.layers[0].register_forward_hook(fail)
    allowance = Allowance()
    rows, _ = sample_share(settings(), model, allowance=allowance)
    for row, other in zip(rows, expected, strict=True):
        assert row["response_ids"] == other["response_ids"]
        assert row["sampling_logprobs"] == pytest.approx(
            other["sampling_logprobs"], abs=1e-5
        )
    assert [n for n in sizes if n > 3] == [15, 7]
    assert allowance == Allowance(limit=3, num_retries=2)


def test_a_single_response_that_does_not_fit_ends_the_run(
    settings: Callable[..., Settings],
) -> None:
    model = make_model()

    def fail(*_: Any) -> None:
        raise MemoryError

    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(
        RunError, match=r"single response of batch E \(.*: MemoryError;"
    ):
        sample_share(settings(), model)


# --- redraws --------------------------------------------------------------------------


def ends_early(prompt: str, response: str, row: dict[str, Any]) -> float:
    """A reward that is often the same for a whole group."""
    return float(len(response) < 2)


def sample_with_redraws(make: Callable[..., Settings], redraws: int) -> Any:
    settings = make(
        num_prompts=12,
        with_replacement=True,
        reward=f"{__name__}:ends_early",
        redraw_zero_advantage=redraws,
        split="U",
    )
    return sample_share(settings, make_model())


def get_groups(rows: Rows) -> list[Rows]:
    return [[row for row in rows if row["group"] == g] for g in range(12)]


def test_only_groups_of_equal_rewards_are_redrawn(
    settings: Callable[..., Settings],
) -> None:
    runs = [sample_with_redraws(settings, redraws) for redraws in range(4)]
    # The responses to a prompt are no independent draws: nothing is said of the draws.
    draws = ("num_prompts_total", "with_replacement")
    for rows, _ in runs[1:]:
        assert not any(row.keys() & set(draws) for row in rows)
    runs[0] = strip(runs[0][0], *draws), runs[0][1]
    num_redraws = 0
    for before, after in pairwise(runs):
        num_equal = 0
        for old, new in zip(get_groups(before[0]), get_groups(after[0])):
            assert [row["prompt_index"] for row in old] == [
                row["prompt_index"] for row in new
            ]
            if len({row["reward"] for row in old}) == 1:
                num_equal += 1
                assert old != new
            else:
                # Equal but for the padding of other batches.
                assert strip_logprobs(old) == strip_logprobs(new)
        num_redraws += num_equal
        assert after[1] == num_redraws
    assert runs[0][1] == 0 < runs[1][1] < runs[2][1]


# --- what is borrowed is given back ---------------------------------------------------


def list_flags(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def fail(prompt: str, response: str, row: dict[str, Any]) -> float:
    """A reward that fails."""
    raise KeyError("gold")


def test_training_flags_are_restored_and_dropout_is_off(
    settings: Callable[..., Settings],
) -> None:
    expected = sample(settings(), make_model("gpt2"))
    model = make_model("gpt2").train()
    model.transformer.h[0].eval()
    flags, config = list_flags(model), model.generation_config
    assert sample(settings(), model) == expected
    assert list_flags(model) == flags
    with pytest.raises(RunError, match=r"group \d, prompt .*KeyError: 'gold'"):
        sample(settings(reward=f"{__name__}:fail"), model)
    assert list_flags(model) == flags
    assert model.generation_config is config


def test_a_lora_model_is_sampled_from(
    settings: Callable[..., Settings],
) -> None:
    base = make_model()
    base.generation_config = poison = GenerationConfig(**POISON)
    plain = sample(settings(), base)
    model = get_peft_model(
        base,
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    model.train()
    rows = sample(settings(temperature=0.8), model)
    assert strip_logprobs(rows) != strip_logprobs(plain)
    assert model.get_base_model().generation_config is poison
    assert all(list_flags(model))
    model.eval()
    for row in rows:
        expected = score(model, row, 0.8).tolist()
        assert row["sampling_logprobs"] == pytest.approx(expected, rel=0, abs=1e-5)
    assert all(p.grad is None for p in model.parameters())


# --- what is wrong --------------------------------------------------------------------


def test_a_tokenizer_needs_an_end_token(
    settings: Callable[..., Settings],
) -> None:
    message = "tokenizer: expected an end-of-sequence token, found none; set eos_token"
    with pytest.raises(InputError, match=message):
        sample(settings(), tokenizer=make_tokenizer(eos_token=None))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [4, 11]}, "from 0 to 10, .*in `prompt_ids`, found 11 at pla"),
        ({"prompt": ""}, "at least one prompt token"),
        ({"prompt": "a" * 54}, "the model's 64 positions, found 54 prompt tokens and"),
    ],
)
def test_a_bad_prompt_is_named_by_every_rank(
    settings: Callable[..., Settings],
    tmp_path: Path,
    row: dict[str, Any],
    message: str,
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 53}) + "\n" + json.dumps(row))
    for rank in range(3):
        with pytest.raises(InputError, match=re.escape(f"{path}:2: ") + ".*" + message):
            sample_share(
                settings(prompts=path, num_prompts=1), make_model(), None, rank, 3
            )


def test_the_longest_prompt_that_fits_is_sampled(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 53}))
    model = make_model("gpt2")  # learned positions: one too many is an index error
    rows = sample(settings(prompts=path, num_prompts=1, responses_per_prompt=9), model)
    assert max(len(row["response_ids"]) for row in rows) == 12


def test_logits_that_are_not_numbers_stop_the_run(
    settings: Callable[..., Settings],
) -> None:
    model = make_model()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    message = r"expected finite logits, .* prompt draw \d, response \d; check"
    with pytest.raises(RunError, match=message):
        sample(settings(), model)


def test_merged_rows_are_in_order() -> None:
    rows = [
        [{"group": g, "n": n} for g in mine for n in (0, 1)]
        for mine in ([1, 3], [0, 2])
    ]
    merged = [SimpleNamespace(**row) for row in merge_rows(rows)]
    assert [(row.group, row.n) for row in merged] == [
        (g, n) for g in range(4) for n in (0, 1)
    ]
