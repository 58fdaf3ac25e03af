"""The memory that training needs on a device, from a configuration: parameters and their state, activations, buffers.

Parameters and state: ZeRO (https://arxiv.org/abs/1910.02054, section 3.1), state and gradients sharded over the ranks
that see different rows. Activations: what the backward pass of our layers reads again, counted as in
https://arxiv.org/abs/2205.05198, section 4; with recomputation each layer keeps its input alone (section 5). For
MindFormers' GLM2-6B on Ascend 910A, 8 x 193 tokens a device in float16, 25.2 GB (all weights, recomputed, 8 devices)
and 22.38 GB (LoRA, not recomputed, 4 devices) were published; test_memory.py holds the estimate to 15 % of both.

    print(memory_table(estimate_memory(load_config("configs/run_glm3_6b.yaml"))))
"""

from math import prod

from glm3kit.config.groups import ModelConfig, RunConfig
from glm3kit.weights.names import EMBEDDING
from glm3kit.weights.slices import slice_shapes
from glm3kit.weights.tensors import DTYPES

FLOAT32 = 4  # bytes
# Bytes of two buffers a group of ranks: HCCL_BUFFSIZE is 200 MB, one to send and one to receive.
COMMUNICATION = 2 * 200 * 2**20


def parameter_count(cfg: ModelConfig, ranks: int = 1) -> int:
    """Parameters that one of `ranks` tensor-parallel ranks holds.

    Example: ChatGLM3-6B, 1 rank -> 6,243,584,000
    """
    return sum(map(prod, slice_shapes(cfg, ranks).values()))


def _matrices(config: RunConfig) -> dict[str, tuple[int, int]]:
    """What a rank holds of the matrices of a layer, (out, in), by the names that LoraConfig.targets has for them."""
    shapes = slice_shapes(config.model, config.parallel.tensor_parallel)
    return {name.split(".")[-2]: shape for name, shape in shapes.items() if ".layers.0." in name and len(shape) == 2}


def adapter_count(config: RunConfig) -> int:
    """Parameters of the LoRA adapters that a rank holds: rank x (in + out) a matrix."""
    lora, matrices = config.train.lora, _matrices(config)
    return config.model.num_layers * lora.rank * sum(sum(matrices[target]) for target in lora.targets)


def layer_activations(config: RunConfig) -> int:
    """Bytes that a layer keeps for its backward pass, without recomputation.

    A token (c: bytes of the computing type; C, Q, K, F: sizes): the input of two norms, 4C each; of each matrix that is
    trained cC, cQ, cC or cF (of an adapter, what dropout left of it and its mask, too); query, key and value
    c(Q + 2K), the output of attention cQ; gate, up and silu(gate) 3cF. A head and a pair of tokens: the softmax, c;
    flash attention keeps two rows of 8 float32 a head and token instead.
    """
    cfg, train, matrices = config.model, config.train, _matrices(config)
    c, C = DTYPES[cfg.compute_dtype].itemsize, cfg.hidden_size
    fused, Q, F = matrices["query_key_value"][0], matrices["dense"][1], matrices["dense_4h_to_h"][1]
    trained, dropped = tuple(matrices), 0
    if train.lora:
        trained, dropped = train.lora.targets, c + 1 if train.lora.dropout else 0
    flash = cfg.use_flash_attention and config.parallel.device_target != "CPU"
    heads = Q // cfg.kv_channels * (2 * 8 * FLOAT32 if flash else cfg.seq_length * c)
    inputs = sum(matrices[name][1] * (c + dropped) for name in trained)
    token = 2 * FLOAT32 * C + inputs + c * fused + c * Q + 3 * c * F + heads
    return train.batch_size * cfg.seq_length * token


def estimate_memory(config: RunConfig) -> dict[str, int]:
    """Bytes of a device by what they are for, at the largest moment of a training step; their sum is what it needs.

    weights: in their type, this rank's slice; adapters in float32. masters, moments (AdamW's two), gradients: float32,
    of what is trained, shards where the optimizer is sharded; one rank's float32 weights are their own masters.
    activations: kept by all layers, with the weights in the computing type where that is another one. passing: the
    largest of what is there for a moment only: the softmax of the loss with its gradient, a whole gradient on its way
    into its shard, a layer that is recomputed. communication: buffers of the groups of ranks.
    """
    cfg, train, parallel = config.model, config.train, config.parallel
    c, C = DTYPES[cfg.compute_dtype].itemsize, cfg.hidden_size
    V, F = slice_shapes(cfg, parallel.tensor_parallel)[EMBEDDING][0], _matrices(config)["dense_4h_to_h"][1]
    held = parameter_count(cfg, parallel.tensor_parallel)
    trained = adapter_count(config) if train.lora else held
    shards = parallel.data_parallel if parallel.shard_optimizer else 1
    shard = -(-trained // shards)
    own_masters = shards == 1 and (train.lora is not None or cfg.param_dtype == "float32")

    tokens, layer = train.batch_size * cfg.seq_length, layer_activations(config)
    casts = held * c if cfg.param_dtype != cfg.compute_dtype and not train.recompute else 0
    passing = 0 if train.lora else c + FLOAT32  # bytes of a gradient until it is in its shard: as computed, as summed
    moments = {"softmax of the logits, labels, gradient": tokens * V * 3 * FLOAT32,
               "gradient of the output layer": tokens * V * c + V * C * passing,
               "recomputed layer and its largest gradient": (layer if train.recompute else 0) + 2 * F * C * passing}
    groups = 0
    if parallel.ranks > 1 and parallel.device_target != "CPU":  # HCCL's buffers; a CPU has none
        groups = 3 if parallel.data_parallel > 1 and parallel.tensor_parallel > 1 else 1
    return {"weights": held * DTYPES[cfg.param_dtype].itemsize + (trained * FLOAT32 if train.lora else 0),
            "masters": 0 if own_masters else shard * FLOAT32, "moments": 2 * shard * FLOAT32,
            "gradients": shard * FLOAT32,
            "activations": casts + cfg.num_layers * (c * tokens * C if train.recompute else layer),
            "passing": max(moments.values()), "communication": groups * COMMUNICATION}


def memory_table(parts: dict[str, int]) -> str:
    """The parts and their sum in GB (10^9 bytes), a line each."""
    return "\n".join(f"{name:<14}{size / 1e9:8.2f} GB" for name, size in [*parts.items(), ("sum", sum(parts.values()))])
