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
from glm3kit.errors import CheckpointError, ConfigError
from glm3kit.model.load import load_weights
from glm3kit.weights.convert import convert_weights, verify_weights
from glm3kit.weights.formats.ckpt import write_ckpt
from glm3kit.weights.formats.safetensors import write_safetensors
from glm3kit.weights.hub_files import cut_into_shards, parse_size
from glm3kit.weights.names import glm_names, hf_name, parameter_shapes, part_of
from glm3kit.weights.random import write_random_hub_weights
from glm3kit.weights.read import read_weights
from glm3kit.weights.tensors import Tensors, TensorSpec, cast
from glm3kit.weights.write import write_weights

ATTENTION = "transformer.encoder.layers.1.self_attention."
MLP = "transformer.encoder.layers.1.mlp."


@pytest.fixture(scope="module")
def sources(golden, tmp_path_factory) -> dict[str, Path]:
    """The golden weights in every form that there is, each with its config.json."""
    folder = tmp_path_factory.mktemp("sources")
    hub = golden / "hf"
    found = {"safetensors": hub, "pth": folder / "pth" / "glm3.pth", "legacy": folder / "legacy" / "glm3.pth",
             "bin": folder / "bin"}
    for path in (found["pth"].parent, found["legacy"].parent, found["bin"]):
        path.mkdir()
        shutil.copy(hub / "config.json", path)
    shutil.copy(golden / "glm3_merged.pth", found["pth"])
    shutil.copy(golden / "glm3_merged_legacy.pth", found["legacy"])
    for file in hub.glob("pytorch_model*"):
        shutil.copy(file, found["bin"])
    for form in ("ckpt", "safetensors"):
        found[f"one .{form}"] = convert_weights(hub, folder / f"glm3.{form}", progress=False)
        found[f"shards .{form}"] = convert_weights(hub, folder / f"shards.{form}", max_shard_size=100_000,
                                                   progress=False)
    with pytest.warns(UserWarning, match="without a tokenizer"):
        found["hf-glm"] = convert_weights(found["pth"], folder / "hf-glm", to="hf-glm", max_shard_size=100_000,
                                          progress=False)
    return found


FORMS = ["safetensors", "bin", "pth", "legacy", "one .ckpt", "one .safetensors", "shards .ckpt", "shards .safetensors",
         "hf-glm"]


# The forms


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


@pytest.mark.parametrize("form", [".ckpt", ".safetensors"])
def test_shards_are_cut_by_size_and_an_index_names_them(form, sources):
    folder = sources[f"shards {form}"]
    shards = sorted(folder.glob(f"model-*{form}"))
    assert [shard.name for shard in shards] == [f"model-{n:05d}-of-{len(shards):05d}{form}"
                                                for n in range(1, len(shards) + 1)]
    assert len(shards) > 3 and all(shard.stat().st_size < 102_000 for shard in shards)
    index = json.loads((folder / f"model{form}.index.json").read_text())["weight_map"]
    assert {name: file.name for name, ((file, _),) in read_weights(folder).origin.items()} == index


def test_a_shard_is_full_before_the_next_one_begins():
    specs = {name: TensorSpec("uint8", (size,)) for name, size in (("a", 6), ("b", 4), ("c", 11), ("d", 1), ("e", 9))}
    assert cut_into_shards(specs, 10, ".ckpt") == {
        "model-00001-of-00003.ckpt": ["a", "b"], "model-00002-of-00003.ckpt": ["c"],  # too large: on its own
        "model-00003-of-00003.ckpt": ["d", "e"]}


@pytest.mark.parametrize("text, size", [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 << 29), ("4096", 4096),
                                        ("10k", 10_000)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2PB", "0", "1e9", "2GI"])
def test_no_size_is_an_error(text):
    with pytest.raises(CheckpointError, match="is no size; write it as 2GB"):
        parse_size(text)


# MindFormers' later names


@pytest.fixture
def later(published) -> dict[str, np.ndarray]:
    """The golden weights as later MindFormers writes them: another name for the embedding, fused matrices split."""
    tensors = {}
    for name, array in published.items():
        if name.endswith("word_embeddings.weight"):
            tensors["transformer.embedding.embedding_weight"] = array
        elif "query_key_value" in name:
            for part, rows in (("wq", slice(0, 64)), ("wk", slice(64, 96)), ("wv", slice(96, 128))):
                tensors[name.replace("query_key_value", part)] = array[rows]
        elif "dense_h_to_4h" in name:
            tensors[name.replace("dense_h_to_4h", "dense_left")] = array[:176]
            tensors[name.replace("dense_h_to_4h", "dense_right")] = array[176:]
        elif "inv_freq" not in name:
            tensors[name] = array
    return tensors


def test_mindformers_later_names_read_as_the_golden_weights(later, published, tmp_path):
    names = sorted(later)  # parts in another order, and in two files
    write_ckpt(tmp_path / "a.ckpt", {name: later[name] for name in names[1::2]})
    write_ckpt(tmp_path / "b.ckpt", {name: later[name] for name in names[::2]})
    weights = read_weights(tmp_path)
    assert_golden(weights, published)
    for name in weights:
        np.testing.assert_array_equal(np.concatenate(list(weights.blocks(name))), weights[name].reshape(-1))


def test_a_part_that_is_missing_or_does_not_fit_is_named(later, tmp_path):
    del later[f"{ATTENTION}wk.bias"]
    later[f"{MLP}dense_right.weight"] = np.zeros((176, 63), np.float16)
    later[f"{ATTENTION}wv.weight"] = later[f"{ATTENTION}wv.weight"].astype(np.float32)
    write_ckpt(tmp_path / "t.ckpt", later)
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path / "t.ckpt")
    message = str(caught.value)
    assert "3 faults" in message
    assert (f"'{ATTENTION}query_key_value.bias' is stored in 3 parts, there are only {ATTENTION}wq.bias, "
            f"{ATTENTION}wv.bias") in message
    assert (f"'{MLP}dense_h_to_4h.weight' is stored in parts that do not fit together: float16 [176, 64], "
            "float16 [176, 63]") in message
    assert f"'{ATTENTION}query_key_value.weight' is stored in parts that do not fit together" in message


def test_a_whole_beside_its_parts_is_refused(later, tmp_path):
    later[f"{MLP}dense_h_to_4h.weight"] = np.zeros((352, 64), np.float16)
    write_ckpt(tmp_path / "t.ckpt", later)
    with pytest.raises(CheckpointError, match=f"'{MLP}dense_h_to_4h.weight' is both in"):
        read_weights(tmp_path / "t.ckpt")


def test_names_of_every_form_lead_back_to_one():
    for name in parameter_shapes(ModelConfig()):
        parts = glm_names(name)
        assert [part_of(part) for part in parts] == [(name, index, len(parts)) for index in range(len(parts))]
        assert part_of(hf_name(name)) == part_of(name) == (name, 0, 1)


# Types


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


# Checked before, whole or not at all


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


def test_what_a_killed_run_left_is_named_where_room_is_short(hub, tmp_path, monkeypatch):
    (tmp_path / ".t.ckpt.1.tmp").write_text("half")
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(CheckpointError, match=r"removing what a killed run has left: \.t\.ckpt\.1\.tmp"):
        convert_weights(hub, tmp_path / "t.ckpt", progress=False)


def test_a_folder_of_other_things_is_never_replaced(hub, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="a folder that convert did not write is not replaced"):
        convert_weights(hub, tmp_path / "mine", to="hf", force=True, progress=False)
    with pytest.raises(CheckpointError, match="is or holds the source"):
        convert_weights(hub, hub.parent, to="hf", force=True, progress=False)
    with pytest.raises(CheckpointError, match="is a folder, the result is none"):
        convert_weights(hub, tmp_path / "mine", force=True, progress=False)
    convert_weights(hub, tmp_path / "mine" / "t.ckpt", progress=False)  # which leaves a manifest there
    with pytest.raises(CheckpointError, match="a folder that convert did not write is not replaced"):
        convert_weights(hub, tmp_path / "mine", to="hf", force=True, progress=False)
    result = convert_weights(hub, tmp_path / "hf", to="hf", progress=False)
    (result / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="a folder that convert did not write is not replaced"):
        convert_weights(hub, result, to="hf", force=True, progress=False)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == (result / "thesis.tex").read_text() == "precious"


def test_a_folder_that_convert_wrote_is_replaced_by_force_only(sources, published, tmp_path):
    result = convert_weights(sources["pth"], tmp_path / "hf", to="hf", max_shard_size=50_000, progress=False)
    with pytest.raises(CheckpointError, match="exists already"):
        convert_weights(sources["pth"], result, to="hf", progress=False)
    convert_weights(sources["pth"], result, to="hf", force=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert len(list(result.glob("*.safetensors"))) == 1
    assert_golden(read_weights(result), published)


def test_a_published_form_of_unknown_sizes_asks_for_them(sources, hub, published, tmp_path):
    bare = shutil.copy(sources["one .ckpt"], tmp_path / "bare.ckpt")
    with pytest.raises(CheckpointError, match="no config.json beside .*name the configuration of the model"):
        convert_weights(bare, tmp_path / "hf", to="hf", progress=False)
    result = convert_weights(bare, tmp_path / "hf", to="hf", config=hub / "config.json", progress=False)
    assert json.loads((result / "config.json").read_text()) == json.loads((hub / "config.json").read_text())


def test_a_configuration_of_the_kit_gives_sizes_and_tokenizer(tmp_path):
    from glm3kit.config.groups import load_config

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


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from glm3kit import files
from glm3kit.weights.convert import convert_weights, verify_weights

src, dst, old, new = map(Path, sys.argv[1:5])
to, size = ("mindspore", None) if dst.suffix else ("hf", 100_000)
replacing = dst.exists()

def content(path):
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files} if path.is_dir() else path.read_bytes()

calls = 0

def deadly(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for fatal in range(1, 200):
    child = os.fork()
    if child == 0:  # dies at its `fatal`th call of these
        for name in ("fsync", "replace", "rename", "open", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        Path.open, Path.mkdir, Path.unlink = map(deadly, (Path.open, Path.mkdir, Path.unlink))
        convert_weights(src, dst, to=to, max_shard_size=size, force=replacing, progress=False)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if dst.exists():
        assert content(dst) == content(new) or replacing and content(dst) == content(old)
    else:
        assert not replacing or to == "hf", "a file that is replaced is there all the time"
    if status == 0:
        break
    if dst.exists() and not replacing:
        shutil.rmtree(dst) if dst.is_dir() else dst.unlink()
verify_weights(dst, progress=False)
print(fatal)
"""


@pytest.mark.parametrize("name", ["t.safetensors", "hf"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_at_any_moment_leaves_it_absent_or_whole(name, replacing, sources, tmp_path):
    settings = {"to": "hf", "max_shard_size": 100_000} if name == "hf" else {}
    old, new = (convert_weights(sources["bin"], tmp_path / folder / name, dtype=dtype, progress=False, **settings)
                for folder, dtype in (("old", "float32"), ("new", "keep")))
    destination = tmp_path / name
    if replacing:
        convert_weights(sources["bin"], destination, dtype="float32", progress=False, **settings)
    done = subprocess.run([sys.executable, "-c", KILLED, sources["bin"], destination, old, new],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 10 < int(done.stdout) < 199, "it died at several moments and then came through"


# The manifest


def test_the_manifest_says_what_was_made_of_what(sources, published, tmp_path):
    import hashlib

    import glm3kit

    path = convert_weights(sources["pth"], tmp_path / "t.safetensors", dtype="float32", progress=False)
    entry = json.loads((tmp_path / "manifest.json").read_text())["files"]["t.safetensors"]
    assert entry["tool"] == f"glm3kit {glm3kit.__version__}"
    assert (entry["source"], entry["to"], entry["dtype"]) == (str(sources["pth"]), "mindspore", "float32")
    assert set(entry["tensors"]) == set(safetensors.numpy.load_file(path))
    for name, known in entry["tensors"].items():
        values = published[hf_name(name)].astype(np.float32)
        assert known == {"dtype": "float32", "shape": list(values.shape),
                         "sha256": hashlib.sha256(values.tobytes()).hexdigest()}


def test_results_in_one_folder_share_a_manifest(sources, tmp_path):
    for name in ("a.ckpt", "b.safetensors"):
        convert_weights(sources["pth"], tmp_path / name, progress=False)
    assert set(json.loads((tmp_path / "manifest.json").read_text())["files"]) == {"a.ckpt", "b.safetensors"}
    assert verify_weights(tmp_path / "a.ckpt", progress=False) == verify_weights(tmp_path / "b.safetensors") == 24


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


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"../t.ckpt": {"tensors": {}}}}',
                                  '{"files": {"t.ckpt": {"tensors": {"a": 3}}}}', '{"name": "of an app"}'])
def test_another_manifest_is_neither_believed_nor_replaced(text, hub, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    for run in (lambda: convert_weights(hub, tmp_path / "t.ckpt", progress=False),
                lambda: verify_weights(tmp_path / "t.ckpt")):
        with pytest.raises(CheckpointError, match="manifest.json: not written by glm3kit"):
            run()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert (tmp_path / "manifest.json").read_text() == text


def test_any_lazy_tensors_are_written_in_shards(tmp_path):
    arrays = {f"t{n}": np.full((100, 10), n, np.float32) for n in range(5)}
    write_weights(tmp_path / "out", Tensors.of(arrays), max_shard_size=9000, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", *(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)), "model.safetensors.index.json"]
    weights = read_weights(tmp_path / "out")
    for name, array in arrays.items():
        np.testing.assert_array_equal(weights[name], array)


# The command line


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


# Memory


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
