"""Conversion: from every form to every other, exact, all faults at once, whole or not at all, and checked again."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from support import ROOT, assert_golden

from glm3kit.config.groups import ModelConfig
from glm3kit.config.load import load_config
from glm3kit.errors import CheckpointError, ConfigError
from glm3kit.model.load import load_weights
from glm3kit.weights.convert import convert_weights, verify_weights
from glm3kit.weights.formats.safetensors import write_safetensors
from glm3kit.weights.names import parameter_shapes
from glm3kit.weights.random import write_random_hub_weights
from glm3kit.weights.read import read_weights
from glm3kit.weights.tensors import TensorSpec, cast

EMBEDDING = "transformer.embedding.embedding_table"
OUTPUT = "transformer.output_layer.weight"
INDEX = "model.safetensors.index.json"
ATTENTION = "transformer.encoder.layers.1.self_attention."
MLP = "transformer.encoder.layers.1.mlp."


FORMS = ["safetensors", "bin", "pth", "legacy", "one .ckpt", "one .safetensors", "shards .ckpt", "shards .safetensors",
         "hf-glm"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_as_the_golden_weights(form, sources, published):
    assert_golden(read_weights(sources[form]), published)


@pytest.fixture(scope="module")
def net(hub):
    from glm3kit import ChatGLM3

    return ChatGLM3(ModelConfig.from_hf(hub / "config.json", param_dtype="float32", compute_dtype="float32"))


@pytest.mark.parametrize("form", [*FORMS, "bfloat16"])
def test_every_form_gives_the_golden_logits(form, sources, net, golden):
    import mindspore as ms

    for parameter in net.get_parameters():  # nothing is left of the form before
        parameter.copy_(ms.ops.zeros_like(parameter))
    load_weights(net, sources[form] if form in sources else golden / "glm3_merged_bf16.pth")
    with np.load(golden / "reference.npz") as reference:
        ids, expected = reference["forward.input_ids"], reference["forward.logits"]
    # The file of bfloat16 holds rounded weights: 8 bits of them, which 3 layers carry on.
    tolerance = 2e-4 if form in sources else 2**-8 * np.abs(expected).max() * 3
    np.testing.assert_allclose(net(ms.Tensor(ids)).asnumpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_published_one_bit_by_bit(form, sources, hub, published, tmp_path):
    result = convert_weights(sources[form], tmp_path / "hf", to="hf", max_shard_size=200_000, progress=False)
    index = json.loads((result / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in published.values())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors = safetensors.numpy.load_file(result / file)
        assert {name for name in index["weight_map"] if index["weight_map"][name] == file} == set(tensors)
        found |= tensors
    assert set(found) == set(published)
    for name, array in published.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()
    config = json.loads((result / "config.json").read_text())
    golden = json.loads((hub / "config.json").read_text())
    assert config == golden


def test_transformers_form_has_query_key_and_value_apart(sources, hub, published):
    folder = sources["hf-glm"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: array for file in set(index.values())
             for name, array in safetensors.numpy.load_file(folder / file).items()}
    assert len(found) == 3 * 11 + 3
    fused = published[f"{ATTENTION}query_key_value.weight"]  # 4 heads of 16, and 2 groups for key and for value
    for part, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        np.testing.assert_array_equal(found[f"model.layers.1.self_attn.{part}_proj.weight"], fused[rows])
    np.testing.assert_array_equal(found["model.layers.1.self_attn.k_proj.bias"],
                                  published[f"{ATTENTION}query_key_value.bias"][64:96])
    np.testing.assert_array_equal(found["model.layers.1.mlp.gate_up_proj.weight"],
                                  published[f"{MLP}dense_h_to_4h.weight"])
    np.testing.assert_array_equal(found["lm_head.weight"], published["transformer.output_layer.weight"])


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_converted_weights_are_the_golden_ones_to_us_and_to_mindspore(form, hub, published, tmp_path, ms):
    path = convert_weights(hub, tmp_path / f"glm3.{form}", progress=False)
    assert_golden(read_weights(path), published)
    loaded = ms.load_checkpoint(str(path), format=form)
    assert_golden({name: parameter.asnumpy() for name, parameter in loaded.items()}, published)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conversion_casts(dtype, hub, published, tmp_path):
    weights = read_weights(convert_weights(hub, tmp_path / "t.safetensors", dtype=dtype, progress=False))
    assert {spec.dtype for spec in weights.specs.values()} == {dtype}
    np.testing.assert_allclose(cast(weights[OUTPUT], "float32"), published[OUTPUT].astype(np.float32),
                               rtol=2**-8 if dtype == "bfloat16" else 0)


def test_overflow_is_counted_reported_and_noted(published, hub, tmp_path):
    tensors = {name: array.astype(np.float32) for name, array in published.items()}
    tensors["transformer.output_layer.weight"][0, :3] = 1e5, -1e5, 65504
    tensors[f"{MLP}dense_4h_to_h.weight"][5, 7] = 7e4
    write_safetensors(tmp_path / "model.safetensors", tensors)
    shutil.copy(hub / "config.json", tmp_path)
    with pytest.warns(UserWarning, match="3 values in 2 tensors are beyond float16 and became infinite, most in "
                                         "'transformer.output_layer.weight'"):
        result = convert_weights(tmp_path / "model.safetensors", tmp_path / "t.ckpt", dtype="float16", progress=False)
    noted = json.loads((tmp_path / "manifest.json").read_text())["files"]["t.ckpt"]["overflows"]
    assert noted == {"transformer.output_layer.weight": 2, f"{MLP}dense_4h_to_h.weight": 1}
    assert read_weights(result)["transformer.output_layer.weight"][0, :3].tolist() == [np.inf, -np.inf, 65504]
    with_bfloat16 = convert_weights(tmp_path / "model.safetensors", tmp_path / "b.ckpt", dtype="bfloat16",
                                    progress=False)
    assert np.isfinite(cast(read_weights(with_bfloat16)["transformer.output_layer.weight"], "float32")).all()


@pytest.mark.parametrize("to", ["mindspore", "hf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cast_result_says_its_type(to, dtype, hub, published, tmp_path):
    result = convert_weights(hub, tmp_path / "result", to=to, dtype=dtype, max_shard_size=10**6, progress=False)
    assert json.loads((result / "config.json").read_text())["torch_dtype"] == dtype
    weights = read_weights(result)
    assert {spec.dtype for spec in weights.specs.values()} == {dtype}
    name = "transformer.output_layer.weight"
    np.testing.assert_array_equal(weights[name], cast(published[name], dtype))


def test_an_existing_result_is_replaced_only_by_force(hub, published, tmp_path):
    (tmp_path / "t.ckpt").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_weights(hub, tmp_path / "t.ckpt", progress=False)
    assert (tmp_path / "t.ckpt").read_text() == "precious"
    convert_weights(hub, tmp_path / "t.ckpt", force=True, progress=False)
    assert_golden(read_weights(tmp_path / "t.ckpt"), published)


def changed(folder: Path, shard: str, change) -> None:
    """Rewrite one shard of a hub folder with `change(tensors)`."""
    tensors = safetensors.numpy.load_file(folder / shard)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / shard)


def test_all_faults_of_shards_are_listed_at_once_and_nothing_is_written(copied, tmp_path):
    layer = "transformer.encoder.layers.2."

    def spoil(tensors):
        tensors[layer + "mlp.dense_4h_to_h.weight"] = np.zeros((64, 175), np.float16)
        tensors["transformer.extra"] = np.zeros(1, np.float16)
        del tensors["transformer.encoder.final_layernorm.weight"]

    changed(copied, "model-00002-of-00002.safetensors", spoil)
    (copied / INDEX).unlink()
    with pytest.raises(CheckpointError) as caught:
        convert_weights(copied, tmp_path / "out" / "t.ckpt", progress=False)
    message = str(caught.value)
    assert "3 tensors do not fit config.json" in message
    assert "missing: 'transformer.encoder.final_layernorm.weight' [64]" in message
    assert "surplus: 'transformer.extra' [1]" in message
    assert f"shape: '{layer}mlp.dense_4h_to_h.weight' is [64, 175], expected [64, 176]" in message
    assert not (tmp_path / "out").exists()


def test_another_vocabulary_than_the_config_is_explained(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"padded_vocab_size": 65024}))
    with pytest.raises(CheckpointError, match="vocabulary of 512 rows, config.json asks for 65024"):
        convert_weights(copied, tmp_path / "t.ckpt", progress=False)


def test_half_a_model_without_config_or_index_is_refused(copied, tmp_path):
    for name in ("config.json", INDEX, "model-00001-of-00002.safetensors"):
        (copied / name).unlink()
    with pytest.raises(CheckpointError, match="numbered, and model-00001-of-00002.safetensors is not there"):
        convert_weights(copied, tmp_path / "t.ckpt", progress=False)
    with pytest.raises(CheckpointError, match=f"missing: '{EMBEDDING}'"):
        convert_weights(copied / "model-00002-of-00002.safetensors", tmp_path / "t.ckpt", progress=False)


@pytest.mark.parametrize("change, message", [
    ({"to": "onnx"}, "expected one of mindspore, hf, hf-glm"),
    ({"dtype": "int8"}, "expected one of keep, float16, bfloat16, float32"),
    ({"dst": "weights.bin"}, "end it with .ckpt or .safetensors"),
])
def test_what_is_not_written_is_said(change, message, hub, tmp_path):
    arguments = {"dst": "t.ckpt"} | change
    with pytest.raises(CheckpointError, match=message):
        convert_weights(hub, tmp_path / arguments.pop("dst"), progress=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_converting_needs_no_mindspore(hub, tmp_path):
    code = ("import sys; from glm3kit.weights.convert import convert_weights; "
            "convert_weights(sys.argv[1], sys.argv[2], progress=False); assert 'mindspore' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, hub, tmp_path / "t.ckpt"], check=True)


def test_all_faults_are_listed_at_once_and_nothing_is_written(hub, published, tmp_path, monkeypatch):
    tensors = dict(published) | {f"{MLP}dense_4h_to_h.weight": np.zeros((64, 175), np.float16),
                                 "transformer.extra": np.zeros(3, np.int8)}
    del tensors["transformer.encoder.final_layernorm.weight"]
    source = tmp_path / "source"
    source.mkdir()
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    shutil.copy(hub / "config.json", source)
    (tmp_path / "t.ckpt").write_text("precious")
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(CheckpointError) as caught:
        convert_weights(source, tmp_path / "t.ckpt", progress=False)
    message = str(caught.value)
    for fault in ("missing: 'transformer.encoder.final_layernorm.weight' [64]", "surplus: 'transformer.extra' [3]",
                  f"shape: '{MLP}dense_4h_to_h.weight' is [64, 175], expected [64, 176]",
                  "'transformer.extra' is int8, no weight", "t.ckpt: exists already", "0.00 GB are free; make room"):
        assert fault in message
    assert "inv_freq" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "t.ckpt"]
    assert (tmp_path / "t.ckpt").read_text() == "precious"


def test_a_published_form_of_unknown_sizes_asks_for_them(sources, hub, published, tmp_path):
    bare = shutil.copy(sources["one .ckpt"], tmp_path / "bare.ckpt")
    with pytest.raises(CheckpointError, match="no config.json beside .*name the configuration of the model"):
        convert_weights(bare, tmp_path / "hf", to="hf", progress=False)
    result = convert_weights(bare, tmp_path / "hf", to="hf", config=hub / "config.json", progress=False)
    assert json.loads((result / "config.json").read_text()) == json.loads((hub / "config.json").read_text())


def test_a_configuration_of_the_kit_gives_sizes_and_tokenizer(tmp_path):

    tiny = ROOT / "configs" / "tiny.yaml"
    cfg = load_config(tiny).model
    hub = write_random_hub_weights(cfg, tmp_path / "hub")
    merged = convert_weights(hub, tmp_path / "merged" / "t.safetensors", progress=False)
    (tmp_path / "merged" / "manifest.json").unlink()
    result = convert_weights(merged, tmp_path / "glm", to="hf-glm", config=tiny, progress=False)
    config = json.loads((result / "config.json").read_text())
    assert (config["vocab_size"], config["head_dim"]) == (cfg.padded_vocab_size, cfg.kv_channels)
    assert (result / "tokenizer.model").read_bytes() == Path(cfg.tokenizer_path).read_bytes()
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= {
        path.name for path in result.iterdir()}


def test_weights_of_the_shapes_of_6b_need_no_config(monkeypatch):
    from glm3kit.weights.convert import _find_config

    specs = {name: TensorSpec("float16", shape) for name, shape in parameter_shapes(ModelConfig()).items()}
    published, where = _find_config(Path("nowhere.ckpt"), None, specs)
    assert where == "ChatGLM3-6B" and published["seq_length"] == 8192
    assert ModelConfig.from_published(published, where) == ModelConfig(seq_length=8192)


def test_a_config_of_another_model_is_refused(hub, tmp_path):
    with pytest.raises(ConfigError, match="model_type is None"):
        (tmp_path / "config.json").write_text("{}")
        convert_weights(hub, tmp_path / "t.ckpt", config=tmp_path / "config.json", progress=False)
    with pytest.raises(ConfigError, match="model_type is 'llama'"):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        convert_weights(hub, tmp_path / "t.ckpt", config=tmp_path / "config.json", progress=False)
    with pytest.raises(ConfigError, match="rope_theta 5000000.0 .expected 10000.0"):
        (tmp_path / "config.json").write_text('{"model_type": "glm", "rope_parameters": {"rope_theta": 5000000.0}}')
        convert_weights(hub, tmp_path / "t.ckpt", config=tmp_path / "config.json", progress=False)


def test_a_broken_tokenizer_is_found_before_anything_is_written(hub, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x00garbage")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        convert_weights(hub, tmp_path / "glm", to="hf-glm", tokenizer=tmp_path / "tokenizer.model", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("form", ["one .ckpt", "one .safetensors", "shards .ckpt", "shards .safetensors", "hf-glm"])
def test_what_was_written_verifies(form, sources):
    assert verify_weights(sources[form], progress=False) == (3 * 11 + 3 if form == "hf-glm" else 24)


def test_a_changed_bit_a_missing_and_a_surplus_tensor_are_found(sources, tmp_path):
    path = convert_weights(sources["pth"], tmp_path / "t.safetensors", progress=False)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    last = list(read_weights(path))[-1]
    with pytest.raises(CheckpointError, match=f"1 faults .*\n  '{last}' in t.safetensors has other values"):
        verify_weights(path, progress=False)
    tensors = safetensors.numpy.load_file(path)
    tensors["more"] = tensors.pop(last)
    first = next(iter(tensors))
    tensors[first] = tensors[first].astype(np.float32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        verify_weights(path, progress=False)
    assert f"'{last}' is missing in t.safetensors" in str(caught.value)
    assert "'more' in t.safetensors is not in the manifest" in str(caught.value)
    assert f"'{first}' in t.safetensors is float32 " in str(caught.value)


def test_what_no_manifest_knows_cannot_be_verified(hub, tmp_path):
    for path in (hub, hub / "model-00001-of-00002.safetensors"):
        with pytest.raises(CheckpointError, match="says nothing of it; it was not written by convert or merge"):
            verify_weights(path)


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "glm3kit", "convert", *map(str, arguments)], capture_output=True,
                          text=True)


def test_the_command_converts_verifies_and_says_what_is_wrong(hub, tmp_path):
    done = run(hub, tmp_path / "glm", "--to", "hf-glm", "--max-shard-size", "100kB", "--verify")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'glm'}: 36 tensors are as they were written" in done.stdout
    assert "written without a tokenizer" in done.stderr
    done = run(tmp_path / "glm", "--verify")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'glm'}: 36 tensors are as they were written\n")
    shard = next((tmp_path / "glm").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xaa")
    done = run(tmp_path / "glm", "--verify")
    assert done.returncode == 1 and "has other values than were written" in done.stderr
    done = run(hub, tmp_path / "glm", "--max-shard-size", "much")
    assert done.returncode == 2 and "'much' is no size" in done.stderr
    done = run(hub)
    assert done.returncode == 2 and "DST is missing" in done.stderr


@pytest.mark.parametrize("line", ["bin > ckpt", "ckpt > hf-glm"])
def test_hundreds_of_megabytes_pass_through_a_few(line):
    root = ROOT
    done = subprocess.run([sys.executable, root / "benchmarks" / "convert.py", "--layers", "2", "--hidden", "1024",
                           "--only", line, "--json"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["gb"] > 0.3
    (measured,) = report["results"].values()
    assert 0 < measured["anonymous_mb"] < 150  # the interpreter with NumPy has 30
    assert measured["resident_mb"] < 400  # the largest tensor, mapped, has 133
