"""Tokens from a model: what is likely, what is chosen, and the loop around both."""

from glm3kit.generate.sampling import sampling_probabilities

__all__ = ["sampling_probabilities"]
