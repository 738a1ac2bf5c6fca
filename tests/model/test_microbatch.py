"""Does every response token meet the hidden state that predicts it, exactly once?"""

import random
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_ddp.data.batch import Batch, Sequence, Shard
from entropy_ddp.data.microbatch import (
    Microbatch,
    PromptSharing,
    make_microbatches,
    plan_microbatches,
)

VOCABULARY = 97
BUDGETS = [1, 16, 40, 10_000]


def make_shard(seed: int, num_sequences: int = 23) -> Shard:
    """Sequences of random ids from 1 up, so that 0 is padding; some empty."""
    draw = random.Random(seed)
    sequences = tuple(
        Sequence(
            index=index,
            group=index // 2,
            group_key=index // 2,
            prompt_ids=torch.tensor(draw.choices(range(1, VOCABULARY), k=prompt)),
            response_ids=torch.tensor(
                draw.choices(range(1, VOCABULARY), k=response), dtype=torch.int64
            ),
        )
        for index, (prompt, response) in enumerate(
            (draw.randint(1, 8), draw.choice([0, 1, 1, 3, 12]))
            for _ in range(num_sequences)
        )
    )
    return Batch(split="E", sequences=sequences).shard(0, 1)


def get_row(shard: Shard, position: int) -> list[int]:
    """What the model reads of a sequence: all but its last token."""
    sequence = shard.sequences[position]
    return (sequence.prompt_ids.tolist() + sequence.response_ids.tolist())[:-1]


def members(shard: Shard, microbatch: Microbatch) -> list[int]:
    """The sequence of each row of a microbatch of flat rows."""
    owner = shard.ragged.sequence_of_token[microbatch.token]
    rows = range(len(microbatch.input_ids))
    owners = [owner[microbatch.row == row].unique().tolist() for row in rows]
    assert all(len(one) == 1 for one in owners)
    return [one[0] for one in owners]


@pytest.fixture(params=BUDGETS)
def budget(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=range(3))
def shard(request: pytest.FixtureRequest) -> Shard:
    return make_shard(request.param)


def test_the_budget_is_respected_and_lone_rows_may_exceed_it(
    shard: Shard, budget: int
) -> None:
    for microbatch in make_microbatches(shard, budget):
        num_rows, longest = microbatch.input_ids.shape
        assert num_rows == 1 or num_rows * longest <= budget


def test_microbatches_are_filled(shard: Shard) -> None:
    assert len(list(make_microbatches(shard, 10_000))) == 1
    microbatches = list(make_microbatches(shard, 40))
    for microbatch, following in pairwise(microbatches):
        num_rows, longest = microbatch.input_ids.shape
        assert (num_rows + 1) * longest > 40
        assert following.input_ids.shape[1] <= longest


def test_every_response_token_comes_exactly_once(shard: Shard, budget: int) -> None:
    microbatches = list(make_microbatches(shard, budget))
    tokens = torch.cat([m.token for m in microbatches])
    assert sorted(tokens.tolist()) == list(range(shard.ragged.num_tokens))
    targets = torch.zeros(shard.ragged.num_tokens, dtype=torch.int64)
    targets[tokens] = torch.cat([m.target_ids for m in microbatches])
    assert torch.equal(targets, torch.cat([s.response_ids for s in shard.sequences]))


def test_each_token_is_predicted_from_the_one_before_it(
    shard: Shard, budget: int
) -> None:
    for m in make_microbatches(shard, budget):
        for row, column, token in zip(m.row.tolist(), m.column.tolist(), m.token):
            position = members(shard, m)[row]
            assert position == int(shard.ragged.sequence_of_token[token])
            sequence = shard.sequences[position]
            k = int(shard.ragged.position[token])
            assert column == len(sequence.prompt_ids) + k - 1
            previous = sequence.response_ids[k - 1] if k else sequence.prompt_ids[-1]
            assert m.input_ids[row, column] == previous


def test_rows_are_padded_on_the_right_only(shard: Shard, budget: int) -> None:
    for m in make_microbatches(shard, budget):
        for row, position in zip(m.input_ids.tolist(), members(shard, m)):
            expected = get_row(shard, position)
            assert row == expected + [0] * (len(row) - len(expected))


def test_sequences_without_response_are_in_none(shard: Shard, budget: int) -> None:
    seen = [p for m in make_microbatches(shard, budget) for p in members(shard, m)]
    expected = [i for i, s in enumerate(shard.sequences) if s.num_tokens > 0]
    assert len(expected) < len(shard.sequences)
    assert sorted(seen) == expected


def make_pair(*lengths: int) -> Shard:
    """Sequences of these row lengths, each with a prompt of one token."""
    sequences = tuple(
        Sequence(
            index=index,
            group=index,
            group_key=index,
            prompt_ids=torch.tensor([1]),
            response_ids=torch.ones(length, dtype=torch.int64),
        )
        for index, length in enumerate(lengths)
    )
    return Batch(split="E", sequences=sequences).shard(0, 1)


def list_members(shard: Shard, budget: int) -> list[list[int]]:
    return [members(shard, m) for m in make_microbatches(shard, budget)]


def test_an_overlong_sequence_is_alone() -> None:
    assert list_members(make_pair(2, 50, 2, 3), 10) == [[1], [3, 0, 2]]


def test_the_budget_itself_still_fits() -> None:
    assert list_members(make_pair(5, 5), 10) == [[0, 1]]
    assert list_members(make_pair(5, 5), 9) == [[0], [1]]


def test_nothing_to_score_gives_no_microbatch() -> None:
    assert list_members(make_pair(0, 0), 10) == []
    assert list_members(make_pair(), 10) == []


def score(model: LlamaForCausalLM, microbatch: Microbatch) -> torch.Tensor:
    logprobs = model(microbatch.input_ids).logits.log_softmax(dim=-1)
    return logprobs[microbatch.row, microbatch.column, microbatch.target_ids]


@torch.no_grad()
def test_scores_are_those_of_sequences_alone(shard: Shard, budget: int) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).double()
    model.eval()
    result = torch.zeros(shard.ragged.num_tokens, dtype=torch.float64)
    for microbatch in make_microbatches(shard, budget):
        result[microbatch.token] = score(model, microbatch)
    expected = []
    for sequence in shard.sequences:
        ids = torch.cat([sequence.prompt_ids, sequence.response_ids])
        logprobs = model(ids[None]).logits[0].log_softmax(dim=-1)
        first = len(sequence.prompt_ids)
        expected += [logprobs[i - 1, ids[i]] for i in range(first, len(ids))]
    # The model narrows to float32 inside (RMSNorm).
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-6)


def test_to_moves_what_the_model_reads(shard: Shard) -> None:
    """Places in the shard's arrays stay where those arrays are."""
    microbatch = next(make_microbatches(shard, 40)).to(torch.device("meta"))
    tensors = {n: t for n, t in vars(microbatch).items() if t is not None}
    devices = {name: t.device.type for name, t in tensors.items()}
    assert devices == {
        "input_ids": "meta",
        "row": "meta",
        "column": "meta",
        "target_ids": "meta",
        "token": "cpu",
    }


# Shared prompts

ALWAYS = PromptSharing(0.0)


def make_groups(*groups: tuple[int, list[int]]) -> Shard:
    """Groups of one prompt each: its length, and the lengths of its responses."""
    draw = random.Random(1)
    sequences: list[Sequence] = []
    for number, (prompt, responses) in enumerate(groups):
        ids = torch.tensor(draw.choices(range(1, VOCABULARY), k=prompt))
        for length in responses:
            response = draw.choices(range(1, VOCABULARY), k=length)
            sequences.append(
                Sequence(
                    index=len(sequences),
                    group=number,
                    group_key=number,
                    prompt_ids=ids.clone(),
                    response_ids=torch.tensor(response, dtype=torch.int64),
                )
            )
    # The order of the file says nothing about groups.
    draw.shuffle(sequences)
    return Batch(split="U", sequences=tuple(sequences)).shard(0, 1)


GROUPS = ((9, [4, 1, 7, 0, 2]), (5, [3]), (3, [6, 6, 1]))


def shapes(shard: Shard, budget: int, sharing: PromptSharing | None) -> list[list[int]]:
    """Number of responses of each row, by microbatch."""
    plan = plan_microbatches(shard, budget, sharing)
    return [[len(row.sequences) for row in rows] for rows in plan]


def test_responses_to_one_prompt_share_a_row() -> None:
    assert shapes(make_groups(*GROUPS), 10_000, ALWAYS) == [[4, 3], [1]]
    assert shapes(make_groups(*GROUPS), 10_000, None) == [[1] * 8]


@pytest.mark.parametrize("budget", [1, 16, 24, 10_000])
def test_every_token_of_a_tree_comes_once_from_the_token_before_it(budget: int) -> None:
    shard = make_groups(*GROUPS)
    seen = []
    for m in make_microbatches(shard, budget, ALWAYS):
        rows, longest = m.input_ids.shape
        assert rows == 1 or rows * longest <= budget
        for row, column, token, target in zip(
            m.row.tolist(), m.column.tolist(), m.token.tolist(), m.target_ids.tolist()
        ):
            seen.append(token)
            sequence = shard.sequences[int(shard.ragged.sequence_of_token[token])]
            k = int(shard.ragged.position[token])
            assert target == int(sequence.response_ids[k])
            # What the position that predicts the token sees, along its branch.
            places = range(column + 1)
            if m.sees is not None:
                places = m.sees[row, 0, column].nonzero().squeeze(1).tolist()
                path = m.position[row, list(places)]
                assert path.tolist() == list(range(len(sequence.prompt_ids) + k))
            context = [int(m.input_ids[row, place]) for place in places]
            before = [
                *sequence.prompt_ids.tolist(),
                *sequence.response_ids[:k].tolist(),
            ]
            assert context == before
    assert sorted(seen) == list(range(shard.ragged.num_tokens))


def test_every_position_sees_something() -> None:
    """A row of the mask without any key would be NaN after softmax."""
    (tree,) = (
        m
        for m in make_microbatches(make_groups(*GROUPS), 10_000, ALWAYS)
        if m.sees is not None
    )
    assert tree.sees.any(-1).all()


@pytest.mark.parametrize(
    ("prompt", "response", "is_tree"),
    [(400, 100, True), (8, 128, False), (16, 512, False)],
)
def test_a_tree_is_chosen_where_the_prompt_is_worth_it(
    prompt: int, response: int, is_tree: bool
) -> None:
    """The square of a long row costs more than a short prompt computed again."""
    shard = make_groups((prompt, [response] * 8))
    plan = plan_microbatches(shard, 8192, PromptSharing(1e-3))
    assert any(row.is_tree for rows in plan for row in rows) is is_tree


def test_what_is_chosen_costs_less_than_flat_rows() -> None:
    draw = random.Random(5)
    sharing = PromptSharing(1e-3)
    for _ in range(50):
        lengths = [draw.randint(1, 200) for _ in range(draw.randint(2, 12))]
        shard = make_groups((draw.randint(1, 300), lengths))
        rows = [row for rows in plan_microbatches(shard, 4096, sharing) for row in rows]
        flat = [row for rows in plan_microbatches(shard, 4096) for row in rows]
        cost = sum(
            sharing.tree_cost(row.length)
            if row.is_tree
            else sharing.flat_cost(row.length)
            for row in rows
        )
        flat_cost = sum(sharing.flat_cost(row.length) for row in flat)
        assert cost <= flat_cost
        assert any(row.is_tree for row in rows) == (cost < flat_cost)


def test_rows_beyond_the_reach_of_attention_stay_flat() -> None:
    shard = make_groups((9, [4, 2]), (3, [6, 6]))
    # Rows of 12 and 8 tokens (the last one predicts nothing).
    assert shapes(shard, 10_000, PromptSharing(0.0, longest_path=12)) == [[2, 2]]
    assert shapes(shard, 10_000, PromptSharing(0.0, longest_path=11)) == [[2], [1, 1]]


def test_a_tree_fits_the_budget() -> None:
    shard = make_groups((10, [5] * 6))
    for budget in (14, 18, 25, 34):
        for rows in plan_microbatches(shard, budget, ALWAYS):
            assert len(rows) * rows[0].length <= budget
    assert shapes(shard, 34, ALWAYS) == [[6]]
    assert shapes(shard, 25, ALWAYS) == [[3], [3]]


def test_rows_are_put_together_up_to_the_filling() -> None:
    """A tree is as long as the budget allows: cut up, it would compute its prompt again."""
    shard = make_groups((10, [5] * 6), (4, [3]), (4, [3]), (4, [3]))
    for fill, expected in (
        (None, [[6], [1, 1, 1]]),
        (12, [[6], [1, 1], [1]]),
        (1, [[6], [1], [1], [1]]),
        (1000, [[6], [1, 1, 1]]),
    ):
        plan = plan_microbatches(shard, 40, ALWAYS, fill=fill)
        assert [[len(row.sequences) for row in rows] for rows in plan] == expected
    plan = plan_microbatches(shard, 6, None, fill=1000)
    assert all(len(rows) == 1 for rows in plan)


def test_trees_of_very_different_lengths_are_not_padded_to_one_another() -> None:
    shard = make_groups((30, [9, 9]), (4, [3, 3]), (25, [8, 8]))
    assert shapes(shard, 10_000, ALWAYS) == [[2, 2], [2]]
