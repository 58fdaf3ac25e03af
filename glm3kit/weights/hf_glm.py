"""What Transformers and vLLM need beside weights in the names of Transformers' own GLM: its config and tokenizer files.

The configuration's fields are those of `GlmConfig` (transformers/models/glm). The tokenizer is the SentencePiece model
written out in the form of Hugging Face's tokenizers, as convert_slow_tokenizer.py of Transformers does it for Llama,
whose form of BPE it has. The chat template gives the ids of ChatGLM3's `build_chat_input`.

    tokenizer_files(Path("tokenizer.model"))["tokenizer.json"]
"""

import json
from pathlib import Path
from typing import Any

import sentencepiece

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import ConfigError, DataError
from glm3kit.text.tokenizer import SPECIAL_NAMES, ChatGLM3Tokenizer
from glm3kit.weights.formats.protobuf import read_message

PUBLISHED_STOP_IDS = (2, 64795, 64797)  # </s>, <|user|>, <|observation|>
# "sop" would be found in the middle of words by those who look for special tokens in text, "<sop>" will not.
TOKEN_NAMES = {"sop": "<sop>", "eop": "<eop>"}
GLM_FIELDS = {"padded_vocab_size": "vocab_size", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
              "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
              "multi_query_group_num": "num_key_value_heads", "kv_channels": "head_dim",
              "layernorm_epsilon": "rms_norm_eps", "seq_length": "max_position_embeddings"}
BPE = 2  # TrainerSpec.model_type
SPACE = "▁"
# Metadata and content are encoded on their own, each with the space that SentencePiece puts first.
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}
{%- set content = message.content or '' -%}
{%- set tools = message.tools or (tools if loop.first) -%}
{%- if message.role == 'system' and tools -%}
{%- set content = content ~ '\\n' ~ (tools | tojson(indent=4)) -%}
{%- endif -%}
{{ '<|' ~ message.role ~ '|>' ~ (message.metadata or '') ~ '\\n' }}
{%- if content %}{{ ' ' ~ content }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""


def glm_config(cfg: ModelConfig, dtype: str, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    """The content of config.json for Transformers' GlmForCausalLM of these sizes.

    dtype: of the weights. stop_ids: those that end an answer.
    """
    return {"architectures": ["GlmForCausalLM"], "model_type": "glm", "torch_dtype": dtype,
            **{key: getattr(cfg, own) for own, key in GLM_FIELDS.items()},
            "attention_bias": True, "attention_dropout": 0.0, "hidden_act": "silu", "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "use_cache": True, "pad_token_id": 0,
            "eos_token_id": [i for i in stop_ids if i < cfg.padded_vocab_size]}


def chatglm_config(glm: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The content of the published config.json for a GlmForCausalLM: the way back of `glm_config`.

    Raises ConfigError, with `path`, for a GLM that is no ChatGLM3, such as GLM-4 with its other rotary base.
    """
    rotary = glm | (glm.get("rope_parameters") or {})  # where Transformers 5 puts them
    expected = {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "attention_bias": True, "hidden_act": "silu"}
    other = [f"{key} {rotary[key]} (expected {value})" for key, value in expected.items()
             if rotary.get(key, value) != value]
    if other:
        raise ConfigError(f"{path}: not ChatGLM3's architecture: {', '.join(other)}")
    fields = {own: glm[key] for own, key in GLM_FIELDS.items() if key in glm}
    dtype = glm.get("torch_dtype", glm.get("dtype"))
    return ModelConfig.from_published({"model_type": "chatglm", "torch_dtype": dtype} | fields, path).to_hf()


def _check_model(path: Path, proto: bytes) -> None:
    """Refuse a SentencePiece model that Llama's form of BPE does not describe: other algorithms, changed texts."""
    try:
        # of sentencepiece_model.proto what decides how text is split and changed
        model = read_message(proto, slice(0, len(proto)), {2: ("trainer", slice), 3: ("normalizer", slice)})
        trainer = read_message(proto, model["trainer"], {3: ("model_type", int)}, model_type=1)
        normalizer = read_message(proto, model["normalizer"], {
            2: ("character_map", slice), 3: ("add_dummy_prefix", int), 4: ("remove_extra_whitespaces", int)},
            character_map=slice(0, 0), add_dummy_prefix=1, remove_extra_whitespaces=1)
    except ValueError as err:
        raise DataError(f"{path}: not a SentencePiece model ({err}); download the published tokenizer.model") from err
    if (trainer["model_type"] != BPE or proto[normalizer["character_map"]] or not normalizer["add_dummy_prefix"]
            or normalizer["remove_extra_whitespaces"]):
        raise DataError(f"{path}: a SentencePiece model of another kind than ChatGLM3's (BPE without normalization, "
                        "with a space put first); it cannot be written as tokenizer.json")


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Which two pieces make which piece, the first to be applied first: SentencePiece takes the best score."""
    pairs = [(-score, len(piece[:cut]), len(piece[cut:]), piece[:cut], piece[cut:])
             for piece, score in scores.items() for cut in range(1, len(piece))
             if piece[:cut] in scores and piece[cut:] in scores]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _tokenizer_json(pieces: sentencepiece.SentencePieceProcessor, tokenizer: ChatGLM3Tokenizer) -> dict[str, Any]:
    """The tokenizer in the form of the `tokenizers` library; encoding puts [gMASK] and sop first."""
    ids = range(pieces.vocab_size())
    plain = [i for i in ids if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))]
    special = {TOKEN_NAMES.get(name, name): id_ for name, id_ in tokenizer.special_tokens.items()}
    prefix = ("[gMASK]", "<sop>")
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in prefix]
    single.append({"Sequence": {"id": "A", "type_id": 0}})
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": id_, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for name, id_ in special.items()],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {name: {"id": name, "ids": [special[name]], "tokens": [name]} for name in prefix}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {pieces.id_to_piece(i): i for i in ids},
                  "merges": _merges({pieces.id_to_piece(i): pieces.get_score(i) for i in plain})}}


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files of a tokenizer for Transformers and vLLM, made of a tokenizer.model.

    tokenizer.json, tokenizer_config.json and chat_template.jinja. Encoding gives the ids of `ChatGLM3Tokenizer`, and
    the chat template those of its `build_chat_input`. But, as with every tokenizer of this form, the name of a special
    token in a text is taken for the token, unless it is called with split_special_tokens=True.
    Raises DataError for another kind of SentencePiece model.
    """
    tokenizer = ChatGLM3Tokenizer(path)
    proto = path.read_bytes()
    _check_model(path, proto)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "padding_side": "left", "model_input_names": ["input_ids", "attention_mask"],
              "unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "</s>",
              "additional_special_tokens": [TOKEN_NAMES.get(name, name) for name in SPECIAL_NAMES]}
    return {"tokenizer.json": json.dumps(_tokenizer_json(pieces, tokenizer), ensure_ascii=False).encode("utf-8"),
            "tokenizer_config.json": json.dumps(config, indent=2).encode("utf-8"),
            "chat_template.jinja": CHAT_TEMPLATE.encode("utf-8")}
