"""What the ranks tell each other beside the collectives, in the launcher's store."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

_FAILURE = "entropy_ddp/first_failure"
_TOLD = "entropy_ddp/failure_told"
_LOOKER = "entropy_ddp/looks_for_the_gone"
_SIGN = "entropy_ddp/sign_of_life"


class StoreGone(Exception):
    """The process that holds the store does not answer any more."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a run ends.

    Attributes:
        rank: the rank that says so.
        code: the exit code of every rank.
        message: what failed.
    """

    rank: int
    code: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A sign of life of one rank.

    Attributes:
        number: counts up; 0 before the first sign.
        collectives: number of collectives that the rank has come to.
        ended: whether the rank has no more to do.
    """

    number: int = 0
    collectives: int = 0
    ended: bool = False


class Ledger:
    """A connection of its own to the store: calls over one connection wait in line."""

    def __init__(self, store: Any) -> None:
        self._store = store.clone()
        self._known: set[int] = set()

    def claim(self, failure: Failure) -> Failure:
        """The first failure of the run, which is this one if there was none before."""
        with _answering():
            text = json.dumps(asdict(failure))
            return _failure(self._store.compare_set(_FAILURE, "", text))

    def first_failure(self) -> Failure | None:
        """The first failure of the run, if there is one."""
        with _answering():
            if not self._store.check([_FAILURE]):
                return None
            return _failure(self._store.get(_FAILURE))

    def looks_first(self, rank: int) -> bool:
        """Whether this rank is the first to look which of all the ranks are gone."""
        with _answering():
            found = self._store.compare_set(_LOOKER, "", str(rank))
            return found == str(rank).encode()

    def set_told(self) -> None:
        """Let the other ranks know that the message of the failure is out."""
        with suppress(StoreGone), _answering():
            self._store.set(_TOLD, "1")

    def wait_told(self, seconds: float) -> None:
        """Wait until the message of the failure is out, or for this long."""
        with suppress(StoreGone), _answering():
            self._store.wait([_TOLD], timedelta(seconds=seconds))

    def sign(self, rank: int, sign: Sign) -> None:
        """Leave a sign of life of this rank."""
        with _answering():
            self._store.set(f"{_SIGN}/{rank}", json.dumps(asdict(sign)))

    def signs(self, ranks: Sequence[int]) -> dict[int, Sign]:
        """The last sign of life of those ranks that ever gave one."""
        with _answering():
            for rank in ranks:
                if rank not in self._known and self._store.check([f"{_SIGN}/{rank}"]):
                    self._known.add(rank)
            known = [rank for rank in ranks if rank in self._known]
            texts = []
            if known:
                texts = self._store.multi_get([f"{_SIGN}/{rank}" for rank in known])
            signs = [Sign(**json.loads(text)) for text in texts]
        return dict(zip(known, signs, strict=True))


def _failure(text: bytes) -> Failure:
    return Failure(**json.loads(text))


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    # Errors of the network and of the store are RuntimeErrors.
    except (RuntimeError, OSError) as error:
        raise StoreGone(str(error)) from error
