"""Live in a trainer: what each optimizer step of a run changes, while it trains."""

from entropy_ddp.training.callback import EntropyProbeCallback

__all__ = ["EntropyProbeCallback"]
