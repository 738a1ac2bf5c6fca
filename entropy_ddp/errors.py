"""The two ways in which a run ends that are not a defect of this package."""

# As allocators word it: torch's on the CPU, on a GPU and in older versions; the driver's
# own; libraries' that allocate for themselves; C++'s `new`.
_NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "std::bad_alloc",
)


class InputError(ValueError):
    """What the user gave is wrong: a configuration, a checkpoint or a batch file.

    The message names what was expected, what was found and what to do. Found before
    anything expensive ran; the command line turns it into one line and exit code 2.
    """


class RunError(RuntimeError):
    """The run itself failed: a number is not finite, an invariant does not hold.

    The command line turns it into one line and exit code 1.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    # By name: torch is not imported for this.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _NO_MEMORY)


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise an error that says that memory ran out; anything else passes.

    For handlers of "whatever a library raises about this file": a machine that is too
    small is no fault of the file.
    """
    if is_out_of_memory(error):
        raise error
