"""A model with the weights that a path or a configuration names, of any form, with adapters folded in.

    net = AutoModel.from_config(load_config("run.yaml").model)
"""

from pathlib import Path

from glm3kit.checkpoint.merge import read_adapters
from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import ALONE, Topology
from glm3kit.weights.adapters import fold_adapters
from glm3kit.weights.names import parameter_shapes
from glm3kit.weights.random import random_weights
from glm3kit.weights.read import read_weights, shape_faults
from glm3kit.weights.tensors import Tensors


def fitting_weights(cfg: ModelConfig, path: str | Path, adapters: str | Path | None = None) -> Tensors:
    """Open weights of any form that `read_weights` reads, and check that they are those of a model of these sizes.

    adapters: LoRA adapters to fold in: a file, a checkpoint or a job.
    Raises CheckpointError with every parameter that is missing or of another shape and every surplus tensor.
    """
    weights = read_weights(path)
    if faults := shape_faults(weights.specs, parameter_shapes(cfg), "the model"):
        raise CheckpointError(f"{path}: " + "\n".join(faults))
    if adapters:
        return fold_adapters(read_adapters(adapters), weights, str(adapters), cfg.param_dtype)
    return weights


def load_weights(net: ChatGLM3, path: str | Path, adapters: str | Path | None = None) -> None:
    """Load weights into a model, cast to the types of its parameters; under tensor parallelism the rank's slices.

    Path, adapters and errors are those of `fitting_weights`; nothing is loaded where something does not fit.
    """
    net.fill(fitting_weights(net.cfg, path, adapters))


class AutoModel:
    """The name that MindFormers' scripts use for building a model."""

    @staticmethod
    def from_config(config: ModelConfig, topology: Topology = ALONE, seed: int = 0) -> ChatGLM3:
        """A ChatGLM3 with the weights (and adapters) that the configuration names; random ones where it names none."""
        path = config.checkpoint_name_or_path
        return ChatGLM3(config, topology,
                        fitting_weights(config, path, config.adapters_path) if path else random_weights(config, seed))
