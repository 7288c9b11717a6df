"""Spatial understanding in image generation: preference pairs, a reward model, and reinforcement learning."""

__version__ = "0.1.0"
