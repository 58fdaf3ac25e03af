"""ChatGLM3's weights: the published and MindSpore's names, reading, converting, loading into a model.

Names and shapes: MindFormers 1.1's checkpoints and the published `modeling_chatglm.py`. A file is mapped into memory
and a tensor is read when it is needed, so 12 GB of weights need the memory of one tensor.

    convert_weights("chatglm3-6b", "glm3_6b.ckpt")
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from math import sqrt
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from glm3kit.ckpt_file import read_ckpt, write_ckpt
from glm3kit.config import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.files import atomic_write
from glm3kit.safetensors_file import read_safetensors, write_safetensors
from glm3kit.tensors import FLOATS, Tensors, TensorSpec, cast

if TYPE_CHECKING:
    from glm3kit.model import ChatGLM3

EMBEDDING = "transformer.embedding.embedding_table"
OUTPUT = "transformer.output_layer.weight"
HF_EMBEDDING = "transformer.embedding.word_embeddings.weight"
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"  # constants that the model computes itself
NEWER_EMBEDDING = "transformer.embedding.embedding_weight"  # MindFormers 1.2 and later
# What MindFormers' training adds to a checkpoint: optimizer state, counters.
TRAINING_STATE = re.compile(r"(adam_m|adam_v|accu_grads)\..*|global_step|step_num|epoch_num|learning_rate|loss_scale|"
                            r"(current|last_overflow)_iterator_step")
HUB_INDEX = "model.safetensors.index.json"
READ_FORMS = ("read are a hub folder of .safetensors with its index, a .safetensors file, MindSpore's .ckpt, "
              "and a folder of either")
CASTS = ("keep", "float16", "bfloat16", "float32")


def mindspore_name(hf_name: str) -> str:
    """The name in MindSpore of a published (or later MindFormers) name; others stay as they are.

    Example: "transformer.embedding.word_embeddings.weight" -> "transformer.embedding.embedding_table"
    """
    return EMBEDDING if hf_name in (HF_EMBEDDING, NEWER_EMBEDDING) else hf_name


def hf_name(ms_name: str) -> str:
    """The published name of a MindSpore name: the way back of `mindspore_name`."""
    return HF_EMBEDDING if ms_name == EMBEDDING else ms_name


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a ChatGLM3 with its shape, in the order of the model; 7 a layer and 3.

    Example: "transformer.embedding.embedding_table" -> (65024, 4096)
    """
    C, F = cfg.hidden_size, cfg.ffn_hidden_size
    heads = cfg.num_attention_heads * cfg.kv_channels
    fused = heads + 2 * cfg.multi_query_group_num * cfg.kv_channels  # query of all heads, key and value of the groups
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (cfg.padded_vocab_size, C)}
    for layer in range(cfg.num_layers):
        shapes |= {f"transformer.encoder.layers.{layer}.{name}": shape for name, shape in {
            "input_layernorm.weight": (C,),
            "self_attention.query_key_value.weight": (fused, C),
            "self_attention.query_key_value.bias": (fused,),
            "self_attention.dense.weight": (C, heads),
            "post_attention_layernorm.weight": (C,),
            "mlp.dense_h_to_4h.weight": (2 * F, C),  # gate and up
            "mlp.dense_4h_to_h.weight": (C, F),
        }.items()}
    return shapes | {"transformer.encoder.final_layernorm.weight": (C,), OUTPUT: (cfg.padded_vocab_size, C)}


def _index_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards that an index names, and which of them should hold each tensor."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        raise CheckpointError(f"{index}: no index of weights: {err!r}; expected "
                              '{"weight_map": {"tensor name": "file name"}}; get the file again') from err
    if outside:
        raise CheckpointError(f"{index}: names a file outside its folder: {', '.join(outside)}; "
                              "do not use weights of this source")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} files are not in the folder: "
                              f"{', '.join(missing)}; get them too")
    return [index.parent / name for name in names], weight_map


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that make up the weights at `path`, and what an index says of them."""
    if path.is_file() and path.suffix in (".safetensors", ".ckpt"):
        return [path], {}
    if path.is_dir():
        if (path / HUB_INDEX).is_file():
            return _index_files(path / HUB_INDEX)
        for suffix in (".safetensors", ".ckpt"):
            if files := sorted(path.glob(f"*{suffix}")):
                return files, {}
        found = sorted(file.name for file in path.iterdir())
        what = f"holds no weights of these forms, but {', '.join(found[:10]) or 'nothing'}"
    elif path.exists():
        what = f"weights in the form '{path.suffix}' are not read"
    else:
        what = "no such file or folder"
    raise CheckpointError(f"{path}: {what}; {READ_FORMS}")


class Weights(Tensors):
    """Lazy weights under MindSpore's names.

    origin: name -> (file, name there).
    dropped: what the files hold beside the weights, left out on purpose: rotary constants, optimizer state.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], read: Callable[[str], np.ndarray],
                 origin: Mapping[str, tuple[Path, str]], dropped: Iterable[str]):
        super().__init__(specs, read)
        self.origin = dict(origin)
        self.dropped = tuple(dropped)


def read_weights(path: str | Path) -> Weights:
    """Open weights of any form: a mapping of MindSpore names to arrays, each read when it is asked for.

    path: hub folder with `model.safetensors.index.json`, a folder of .safetensors or .ckpt, or one such file.
    bfloat16 arrays have the type `glm3kit.tensors.BFLOAT16`; `glm3kit.tensors.cast` gives numbers.
    Raises CheckpointError for files that are missing, cut off, damaged or of another form, an index that names a file
    outside its folder, and tensors that are missing from their shard or stand in two files.
    Example: read_weights("chatglm3-6b").specs["transformer.output_layer.weight"].shape
    """
    path = Path(path)
    files, weight_map = _weight_files(path)
    opened = {file: (read_ckpt if file.suffix == ".ckpt" else read_safetensors)(file) for file in files}
    faults = [f"'{name}' is not in {file}, where the index has it" for name, file in weight_map.items()
              if name not in opened[path / file]]
    specs: dict[str, TensorSpec] = {}
    origin: dict[str, tuple[Path, str]] = {}
    dropped = []
    for file, tensors in opened.items():
        for stored, spec in tensors.specs.items():
            name = mindspore_name(stored)
            if name == INV_FREQ or TRAINING_STATE.fullmatch(name):
                dropped.append(stored)
            elif name in origin:
                faults.append(f"'{name}' is both in {origin[name][0].name} and in {file.name}; "
                              "keep one, or give the path of one file")
            else:
                specs[name], origin[name] = spec, (file, stored)
    if faults:
        raise CheckpointError(f"{path}: {len(faults)} faults\n  " + "\n  ".join(faults))

    def read(name: str) -> np.ndarray:
        file, stored = origin[name]
        return opened[file][stored]

    return Weights(specs, read, origin, dropped)


def _check(path: Path, specs: Mapping[str, TensorSpec], expected: Mapping[str, tuple[int, ...]], by: str) -> None:
    """Compare weights with the shapes that `by` asks for; raise CheckpointError that lists every difference."""
    faults = [f"missing: '{name}' {list(shape)}" for name, shape in expected.items() if name not in specs]
    faults += [f"surplus: '{name}' {list(spec.shape)}" for name, spec in specs.items() if name not in expected]
    faults += [f"shape: '{name}' is {list(specs[name].shape)}, expected {list(shape)}"
               for name, shape in expected.items() if name in specs and specs[name].shape != shape]
    if not faults:
        return
    advice = f"use the weights and {by} of one model"
    stored, wanted = specs.get(EMBEDDING), expected.get(EMBEDDING)
    if stored and wanted and stored.shape[:1] != wanted[:1]:
        advice = (f"the weights have a vocabulary of {stored.shape[0]} rows, {by} asks for {wanted[0]}: "
                  f"set padded_vocab_size to {stored.shape[0]}, or use weights of this vocabulary")
    raise CheckpointError(f"{path}: {len(faults)} tensors do not fit {by}:\n  " + "\n  ".join(faults) + f"\n{advice}")


def _expected_shapes(path: Path, weights: Weights) -> tuple[dict[str, tuple[int, ...]], str]:
    """What the weights must be: by the config.json beside them, else by the names that a ChatGLM3 has."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if config.is_file():
        return parameter_shapes(ModelConfig.from_hf(config)), config.name
    layers = {found[1] for name in weights if (found := re.match(r"transformer\.encoder\.layers\.(\d+)\.", name))}
    shapes = parameter_shapes(ModelConfig(num_layers=max(len(layers), 1)))
    return {name: weights.specs[name].shape if name in weights else shape for name, shape in shapes.items()}, "ChatGLM3"


def _check_destination(path: Path, force: bool) -> None:
    if path.suffix not in (".ckpt", ".safetensors"):
        raise CheckpointError(f"{path}: the name of the result says its form; end it with .ckpt or .safetensors")
    if path.exists() and not force:
        raise CheckpointError(f"{path}: exists already; give another name, or force=True to replace it")


def write_weights(path: str | Path, tensors: Tensors, *, force: bool = False, progress: bool = True) -> Path:
    """Write tensors to one .ckpt or .safetensors file, read one at a time, with a progress bar in bytes.

    Raises CheckpointError for another suffix, and for a file that exists already unless `force` is set.
    """
    path = Path(path)
    _check_destination(path, force)
    with tqdm(total=tensors.nbytes, unit="B", unit_scale=True, desc=path.name, disable=not progress) as bar:
        def read(name: str) -> np.ndarray:
            array = tensors[name]
            bar.update(array.nbytes)
            return array

        counted = Tensors(tensors.specs, read)
        if path.suffix == ".ckpt":
            write_ckpt(path, counted)
        else:
            write_safetensors(path, counted, {"format": "ms"})
    return path


def convert_weights(src: str | Path, dst: str | Path, to: str = "mindspore", dtype: str = "keep", *,
                    force: bool = False, progress: bool = True) -> Path:
    """Convert weights of any form that `read_weights` reads into one file with MindSpore's names.

    src: as for `read_weights`; a config.json beside the weights is what their shapes are checked against.
    dst: a path that ends with .ckpt or .safetensors; an existing one is replaced only with `force`.
    dtype: "keep", or the type to cast to: "float16", "bfloat16", "float32".
    Everything is checked before anything is written; a tensor is in memory at a time; `dst` appears whole or not at
    all. Returns the path of the result.
    Raises CheckpointError with every missing, surplus and wrong-shaped tensor.
    Example: convert_weights("chatglm3-6b", "glm3_6b.ckpt", dtype="float32")
    """
    src, dst = Path(src), Path(dst)
    if to != "mindspore":
        raise CheckpointError(f"to={to!r}: weights are written as 'mindspore'")
    if dtype not in CASTS:
        raise CheckpointError(f"dtype={dtype!r}: expected one of {', '.join(CASTS)}")
    _check_destination(dst, force)
    weights = read_weights(src)
    _check(src, weights.specs, *_expected_shapes(src, weights))

    def target(spec: TensorSpec) -> TensorSpec:
        return spec if dtype == "keep" or spec.dtype not in FLOATS else TensorSpec(dtype, spec.shape)

    def read(name: str) -> np.ndarray:
        return weights[name] if dtype == "keep" else cast(weights[name], dtype, name)

    tensors = Tensors({name: target(spec) for name, spec in weights.specs.items()}, read)
    return write_weights(dst, tensors, force=force, progress=progress)


def load_weights(net: "ChatGLM3", path: str | Path) -> None:
    """Load weights of any form that `read_weights` reads into a model, cast to the types of its parameters.

    Under tensor parallelism each rank takes its slices.
    Raises CheckpointError, before anything is loaded, with every parameter that is missing or of another shape and
    every surplus tensor.
    Example: load_weights(net, "chatglm3-6b")
    """
    path = Path(path)
    weights = read_weights(path)
    _check(path, weights.specs, parameter_shapes(net.cfg), "the model")
    fill_parameters(net, weights)


def fill_parameters(net: "ChatGLM3", weights: Mapping[str, np.ndarray]) -> None:
    """Set every parameter of a model to its (slice of a) whole tensor."""
    import mindspore as ms  # here, so that reading and converting weights need no MindSpore

    from glm3kit.model import slicing

    topology = net.topology
    for name, parameter in net.parameters_dict().items():
        values, cut = weights[name], slicing(name, net.cfg)
        if cut and topology.tensor_parallel > 1:
            values = cut.part(values, topology.tensor_rank, topology.tensor_parallel)
        if parameter.dtype == ms.bfloat16:  # through float32, which holds every bfloat16
            values = ms.Tensor(cast(values, "float32", name)).astype(ms.bfloat16)
        else:
            values = ms.Tensor(cast(values, str(parameter.dtype).lower(), name))
        parameter.copy_(values)  # in place: compiled graphs hold on to the memory they were compiled with


def random_weights(cfg: ModelConfig, seed: int) -> Tensors:
    """Weights to start training from, with MindSpore's names, drawn when they are asked for.

    Matrices are normal with deviation 0.02 (residual outputs less), norms one, biases zero, all in `cfg.param_dtype`.
    """
    specs = {name: TensorSpec(cfg.param_dtype, shape) for name, shape in parameter_shapes(cfg).items()}
    order = list(specs)

    def read(name: str) -> np.ndarray:
        shape = specs[name].shape
        if name.endswith("norm.weight"):
            values = np.ones(shape)
        elif name.endswith(".bias"):
            values = np.zeros(shape)
        else:
            # Two residual branches a layer add up; scaled so, their sum keeps its size (GPT-2's initialization).
            branch = name.endswith(("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"))
            scale = 0.02 / sqrt(2 * cfg.num_layers) if branch else 0.02
            values = np.random.default_rng([seed, order.index(name)]).standard_normal(shape, np.float32) * scale
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
    weights = random_weights(cfg, seed)
    half = cfg.kv_channels // 2  # half a head is rotated, in pairs
    inv_freq = cast(1 / 10000 ** (np.arange(0, half, 2) / half), cfg.param_dtype)
    specs = {hf_name(name): spec for name, spec in weights.specs.items()}
    specs[INV_FREQ] = TensorSpec(cfg.param_dtype, inv_freq.shape)
    tensors = Tensors(specs, lambda name: inv_freq if name == INV_FREQ else weights[mindspore_name(name)])
    weight_map, position = {}, 0
    for name, spec in tensors.specs.items():  # the second shard begins in the middle, counted in bytes
        shard = 1 + (2 * position >= tensors.nbytes)
        weight_map[name] = f"model-{shard:05d}-of-00002.safetensors"
        position += spec.nbytes
    for file in sorted(set(weight_map.values())):
        specs = {name: tensors.specs[name] for name in tensors if weight_map[name] == file}
        write_safetensors(folder / file, Tensors(specs, tensors.__getitem__), {"format": "pt"})
    index = {"metadata": {"total_size": tensors.nbytes}, "weight_map": weight_map}
    atomic_write(folder / "config.json", json.dumps(cfg.to_hf(), indent=2) + "\n")
    if tokenizer is not None:
        atomic_write(folder / "tokenizer.model", Path(tokenizer).read_bytes())
    atomic_write(folder / HUB_INDEX, json.dumps(index, indent=2) + "\n")
    return folder
