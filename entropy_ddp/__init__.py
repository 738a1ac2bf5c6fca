"""Measure how much one reinforcement-learning update changes a policy's entropy."""

__version__ = "0.1.0"
