"""Policies of long responses whose exact entropy is known, and samples of them.

What a response does next depends on its state: one of a few, that lead to each other for
up to a thousand steps, or one for every prefix of another model's responses. With the
probability a_k(s) that a response reaches step k in state s,

    E[H] = sum_k sum_s a_k(s) H(s)        E[T] = sum_k sum_s a_k(s)

are a few products for each step, and autograd of them gives the derivatives along v.

A state with a token that may follow it is a *move*. The token arrays of all moves are
known once (`Policy.table`), so those of any number of responses are rows of them.

Shape legend: S states, V vocabulary, m moves, P prompts, M responses, t their tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from enumerable import Policy, Table, at
from torch import Tensor
from torch.nn.functional import one_hot

from entropy_ddp.config import Integrand, Normalize
from entropy_ddp.data.batch import Ragged
from entropy_ddp.model.response_tokens import NUM_EMBEDDINGS

IMPOSSIBLE = (
    -1e4
)  # logit of a token that never follows: finite, so that 0 times it is 0
NOWHERE = -1  # successor of a move that ends the response
Rows = tuple[tuple[float, ...], ...]
CHUNK = 2000  # responses whose token arrays exist at once


@dataclass(frozen=True, kw_only=True)
class Place:
    """Logits of all states at one place on the line, and their derivative; [S, V] each."""

    logits: Tensor
    tangent: Tensor


class StatePolicy(Policy):
    """A policy by its states.

    Attributes:
        state, target: state and token of each move, [m].
        successor: the next state of each move, [m].
        start: first state of each prompt's responses, [P]; prompts are equally likely.
        longest: the greatest length.

    Args:
        places: logits by eta; elsewhere they are linear from the nearest of these.
        successor: the next state, [S, V].
        hidden: what the baselines may use of each state, [S, h].
        embedding: e(v), [V, 8].
    """

    def __init__(
        self,
        *,
        places: dict[float, Place],
        successor: Tensor,
        start: Tensor,
        longest: int,
        hidden: Tensor,
        embedding: Tensor,
    ) -> None:
        self._places = places
        logits = places[0.0].logits
        self.vocabulary, self.length = logits.shape[1], longest
        self.num_prompts, self.start = len(start), start
        possible = logits > IMPOSSIBLE / 2
        self.state, self.target = possible.nonzero().T
        self.successor = successor[self.state, self.target]
        # Each move is a response of one token to `Policy.table`.
        self.ragged = Ragged(torch.ones_like(self.state))
        self._hidden, self.embedding = hidden, embedding
        self._move = torch.full(logits.shape, NOWHERE)
        self._move[self.state, self.target] = torch.arange(len(self.state))

    def logits(self, eta: Tensor) -> Tensor:
        """Logits at theta + eta v, [S, V]."""
        nearest = min(self._places, key=lambda place: abs(place - float(eta.detach())))
        place = self._places[nearest]
        return place.logits + (eta - nearest) * place.tangent

    @property
    def hidden_of_states(self) -> Tensor:
        """What the baselines may use of each state, [S, h]."""
        return self._hidden

    def sums(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """E[H] and E[T] at theta + eta v."""
        log_pi = torch.log_softmax(self.logits(eta), dim=-1)
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        goes_on = (self.successor != NOWHERE).nonzero()[:, 0]
        state, target = self.state[goes_on], self.target[goes_on]
        successor, probability = self.successor[goes_on], log_pi[state, target].exp()
        reached = torch.zeros(len(entropy), dtype=torch.float64)
        reached.index_add_(0, self.start, torch.ones(len(self.start)).double())
        reached = reached / len(self.start)
        total, steps = at(0.0), at(0.0)
        for _ in range(self.length):
            total, steps = total + reached @ entropy, steps + reached.sum()
            moved = reached[state] * probability
            reached = torch.zeros_like(reached).index_add(0, successor, moved)
        return total, steps

    def entropy(
        self, eta: Tensor, normalize: Normalize, integrand: Integrand
    ) -> Tensor:
        """H(theta + eta v), per token or of one sequence; a scalar.

        Raises:
            ValueError: another normalisation.
        """
        if normalize == "per_sequence_token_mean":
            raise ValueError("not a function of the states")
        total, steps = self.sums(eta)
        return total / steps if normalize == "per_token" else total

    def responses(self, prompts: Tensor, generator: torch.Generator) -> "Responses":
        """One response to each of these prompts [M]."""
        log_pi = torch.log_softmax(self.logits(at(0.0)), dim=-1)
        upper = log_pi.exp().cumsum(-1)
        # Rounding must not let a token follow that cannot.
        upper[upper >= upper[:, -1:]] = 2.0
        state, alive = self.start[prompts], torch.arange(len(prompts))
        moves, sequences = [], []
        while len(alive):
            uniform = torch.rand(
                len(alive), 1, generator=generator, dtype=torch.float64
            )
            target = torch.searchsorted(upper[state], uniform).squeeze(1)
            move = self._move[state, target]
            moves.append(move)
            sequences.append(alive)
            state = self.successor[move]
            goes_on = state != NOWHERE
            if len(moves) == self.length:
                break
            state, alive = state[goes_on], alive[goes_on]
        sequence = torch.cat(sequences)
        order = sequence.sort(stable=True).indices
        lengths = torch.bincount(sequence, minlength=len(prompts))
        return Responses(move=torch.cat(moves)[order], ragged=Ragged(lengths))


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Responses by their moves.

    Attributes:
        move: flat token array of the moves, [t].
        ragged: its layout, [M].
    """

    move: Tensor
    ragged: Ragged

    def select(self, index: Tensor) -> "Responses":
        """The responses with these numbers, in this order, [N]."""
        ragged = Ragged(self.ragged.lengths[index])
        token = ragged.spread(self.ragged.starts[index]) + ragged.position
        return Responses(move=self.move[token], ragged=ragged)

    def table(self, moves: Table) -> Table:
        """Their token arrays, from those of all moves."""
        arrays = moves.arrays.index_select(1, self.move)
        return Table(ragged=self.ragged, arrays=arrays)

    def tables(self, moves: Table) -> Iterator[Table]:
        """The same, some responses at a time."""
        for first in range(0, len(self.ragged.lengths), CHUNK):
            last = min(first + CHUNK, len(self.ragged.lengths))
            yield self.select(torch.arange(first, last)).table(moves)


# Three kinds of plain responses stop after some 30 tokens, and 3 in 100 ramble. The tokens
# are the end, four that stay (two pairs of one meaning each), and one that goes up to
# longer responses or down to shorter ones.
_PROBABILITIES = (
    (0.0333, 0.0518, 0.5240, 0.3493, 0.0345, 0.0050, 0.0021),
    (0.0278, 0.0924, 0.4850, 0.3233, 0.0616, 0.0050, 0.0049),
    (0.0213, 0.0581, 0.5231, 0.3487, 0.0387, 0.0050, 0.0051),
    (0.0053, 0.2252, 0.3674, 0.2449, 0.1501, 0.0021, 0.0050),
)
_DIRECTION = (
    (-0.013, -0.920, -0.989, +1.556, +0.655, +0.090, -0.031),
    (+0.001, -0.727, -0.063, +0.266, +0.190, -0.163, +0.004),
    (-0.016, -1.430, +0.043, -0.072, +2.222, +0.057, -0.042),
    (+0.023, +0.493, -0.200, -0.176, +0.036, -0.111, -0.110),
)
_SUCCESSOR = (
    (NOWHERE, 0, 0, 0, 0, 1, 0),
    (NOWHERE, 1, 1, 1, 1, 2, 0),
    (NOWHERE, 2, 2, 2, 2, 3, 1),
    (NOWHERE, 3, 3, 3, 3, 3, 2),
)
LONGEST = 1200


def heavy_tailed() -> StatePolicy:
    """A policy whose lengths have a median of 27 and a 99 % quantile of 310."""
    return _chain(_PROBABILITIES, _DIRECTION, _SUCCESSOR, starts=(34, 23, 40, 3))


# Rambling responses have a fifth of the entropy, and every token leads to another state.
_OTHER_PROBABILITIES = (
    (0.030, 0.600, 0.200, 0.125, 0.040, 0.005),
    (0.045, 0.250, 0.300, 0.250, 0.150, 0.005),
    (0.025, 0.100, 0.150, 0.300, 0.415, 0.010),
    (0.006, 0.003, 0.003, 0.008, 0.050, 0.930),
)
_OTHER_DIRECTION = (
    (-0.22, +0.15, +0.67, -0.51, -1.59, -0.75),
    (+0.65, +0.91, +1.08, +0.34, +0.72, +0.83),
    (+0.51, -1.53, -1.90, +0.25, +0.03, +0.24),
    (+0.78, -1.00, +1.19, +0.41, +0.18, -0.15),
)
_OTHER_SUCCESSOR = (
    (NOWHERE, 0, 1, 0, 2, 3),
    (NOWHERE, 0, 1, 1, 2, 3),
    (NOWHERE, 0, 1, 2, 2, 3),
    (NOWHERE, 0, 1, 3, 3, 3),
)


def one_sided() -> StatePolicy:
    """One whose long responses move the entropy, all in one direction."""
    return _chain(
        _OTHER_PROBABILITIES, _OTHER_DIRECTION, _OTHER_SUCCESSOR, starts=(60, 30, 10, 0)
    )


def _chain(
    probabilities: Rows, direction: Rows, successor: Rows, starts: tuple[int, ...]
) -> StatePolicy:
    """A policy of four states.

    Args:
        probabilities: of each token in each state.
        direction: derivative of the logits.
        successor: the state that each leads to.
        starts: of 100 prompts, how many begin in each state.
    """
    logits = torch.tensor(probabilities, dtype=torch.float64).log()
    states, tokens = (torch.arange(count) for count in logits.shape)
    return StatePolicy(
        places={
            0.0: Place(
                logits=logits, tangent=torch.tensor(direction, dtype=torch.float64)
            )
        },
        successor=torch.tensor(successor),
        start=torch.repeat_interleave(states, torch.tensor(starts)),
        longest=LONGEST,
        hidden=one_hot(states).double()[:, 1:],
        embedding=one_hot(tokens, NUM_EMBEDDINGS).double(),
    )
