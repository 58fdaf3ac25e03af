"""Weights into a model: of any form, whole or this rank's slices, with adapters folded in.

    net = AutoModel.from_config(load_config("run.yaml").model)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mindspore as ms
import numpy as np

from glm3kit.checkpoint.merge import read_adapters
from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.model.layers import _draws
from glm3kit.weights.adapters import fold_adapters
from glm3kit.weights.names import parameter_shapes
from glm3kit.weights.read import read_weights, shape_faults
from glm3kit.weights.slices import slicing
from glm3kit.weights.tensors import cast, release


def load_weights(net: ChatGLM3, path: str | Path, adapters: str | Path | None = None) -> None:
    """Load weights of any form that `read_weights` reads into a model, cast to the types of its parameters.

    adapters: LoRA adapters to fold in: a file, a checkpoint or a job.
    Under tensor parallelism each rank takes its slices.
    Raises CheckpointError, before anything is loaded, with every parameter that is missing or of another shape and
    every surplus tensor.
    Example: load_weights(net, "chatglm3-6b")
    """
    weights = read_weights(path)
    if faults := shape_faults(weights.specs, parameter_shapes(net.cfg), "the model"):
        raise CheckpointError(f"{path}: " + "\n".join(faults))
    if adapters:
        weights = fold_adapters(read_adapters(adapters), weights, str(adapters), net.cfg.param_dtype)
    fill_parameters(net, weights)


def fill_parameters(net: ChatGLM3, weights: Mapping[str, np.ndarray]) -> None:
    """Set every parameter of a model but adapters to its (slice of a) whole tensor."""
    topology, parameters = net.topology, net.parameters_dict()
    for name in parameter_shapes(net.cfg):
        values, parameter, cut = weights[name], parameters[name], slicing(name, net.cfg)
        stored = values
        if cut and topology.tensor_parallel > 1:
            values = cut.part(values, topology.tensor_rank, topology.tensor_parallel)
        if parameter.dtype == ms.bfloat16:  # through float32, which holds every bfloat16
            values = ms.Tensor(cast(values, "float32", name)).astype(ms.bfloat16)
        else:
            values = ms.Tensor(cast(values, str(parameter.dtype).lower(), name))
        parameter.copy_(values)  # in place: compiled graphs hold on to the memory they were compiled with
        release(stored)


@contextmanager
def undrawn_weights() -> Iterator[None]:
    """Build models without drawing random weights, where others come at once: to draw those of 6B takes minutes."""
    token = _draws.set(False)
    try:
        yield
    finally:
        _draws.reset(token)


class AutoModel:
    """The name that MindFormers' scripts use for building a model."""

    @staticmethod
    def from_config(config: ModelConfig) -> ChatGLM3:
        """A ChatGLM3 with the weights (and adapters) that the configuration names; random ones where it names none."""
        if not config.checkpoint_name_or_path:
            return ChatGLM3(config)
        with undrawn_weights():
            net = ChatGLM3(config)
        load_weights(net, config.checkpoint_name_or_path, config.adapters_path)
        return net
