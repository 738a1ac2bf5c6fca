"""What each command needs of a configuration beside its schema.

Everything here is found before a file is opened; what hangs on the content of a batch or
of a checkpoint is checked where that is read.
"""

from entropy_ddp.config.schema import Config, Sample
from entropy_ddp.errors import InputError


def require_job(config: Config, command: str) -> None:
    """Check that a configuration is one that a command can run.

    Args:
        command: `sample`; a job that measures: `probe`, `sweep`, `attribute`, `audit`,
            `ledger` (over a trainer's checkpoints); or `open`: what all of these need.

    Raises:
        InputError: it is not, with the key to change.
    """
    planned = config.batches.samples
    if command == "sample":
        if not planned:
            raise InputError(
                "batches: neither E nor U has a `sample` section; there is nothing to "
                "sample"
            )
        return
    if command == "ledger" and "E" not in planned:
        raise InputError(
            "batches.E: expected a `sample` section, found a file; a ledger needs fresh "
            "responses from every checkpoint"
        )
    if command == "attribute" or (command == "probe" and config.attribution.enabled):
        _require_attributable(config)
    if "E" in planned and planned["E"].num_prompts < 2:
        raise InputError(
            "batches.E.sample.num_prompts: expected at least 2 (a standard error needs "
            f"independent groups), found {planned['E'].num_prompts}; sample more"
        )
    reason = gradient_dot_obstacle(planned)
    asked_for = config.gradient_dot.enabled is True
    if command in ("probe", "audit") and asked_for and reason is not None:
        raise InputError(f"gradient_dot: {reason}; or set gradient_dot.enabled: auto")


def _require_attributable(config: Config) -> None:
    if config.linear.control_variates:
        raise InputError(
            "linear.control_variates: attribution is of a slope without them (they are "
            "no derivative of the update); set it to false"
        )
    if config.update.delta is not None:
        raise InputError(
            "update.delta: attribution is of the optimizer's step on U; a change that is "
            "given does not say what it was made of; leave update.delta out"
        )


def gradient_dot_obstacle(planned: dict[str, Sample]) -> str | None:
    """Why the gradient-dot form has no variance with batches that are to be sampled.

    Args:
        planned: the `sample` sections by split; a batch that is there has none.
    """
    for split, sample in planned.items():
        if sample.num_prompts < 2:
            return f"needs at least 2 groups in {split}, found {sample.num_prompts}"
    if "E" in planned and planned["E"].responses_per_prompt < 2:
        return (
            "needs at least 2 responses in every group of E, found "
            "batches.E.sample.responses_per_prompt of 1"
        )
    return None
