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
