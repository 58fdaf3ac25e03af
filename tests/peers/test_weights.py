"""Weights against PyTorch and Transformers, which this project did not write: `make peers`."""

import json
from pathlib import Path

import numpy as np
import pytest

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.weights.convert import convert_weights
from glm3kit.weights.formats.torch import read_torch
from glm3kit.weights.names import INV_FREQ, parameter_shapes
from glm3kit.weights.tensors import Tensors, TensorSpec, cast
from glm3kit.weights.write import published_tensors

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


def assert_equal(tensors: Tensors, loaded: dict, torch) -> None:
    """The same names, types, shapes and bits."""
    assert set(tensors) == set(loaded)
    for name, expected in loaded.items():
        assert tensors.specs[name] == (str(expected.dtype).removeprefix("torch."), tuple(expected.shape))
        values = expected.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert np.ascontiguousarray(tensors[name]).tobytes() == values
        assert b"".join(block.tobytes() for block in tensors.blocks(name)) == values


# PyTorch's files


@pytest.mark.parametrize("name", ["glm3_merged.pth", "glm3_merged_bf16.pth", "glm3_merged_legacy.pth",
                                  "hf/pytorch_model-00001-of-00002.bin", "hf/pytorch_model-00002-of-00002.bin"])
def test_torch_loads_what_we_read(name, golden, torch):
    path = golden / name
    assert_equal(read_torch(path), torch.load(path, weights_only=True), torch)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64", "uint8", "bool"])
def test_what_torch_saves_we_read(dtype, zipped, torch, tmp_path):
    base = torch.arange(240).reshape(12, 20).to(getattr(torch, dtype))
    tensors = {"whole": base, "rows": base[3:7], "columns": base[:, 5:9], "transposed": base.T, "steps": base[::2],
               "scalar": base[1, 1], "empty": base[:0], "cube": base.reshape(3, 4, 20).permute(2, 0, 1)}
    torch.save(tensors, tmp_path / "t.pth", _use_new_zipfile_serialization=zipped)
    assert_equal(read_torch(tmp_path / "t.pth"), tensors, torch)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_s_state_and_its_parameters_read_equal(zipped, torch, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
    for content in (module.state_dict(), dict(module.named_parameters()), {"alone": torch.ones(2)}):
        torch.save(content, tmp_path / "t.bin", _use_new_zipfile_serialization=zipped)
        assert_equal(read_torch(tmp_path / "t.bin"), dict(content), torch)


def test_a_state_of_thousands_of_tensors_reads_equal(torch, tmp_path):
    tensors = {f"layer.{n}": torch.full((2,), n, dtype=torch.float32) for n in range(2500)}  # more than a batch of 1000
    torch.save(tensors, tmp_path / "t.pth")
    assert_equal(read_torch(tmp_path / "t.pth"), tensors, torch)


def test_what_torch_saves_beside_plain_tensors_is_refused(torch, tmp_path):
    plain = torch.ones(2, 3)
    for value, message in ((torch.nn.Linear(2, 3), "the global 'torch.nn.modules.linear.Linear'"),
                           ({"a": plain.to_sparse()}, "tensor 'a': the global 'torch._utils._rebuild_sparse_tensor'"),
                           ({"ok": plain, "a": plain[:1].expand(9, 3)}, "tensor 'a' of shape .* repeats the values"),
                           ({"a": plain.to(torch.float8_e4m3fn)}, "tensor 'a': the global"),
                           ({"epoch": 3, "model": {"a": plain}}, "'epoch': a int, expected a tensor")):
        torch.save(value, tmp_path / "t.pth")
        with pytest.raises(CheckpointError, match=message):
            read_torch(tmp_path / "t.pth")


def test_the_rotary_constants_of_6b_are_those_of_the_official_code(torch):
    for dtype in ("float16", "bfloat16", "float32"):
        specs = {name: TensorSpec(dtype, shape) for name, shape in parameter_shapes(ModelConfig()).items()}
        ours = published_tensors(Tensors(specs, lambda name: np.zeros(0)), ModelConfig())[INV_FREQ]
        theirs = (1.0 / (10000 ** (torch.arange(0, 64, 2) / 64))).to(getattr(torch, dtype))  # modeling_chatglm.py
        np.testing.assert_allclose(cast(ours, "float32"), theirs.float().numpy(), atol=0,
                                   rtol=2e-7 if dtype == "float32" else 0)  # published are the other two


# Transformers' GLM


@pytest.fixture(scope="module")
def exported(golden, shared, tmp_path_factory) -> Path:
    """The golden weights for Transformers, made of MindSpore's form, with the published tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    ckpt = convert_weights(golden / "hf", folder / "glm3.ckpt", progress=False)
    return convert_weights(ckpt, folder / "glm", to="hf-glm", max_shard_size=150_000, progress=False,
                           tokenizer=shared / "data" / "tokenizer" / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(exported):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exported)


def test_transformers_glm_gives_the_logits_of_our_model(exported, golden, torch):
    from mindspore import Tensor
    from transformers import AutoModelForCausalLM, GlmForCausalLM

    from glm3kit import ChatGLM3, load_weights

    model, info = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert type(model) is GlmForCausalLM
    assert not any(info.values()), "every tensor has its place, every place its tensor"
    net = ChatGLM3(ModelConfig.from_hf(golden / "hf" / "config.json", param_dtype="float32",
                                       compute_dtype="float32"))
    load_weights(net, exported)
    with np.load(golden / "reference.npz") as reference:
        ids, expected = reference["forward.input_ids"], reference["forward.logits"]
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(net(Tensor(ids.astype(np.int32))).asnumpy(), theirs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-5)


def test_transformers_generates_from_the_folder_alone(exported, golden, torch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert model.generation_config.pad_token_id == 0
    with np.load(golden / "reference.npz") as reference:
        prompt, expected = reference["greedy.prompt_0"], reference["greedy.tokens_0"]
    ids = torch.from_numpy(prompt.astype(np.int64).reshape(1, -1))
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False,
                           eos_token_id=-1)
    assert found[0, ids.shape[1]:].tolist() == expected.reshape(-1)[-32:].tolist()


def test_transformers_tokenizer_gives_the_official_ids_and_texts(tokenizer, shared):
    rows = [json.loads(line) for line in (shared / "golden" / "text" / "tokenizer.jsonl").open(encoding="utf-8")]
    assert len(rows) == 508
    for row in rows:
        assert tokenizer.encode(row["text"], add_special_tokens=False, split_special_tokens=True) == row["ids"]
        assert tokenizer.encode(row["text"], split_special_tokens=True) == row["ids_with_special"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["decoded"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (2, 0, "left")


def test_the_chat_template_gives_the_official_ids(tokenizer, shared):
    prompts = json.loads((shared / "golden" / "text" / "chat_prompts.json").read_text(encoding="utf-8"))
    for prompt in prompts:
        messages = [*prompt["history"], {"role": prompt["role"], "content": prompt["query"]}]
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert found == prompt["input_ids"], prompt
