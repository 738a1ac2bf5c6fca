"""Live in a trainer: what each optimizer step of a run changes, while it trains."""

from entropy_ddp.training.callback import EntropyProbeCallback
from entropy_ddp.training.recorder import RolloutRecorder

__all__ = ["EntropyProbeCallback", "RolloutRecorder"]
