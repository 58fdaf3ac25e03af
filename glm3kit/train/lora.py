"""LoRA: small adapters are trained beside frozen matrices, saved alone, and folded into them.

What an adapter consists of, and adds to its matrix: weights/adapters.py (https://arxiv.org/abs/2106.09685).

    history = fit(net, batches, TrainConfig(lora=LoraConfig(rank=8))); save_adapters(net, "adapters.safetensors")
"""

from math import sqrt
from pathlib import Path
from typing import get_args

import numpy as np
from mindspore import Parameter, Tensor

from glm3kit.config.groups import LoraConfig, LoraTarget
from glm3kit.errors import ConfigError
from glm3kit.model.adapter import Adapter, Dropout, mask_key
from glm3kit.model.chatglm3 import ChatGLM3, ColumnParallelLinear, RowParallelLinear
from glm3kit.weights.adapters import ADAPTER, fold_adapters, is_adapter
from glm3kit.weights.formats.safetensors import write_safetensors
from glm3kit.weights.slices import slicing
from glm3kit.weights.tensors import Tensors, cast

Linear = ColumnParallelLinear | RowParallelLinear


def adapted_linears(net: ChatGLM3, targets: tuple[str, ...] = get_args(LoraTarget)) -> dict[str, Linear]:
    """The matrices that `targets` name in every layer (by default all), by the part of their names before `.weight`."""
    return {linear.weight.name.removesuffix(".weight"): linear
            for layer in net.transformer.encoder.layers
            for linear in (layer.self_attention.query_key_value, layer.self_attention.dense,
                           layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h)
            if linear.weight.name.split(".")[-2] in targets}


def add_adapters(net: ChatGLM3, lora: LoraConfig, seed: int = 0) -> None:
    """Freeze a model and put adapters beside the matrices that `lora.targets` names; those it has already stay.

    A is uniform in +-1/sqrt(in) (Kaiming's, as peft), drawn by `seed` whatever the layout; B is zero, so the model's
    answers stay what they are. Adapters are float32, whatever the type of the weights.
    Raises ConfigError if the model has adapters of other settings.
    """
    topology = net.topology
    ranks = {name: p.shape[0] for name, p in net.parameters_dict().items() if name.endswith(".lora_a")}
    linears = adapted_linears(net, lora.targets)
    if ranks and ranks != {f"{name}.lora_a": lora.rank for name in linears}:
        raise ConfigError(f"the model has adapters already, on {sorted(ranks)[:2]} ... of rank "
                          f"{next(iter(ranks.values()))}; expected {', '.join(lora.targets)} and rank {lora.rank}: "
                          "fold them with merge_adapters(net), or train them on with their own settings")
    for parameter in net.get_parameters():
        parameter.requires_grad = parameter.name.endswith((".lora_a", ".lora_b"))
    if ranks:
        return
    key = mask_key()
    for index, (name, linear) in enumerate(linears.items()):
        out_size, in_size = linear.weight.shape
        cut = slicing(f"{name}.lora_a", net.cfg)
        whole_in = cut.segments[0] if cut else in_size
        rng = np.random.default_rng([seed, index])
        a = rng.uniform(-1, 1, (lora.rank, whole_in)).astype(np.float32) / np.float32(sqrt(whole_in))
        b = np.zeros((out_size, lora.rank), np.float32)
        parameters = [Parameter(Tensor(topology.slice_of(a, cut))), Parameter(Tensor(b)),
                      Parameter(Tensor(np.float32(lora.alpha)), requires_grad=False)]
        dropout = Dropout(lora.dropout, key, index, topology, sliced=cut is not None) if lora.dropout else None
        linear.adapter = Adapter(*parameters, dropout, linear.dtype, linear.exchange)
        for parameter, suffix in zip(parameters, ADAPTER, strict=True):
            parameter.name = name + suffix


def dropout_key(net: ChatGLM3) -> Parameter | None:
    """What the masks of a model's adapters depend on (see glm3kit.model.adapter), None where they drop nothing."""
    adapters = (linear.adapter for linear in adapted_linears(net).values() if linear.adapter)
    return next((adapter.dropout.key for adapter in adapters if adapter.dropout), None)


def save_adapters(net: ChatGLM3, path: str | Path) -> Path:
    """Write the adapters of a model alone, a few megabytes, to a .safetensors file; `load_weights` folds them in."""
    if net.topology.tensor_parallel > 1:
        raise ConfigError("save_adapters: this rank holds slices; save a checkpoint and merge it with adapters=True")
    adapters = {name: p.asnumpy() for name, p in net.parameters_dict().items() if is_adapter(name)}
    if not adapters:
        raise ConfigError("save_adapters: the model has no adapters; train with TrainConfig(lora=LoraConfig(...))")
    return write_safetensors(path, adapters, {"format": "ms"})


def merge_adapters(net: ChatGLM3) -> None:
    """Fold a model's adapters into its weights, in place, and take them away: it is a plain model again."""
    if net.topology.tensor_parallel > 1:
        raise ConfigError("merge_adapters: this rank holds slices; save a checkpoint and merge it")
    held = {name: cast(p.float().asnumpy().copy(), str(p.dtype).lower()) for name, p in net.parameters_dict().items()}
    for linear in adapted_linears(net).values():
        linear.adapter = None
    for parameter in net.get_parameters():
        parameter.requires_grad = True
    net.fill(fold_adapters(Tensors.of(held)))


def saved_parameters(net: ChatGLM3, lora: LoraConfig | None) -> list[Parameter]:
    """What a checkpoint holds of a model: all parameters, or the adapters alone where `lora` asks for that."""
    adapters_only = lora is not None and lora.adapters_only
    return [p for p in net.get_parameters() if not adapters_only or is_adapter(p.name)]
