"""The jobs: `probe`, and `audit`, which is a probe that audits all of E and asks more."""

from pathlib import Path

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.probe.attribution import attributed, require_plain_slope
from entropy_ddp.probe.audits import Extras, audit_rows
from entropy_ddp.probe.diagnosis import learning_rate_ratios
from entropy_ddp.probe.gradient_dot import gradient_dot, is_wanted
from entropy_ddp.probe.measure import Measured, measure
from entropy_ddp.probe.outcome import make_results
from entropy_ddp.probe.session import Progress, Session, open_session
from entropy_ddp.probe.units import proxy_gradient_norm
from entropy_ddp.results import GradientDotResult, Probed


def run_probe(
    config: Config, world: World, out: Path | None, progress: Progress
) -> Probed:
    """Open everything, run the passes, estimate, audit.

    Every rank computes the same results.

    Args:
        config: the run's configuration.
        world: the ranks.
        out: run directory, where sampled rollouts are kept; None keeps none.
        progress: told how far the current phase is.

    Raises:
        InputError: the configuration, the checkpoint or a batch is wrong.
        RunError: a number is not finite.
    """
    if config.attribution.enabled:
        require_plain_slope(config)
    return probe_session(
        open_session(config, world, out, progress, require=_require_gradient_dot)
    )


def probe_session(session: Session) -> Probed:
    """A probe of what is open already; errors as of `run_probe`."""
    config = session.config
    attribute = config.attribution.enabled
    if attribute:
        require_plain_slope(config)
    _require_gradient_dot(session)
    measured = measure(session, "gradient" if attribute else "sample")
    dot = _gradient_dot(session, measured)
    rows = audit_rows(session, measured, Extras(dot=dot))
    if attribute:
        return attributed(session, measured, rows, "probe", gradient_dot=dot)
    return make_results(session, measured, rows, "probe", gradient_dot=dot)


def _require_gradient_dot(session: Session) -> None:
    """Asked for but impossible is said before the first token and the first pass."""
    is_wanted(session.config.gradient_dot, session.batches, session.planned)


def _gradient_dot(session: Session, measured: Measured) -> GradientDotResult | None:
    return gradient_dot(
        session,
        measured.stepped,
        measured.gradient,
        measured.base,
        session.config.gradient_dot,
    )


def run_audit(
    config: Config, world: World, out: Path | None, progress: Progress
) -> Probed:
    """The same with every audit on all of E, and those that cost a pass or a step more.

    Arguments and errors as of `run_probe`.
    """
    return audit_session(
        open_session(config, world, out, progress, "audit", _require_gradient_dot)
    )


def audit_session(session: Session) -> Probed:
    """An audit of what is open already; errors as of `run_probe`."""
    _require_gradient_dot(session)
    measured = measure(session, "everything")
    dot = _gradient_dot(session, measured)
    extras = Extras(dot=dot)
    if measured.gradient is not None:
        extras = Extras(
            dot=dot,
            ratios=learning_rate_ratios(
                session, measured.gradient, measured.step, measured.duality.gradient
            ),
            signal=proxy_gradient_norm(session, limit=len(session.batches["U"])),
        )
    rows = audit_rows(session, measured, extras)
    return make_results(session, measured, rows, "audit", gradient_dot=dot)
