"""The groups of a configuration: every setting with its default, once, and what settings ask of each other.

The defaults of `model` are the published config.json of ChatGLM3-6B; those of `train` are MindFormers 1.1's
`run_glm3_6b*.yaml`.

    config = RunConfig(data={"train_path": "train.json"}, train={"batch_size": 2})
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from glm3kit.config.faults import validated
from glm3kit.errors import ConfigError
from glm3kit.files import atomic_write

Dtype = Literal["float32", "float16", "bfloat16"]
Count = Annotated[int, Field(ge=1)]
LoraTarget = Literal["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]  # the matrices of a layer
Paths = Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]
Ids = Annotated[tuple[Annotated[int, Field(strict=True)], ...], Field(strict=False),
                BeforeValidator(lambda v: (v,) if isinstance(v, int) else v)]
ROW_KEYS = {"train_path", "max_source_length", "max_target_length", "max_seq_length"}  # of data; the window follows
# What all ChatGLM3 models have in common, as their config.json says it; another value is another model.
ARCHITECTURE = {"rmsnorm": True, "add_bias_linear": False, "add_qkv_bias": True, "multi_query_attention": True,
                "post_layer_norm": True, "apply_residual_connection_post_layernorm": False, "original_rope": True}


def read_published(path: str | Path) -> Any:
    """The content of a config.json; raises ConfigError if there is none, or no JSON in it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ConfigError(f"{path}: no such file; expected the config.json of the hub folder") from err
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(f"{path}: cannot be read as JSON ({err}); download the file again") from err


class Group(BaseModel):
    """Base of the groups: no unknown keys, no silent conversion of types, no change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class ModelConfig(Group):
    """Sizes and types of a ChatGLM3; field names are those of the published config.json."""

    num_layers: Count = 28
    padded_vocab_size: Count = 65024
    hidden_size: Count = 4096
    ffn_hidden_size: Count = 13696
    kv_channels: Count = 128  # size of one attention head
    num_attention_heads: Count = 32
    multi_query_group_num: Count = 2  # key/value heads
    layernorm_epsilon: float = Field(1e-5, gt=0)
    seq_length: Count = 2048  # tokens of the window
    param_dtype: Dtype = "float16"
    compute_dtype: Dtype = "float16"
    use_flash_attention: bool = False  # on Ascend, in float16 or bfloat16; a CPU computes the same without
    checkpoint_name_or_path: str | None = None  # a weights file or folder
    adapters_path: str | None = None  # LoRA adapters to fold into those weights: a file, a checkpoint or a job
    tokenizer_path: str | None = None

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelConfig":
        if self.num_attention_heads % self.multi_query_group_num:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is no multiple of "
                             f"multi_query_group_num {self.multi_query_group_num}")
        if self.use_flash_attention and self.compute_dtype == "float32":
            raise ValueError("use_flash_attention is true, but compute_dtype is float32; the operator takes float16 "
                             "and bfloat16")
        if self.kv_channels % 4:
            raise ValueError(f"kv_channels {self.kv_channels} is no multiple of 4: half a head is rotated, in pairs")
        return self

    @classmethod
    def from_hf(cls, path: str | Path, **changes: Any) -> "ModelConfig":
        """Read a published config.json; `changes` replace single fields.

        Raises ConfigError for a missing file, a file of another model, or an architecture that ChatGLM3 does not have.
        Example: ModelConfig.from_hf("chatglm3-6b/config.json", compute_dtype="float32")
        """
        return cls.from_published(read_published(path), path, **changes)

    @classmethod
    def from_published(cls, published: Any, path: str | Path, **changes: Any) -> "ModelConfig":
        """The sizes in the content of a published config.json; `path` is where it stood, for messages."""
        model_type = published.get("model_type") if isinstance(published, dict) else None
        if model_type != "chatglm":
            raise ConfigError(f"{path}: model_type is {model_type!r}, expected 'chatglm'; "
                              "give the config.json of a ChatGLM3 model")
        other = [f"{key} {published[key]} (expected {value})" for key, value in ARCHITECTURE.items()
                 if published.get(key, value) != value]
        if other:
            raise ConfigError(f"{path}: not ChatGLM3's architecture: {', '.join(other)}")
        fields = {key: published[key] for key in cls.model_fields if key in published}
        dtype = published.get("torch_dtype", "float16")
        return validated(cls, {"param_dtype": dtype, "compute_dtype": dtype} | fields | changes, {}, str(path))

    def to_hf(self) -> dict[str, Any]:
        """The content of the published config.json for these sizes; `from_hf` reads it back, the official code too."""
        own = self.model_dump(exclude={"param_dtype", "compute_dtype", "use_flash_attention",
                                       "checkpoint_name_or_path", "adapters_path", "tokenizer_path"})
        return {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "torch_dtype": self.param_dtype,
                **own, **ARCHITECTURE, "hidden_dropout": 0.0, "attention_dropout": 0.0, "bias_dropout_fusion": True,
                "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True,
                "fp32_residual_connection": False, "quantization_bit": 0, "pre_seq_len": None,
                "prefix_projection": False, "eos_token_id": 2, "pad_token_id": 0, "use_cache": True,
                "tie_word_embeddings": False}


class DataConfig(Group):
    """Where the rows are and how long they may get; lengths in tokens."""

    train_path: Paths = ()
    eval_path: Paths = ()
    origin_columns: Annotated[tuple[str, str], Field(strict=False)] = ("content", "summary")  # source, target
    max_source_length: Count = 64
    max_target_length: Count = 127
    max_seq_length: Count | None = None  # for conversations only; else the sum of the two above and 1
    tools_indent: int | None = Field(4, ge=0)  # null: MindFormers' form, 4: the chat prompt's form
    skip_bad: bool = False
    # Lengths besides seq_length that a batch may be padded to; a graph is compiled for each.
    bucket_lengths: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    packing: bool = False  # several short rows in one, each computed as if it stood alone

    @model_validator(mode="after")
    def _check_buckets(self) -> "DataConfig":
        lengths = self.bucket_lengths
        if list(lengths) != sorted(set(lengths)) or (lengths and lengths[-1] >= self.seq_length):
            raise ValueError(f"bucket_lengths {list(lengths)} do not rise and stay below seq_length {self.seq_length}, "
                             "which is the last one by itself")
        return self

    @property
    def seq_length(self) -> int:
        """Tokens of a training row: max_source_length + max_target_length + 1, unless max_seq_length says otherwise."""
        return self.max_seq_length or self.max_source_length + self.max_target_length + 1

    @property
    def names_rows(self) -> bool:
        """Whether rows or their lengths were given, so that `seq_length` is more than a default."""
        return not ROW_KEYS.isdisjoint(self.model_fields_set)

    @property
    def row_rule(self) -> str:
        """The sum of an ADGEN row, for messages."""
        return (f"max_source_length {self.max_source_length} + max_target_length {self.max_target_length} + 1 = "
                f"{self.max_source_length + self.max_target_length + 1}")


class LoraConfig(Group):
    """Adapters beside frozen matrices; MindFormers' LoRA configurations also set dropout 0.1."""

    rank: Count = 8
    alpha: float = Field(32.0, gt=0)  # what an adapter adds is scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # of an adapter's input
    targets: Annotated[tuple[LoraTarget, ...], Field(strict=False, min_length=1)] = ("query_key_value",)
    adapters_only: bool = False  # checkpoints leave the frozen weights out; merge then reads them where they came from


class TrainConfig(Group):
    """Optimizer, schedule and saving; AdamW and a polynomial of power 1 as in MindFormers' GLM3 configurations."""

    batch_size: Count = 4  # rows a device and micro-step
    epochs: Count = 1
    total_steps: Count | None = None  # default: all steps of all epochs
    gradient_accumulation_steps: Count = 1
    learning_rate: float = Field(5e-5, ge=0)
    end_learning_rate: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(0, ge=0)
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # not on biases and norms
    max_grad_norm: float | None = Field(1.0, gt=0)  # null: no clipping
    loss_scale: float | Literal["dynamic"] | None = None  # "dynamic": 65536, factor 2, window 1000
    recompute: bool = False  # each layer's forward pass again in the backward pass: less memory, more time
    lora: LoraConfig | None = None  # train adapters alone; null: all weights
    seed: int = Field(0, ge=0)
    save_steps: Count | None = None  # default: at the end only
    keep_checkpoints: Count = 1
    log_steps: Count = 1
    eval_steps: Count | None = None  # measure the loss on data.eval_path every so many steps; default: never
    hang_timeout_s: float | None = Field(1800.0, gt=0)  # no step for so long ends the job; null: wait for ever


class ParallelConfig(Group):
    """How many processes train together, one a device: data_parallel x tensor_parallel."""

    data_parallel: Count = 1  # see different rows
    tensor_parallel: Count = 1  # share each matrix
    shard_optimizer: bool = True  # ranks that see different rows share optimizer state and gradients
    device_target: Literal["auto", "CPU", "Ascend"] = "auto"
    peak_tflops: float | None = Field(None, gt=0)  # of a device, in compute_dtype: for model FLOP utilisation

    @property
    def ranks(self) -> int:
        return self.data_parallel * self.tensor_parallel


def _plain(value: Any) -> Any:
    """What is NumPy's, or a list of NumPy's numbers, as Python's."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


class GenerateConfig(Group):
    """How to generate; lengths in tokens, and every limit that is given holds. A description says what is in range.

    `model_dump` leaves out eos_token_id unless it was set, so that a tokenizer's own stop ids can take its place.
    """

    max_length: int | None = Field(None, ge=1, description="at least 1, or None")  # prompt and answer; None: the window
    max_new_tokens: int | None = Field(None, ge=1, description="at least 1, or None")  # of the answer
    do_sample: bool = Field(False, description="True or False")  # draw tokens; else always the most likely one
    temperature: FiniteFloat = Field(1.0, gt=0, description="above 0 (do_sample=False takes the most likely token)")
    top_k: int = Field(0, ge=0, description="at least 0 (0: all tokens)")
    top_p: FiniteFloat = Field(1.0, gt=0, le=1, description="above 0, at most 1")
    # Above 1.0 makes tokens of prompt and answer less likely (https://arxiv.org/abs/1909.05858).
    repetition_penalty: FiniteFloat = Field(1.0, gt=0, description="above 0 (1.0: none)")
    # An id or several that end an answer, and are part of it: </s>, <|user|>, <|observation|>.
    eos_token_id: Ids = Field((2, 64795, 64797), description="an id, a list of ids, or [] for none")
    # Makes draws repeatable; a row's draws depend on the seed and its place in the batch.
    seed: int | None = Field(None, ge=0, description="at least 0, or None")
    # Above 1 searches for the most likely answer with so many beams.
    num_beams: int = Field(1, ge=1, description="at least 1 (1: no beam search), and 1 with do_sample")
    length_penalty: FiniteFloat = Field(1.0, description="a number")  # of beams: above 0 longer answers gain
    # The search ends with the first num_beams answers (True), when no better one is likely (False) or possible.
    early_stopping: bool | Literal["never"] = Field(False, description="True, False or 'never'")

    @field_validator("num_beams")
    @classmethod
    def _check_beams(cls, value: int, others: ValidationInfo) -> int:
        if value > 1 and others.data.get("do_sample"):
            raise ValueError(f"num_beams is {value}, expected 1 with do_sample")
        return value

    @model_serializer(mode="wrap")
    def _leave_out_unset_stop_ids(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = dump(self)
        if "eos_token_id" not in self.model_fields_set:
            del values["eos_token_id"]
        return values

    @classmethod
    def checked(cls, **settings: Any) -> "GenerateConfig":
        """Settings as a call gives them, NumPy's numbers and arrays too.

        Raises ConfigError with every one that is out of its range, or unknown.
        """
        try:
            return cls(**{name: _plain(value) for name, value in settings.items()})
        except ValidationError as err:
            names = dict.fromkeys(item["loc"][0] for item in err.errors())  # a union has several errors
            faults = [f"{name} is {settings[name]!r}, expected {cls.model_fields[name].description}"
                      if name in cls.model_fields else f"{name} is unknown, expected {', '.join(cls.model_fields)}"
                      for name in names]
            raise ConfigError("generate: " + "; ".join(faults)) from err


class RunConfig(Group):
    """Everything a run is made of. `model.seq_length` is derived from `data` where `data` names rows or lengths."""

    name: str = Field("run", pattern=r"^[\w.-]+$")
    output_dir: str = "output"
    data: DataConfig = DataConfig()  # before model, whose window follows from it
    model: ModelConfig = Field(ModelConfig(), validate_default=True)
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    generate: GenerateConfig = GenerateConfig()

    @field_validator("model")
    @classmethod
    def _derive_seq_length(cls, model: ModelConfig, info: ValidationInfo) -> ModelConfig:
        data = info.data.get("data")  # of the fields before this one; none where it has a fault
        if data is None or not data.names_rows or "seq_length" in model.model_fields_set:
            return model
        return model.model_copy(update={"seq_length": data.seq_length})

    @model_validator(mode="after")
    def _check_conflicts(self) -> "RunConfig":
        """What settings of different groups ask of each other."""
        model, data, faults = self.model, self.data, []
        if data.max_seq_length and {"max_source_length", "max_target_length"} <= data.model_fields_set:
            if data.max_seq_length != data.max_source_length + data.max_target_length + 1:
                faults.append(f"data.max_seq_length is {data.max_seq_length}, but {data.row_rule}; give one or the "
                              "other")
        if data.names_rows and model.seq_length != data.seq_length:
            rule = f"max_seq_length is {data.max_seq_length}" if data.max_seq_length else data.row_rule
            faults.append(f"model.seq_length is {model.seq_length}, but in data {rule}; leave model.seq_length out (it "
                          "is derived), or change the lengths in data")
        adapters_only = self.train.lora and self.train.lora.adapters_only
        if model.checkpoint_name_or_path is None and (model.adapters_path or adapters_only):
            faults.append(f"{'model.adapters_path' if model.adapters_path else 'train.lora.adapters_only'} is set, but "
                          "model.checkpoint_name_or_path names no weights to fold adapters into; set it too")
        if self.train.eval_steps and not data.eval_path:
            faults.append("train.eval_steps is set, but data.eval_path names no held-out rows; give some, or leave "
                          "eval_steps out")
        ranks = self.parallel.tensor_parallel
        if uneven := self._uneven(ranks):
            fits = [n for n in range(1, model.num_attention_heads + 1) if not self._uneven(n)]
            faults.append(f"parallel.tensor_parallel is {ranks}, which does not divide {', '.join(uneven)}; these "
                          f"would do: {', '.join(map(str, fits))}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _uneven(self, ranks: int) -> list[str]:
        """The sizes that so many ranks cannot share evenly; several ranks may hold the same key/value group."""
        keys = ("num_attention_heads", "multi_query_group_num", "ffn_hidden_size", "padded_vocab_size")
        return [f"{key} {size}" for key in keys if (size := getattr(self.model, key)) % ranks
                and not (key == "multi_query_group_num" and ranks % size == 0)]

    @property
    def job_dir(self) -> Path:
        """The folder of the run: output_dir/name."""
        return Path(self.output_dir) / self.name

    def save(self, path: str | Path) -> None:
        """Write the complete configuration as YAML that `load_config` reads back equal; paths become absolute."""
        unset = None if self.data.names_rows else {"data": ROW_KEYS}  # once written, defaults would look given
        values = absolute_paths(self.model_dump(mode="json", exclude=unset), Path.cwd())
        atomic_write(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def absolute_paths(value: Any, folder: Path, key: str = "") -> Any:
    """A parsed value with its paths made absolute from `folder`: what stands at a key ..._path, and output_dir."""
    if isinstance(value, dict):
        return {name: absolute_paths(item, folder, name) for name, item in value.items()}
    if isinstance(value, list):
        return [absolute_paths(item, folder, key) for item in value]
    if isinstance(value, str) and key.endswith(("_path", "output_dir")):
        return str((folder / os.path.expanduser(value)).resolve())  # Path.expanduser raises where there is no such user
    return value
