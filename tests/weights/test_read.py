"""Weights: exact in every form, checked against MindSpore and the safetensors package, and clear about bad files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from support import assert_golden

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.model.load import load_weights
from glm3kit.weights.convert import convert_weights
from glm3kit.weights.formats.ckpt import write_ckpt
from glm3kit.weights.formats.safetensors import write_safetensors
from glm3kit.weights.names import hf_name, mindspore_name, parameter_shapes
from glm3kit.weights.random import write_random_hub_weights
from glm3kit.weights.read import read_weights
from glm3kit.weights.tensors import BFLOAT16, Tensors, TensorSpec, cast

EMBEDDING = "transformer.embedding.embedding_table"
OUTPUT = "transformer.output_layer.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copied(hub, tmp_path) -> Path:
    """A hub folder that may be damaged."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in [*hub.glob("*.safetensors"), hub / "config.json", hub / INDEX]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def ms():
    import mindspore

    return mindspore


def changed(folder: Path, shard: str, change) -> None:
    """Rewrite one shard of a hub folder with `change(tensors)`."""
    tensors = safetensors.numpy.load_file(folder / shard)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / shard)


# Names and shapes


def test_the_6b_model_has_199_parameters_of_the_published_shapes():
    shapes = parameter_shapes(ModelConfig())
    assert len(shapes) == 28 * 7 + 3
    assert shapes[EMBEDDING] == shapes[OUTPUT] == (65024, 4096)
    layer = "transformer.encoder.layers.27."
    assert shapes[layer + "self_attention.query_key_value.weight"] == (4608, 4096)
    assert shapes[layer + "self_attention.query_key_value.bias"] == (4608,)
    assert shapes[layer + "self_attention.dense.weight"] == (4096, 4096)
    assert shapes[layer + "mlp.dense_h_to_4h.weight"] == (27392, 4096)
    assert shapes[layer + "mlp.dense_4h_to_h.weight"] == (4096, 13696)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 6243584000  # the published parameter count


def test_names_map_to_mindspore_and_back(published):
    for name in published:
        assert hf_name(mindspore_name(name)) == name
    assert mindspore_name("transformer.embedding.word_embeddings.weight") == EMBEDDING
    assert mindspore_name("transformer.embedding.embedding_weight") == EMBEDDING
    assert mindspore_name(OUTPUT) == OUTPUT


def test_the_shapes_of_a_config_are_those_of_its_weights(hub, published):
    shapes = parameter_shapes(ModelConfig.from_hf(hub / "config.json"))
    assert {hf_name(name): shape for name, shape in shapes.items()} == {
        name: array.shape for name, array in published.items() if "inv_freq" not in name}


# Reading and writing


def test_a_hub_folder_reads_as_mindspore_weights(hub, published):
    weights = read_weights(hub)
    assert_golden(weights, published)
    assert weights.dropped == ("transformer.rotary_pos_emb.inv_freq",)
    assert weights.origin[EMBEDDING] == ((hub / "model-00001-of-00002.safetensors",
                                          "transformer.embedding.word_embeddings.weight"),)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_converted_weights_are_the_golden_ones_to_us_and_to_mindspore(form, hub, published, tmp_path, ms):
    path = convert_weights(hub, tmp_path / f"glm3.{form}", progress=False)
    assert_golden(read_weights(path), published)
    loaded = ms.load_checkpoint(str(path), format=form)
    assert_golden({name: parameter.asnumpy() for name, parameter in loaded.items()}, published)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_weights_that_mindspore_saved_read_equal(form, published, tmp_path, ms):
    path = str(tmp_path / f"saved.{form}")
    ms.save_checkpoint([{"name": mindspore_name(name), "data": ms.Tensor(array)}
                        for name, array in published.items()], path, format=form)
    assert_golden(read_weights(path), published)


def test_a_folder_of_ckpt_files_reads_as_one(hub, published, tmp_path):
    weights = read_weights(hub)
    names = list(weights)
    write_ckpt(tmp_path / "a.ckpt", {name: weights[name] for name in names[:10]})
    write_ckpt(tmp_path / "b.ckpt", {name: weights[name] for name in names[10:]})
    assert_golden(read_weights(tmp_path), published)


def mixed(ms) -> dict:
    """One MindSpore tensor of every kind that a checkpoint may hold."""
    draw = np.random.default_rng(0)
    return {"matrix": ms.Tensor(draw.standard_normal((70, 33), np.float32)),
            "odd": ms.Tensor(draw.standard_normal((3, 5, 1)).astype(np.float16)),
            "bfloat16": ms.Tensor(draw.standard_normal((9, 4), np.float32)).astype(ms.bfloat16),
            "double": ms.Tensor(draw.standard_normal(7)),
            "scalar": ms.Tensor(65536.0, ms.float32), "count": ms.Tensor(-3, ms.int32),
            "flags": ms.Tensor([True, False])}


def assert_same(arrays, tensors, ms) -> None:
    assert set(arrays) == set(tensors)
    for name, tensor in tensors.items():
        assert arrays[name].shape == tensor.shape
        if tensor.dtype == ms.bfloat16:
            assert arrays[name].dtype == BFLOAT16
            np.testing.assert_array_equal(arrays[name].view(np.uint16), tensor.asnumpy().view(np.uint16))
            np.testing.assert_array_equal(cast(arrays[name], "float32"), tensor.astype(ms.float32).asnumpy())
        else:
            np.testing.assert_array_equal(arrays[name], tensor.asnumpy())


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_every_type_survives_both_ways(form, tmp_path, ms):
    tensors = mixed(ms)
    theirs, ours = tmp_path / f"theirs.{form}", tmp_path / f"ours.{form}"
    ms.save_checkpoint([{"name": name, "data": tensor} for name, tensor in tensors.items()], str(theirs), format=form)
    read = read_weights(theirs)
    assert_same(read, tensors, ms)

    (write_ckpt if form == "ckpt" else write_safetensors)(ours, read)
    again = ms.load_checkpoint(str(ours), format=form)
    assert {name: (p.dtype, p.shape) for name, p in again.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()}
    assert_same(read_weights(ours), tensors, ms)


def test_tensors_in_several_slices_read_equal_both_ways(tmp_path, ms, monkeypatch):
    tensors = mixed(ms)
    monkeypatch.setattr("mindspore.train.serialization.SLICE_SIZE", 1)  # KB
    ms.save_checkpoint([{"name": name, "data": tensor} for name, tensor in tensors.items()], str(tmp_path / "t.ckpt"))
    assert (tmp_path / "t.ckpt").read_bytes().count(b"matrix") == 10  # 70 x 33 x 4 bytes in 1 KB slices
    read = read_weights(tmp_path / "t.ckpt")
    assert_same(read, tensors, ms)

    monkeypatch.setattr("glm3kit.weights.formats.ckpt.MESSAGE", 1000)
    write_ckpt(tmp_path / "o.ckpt", read)
    assert (tmp_path / "o.ckpt").read_bytes().count(b"matrix") == 10
    again = ms.load_checkpoint(str(tmp_path / "o.ckpt"))
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        np.testing.assert_array_equal(again[name].astype(ms.float32).asnumpy(), tensor.astype(ms.float32).asnumpy())


def test_a_checksum_at_the_end_of_a_ckpt_is_no_tensor(tmp_path, ms):
    tensors = mixed(ms)
    ms.save_checkpoint([{"name": name, "data": tensor} for name, tensor in tensors.items()], str(tmp_path / "t.ckpt"),
                       crc_check=True)
    assert_same(read_weights(tmp_path / "t.ckpt"), tensors, ms)


def test_optimizer_state_and_counters_are_left_out_and_named(tmp_path, ms):
    state = [f"adam_m.{OUTPUT}", f"adam_v.{OUTPUT}", "global_step", "loss_scale"]
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(np.ones(2, np.float32))} for name in [OUTPUT, *state]],
                       str(tmp_path / "t.ckpt"), append_dict={"epoch_num": 1, "note": "text"})
    weights = read_weights(tmp_path / "t.ckpt")
    assert list(weights) == [OUTPUT]
    assert set(weights.dropped) == {*state, "epoch_num"}


def test_the_later_embedding_name_reads_as_the_table(tmp_path):
    write_ckpt(tmp_path / "t.ckpt", {"transformer.embedding.embedding_weight": np.ones((2, 3), np.float16)})
    assert list(read_weights(tmp_path / "t.ckpt")) == [EMBEDDING]


def test_reading_a_mapping_opens_nothing_but_the_headers(hub):
    read = []
    lazy = Tensors({"a": TensorSpec("float16", (2,))}, lambda name: read.append(name) or np.zeros(2, np.float16))
    assert lazy.specs["a"].nbytes == 4 and "a" in lazy and "b" not in lazy and not read
    assert lazy["a"].shape == (2,) and read == ["a"]
    with pytest.raises(ValueError, match="read-only"):
        read_weights(hub)[OUTPUT][0] = 0


def test_our_safetensors_are_read_by_the_safetensors_package(tmp_path, published):
    published = dict(published) | {"wide": np.arange(3.0), "empty": np.zeros((0, 4), np.float16)}
    write_safetensors(tmp_path / "t.safetensors", published, {"format": "pt"})
    again = safetensors.numpy.load_file(tmp_path / "t.safetensors")
    assert set(again) == set(published)
    for name, array in published.items():
        np.testing.assert_array_equal(again[name], array)
        np.testing.assert_array_equal(read_weights(tmp_path / "t.safetensors").get(name, array), array)
    with safetensors.safe_open(tmp_path / "t.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


# Types


def test_bfloat16_rounds_to_nearest_even_as_mindspore_does(ms):
    values = np.random.default_rng(1).standard_normal(100_000).astype(np.float32) * 1e3
    values = np.concatenate([values, [0, -0.0, np.inf, -np.inf, 3.3895e38, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40],
                             (values.view(np.uint32) & 0xFFFF8000).view(np.float32)]).astype(np.float32)
    expected = ms.Tensor(values).astype(ms.bfloat16).astype(ms.float32).asnumpy()
    np.testing.assert_array_equal(cast(cast(values, "bfloat16"), "float32"), expected)


def test_not_a_number_stays_so_in_bfloat16():
    values = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(cast(cast(values, "bfloat16"), "float32")).all()


def test_bfloat16_to_float32_and_back_is_exact():
    every = np.arange(65536, dtype=np.uint16).view(BFLOAT16)
    numbers = cast(every, "float32")
    keep = ~np.isnan(numbers)
    assert (cast(numbers, "bfloat16").view(np.uint16)[keep] == every.view(np.uint16)[keep]).all()


def test_arithmetic_on_stored_bfloat16_is_that_of_its_numbers():
    ones = np.array([0x3F80, 0x3F80], np.uint16).view(BFLOAT16)
    assert (ones + 1).astype(np.float32).tolist() == [2, 2] and (ones + 1).dtype == BFLOAT16


def test_values_beyond_float16_are_counted():
    with pytest.warns(UserWarning, match="out.weight: 2 of 4 values are beyond float16"):
        result = cast(np.array([1e6, -7e4, 65504, np.inf], np.float32), "float16", "out.weight")
    assert result.tolist() == [np.inf, -np.inf, 65504, np.inf]


def test_a_cast_follows_the_values_and_not_their_order_in_memory():
    values = np.random.default_rng(2).standard_normal((7, 11), np.float32)
    np.testing.assert_array_equal(cast(values.T, "float16"), values.T.astype(np.float16))
    assert cast(np.arange(3), "float16").dtype == np.int64  # counters are no weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conversion_casts(dtype, hub, published, tmp_path):
    weights = read_weights(convert_weights(hub, tmp_path / "t.safetensors", dtype=dtype, progress=False))
    assert {spec.dtype for spec in weights.specs.values()} == {dtype}
    np.testing.assert_allclose(cast(weights[OUTPUT], "float32"), published[OUTPUT].astype(np.float32),
                               rtol=2**-8 if dtype == "bfloat16" else 0)


# Into a model


@pytest.fixture
def model(hub, ms):
    """Build a ChatGLM3 of the golden sizes, but for the changes."""
    from glm3kit.model.chatglm3 import ChatGLM3

    return lambda **changes: ChatGLM3(ModelConfig.from_hf(hub / "config.json", **changes))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_load_into_a_model_in_its_type(dtype, hub, published, ms, model):
    net = model(param_dtype=dtype)
    load_weights(net, hub)
    loaded = net.parameters_dict()
    assert set(loaded) == {mindspore_name(name) for name in published if "inv_freq" not in name}
    for name, parameter in loaded.items():
        assert parameter.dtype == getattr(ms, dtype)
        expected = ms.Tensor(published[hf_name(name)].astype(np.float32)).astype(parameter.dtype).astype(ms.float32)
        np.testing.assert_array_equal(parameter.astype(ms.float32).asnumpy(), expected.asnumpy())


def test_a_model_of_another_vocabulary_is_refused_and_stays_as_it_was(hub, model):
    net = model(padded_vocab_size=528, param_dtype="float32")
    before = {name: parameter.asnumpy().copy() for name, parameter in net.parameters_dict().items()}
    with pytest.raises(CheckpointError, match="vocabulary of 512 rows, the model asks for 528: set padded_vocab_size"):
        load_weights(net, hub)
    for name, parameter in net.parameters_dict().items():
        np.testing.assert_array_equal(parameter.asnumpy(), before[name])


def test_a_model_with_more_layers_names_every_missing_parameter(hub, model):
    with pytest.raises(CheckpointError) as caught:
        load_weights(model(num_layers=4), hub)
    assert str(caught.value).count("missing: 'transformer.encoder.layers.3.") == 7


# Conversion refuses


def test_an_existing_result_is_replaced_only_by_force(hub, published, tmp_path):
    (tmp_path / "t.ckpt").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_weights(hub, tmp_path / "t.ckpt", progress=False)
    assert (tmp_path / "t.ckpt").read_text() == "precious"
    convert_weights(hub, tmp_path / "t.ckpt", force=True, progress=False)
    assert_golden(read_weights(tmp_path / "t.ckpt"), published)


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


def test_a_failure_on_the_way_leaves_no_file(copied, tmp_path):
    path = copied / "model-00002-of-00002.safetensors"
    weights = read_weights(copied)

    def read(name):
        if name == OUTPUT:
            raise OSError("disk gone")
        return weights[name]

    for write in (write_ckpt, write_safetensors):
        with pytest.raises(OSError, match="disk gone"):
            write(tmp_path / "out" / path.name, Tensors(weights.specs, read))
        assert not list((tmp_path / "out").iterdir())


# Bad files


def test_a_cut_safetensors_file_says_how_many_bytes_it_should_have(copied):
    shard = copied / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"00002-of-00002.safetensors: {size - 100} bytes, its header .*{size}"):
        read_weights(copied)


def header_of(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("content, message", [
    (b"", "0 bytes"),
    (b"\x10\0\0\0\0\0\0\0{}", "cut off or no safetensors file"),
    (b"\xff" * 64, "cut off or no safetensors file"),
    (b"\x04\0\0\0\0\0\0\0{..}", "its header is no JSON"),
    (b"\x04\0\0\0\0\0\0\0\xff\xff\xff\xff", "its header is no JSON"),
    (header_of([]), "expected names and places of tensors"),
    (header_of({"__metadata__": 3}), "expected names and places of tensors"),
    (header_of({"a": {"dtype": "F16", "shape": [2]}}), "tensor 'a': the header says"),
    (header_of({"a": {"dtype": "F16", "shape": [-2], "data_offsets": [0, 4]}}, b"1234"), "tensor 'a': the header says"),
    (header_of({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1"), "has type 'F4'; read are F64"),
    (header_of({"a": {"dtype": "F16", "shape": [3], "data_offsets": [0, 4]}}, b"1234"), "needs 6 bytes"),
    (header_of({"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, b"1234"), "starts at byte 2"),
    (header_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, b"1234"), "starts at byte 2"),
    (b"\x00\x90\x00\0\0\0\0\0" + b"[" * 0x9000, "its header is no JSON"),
])
def test_no_safetensors_file_is_a_checkpoint_error(content, message, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(path)


def test_a_missing_shard_is_named(copied):
    (copied / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 files are not in the folder: model-00002-of-00002.safetensors"):
        read_weights(copied)


def test_a_tensor_that_its_shard_lacks_is_named(copied):
    changed(copied, "model-00002-of-00002.safetensors", lambda tensors: tensors.pop(OUTPUT))
    with pytest.raises(CheckpointError, match=f"'{OUTPUT}' is not in model-00002-of-00002.safetensors"):
        read_weights(copied)


def test_a_tensor_in_two_files_is_refused(copied):
    shutil.copy(copied / "model-00002-of-00002.safetensors", copied / "another.safetensors")
    (copied / INDEX).unlink()
    with pytest.raises(CheckpointError, match="is both in another.safetensors and in model-00002"):
        read_weights(copied)


@pytest.mark.parametrize("outside", ["../hub/model-00002-of-00002.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_an_index_cannot_name_a_file_outside_its_folder(outside, copied):
    index = json.loads((copied / INDEX).read_text())
    index["weight_map"][OUTPUT] = outside
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"names a file outside its folder: {outside}"):
        read_weights(copied)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{" * 10, "\0"])
def test_an_index_that_is_none_is_refused(text, copied):
    (copied / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="no index of weights"):
        read_weights(copied)


def test_links_inside_a_folder_may_lead_elsewhere(copied, published, tmp_path):
    cache = tmp_path / "cache"  # the hub's own download cache is made so
    cache.mkdir()
    for file in copied.iterdir():
        (cache / file.name).symlink_to(file)
    assert_golden(read_weights(cache), published)


@pytest.mark.parametrize("content", [
    b"", b"garbage", b"PK\x03\x04" * 40, b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x0a\x05ab", bytes(50),
    b"\x0a\x02\x0a\xff", b"\x0a\x04\x0a\x02\xff\xfe", b"crc_num" + bytes(10), b"\x08\x01",
    b"\x0a\x0f\x0a\x01x\x12\x0a\x12\x04Int9\x1a\x02ab",
])
def test_a_garbage_ckpt_is_a_checkpoint_error(content, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="bad.ckpt: no MindSpore checkpoint, or a damaged or encrypted one"):
        read_weights(tmp_path / "bad.ckpt")


def test_a_ckpt_cut_or_changed_anywhere_never_raises_another_error(tmp_path, ms):
    path, draw = tmp_path / "t.ckpt", np.random.default_rng(3)
    write_ckpt(path, {name: t.astype(ms.float32).asnumpy() for name, t in mixed(ms).items() if t.size < 40})
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        try:
            assert len(read_weights(path)) < 6  # cut between two tensors: fewer of them, which a model would refuse
        except CheckpointError:
            pass
        damaged = bytearray(whole)
        damaged[cut] = draw.integers(256)
        path.write_bytes(damaged)
        try:
            dict(read_weights(path))
        except CheckpointError:
            pass


def test_an_encrypted_ckpt_is_refused(tmp_path, ms):
    ms.save_checkpoint([{"name": "a", "data": ms.Tensor(np.ones(4, np.float32))}], str(tmp_path / "t.ckpt"),
                       enc_key=b"0123456789abcdef")
    with pytest.raises(CheckpointError, match="encrypted"):
        read_weights(tmp_path / "t.ckpt")


def test_another_form_is_refused_with_the_forms_that_are_read(hub):
    with pytest.raises(CheckpointError, match="form '.json' are not read; read are a hub folder of .safetensors"):
        read_weights(hub / "config.json")


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds no weights of these forms, but model.gguf"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        read_weights(tmp_path / "nowhere")


# Random weights


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_random_hub_weights_have_the_published_form(dtype, hub, tmp_path):
    cfg = ModelConfig.from_hf(hub / "config.json", param_dtype=dtype)
    write_random_hub_weights(cfg, tmp_path / "hub", seed=7)
    golden_index = json.loads((hub / INDEX).read_text())
    index = json.loads((tmp_path / "hub" / INDEX).read_text())
    assert set(index["weight_map"]) == set(golden_index["weight_map"])
    assert set(index["weight_map"].values()) == set(golden_index["weight_map"].values())
    assert index["metadata"]["total_size"] == golden_index["metadata"]["total_size"] * (2 if dtype == "float32" else 1)
    golden_config = json.loads((hub / "config.json").read_text())
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert set(config) == set(golden_config)
    assert config == golden_config | {"torch_dtype": dtype}
    assert {spec.dtype for spec in read_weights(tmp_path / "hub").specs.values()} == {dtype}
    convert_weights(tmp_path / "hub", tmp_path / "t.ckpt", progress=False)


def test_random_weights_are_spread_as_gpt2_s_are_and_follow_the_seed(tmp_path):
    cfg = ModelConfig(num_layers=8, padded_vocab_size=512, hidden_size=64, ffn_hidden_size=176, kv_channels=16,
                      num_attention_heads=4, param_dtype="float32")
    first = read_weights(write_random_hub_weights(cfg, tmp_path / "a", seed=1))
    again = read_weights(write_random_hub_weights(cfg, tmp_path / "b", seed=1))
    other = read_weights(write_random_hub_weights(cfg, tmp_path / "c", seed=2))
    layer = "transformer.encoder.layers.3."
    assert first[OUTPUT].std() == pytest.approx(0.02, rel=0.03)
    assert first[layer + "self_attention.dense.weight"].std() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8) = 4
    assert first[layer + "mlp.dense_4h_to_h.weight"].std() == pytest.approx(0.02 / 4, rel=0.05)
    assert (first[layer + "input_layernorm.weight"] == 1).all()
    assert (first[layer + "self_attention.query_key_value.bias"] == 0).all()
    assert not np.array_equal(first[OUTPUT], first[EMBEDDING])
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first[OUTPUT], other[OUTPUT])


def test_rotary_constants_are_the_published_ones(hub, published, tmp_path):
    write_random_hub_weights(ModelConfig.from_hf(hub / "config.json"), tmp_path)
    name = "transformer.rotary_pos_emb.inv_freq"
    shard = json.loads((tmp_path / INDEX).read_text())["weight_map"][name]
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / shard)[name], published[name])


def test_random_weights_never_replace_others_without_force(copied, published):
    cfg = ModelConfig.from_hf(copied / "config.json")
    with pytest.raises(CheckpointError, match="holds weights already"):
        write_random_hub_weights(cfg, copied)
    assert_golden(read_weights(copied), published)
    write_random_hub_weights(cfg, copied, force=True)
    assert not np.array_equal(read_weights(copied)[OUTPUT], published[OUTPUT])


def test_a_tokenizer_is_copied_beside_random_weights(hub, shared, tmp_path):
    tokenizer = shared / "data" / "tokenizer" / "tokenizer.model"
    write_random_hub_weights(ModelConfig.from_hf(hub / "config.json"), tmp_path, tokenizer=tokenizer)
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_converting_needs_no_mindspore(hub, tmp_path):
    code = ("import sys; from glm3kit.weights.convert import convert_weights; "
            "convert_weights(sys.argv[1], sys.argv[2], progress=False); assert 'mindspore' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, hub, tmp_path / "t.ckpt"], check=True)


def test_a_model_that_gets_weights_at_once_is_built_without_drawing_others(hub, published, monkeypatch):
    from glm3kit import AutoModel, ChatGLM3

    cfg = ModelConfig.from_hf(hub / "config.json", param_dtype="float32", checkpoint_name_or_path=str(hub))
    monkeypatch.setattr("glm3kit.model.chatglm3.random_weights", None)  # would be called to draw
    net = AutoModel.from_config(cfg)
    for name, parameter in net.parameters_dict().items():
        np.testing.assert_array_equal(parameter.asnumpy(), published[hf_name(name)].astype(np.float32))
    with pytest.raises(TypeError):
        ChatGLM3(cfg)
