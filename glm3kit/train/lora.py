"""LoRA: small adapters are trained beside frozen matrices, saved alone, and folded into them.

Beside a matrix W (out, in) stand `lora_a` (rank, in), `lora_b` (out, rank) and `lora_alpha` (); the three say all there
is to know: W' = W + lora_alpha / rank * lora_b @ lora_a (https://arxiv.org/abs/2106.09685). So no setting can be
forgotten when a checkpoint is merged.

    history = fit(net, batches, TrainConfig(lora=LoraConfig(rank=8))); save_adapters(net, "adapters.safetensors")
"""

from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from glm3kit.config.groups import LoraConfig, LoraTarget
from glm3kit.errors import CheckpointError, ConfigError
from glm3kit.weights.formats.safetensors import read_safetensors, write_safetensors
from glm3kit.weights.tensors import Tensors, TensorSpec, cast, cut

if TYPE_CHECKING:
    from mindspore import Parameter

    from glm3kit.model.chatglm3 import ChatGLM3
    from glm3kit.model.layers import Linear

ADAPTER = (".lora_a", ".lora_b", ".lora_alpha")


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to an adapter."""
    return name.endswith(ADAPTER)


def adapted_linears(net: "ChatGLM3", targets: tuple[str, ...] = get_args(LoraTarget)) -> dict[str, "Linear"]:
    """The matrices that `targets` name in every layer (by default all), by the part of their names before `.weight`."""
    return {linear.weight.name.removesuffix(".weight"): linear
            for layer in net.transformer.encoder.layers
            for linear in (layer.self_attention.query_key_value, layer.self_attention.dense,
                           layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h)
            if linear.weight.name.split(".")[-2] in targets}


def add_adapters(net: "ChatGLM3", lora: LoraConfig, seed: int = 0) -> None:
    """Freeze a model and put adapters beside the matrices that `lora.targets` names; those it has already stay.

    A is uniform in +-1/sqrt(in) (Kaiming's, as peft), drawn by `seed` whatever the layout; B is zero, so the model's
    answers stay what they are. Adapters are float32, whatever the type of the weights.
    Raises ConfigError if the model has adapters of other settings.
    """
    from mindspore import Parameter, Tensor

    from glm3kit.model.chatglm3 import slicing
    from glm3kit.model.dropout import Dropout, mask_key
    from glm3kit.model.layers import Adapter

    topology = net.topology
    has = {name: tuple(p.shape) for name, p in net.parameters_dict().items() if name.endswith(".lora_a")}
    linears = adapted_linears(net, lora.targets)
    wanted = {f"{name}.lora_a" for name in linears}
    if has and (set(has) != wanted or any(shape[0] != lora.rank for shape in has.values())):
        raise ConfigError(f"the model has adapters already, on {sorted(has)[:2]} ... of rank "
                          f"{next(iter(has.values()))[0]}; expected {', '.join(lora.targets)} and rank {lora.rank}: "
                          "fold them with merge_adapters(net), or train them on with their own settings")
    for parameter in net.get_parameters():
        parameter.requires_grad = parameter.name.endswith((".lora_a", ".lora_b"))
    if has:
        return
    key = mask_key()
    for place, (name, linear) in enumerate(linears.items()):
        out_size, in_size = linear.weight.shape
        cut = slicing(f"{name}.lora_a", net.cfg)
        whole_in = cut.segments[0] if cut else in_size
        rng = np.random.default_rng([seed, place])
        a = rng.uniform(-1, 1, (lora.rank, whole_in)).astype(np.float32) / np.float32(sqrt(whole_in))
        if cut:
            a = cut.part(a, topology.tensor_rank, topology.tensor_parallel)
        b = np.zeros((out_size, lora.rank), np.float32)
        parameters = [Parameter(Tensor(a)), Parameter(Tensor(b)),
                      Parameter(Tensor(np.float32(lora.alpha)), requires_grad=False)]
        dropout = Dropout(lora.dropout, key, place, topology, sliced=cut is not None) if lora.dropout else None
        linear.adapter = Adapter(*parameters, dropout, linear.dtype, linear.copy or linear.sum)
        for parameter, suffix in zip(parameters, ADAPTER, strict=True):
            parameter.name = name + suffix


def dropout_key(net: "ChatGLM3") -> "Parameter | None":
    """What the masks of a model's adapters depend on (see glm3kit.model.dropout), None where they drop nothing."""
    adapters = (linear.adapter for linear in adapted_linears(net).values() if linear.adapter)
    return next((adapter.dropout.key for adapter in adapters if adapter.dropout), None)


def _update(adapters: Mapping[str, np.ndarray], matrix: str) -> np.ndarray:
    """What an adapter adds to its matrix, float32 (out, in)."""
    a, b, alpha = (cast(adapters[matrix + suffix], "float32") for suffix in ADAPTER)
    return (b @ a) * (alpha / len(a))


def _check_whole(adapters: Mapping[str, object], origin: str) -> list[str]:
    """The matrices that adapters belong to; raises CheckpointError where one of the three tensors is missing."""
    matrices = sorted({name.rpartition(".")[0] for name in adapters if is_adapter(name)})
    missing = [matrix + suffix for matrix in matrices for suffix in ADAPTER if matrix + suffix not in adapters]
    if missing:
        raise CheckpointError(f"{origin}: adapters lack {', '.join(missing[:3])}; expected lora_a, lora_b and "
                              "lora_alpha of every matrix; save them again")
    return matrices


def fold_adapters(tensors: Tensors, base: Tensors | None = None, origin: str = "weights",
                  dtype: str | None = None) -> Tensors:
    """Weights with their adapters folded in; a matrix is computed when it is asked for.

    tensors: adapters and weights, or the adapters of `base`. Weights without adapters stay as they are.
    dtype: type of the others, by default their own.
    Raises CheckpointError if an adapter is not whole, or its matrix is missing or of another shape.
    """
    matrices = _check_whole(tensors.specs, origin)
    weights = base or tensors
    faults = []
    for matrix in matrices:
        spec = weights.specs.get(f"{matrix}.weight")
        shape = tensors.specs[f"{matrix}.lora_b"].shape[0], tensors.specs[f"{matrix}.lora_a"].shape[1]
        if spec is None or spec.shape != shape:
            faults.append(f"'{matrix}.weight' is {list(spec.shape) if spec else 'missing'}, its adapter is for a "
                          f"matrix {list(shape)}")
    if faults:
        raise CheckpointError(f"{origin}: adapters do not fit the weights:\n  " + "\n  ".join(faults) +
                              "\ngive the weights that they were trained beside")
    folded = {f"{matrix}.weight": matrix for matrix in matrices}
    specs = {name: TensorSpec(dtype, spec.shape) if dtype and name in folded else spec
             for name, spec in weights.specs.items() if not is_adapter(name)}

    def read(name: str) -> np.ndarray:
        if name not in folded:
            return weights[name]
        return cast(cast(weights[name], "float32") + _update(tensors, folded[name]), specs[name].dtype, name)

    return Tensors(specs, read, weights.metadata,
                   lambda name: cut(read(name)) if name in folded else weights.pieces(name))


def read_adapters(path: str | Path) -> Tensors:
    """The adapters of a .safetensors file, a job (its newest checkpoint) or a checkpoint, without weights beside them.

    Raises CheckpointError where there are none.
    """
    path = Path(path)
    if path.is_dir():
        from glm3kit.checkpoint.merge import merged_tensors

        stored = merged_tensors(path)
    else:
        stored = read_safetensors(path)
    specs = {name: spec for name, spec in stored.specs.items() if is_adapter(name)}
    if not specs:
        raise CheckpointError(f"{path}: holds no adapters (lora_a, lora_b, lora_alpha), but "
                              f"{', '.join(list(stored)[:3])}; name plain weights as checkpoint_name_or_path")
    return Tensors(specs, stored.__getitem__)


def save_adapters(net: "ChatGLM3", path: str | Path) -> Path:
    """Write the adapters of a model alone, a few megabytes, to a .safetensors file; `load_weights` folds them in."""
    if net.topology.tensor_parallel > 1:
        raise ConfigError("save_adapters: this rank holds slices; save a checkpoint and merge it with adapters=True")
    adapters = {name: p.asnumpy() for name, p in net.parameters_dict().items() if is_adapter(name)}
    if not adapters:
        raise ConfigError("save_adapters: the model has no adapters; train with TrainConfig(lora=LoraConfig(...))")
    write_safetensors(Path(path), adapters, {"format": "ms"})
    return Path(path)


def merge_adapters(net: "ChatGLM3") -> None:
    """Fold a model's adapters into its weights, in place, and take them away: it is a plain model again."""
    from glm3kit.weights.read import fill_parameters

    if net.topology.tensor_parallel > 1:
        raise ConfigError("merge_adapters: this rank holds slices; save a checkpoint and merge it")
    held = {name: cast(p.float().asnumpy().copy(), str(p.dtype).lower()) for name, p in net.parameters_dict().items()}
    for linear in adapted_linears(net).values():
        linear.adapter = None
    for parameter in net.get_parameters():
        parameter.requires_grad = True
    fill_parameters(net, fold_adapters(Tensors.of(held)))


def saved_parameters(net: "ChatGLM3", lora: LoraConfig | None) -> "list[Parameter]":
    """What a checkpoint holds of a model: all parameters, or the adapters alone where `lora` asks for that."""
    adapters_only = lora is not None and lora.adapters_only
    return [p for p in net.get_parameters() if not adapters_only or is_adapter(p.name)]
