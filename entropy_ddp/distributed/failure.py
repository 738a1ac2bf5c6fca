"""A watch over the other ranks: no rank waits for one that has failed, hangs or is gone.

Every rank leaves signs of life in the store. Rank 0 looks at all of them, the others at
those of rank 0 and of the nearest rank below them: a few reads for each rank, however
many there are. A rank that fails, or finds another one silent, claims the run's failure;
the first to claim prints, the others end without a word and with the same exit code. Who
ends how:

- the main thread unwinds, by a signal to this process, so that files are cleaned up;
- a process whose main thread does not come back from a call in time is ended hard.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

from entropy_ddp.files import remove_temporary
from entropy_ddp.interruption import end_at_once, ignore_signals

# Keys of the store.
_FAILURE = "entropy_ddp/first_failure"
_TOLD = "entropy_ddp/failure_told"
_LOOKER = "entropy_ddp/looks_for_the_gone"
_SIGN = "entropy_ddp/sign_of_life"
_SIGN_SECONDS = 0.5
_GUARD_SECONDS = 0.1
# Silence that explains a lost connection: beyond what a busy interpreter causes.
_GONE_SECONDS = 4.0
# For a message to be written to a slow terminal.
_TELL_SECONDS = 8.0
# For the main thread to unwind.
_GRACE_SECONDS = 3.0
# A gap in this process's own life: it was stopped, and the others' silence means nothing.
_ABSENT_SECONDS = 2.0
_CODE_FAILED = 1


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


class StoreConnection:
    """What the ranks tell each other beside the collectives, in the launcher's store.

    Over a connection of its own: calls over one connection wait in line.
    """

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


class Watch:
    """One rank's watch over the others, and its way to fail.

    One thread talks to the store; a second one never does, so that it sees a store that
    hangs and a main thread that does not end.

    Attributes:
        collectives: number of collectives that this rank has come to.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        silence_seconds: float,
        tell: Callable[[str], None],
    ) -> None:
        """Prepare a watch.

        Args:
            store: the ranks' key-value store.
            rank, world_size: of this process.
            silence_seconds: a rank silent for longer ends the run.
            tell: prints why the run ends.
        """
        self.collectives = 0
        self._rank = rank
        # torchrun's agent holds the store; without one, rank 0 does.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._store_rank = None if agent else 0
        self._silence_seconds = silence_seconds
        self._tell = tell
        self._store, self._threads_store = (
            StoreConnection(store),
            StoreConnection(store),
        )
        now = time.monotonic()
        self._others = [other for other in range(world_size) if other != rank]
        watched = self._others if rank == 0 else {0, rank - 1}
        # The last sign of each, and when it was first seen.
        self._seen = {other: (Sign(), now) for other in watched}
        self._answered = self._exchanged = now
        self._failure: Failure | None = None
        self._is_store_gone = False
        self._is_finishing = self._is_settling = False
        self._leave_at: float | None = None
        self._code = _CODE_FAILED
        self._has_ended = False
        self._losing, self._signing = threading.Lock(), threading.Lock()
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._exchange_signs, self._guard)
        ]

    def start(self) -> None:
        """Start to give signs of life and to look at the others'."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """End the watch of a rank that has no more to do; rank 0 waits for the others."""
        self._is_finishing = self._rank != 0
        self._hurry.set()
        try:
            self._sign(self._store, Sign(ended=True))
            while self._rank == 0 and self._remaining():
                time.sleep(0.01)
        except StoreGone:
            # All that this rank had to do is done.
            pass
        self._stop.set()
        for thread in self._threads:
            thread.join(_GRACE_SECONDS)

    def behind(self) -> list[int]:
        """The ranks that have come to fewer collectives than this one."""
        try:
            signs = self._store.signs(self._others)
        except StoreGone:
            return []
        found = {rank: signs.get(rank, Sign()) for rank in self._others}
        return [
            rank
            for rank, sign in found.items()
            if sign.collectives < self.collectives and not sign.ended
        ]

    def fail(
        self, message: str, code: int, tell: Callable[[], None], *, is_suspect: bool
    ) -> NoReturn:
        """End this process, for a failure of its own or because another rank failed.

        Args:
            message: what failed.
            code: exit code, if this is the first failure of the run.
            tell: prints the failure; called if it is the first.
            is_suspect: whether the failure may be due to a rank that is gone.
        """
        ignore_signals()
        if self._is_store_gone:
            # The guard may be in the middle of its message: this waits for it.
            end_at_once(self._lose_store(f"{self._holder()} is gone").code)
        self._code = code if self._failure is None else self._failure.code
        self._leave_at = (
            time.monotonic() + _GONE_SECONDS + _TELL_SECONDS + _GRACE_SECONDS
        )
        mine = Failure(rank=self._rank, code=code, message=message)
        self._is_settling = True
        try:
            first = self._settle(mine, tell, is_suspect)
        except StoreGone:
            first = self._lose_store(f"{self._holder()} is gone")
        self._is_settling = False
        try:
            self._end_together()
        except StoreGone:
            pass
        end_at_once(first.code)

    def _settle(
        self, mine: Failure, tell: Callable[[], None], is_suspect: bool
    ) -> Failure:
        """Find the first failure of the run; tell it, or wait until it is told."""
        gone = self._fallen_silent() if is_suspect else []
        if gone and self._failure is None:
            silence = _silence(gone, _GONE_SECONDS)
            message = f"{silence}; then rank {mine.rank} failed: {mine.message}"
            mine = Failure(rank=mine.rank, code=_CODE_FAILED, message=message)
            tell = partial(self._tell, silence)
        first = self._failure or self._store.claim(mine)
        self._code = first.code
        if first == mine:
            if not gone:
                _leave_for_launcher(mine)
            tell()
            self._store.set_told()
        else:
            self._store.wait_told(_TELL_SECONDS)
        return first

    def _fallen_silent(self) -> list[int]:
        """The ranks that give no sign any more; empty as soon as all have given one.

        One rank looks, if many have lost a connection: its failure is that of the run.
        """
        if not self._store.looks_first(self._rank):
            self._wait_for_failure(_GONE_SECONDS + 2 * _SIGN_SECONDS)
        if self._failure is not None:
            return []
        # What a killed rank had sent already is in the store before the first look.
        time.sleep(_GUARD_SECONDS)
        before = self._store.signs(self._others)
        silent = [r for r in self._others if not before.get(r, Sign()).ended]
        begin = time.monotonic()
        while self._failure is None:
            now = self._store.signs(silent)
            silent = [r for r in silent if now.get(r) == before.get(r, Sign())]
            if not silent or time.monotonic() - begin > _GONE_SECONDS:
                return silent
            time.sleep(_GUARD_SECONDS)
        return []

    def _wait_for_failure(self, seconds: float) -> None:
        begin = time.monotonic()
        while self._failure is None and time.monotonic() - begin < seconds:
            time.sleep(_GUARD_SECONDS)

    def _sign(self, store: StoreConnection, sign: Sign) -> None:
        """Leave a sign; none of the other thread's comes after the one that ends."""
        with self._signing:
            if not self._has_ended:
                self._has_ended = sign.ended
                store.sign(self._rank, sign)

    def _remaining(self) -> list[int]:
        return [rank for rank, (sign, _) in self._seen.items() if not sign.ended]

    def _end_together(self) -> None:
        """The rank that holds the store is the last to go."""
        self._hurry.set()
        self._sign(self._store, Sign(ended=True))
        if self._rank != self._store_rank:
            return
        give_up = time.monotonic() + _GRACE_SECONDS + 1
        while time.monotonic() < give_up:
            if not set(self._remaining()) - set(self._silent(_GONE_SECONDS)):
                return
            time.sleep(0.01)

    # The thread that talks to the store.

    def _exchange_signs(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            try:
                self._exchange(Sign(number=number, collectives=self.collectives))
            except StoreGone:
                self._is_store_gone = True
                return
            if self._hurry.wait(_SIGN_SECONDS):
                time.sleep(0.01)

    def _exchange(self, sign: Sign) -> None:
        store = self._threads_store
        self._sign(store, sign)
        signs = store.signs(self._remaining())
        now = time.monotonic()
        was_absent = now - self._exchanged > _ABSENT_SECONDS
        for rank, (last, _) in self._seen.items():
            found = signs.get(rank, last)
            if found != last or was_absent:
                self._seen[rank] = (found, now)
        self._look_lower(now)
        self._answered = self._exchanged = now
        if self._failure is not None:
            return
        first = store.first_failure()
        silent = self._silent(self._silence_seconds)
        # Rank 0 knows of all that are silent, unless it is silent itself or has ended.
        is_told = self._rank and 0 in set(self._remaining()) - set(silent)
        if first is None and silent and not is_told:
            first = self._accuse(silent)
        if first is not None:
            self._failure = first
            self._code = first.code
            self._unwind()
            store.wait_told(_TELL_SECONDS)
            self._leave_at = time.monotonic() + _GRACE_SECONDS

    def _look_lower(self, now: float) -> None:
        """Watch one rank more if the lowest but rank 0 has no more to do, or is gone."""
        lowest = min((rank for rank in self._seen if rank), default=1)
        if self._rank and lowest > 1 and not self._is_alive(lowest):
            # Other threads read the old one, or the new one.
            self._seen = self._seen | {lowest - 1: (Sign(), now)}

    def _is_alive(self, rank: int) -> bool:
        sign, at = self._seen[rank]
        return time.monotonic() - at <= _GONE_SECONDS and not sign.ended

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [r for r in self._remaining() if now - self._seen[r][1] > seconds]

    def _accuse(self, silent: list[int]) -> Failure:
        message = _silence(silent, self._silence_seconds)
        mine = Failure(rank=self._rank, code=_CODE_FAILED, message=message)
        first = self._threads_store.claim(mine)
        if first == mine:
            self._tell(message)
            self._threads_store.set_told()
        return first

    # The thread that never waits.

    def _guard(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(_GUARD_SECONDS):
            now = time.monotonic()
            if now - looked > _ABSENT_SECONDS:
                self._answered = now
            looked = now
            if self._leave_at is not None:
                silent_for = now - self._answered
                if self._is_settling and silent_for > self._silence_seconds:
                    # The main thread waits for a store that does not answer.
                    self._guard_store(now)
                    self._leave_at = now
                if now >= self._leave_at:
                    # No flush: the main thread may hold the streams.
                    remove_temporary()
                    os._exit(self._code)
            elif self._failure is None:
                self._guard_store(now)

    def _guard_store(self, now: float) -> None:
        silent_for = now - self._answered
        if self._is_store_gone and self._is_finishing:
            return
        if self._is_store_gone:
            self._lose_store(f"{self._holder()} is gone: it was killed or has crashed")
        elif silent_for > self._silence_seconds:
            self._lose_store(
                f"{self._holder()} has not answered for {silent_for:.0f} s: it was "
                "stopped or killed, or its machine is gone"
            )
        else:
            return
        self._leave_at = now + _GRACE_SECONDS
        self._unwind()

    def _holder(self) -> str:
        if self._store_rank is None:
            return "the launcher, which holds the ranks' store,"
        return f"rank {self._store_rank}, which holds the ranks' store,"

    def _lose_store(self, message: str) -> Failure:
        """The failure of a run that has no store; told by its lowest rank."""
        with self._losing:
            self._is_store_gone = True
            if self._failure is None:
                self._failure = Failure(
                    rank=self._rank, code=_CODE_FAILED, message=message
                )
                if self._is_speaker():
                    self._tell(message)
            return self._failure

    def _is_speaker(self) -> bool:
        """Whether no lower rank was alive when the store last answered."""
        return all(
            rank == self._store_rank or self._answered - at > _GONE_SECONDS
            for rank, (sign, at) in self._seen.items()
            if rank < self._rank and not sign.ended
        )

    def _unwind(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)


def _silence(ranks: list[int], seconds: float) -> str:
    several = len(ranks) > 1
    names = ", ".join(map(str, ranks))
    return (
        f"rank{'s' if several else ''} {names} {'have' if several else 'has'} not "
        f"answered for {seconds:g} s: stopped, killed (often because the machine ran out "
        "of memory), or on a machine that is gone"
    )


def _leave_for_launcher(failure: Failure) -> None:
    """Name the failure where torchrun looks for it: its summary then shows this rank.

    torchrun compares whole seconds and takes the lowest rank of equal ones; the ranks
    that end because of this one may do so within the same.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    summary = f"rank {failure.rank} failed first; its message is printed above"
    extra = {"py_callstack": summary, "timestamp": str(int(time.time()) - 1)}
    document = {"message": {"message": summary, "extraInfo": extra}}
    try:
        with open(path, "w") as stream:
            json.dump(document, stream)
    except OSError:
        # The message itself is on its way; this file only repeats it.
        pass
