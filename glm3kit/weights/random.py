"""Random weights: what a model starts from where none are given, and a hub folder of them to try things with.

    net = ChatGLM3(cfg, weights=random_weights(cfg, seed=0))
"""

import json
from itertools import accumulate
from math import sqrt
from pathlib import Path

import numpy as np

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.files import atomic_write
from glm3kit.weights.formats.safetensors import write_safetensors
from glm3kit.weights.hub_files import cut_into_shards, index_name, index_text
from glm3kit.weights.names import parameter_shapes
from glm3kit.weights.tensors import Tensors, TensorSpec, cast
from glm3kit.weights.write import published_tensors

HUB_INDEX = index_name(".safetensors")


def random_weights(cfg: ModelConfig, seed: int) -> Tensors:
    """Weights to start training from, with MindSpore's names, drawn when they are asked for.

    Matrices are normal with deviation 0.02 (residual outputs less), norms one, biases zero, all in `cfg.param_dtype`.
    Each tensor is drawn whole by the seed and its number in the model, so that slices of it are the same in any layout.
    """
    specs = {name: TensorSpec(cfg.param_dtype, shape) for name, shape in parameter_shapes(cfg).items()}

    def read(name: str) -> np.ndarray:
        shape = specs[name].shape
        if name.endswith("norm.weight"):
            values = np.ones(shape, np.float32)
        elif name.endswith(".bias"):
            values = np.zeros(shape, np.float32)
        else:
            # Two residual branches a layer add up; scaled so, their sum keeps its size (GPT-2's initialization).
            branch = name.endswith(("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"))
            scale = 0.02 / sqrt(2 * cfg.num_layers) if branch else 0.02
            values = np.random.default_rng([seed, list(specs).index(name)]).standard_normal(shape, np.float32)
            values *= np.float32(scale)  # in place: the tables of 6B are 1 GB each
        return cast(values, cfg.param_dtype, name)

    return Tensors(specs, read)


def write_random_hub_weights(cfg: ModelConfig, folder: str | Path, seed: int = 0, *,
                             tokenizer: str | Path | None = None, force: bool = False) -> Path:
    """Write random weights in the published hub form: config.json, two .safetensors shards with index, tokenizer.model.

    The weights are those of `random_weights`: the same seed gives the same files.
    tokenizer: a tokenizer.model to copy beside them.
    Raises CheckpointError if the folder holds weights already and `force` is not set.
    Example: write_random_hub_weights(load_config("configs/tiny.yaml").model, "output/hub", seed=0)
    """
    folder = Path(folder)
    if (folder / HUB_INDEX).exists() and not force:
        raise CheckpointError(f"{folder}: holds weights already; give another folder, or force=True to replace them")
    (folder / HUB_INDEX).unlink(missing_ok=True)  # written last: where it is, the weights are whole
    tensors = published_tensors(random_weights(cfg, seed), cfg)
    ends = list(accumulate(spec.nbytes for spec in tensors.specs.values()))
    middle = next(end for end in ends if 2 * end >= ends[-1])  # bytes, of whole tensors
    shards = cut_into_shards(tensors.specs, middle, ".safetensors")
    for file, names in shards.items():
        write_safetensors(folder / file, tensors.select(names), tensors.metadata)
    atomic_write(folder / "config.json", json.dumps(cfg.to_hf(), indent=2) + "\n")
    if tokenizer is not None:
        atomic_write(folder / "tokenizer.model", Path(tokenizer).read_bytes())
    atomic_write(folder / HUB_INDEX, index_text(tensors.specs, shards))
    return folder
