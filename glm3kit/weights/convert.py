"""Converting weights from any form to any other, and checking the result again: `glm3kit convert`.

`mindspore` writes MindFormers 1.1's names, `hf` the published ones (for the official code), `hf-glm` those of
Transformers' own GLM, which Transformers and vLLM load without remote code. Everything is checked before anything is
written; a few megabytes are in memory at a time.

    convert_weights("chatglm3-6b", "glm3_6b.ckpt")
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from glm3kit.config.groups import ModelConfig, read_published
from glm3kit.config.load import load_config
from glm3kit.errors import CheckpointError
from glm3kit.text.tokenizer import ChatGLM3Tokenizer
from glm3kit.weights.hf_glm import PUBLISHED_STOP_IDS, chatglm_config, glm_config, tokenizer_files
from glm3kit.weights.hub_files import READERS
from glm3kit.weights.manifest import MANIFEST, read_manifest, sha256
from glm3kit.weights.names import fused_rows, glm_names, parameter_shapes
from glm3kit.weights.read import Weights, read_weights, shape_faults
from glm3kit.weights.tensors import FLOATS, Tensors, TensorSpec, cast_tensors
from glm3kit.weights.write import destination_faults, published_tensors, write_weights

FORMS = ("mindspore", "hf", "hf-glm")
CASTS = ("keep", "float16", "bfloat16", "float32")
HUB_SHARD = 2 * 10**9  # bytes: as the hub's files are
PUBLISHED_WINDOW = 8192  # tokens, in the config.json of ChatGLM3-6B
# What stands beside published weights and belongs to them: the tokenizer, and the code that `auto_map` names.
COMPANIONS = ("tokenizer.model", "tokenizer_config.json", "generation_config.json", "configuration_chatglm.py",
              "modeling_chatglm.py", "tokenization_chatglm.py", "quantization.py")


def glm_tensors(weights: Tensors, cfg: ModelConfig) -> Tensors:
    """Weights under the names of Transformers' GLM, with query, key and value apart."""
    specs: dict[str, TensorSpec] = {}
    rows: dict[str, tuple[str, slice]] = {}
    for name, spec in weights.specs.items():
        parts = glm_names(name)
        lengths = fused_rows(cfg) if len(parts) > 1 else spec.shape[:1]
        for part, length, end in zip(parts, lengths, accumulate(lengths), strict=True):
            specs[part] = TensorSpec(spec.dtype, (length, *spec.shape[1:]))
            rows[part] = name, slice(end - length, end)
    return Tensors(specs, lambda part: weights[rows[part][0]][rows[part][1]], {"format": "pt"})


def _as_published(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json for these sizes; that of 6B has the window it was published with, not that of a training."""
    window = {"seq_length": PUBLISHED_WINDOW} if parameter_shapes(cfg) == parameter_shapes(ModelConfig()) else {}
    return cfg.to_hf() | window


def _find_config(src: Path, config: str | Path | None, specs: Mapping[str, TensorSpec]) -> tuple[Any, str]:
    """The content of the config.json that belongs to weights, and where it was found; (None, "") if nowhere.

    It is the given one (a config.json, or a configuration of the kit), the one beside the weights, the one that their
    own conversion has kept in the manifest, or that of 6B where they have its shapes.
    """
    folder = src if src.is_dir() else src.parent
    if config is not None and Path(config).suffix != ".json":
        return _as_published(load_config(config).model), str(config)
    path = Path(config) if config is not None else folder / "config.json"
    if config is not None or path.is_file():
        published = read_published(path)
        is_glm = isinstance(published, dict) and published.get("model_type") == "glm"
        return chatglm_config(published, path) if is_glm else published, str(path)
    entries = read_manifest(folder)
    entry = next(iter(entries.values()), {}) if src.is_dir() else entries.get(src.name, {})
    if "config" in entry:
        return entry["config"], str(folder / MANIFEST)
    if {name: spec.shape for name, spec in specs.items()} == parameter_shapes(ModelConfig()):
        return _as_published(ModelConfig()), "ChatGLM3-6B"
    return None, ""


def _shapes_by_name(weights: Weights) -> dict[str, tuple[int, ...]]:
    """What weights without a config.json must be: the names that a ChatGLM3 has, with any shapes."""
    layers = {found[1] for name in weights if (found := re.match(r"transformer\.encoder\.layers\.(\d+)\.", name))}
    shapes = parameter_shapes(ModelConfig(num_layers=max(len(layers), 1)))
    return {name: weights.specs[name].shape if name in weights else shape for name, shape in shapes.items()}


def _find_tokenizer(src: Path, config: str | Path | None, tokenizer: str | Path | None) -> Path | None:
    """The tokenizer.model that belongs to weights: given, named by a configuration of the kit, or beside them."""
    named = load_config(config).model.tokenizer_path if config and Path(config).suffix != ".json" else None
    path = Path(tokenizer or named or (src if src.is_dir() else src.parent))
    path = path / "tokenizer.model" if path.is_dir() else path
    if tokenizer and not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the tokenizer.model of the model")
    return path if path.is_file() else None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _companions(src: Path, to: str, cfg: ModelConfig, published: Mapping[str, Any], dtype: str,
                tokenizer: Path | None) -> dict[str, bytes]:
    """The files beside the shards: config.json, and for `hf` and `hf-glm` the tokenizer and what belongs to it."""
    config, files = published, {}
    if to == "hf":
        folder = src if src.is_dir() else src.parent
        files = {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}
    elif to == "hf-glm":
        stop_ids = ChatGLM3Tokenizer(tokenizer).stop_ids if tokenizer else PUBLISHED_STOP_IDS
        config = glm_config(cfg, dtype, stop_ids)
        files = tokenizer_files(tokenizer) if tokenizer else {}
        files["generation_config.json"] = _json({key: config[key] for key in ("eos_token_id", "pad_token_id")})
    if tokenizer and to != "mindspore":
        files["tokenizer.model"] = tokenizer.read_bytes()
    return files | {"config.json": _json(config)}


def _source_faults(src: Path, dst: Path, weights: Weights, cfg: ModelConfig | None, where: str, to: str) -> list[str]:
    """Why weights are not those of a ChatGLM3 of these sizes (any, without `cfg`), or cannot become `to` at `dst`."""
    shapes, by = (parameter_shapes(cfg), Path(where).name) if cfg else (_shapes_by_name(weights), "ChatGLM3")
    faults = shape_faults(weights.specs, shapes, by)
    faults += [f"'{name}' is {spec.dtype}, no weight; expected one of {', '.join(FLOATS)}"
               for name, spec in weights.specs.items() if spec.dtype not in FLOATS]
    if not cfg and to != "mindspore":
        faults.append(f"no config.json beside {src}, and it has not the shapes of 6B; name the configuration of the "
                      "model with --config (config=)")
    if dst.resolve() == src.resolve() or dst.resolve() in src.resolve().parents:
        faults.append(f"{dst}: is or holds the source; give another name")
    return faults


def convert_weights(src: str | Path, dst: str | Path, to: str = "mindspore", dtype: str = "keep", *,
                    max_shard_size: int | None = None, config: str | Path | None = None,
                    tokenizer: str | Path | None = None, force: bool = False, progress: bool = True) -> Path:
    """Convert weights of any form that `read_weights` reads into another.

    src: as for `read_weights`.
    dst: for "mindspore" a file that ends with .ckpt or .safetensors, or with `max_shard_size` (bytes) a folder; for
    "hf" and "hf-glm" a folder. An existing one is replaced only with `force`.
    dtype: "keep", or the type to cast to: "float16", "bfloat16", "float32". Values that become infinite are counted, in
    a warning and in the manifest.
    config: the config.json or the kit's configuration of the model, where none is beside `src`.
    tokenizer: the tokenizer.model to write with "hf" and "hf-glm", where none is beside `src`.
    Everything is checked before anything is written; `dst` appears whole or not at all, with a manifest.json beside it
    (in it, for a folder). Returns the path of the result.
    Raises CheckpointError with all faults: missing, surplus and wrong-shaped tensors, an existing destination, no room.
    Example: convert_weights("chatglm3-6b", "glm3_6b.ckpt", dtype="float32")
    """
    src, dst = Path(src), Path(dst)
    for name, value, known in (("to", to, FORMS), ("dtype", dtype, CASTS)):
        if value not in known:
            raise CheckpointError(f"{name}={value!r}: expected one of {', '.join(known)}")
    if to != "mindspore":
        max_shard_size = max_shard_size or HUB_SHARD
    weights = read_weights(src)
    published, where = _find_config(src, config, weights.specs)
    cfg = ModelConfig.from_published(published, where) if where else None
    overflows: Counter[str] = Counter()
    tensors = cast_tensors(weights, dtype, overflows)
    faults = _source_faults(src, dst, weights, cfg, where, to)
    if faults := faults + destination_faults(dst, tensors.nbytes, bool(max_shard_size), force):
        raise CheckpointError(f"{src}: nothing was converted: " + "\n".join(faults))

    about = {"source": str(src), "to": to, "dtype": dtype, "overflows": overflows}
    beside = {}
    if cfg:
        stored = next(iter(tensors.specs.values())).dtype
        vocabulary = _find_tokenizer(src, config, tokenizer)
        about["config"] = published if dtype == "keep" else published | {"torch_dtype": stored}
        beside = _companions(src, to, cfg, about["config"], stored, vocabulary)
        if to == "hf":
            tensors = published_tensors(tensors, cfg)
        elif to == "hf-glm":
            tensors = cast_tensors(glm_tensors(weights, cfg), dtype, overflows)
            if not vocabulary:
                warnings.warn(f"{dst}: written without a tokenizer, none is beside {src}; name it with --tokenizer "
                              "(tokenizer=)", stacklevel=2)
    write_weights(dst, tensors, max_shard_size=max_shard_size, about=about, beside=beside, force=force,
                  progress=progress)
    if overflows:
        warnings.warn(f"{dst}: {overflows.total()} values in {len(overflows)} tensors are beyond {dtype} and became "
                      f"infinite, most in '{overflows.most_common(1)[0][0]}'; keep the type that they have",
                      stacklevel=2)
    return dst


def verify_weights(path: str | Path, *, progress: bool = True) -> int:
    """Read a result of `convert` or `merge` again and compare it with its manifest; returns the number of tensors.

    path: the file, with manifest.json beside it, or the folder, with manifest.json in it.
    Raises CheckpointError with every tensor that is missing, surplus, of another type or shape, or has another
    checksum, and for a file that the manifest does not know.
    Example: verify_weights("models/glm3_6b.safetensors") -> 199
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = read_manifest(folder)
    names = sorted(files) if path.is_dir() else [path.name]
    if not names or not set(names) <= set(files):
        raise CheckpointError(f"{path}: {folder / MANIFEST} says nothing of it; it was not written by convert or merge")
    opened = {name: READERS[Path(name).suffix](folder / name) for name in names}

    def fault(name: str, tensor: str) -> str | None:
        written, spec = files[name]["tensors"].get(tensor), opened[name].specs.get(tensor)
        if not spec:
            return f"'{tensor}' is missing in {name}"
        if not written:
            return f"'{tensor}' in {name} is not in the manifest"
        if (written["dtype"], tuple(written["shape"])) != spec:
            return (f"'{tensor}' in {name} is {spec.dtype} {list(spec.shape)}, was written as {written['dtype']} "
                    f"{written['shape']}")
        if sha256(opened[name], tensor) != written["sha256"]:
            return f"'{tensor}' in {name} has other values than were written"
        return None

    tensors = [(name, tensor) for name in names for tensor in {**files[name]["tensors"], **opened[name].specs}]
    with ThreadPoolExecutor() as pool:
        found = list(tqdm(pool.map(fault, *zip(*tensors, strict=True)), path.name, len(tensors), unit=" tensors",
                          disable=not progress))
    if faults := list(filter(None, found)):
        raise CheckpointError(f"{path}: {len(faults)} faults against {folder / MANIFEST}:\n  " + "\n  ".join(faults) +
                              "\nconvert again from the source")
    return len(tensors)
