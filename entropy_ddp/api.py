"""From Python, what the command line does.

    from entropy_ddp.api import open_run

    run = open_run("run.yaml")                 # checkpoint, optimizer state, E and U
    measured = run.probe()
    print(measured)                            # the answer in one sentence
    measured.results.truth.delta_h_true        # nats
    table = pandas.DataFrame(measured.sequences)
    measured.save("runs/mine")

A run is opened and verified once; any number of jobs may follow, and each leaves
parameters and optimizer state as they were, bit for bit. In a script under torchrun, open
it within `with ranks() as world`, and give it the world: every rank gets
the same results.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from entropy_ddp.answers.headline import answer, verdict_counts
from entropy_ddp.checkpoint.trainer_settings import with_training_arguments
from entropy_ddp.config import Config, load_config, to_yaml, validated, with_sections
from entropy_ddp.data.batch import Batch
from entropy_ddp.distributed import World
from entropy_ddp.distributed import process_group as ranks
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.probe.opening import open_session
from entropy_ddp.probe.pipeline import Command, run_opened
from entropy_ddp.probe.session import Progress, Session, no_progress
from entropy_ddp.results import (
    Probed,
    Results,
    prepare_folder,
    read_results,
    write_results,
)
from entropy_ddp.terminal.commands import as_html

__all__ = [
    "Config",
    "InputError",
    "Measured",
    "Run",
    "RunError",
    "load_config",
    "open_run",
    "ranks",
    "read_results",
]

# What a job may set anew: nothing that was read or computed when the run was opened.
SECTIONS_OF_A_JOB = (
    "truth",
    "linear",
    "curvature",
    "gradient_dot",
    "sweep",
    "attribution",
)


@dataclass(frozen=True)
class Measured:
    """What a job found.

    Attributes:
        results: the numbers; `results.to_dict()` is the content of results.json.
        config: the configuration of the job.
    """

    results: Results
    config: Config
    _probed: Probed

    @cached_property
    def sequences(self) -> list[dict[str, Any]]:
        """One row for each sequence, of E and then of U: as in per_sequence.jsonl."""
        return list(self._probed.sequences)

    @cached_property
    def tokens(self) -> list[dict[str, Any]]:
        """One row for each token of U with its share: as in tokens.jsonl.gz.

        Raises:
            InputError: the job was no attribution.
        """
        if self._probed.tokens is None:
            raise InputError(
                "tokens: this job has no shares of tokens; run attribute()"
            )
        return list(self._probed.tokens)

    def to_dict(self) -> dict[str, Any]:
        """The content of results.json.

        Raises:
            RunError: a number is not finite.
        """
        return self.results.to_dict()

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write the run directory that the command line would; on one rank only.

        Args:
            folder: made if it is not there.
            overwrite: replace results that it holds.

        Raises:
            InputError: it holds results, or cannot be written.
            RunError: a file cannot be written.
        """
        out = Path(folder)
        prepare_folder(out, overwrite)
        write_results(out, self._probed, to_yaml(self.config))

    def __repr__(self) -> str:
        """The answer, its 95 % interval, and whether it may be trusted."""
        document = self.results.to_dict()
        said = answer(document)
        counts = verdict_counts(document)
        if self.results.status != "ok":
            said = f"NOT TO BE TRUSTED: {said}"
        return f"{said} Audits: {self.results.status} ({counts})."

    def _repr_html_(self) -> str:
        """The same for notebooks, with the numbers in a table."""
        return as_html(self.results)


class Run:
    """A checkpoint with its batches, opened: what the jobs work on.

    Attributes:
        config: the resolved configuration.
        E: the evaluation batch; with several ranks the token ids of sequences that
            another one holds have no values (they are on torch's device `meta`).
        U: the update batch; None if a change is given in place of a step.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        # A job has cost what opening did and what it does, not what others did.
        self._opening = copy.deepcopy(
            (session.world.collectives, session.passes.performed, session.seconds)
        )
        self.config = session.config
        self.E: Batch = session.batches["E"]
        self.U: Batch | None = session.batches.get("U")

    def probe(self, **sections: Mapping[str, Any]) -> Measured:
        """Truth, first- and second-order prediction of one step, with audits.

        Args:
            sections: keys to set for this job only, by section of the configuration, as
                in `probe(linear={"score": "to_go", "baseline": "ridge"})`; of `truth`,
                `linear`, `curvature`, `gradient_dot`, `sweep` and `attribution`.

        Raises:
            InputError: a key is unknown, wrong, or cannot be set any more.
            RunError: a number is not finite.
        """
        return self._do("probe", sections)

    def sweep(self, **sections: Mapping[str, Any]) -> Measured:
        """Truth and predictions over a grid of step sizes, all from one step.

        Arguments and errors as of `probe`.
        """
        return self._do("sweep", sections)

    def attribute(self, **sections: Mapping[str, Any]) -> Measured:
        """The share of every token and sequence of U in the first-order change.

        Arguments and errors as of `probe`.
        """
        return self._do("attribute", sections)

    def audit(self, **sections: Mapping[str, Any]) -> Measured:
        """A probe with every check, on all of E.

        Arguments and errors as of `probe`.
        """
        return self._do("audit", sections)

    def __repr__(self) -> str:
        """What was opened."""
        batches = [
            f"{name}: {len(batch):,} sequences in {batch.num_groups:,} groups, "
            f"{batch.num_tokens:,} response tokens"
            for name, batch in self._session.batches.items()
        ]
        elements = self._session.passes.layout.numel
        place = self.config.checkpoint.path or self.config.checkpoint.adapter
        return "; ".join([f"{place}: {elements:,} trainable elements", *batches])

    def _do(self, command: Command, sections: Mapping[str, Any]) -> Measured:
        fixed = sorted(sections.keys() - {*SECTIONS_OF_A_JOB})
        if fixed:
            raise InputError(
                f"`{fixed[0]}` is settled when a run is opened; a job may set "
                f"{', '.join(SECTIONS_OF_A_JOB)}; open another run"
            )
        config = with_sections(self.config, sections)
        collectives, performed, seconds = copy.deepcopy(self._opening)
        self._session.world.collectives = collectives
        self._session.passes.performed = performed
        session = replace(
            self._session, config=config, seconds=seconds, started=datetime.now(UTC)
        )
        probed = run_opened(command, session)
        return Measured(results=probed.results, config=config, _probed=probed)


def open_run(
    configuration: Config | Mapping[str, Any] | Path | str,
    *assignments: str,
    world: World | None = None,
    progress: Progress = no_progress,
) -> Run:
    """Open a checkpoint, verify the model, read or sample both batches.

    Args:
        configuration: a YAML file, its content as a mapping, or what `load_config` gave.
        assignments: `key.sub=value`, as of the option `--set`; of a file only.
        world: the ranks; None for this process alone.
        progress: called with the name of a phase, the units done, those to do (0 if
            not known), what they are, and the tokens done where they are not tokens.

    Raises:
        InputError: anything in the configuration, checkpoint or batches is wrong.
    """
    if isinstance(configuration, (str, Path)):
        config = load_config(Path(configuration), assignments)
    elif assignments:
        raise InputError(
            f"assignments ({assignments[0]}): expected a file to change, found a "
            "configuration; set the key in it"
        )
    elif isinstance(configuration, Config):
        config = configuration
    else:
        config = validated(dict(configuration), "configuration")
    config = with_training_arguments(config)
    return Run(open_session(config, world or World(), None, progress, "open"))
