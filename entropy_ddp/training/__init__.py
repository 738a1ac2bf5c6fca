"""Live in a trainer: what each optimizer step of a run changes, and what holds it."""

from entropy_ddp.training.callback import EntropyProbeCallback
from entropy_ddp.training.floor import EntropyFloor
from entropy_ddp.training.recorder import RolloutRecorder

__all__ = ["EntropyFloor", "EntropyProbeCallback", "RolloutRecorder"]
