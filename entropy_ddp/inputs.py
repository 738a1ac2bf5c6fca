"""What every reader of a file asks: is it a file, and is it the file that is wrong?"""

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from entropy_ddp.errors import InputError, RunError, is_out_of_memory

# Of these the message alone says nothing: KeyError('zzz') reads 'zzz'.
_TERSE = (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError)


def require_regular_file(path: Path) -> None:
    """Refuse what is there under a file's name and is none.

    A pipe is read once, and every rank reads; opening one that nothing writes to never
    ends.

    Raises:
        InputError: it is a pipe, a socket or a device. A file that is missing or may
            not be read is found out by opening it.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise InputError(f"{path}: expected a file, found {kind}; write it to a file first")


@contextmanager
def fault_of_file(place: str, describe: Callable[[str], str]) -> Iterator[None]:
    """Whatever a library raises within is the fault of the file that it reads.

    Args:
        place: the file, for the message when memory runs out.
        describe: the message for a reason.

    Raises:
        InputError: the file cannot be read.
        RunError: memory ran out, which need not be the file's fault.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(
                f"{place}: no memory to read it ({reason_of(error)}); is it damaged? "
                "if not, start fewer processes or use a machine with more memory"
            ) from error
        raise InputError(describe(reason_of(error))) from error


def reason_of(error: BaseException) -> str:
    """What an error says, on one line.

    Of several lines the one that names a tensor, or else the first, with the second
    where the first only announces it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    named = [line for line in lines if "size mismatch for" in line]
    found = (named or lines)[0]
    if found.endswith(":") and len(lines) > 1 and not named:
        found = f"{found} {lines[1]}"
    found = found if len(found) <= 400 else found[:397] + "..."
    return f"{type(error).__name__}: {found}" if isinstance(error, _TERSE) else found
