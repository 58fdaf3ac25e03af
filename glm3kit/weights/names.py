"""What the tensors of a ChatGLM3 are called, and how they are shaped, in each of the forms that exist.

The kit's own names are MindFormers 1.1's. The published ones (`modeling_chatglm.py`) differ in the embedding. Later
MindFormers renamed the embedding again and may store the fused matrices in parts, `wq`, `wk`, `wv` and `dense_left`,
`dense_right` (its script `convert_weight.py` for GLM2 and GLM3). Transformers' own GLM (`modeling_glm.py`) has Llama's
names and separate query, key and value. All cuts are along the first axis: the parts one after the other are the whole.

    part_of("transformer.encoder.layers.0.self_attention.wk.bias").name
"""

import re
from typing import NamedTuple

from glm3kit.config.groups import ModelConfig

EMBEDDING = "transformer.embedding.embedding_table"
OUTPUT = "transformer.output_layer.weight"
HF_EMBEDDING = "transformer.embedding.word_embeddings.weight"
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"  # constants that the model computes itself
NEWER_EMBEDDING = "transformer.embedding.embedding_weight"  # MindFormers 1.2 and later
# What MindFormers' training adds to a checkpoint: optimizer state, counters.
TRAINING_STATE = re.compile(r"(adam_m|adam_v|accu_grads)\..*|global_step|step_num|epoch_num|learning_rate|loss_scale|"
                            r"(current|last_overflow)_iterator_step")
LAYER = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
GLM_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Within a layer: the parts of fused tensors in later MindFormers, and what Transformers' GLM calls each tensor.
NEWER_LAYER = {"self_attention.query_key_value": ("self_attention.wq", "self_attention.wk", "self_attention.wv"),
               "mlp.dense_h_to_4h": ("mlp.dense_left", "mlp.dense_right")}
GLM_LAYER = {"input_layernorm": ("input_layernorm",), "post_attention_layernorm": ("post_attention_layernorm",),
             "self_attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
             "self_attention.dense": ("self_attn.o_proj",),
             "mlp.dense_h_to_4h": ("mlp.gate_up_proj",), "mlp.dense_4h_to_h": ("mlp.down_proj",)}
GLM_OTHERS = {EMBEDDING: "model.embed_tokens.weight", "transformer.encoder.final_layernorm.weight": "model.norm.weight",
              OUTPUT: "lm_head.weight"}
WHOLE = {HF_EMBEDDING: EMBEDDING, NEWER_EMBEDDING: EMBEDDING} | {glm: name for name, glm in GLM_OTHERS.items()}
GLM_PARTS, NEWER_PARTS = ({part: (name, index, len(parts)) for name, parts in layer.items()
                           for index, part in enumerate(parts)} for layer in (GLM_LAYER, NEWER_LAYER))


class Part(NamedTuple):
    """What a stored tensor is: part `index` of `count` of the parameter `name`."""

    name: str
    index: int = 0
    count: int = 1


def part_of(stored: str) -> Part:
    """The parameter that a stored tensor of any of the forms is, or is a part of; an unknown name stays as it is.

    Example: "transformer.encoder.layers.0.self_attention.wk.bias" ->
    ("transformer.encoder.layers.0.self_attention.query_key_value.bias", 1, 3)
    """
    if stored in WHOLE:
        return Part(WHOLE[stored])
    for pattern, parts in ((LAYER, NEWER_PARTS), (GLM_LAYER_NAME, GLM_PARTS)):
        if (found := pattern.fullmatch(stored)) and found[2] in parts:
            name, index, count = parts[found[2]]
            return Part(f"transformer.encoder.layers.{found[1]}.{name}.{found[3]}", index, count)
    return Part(stored)


def hf_name(ms_name: str) -> str:
    """The published name of a MindSpore name: the way back of `part_of`."""
    return HF_EMBEDDING if ms_name == EMBEDDING else ms_name


def glm_names(ms_name: str) -> tuple[str, ...]:
    """The names in Transformers' GLM of a parameter: three for query_key_value, one for the others.

    Example: "transformer.output_layer.weight" -> ("lm_head.weight",)
    """
    if ms_name in GLM_OTHERS:
        return (GLM_OTHERS[ms_name],)
    found = LAYER.fullmatch(ms_name)
    assert found, f"{ms_name} is a parameter"
    return tuple(f"model.layers.{found[1]}.{part}.{found[3]}" for part in GLM_LAYER[found[2]])


def fused_rows(cfg: ModelConfig) -> tuple[int, int, int]:
    """The rows of query, key and value in query_key_value.

    Example: 6B -> (4096, 256, 256)
    """
    group = cfg.multi_query_group_num * cfg.kv_channels
    return cfg.num_attention_heads * cfg.kv_channels, group, group


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a ChatGLM3 with its shape, in the order of the model; 7 a layer and 3.

    Example: "transformer.embedding.embedding_table" -> (65024, 4096)
    """
    C, F = cfg.hidden_size, cfg.ffn_hidden_size
    fused = sum(fused_rows(cfg))
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (cfg.padded_vocab_size, C)}
    for layer in range(cfg.num_layers):
        shapes |= {f"transformer.encoder.layers.{layer}.{name}": shape for name, shape in {
            "input_layernorm.weight": (C,),
            "self_attention.query_key_value.weight": (fused, C),
            "self_attention.query_key_value.bias": (fused,),
            "self_attention.dense.weight": (C, cfg.num_attention_heads * cfg.kv_channels),
            "post_attention_layernorm.weight": (C,),
            "mlp.dense_h_to_4h.weight": (2 * F, C),  # gate and up
            "mlp.dense_4h_to_h.weight": (C, F),
        }.items()}
    return shapes | {"transformer.encoder.final_layernorm.weight": (C,), OUTPUT: (cfg.padded_vocab_size, C)}
