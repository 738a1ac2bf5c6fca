"""A run's configuration: its schema, and how it is read."""

from entropy_ddp.config.reading import load_config, to_yaml, validated
from entropy_ddp.config.sampling import Prompts, Reward, Sample
from entropy_ddp.config.schema import (
    BatchSource,
    Checkpoint,
    Compute,
    Config,
    GradientDot,
    ImportanceMode,
    Integrand,
    Loss,
    Normalize,
    Precision,
    Update,
)
from entropy_ddp.config.section import Section

__all__ = [
    "BatchSource",
    "Checkpoint",
    "Compute",
    "Config",
    "GradientDot",
    "ImportanceMode",
    "Integrand",
    "Loss",
    "Normalize",
    "Precision",
    "Prompts",
    "Reward",
    "Sample",
    "Section",
    "Update",
    "load_config",
    "to_yaml",
    "validated",
]
