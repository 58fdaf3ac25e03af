"""Training: a step, many steps, one rank of a run."""

from typing import Any

from glm3kit.config.groups import LoraConfig, TrainConfig

__all__ = ["LoraConfig", "TrainConfig", "fit"]


def __getattr__(name: str) -> Any:
    if name == "fit":  # the circle through lora and checkpoint: it goes with the next step
        from glm3kit.train.run import fit

        return fit
    raise AttributeError(f"module 'glm3kit.train' has no attribute {name!r}")
