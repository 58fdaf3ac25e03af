"""LoRA adapters as tensors: what belongs to one, and folding them into the matrices that they were trained beside.

Beside a matrix W (out, in) stand `lora_a` (rank, in), `lora_b` (out, rank) and `lora_alpha` (); the three say all there
is to know: W' = W + lora_alpha / rank * lora_b @ lora_a (https://arxiv.org/abs/2106.09685). So no setting can be
forgotten when a checkpoint is merged.

    fold_adapters(read_safetensors("adapters.safetensors"), read_weights("chatglm3-6b"))
"""

import numpy as np

from glm3kit.errors import CheckpointError
from glm3kit.weights.tensors import Tensors, TensorSpec, cast, cut

ADAPTER = (".lora_a", ".lora_b", ".lora_alpha")


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to an adapter."""
    return name.endswith(ADAPTER)


def fold_adapters(tensors: Tensors, base: Tensors | None = None, origin: str = "weights",
                  dtype: str | None = None) -> Tensors:
    """Weights with their adapters folded in; a matrix is computed when it is asked for.

    tensors: adapters and weights, or the adapters of `base`. Weights without adapters stay as they are.
    dtype: type of the others, by default their own.
    Raises CheckpointError if an adapter is not whole, or its matrix is missing or of another shape.
    """
    matrices = sorted({name.rpartition(".")[0] for name in tensors if is_adapter(name)})
    missing = [matrix + suffix for matrix in matrices for suffix in ADAPTER if matrix + suffix not in tensors]
    if missing:
        raise CheckpointError(f"{origin}: adapters lack {', '.join(missing[:3])}; expected lora_a, lora_b and "
                              "lora_alpha of every matrix; save them again")
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
        a, b, alpha = (cast(tensors[folded[name] + suffix], "float32") for suffix in ADAPTER)
        return cast(cast(weights[name], "float32") + (b @ a) * (alpha / len(a)), specs[name].dtype, name)

    return Tensors(specs, read, weights.metadata,
                   lambda name: cut(read(name)) if name in folded else weights.blocks(name))
