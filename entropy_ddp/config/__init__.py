"""A run's configuration: its schema, and how it is read."""

from entropy_ddp.config.jobs import gradient_dot_obstacle, require_job
from entropy_ddp.config.reading import load_config, to_yaml, validated, with_sections
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
    Prompts,
    Reward,
    Sample,
    Section,
    Update,
)

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
    "gradient_dot_obstacle",
    "load_config",
    "require_job",
    "to_yaml",
    "validated",
    "with_sections",
]
