"""The two ways in which a run ends that are not a defect of this package."""


class InputError(ValueError):
    """What the user gave is wrong: a configuration, a checkpoint or a batch file.

    The message names what was expected, what was found and what to do. Found before
    anything expensive ran; the command line turns it into one line and exit code 2.
    """


class RunError(RuntimeError):
    """The run itself failed: a number is not finite, an invariant does not hold.

    The command line turns it into one line and exit code 1.
    """


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise an error that says that memory ran out; anything else passes.

    For handlers of "whatever a library raises about this file": a machine that is too
    small is no fault of the file.
    """
    is_shortage = (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
    if is_shortage:
        raise error
