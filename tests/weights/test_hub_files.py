"""Which files belong together, what their index may say, and cutting new ones."""

import json

import pytest
from support import assert_golden

from glm3kit.errors import CheckpointError
from glm3kit.weights.hub_files import cut_into_shards, parse_size
from glm3kit.weights.read import read_weights
from glm3kit.weights.tensors import TensorSpec

OUTPUT = "transformer.output_layer.weight"
INDEX = "model.safetensors.index.json"


def test_a_missing_shard_is_named(copied):
    (copied / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 files are not in the folder: model-00002-of-00002.safetensors"):
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


def test_another_form_is_refused_with_the_forms_that_are_read(hub):
    with pytest.raises(CheckpointError, match="form '.json' are not read; read are a hub folder of .safetensors"):
        read_weights(hub / "config.json")


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds no weights of these forms, but model.gguf"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        read_weights(tmp_path / "nowhere")


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
