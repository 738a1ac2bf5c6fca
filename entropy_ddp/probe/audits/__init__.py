"""The audits of a run: facts from every rank, turned into rows with a verdict."""

from entropy_ddp.probe.audits import batch, model, step, truth
from entropy_ddp.probe.measurements import Measurements
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AuditRow


def audit_rows(session: Session, measured: Measurements) -> list[AuditRow]:
    """All audits of a run but that of its attribution, in the order they are shown."""
    return [
        *model.stored_rows(session),
        *step.gradient_rows(session, measured),
        *step.step_rows(session, measured),
        *batch.update_batch_rows(session),
        *model.training_rows(session),
        *step.trainer_rows(session, measured.step),
        *batch.own_rollouts_rows(session),
        *batch.batch_rows(session),
        *model.moment_rows(session),
        *step.scale_rows(session, measured),
        *batch.text_rows(session, measured),
        *batch.sampler_rows(session, measured),
        batch.on_policy_row(session, measured),
        truth.duality_row(session, measured),
        *truth.routing_rows(session, measured),
        *truth.truth_rows(session, measured),
        *model.state_rows(session, measured),
        *step.communication_rows(session),
        *truth.gradient_dot_rows(session, measured),
        *step.thorough_rows(measured),
    ]
