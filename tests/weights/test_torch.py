"""PyTorch files without PyTorch: exact in both forms, and nothing but tensors gets out of them."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support import assert_golden

from glm3kit.errors import CheckpointError
from glm3kit.weights.convert import convert_weights
from glm3kit.weights.formats.torch import read_torch
from glm3kit.weights.read import read_weights
from glm3kit.weights.tensors import cast

EMBEDDING = "transformer.embedding.word_embeddings.weight"
MEMBER = "glm3_merged/data.pkl"
# The stored embedding in the golden pickle: from value 0, shape (512, 64), strides (64, 1).
WINDOW = b"K\x00M\x00\x02K@\x86q\x08K@K\x01\x86"


@pytest.fixture(scope="module")
def merged(golden) -> Path:
    return golden / "glm3_merged.pth"


@pytest.fixture
def spoiled(merged, tmp_path):
    """Write the golden archive again with another pickle, or other members."""
    def write(old: bytes = b"", new: bytes = b"", *, members=None, compress=zipfile.ZIP_STORED) -> Path:
        path = tmp_path / "spoiled.pth"
        with zipfile.ZipFile(merged) as source, zipfile.ZipFile(path, "w") as target:
            contents = {name: source.read(name) for name in source.namelist()}
            assert contents[MEMBER].count(old), "the pickle holds what is replaced"
            contents[MEMBER] = contents[MEMBER].replace(old, new, 1)
            for name, content in (contents | (members or {})).items():
                if content is not None:
                    target.writestr(name, content, compress if name.endswith("/data/0") else zipfile.ZIP_STORED)
        return path

    return write


# What is read


@pytest.mark.parametrize("name", ["glm3_merged.pth", "glm3_merged_legacy.pth"])
def test_a_merged_file_holds_the_golden_weights(name, golden, published):
    weights = read_weights(golden / name)
    assert_golden(weights, published)
    assert weights.dropped == ("transformer.rotary_pos_emb.inv_freq",)


def test_a_bfloat16_file_holds_the_rounded_golden_weights(golden, published):
    tensors = read_torch(golden / "glm3_merged_bf16.pth")
    assert set(tensors) == set(published)
    for name, array in published.items():
        assert tensors.specs[name].dtype == "bfloat16"
        np.testing.assert_array_equal(cast(tensors[name], "float32"), cast(cast(array, "bfloat16"), "float32"))


def test_shards_with_their_index_read_as_one(hub, published, tmp_path):
    for file in hub.glob("pytorch_model*"):
        shutil.copy(file, tmp_path)
    weights = read_weights(tmp_path)
    assert_golden(weights, published)
    assert {file.suffix for parts in weights.origin.values() for file, _ in parts} == {".bin"}
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    assert_golden(read_weights(tmp_path), published)


def test_where_a_hub_folder_has_both_forms_the_safetensors_are_read(hub):
    assert {file.suffix for parts in read_weights(hub).origin.values() for file, _ in parts} == {".safetensors"}


def test_arrays_are_views_of_the_file(merged):
    array = read_torch(merged)[EMBEDDING]
    assert not array.flags.owndata and not array.flags.writeable


def test_a_transposed_tensor_reads_transposed_at_once_and_in_blocks(spoiled, published, monkeypatch):
    tensors = read_torch(spoiled(WINDOW, b"K\x00K@M\x00\x02\x86q\x08K\x01K@\x86"))
    assert tensors.specs[EMBEDDING].shape == (64, 512)
    np.testing.assert_array_equal(tensors[EMBEDDING], published[EMBEDDING].T)
    monkeypatch.setattr("glm3kit.weights.tensors.BLOCK", 5000)
    blocks = list(tensors.blocks(EMBEDDING))
    assert len(blocks) > 10
    np.testing.assert_array_equal(np.concatenate(blocks), published[EMBEDDING].T.reshape(-1))


def test_a_window_of_a_storage_is_that_window(spoiled, published):
    tensors = read_torch(spoiled(WINDOW, b"K\x40M\x80\x00K@\x86q\x08K@K\x01\x86"))
    np.testing.assert_array_equal(tensors[EMBEDDING], published[EMBEDDING][1:129])


# What is refused, with file and tensor, before anything happens


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_would_run_a_command_runs_nothing(spoiled, tmp_path):
    command = f"touch {tmp_path / 'ran'}"
    for number, content in enumerate((pickle.dumps({EMBEDDING: Bomb(command)}, 2), pickle.dumps(Bomb(command), 2),
                                      pickle.dumps({"a": [Bomb(command)]}))):
        (tmp_path / f"{number}.bin").write_bytes(content)
        for path in (spoiled(members={MEMBER: content}), tmp_path / f"{number}.bin"):
            with pytest.raises(CheckpointError, match=f"{path.name}: not read"):
                read_torch(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(command), 2))
    assert (tmp_path / "ran").exists(), "the bomb would have gone off"


@pytest.mark.parametrize("name", [
    "os system", "posix system", "builtins eval", "builtins getattr", "torch load", "torch.storage _load_from_bytes",
    "torch._utils _rebuild_qtensor", "torch QInt8Storage", "collections Counter", "numpy.core.multiarray _reconstruct",
    "torch._utils x.y"])
def test_any_other_global_is_refused_by_name(name, spoiled):
    with pytest.raises(CheckpointError) as caught:
        read_torch(spoiled(b"torch._utils\n_rebuild_tensor_v2\n", name.replace(" ", "\n").encode() + b"\n"))
    assert "spoiled.pth: not read" in str(caught.value)
    assert f"tensor '{EMBEDDING}': the global '{name.replace(' ', '.')}'" in str(caught.value)


def test_a_later_tensor_is_named_too(golden, tmp_path):
    legacy = (golden / "glm3_merged_legacy.pth").read_bytes()
    name = b"transformer.encoder.layers.0.input_layernorm.weight"
    at = legacy.index(name) + len(name)
    spoiled = legacy[:at] + legacy[at:].replace(b"(", b"cos\nsystem\n(", 1)
    (tmp_path / "spoiled.pth").write_bytes(spoiled)
    with pytest.raises(CheckpointError, match=f"tensor '{name.decode()}': the global 'os.system'"):
        read_torch(tmp_path / "spoiled.pth")


@pytest.mark.parametrize("window, message", [
    (b"K\x01M\x00\x02K@\x86q\x08K@K\x01\x86", r"points outside its storage of 32768 values"),
    (b"K\x00M\x01\x02K@\x86q\x08K@K\x01\x86", r"points outside its storage of 32768 values"),
    (b"K\x00M\x00\x02K@\x86q\x08M\xff\xffK\x01\x86", r"points outside its storage of 32768 values"),
    (b"J\xff\xff\xff\xffM\x00\x02K@\x86q\x08K@K\x01\x86", "a call of"),
    (b"K\x00M\x00\x02K@\x86q\x08J\xc0\xff\xff\xffK\x01\x86", "a call of"),
    (b"K\x00M\x00\x02K@\x86q\x08K@\x85", "a call of"),
    (b"K\x00M\x00\x02M\x00\x02\x86q\x08K\x00K\x01\x86", "repeats the values of a storage"),
    (b"K\x00\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x3fK@\x86q\x08K\x00K\x00\x86", "repeats the values of a storage"),
    (b"NM\x00\x02K@\x86q\x08K@K\x01\x86", "a call of"),
])
def test_a_tensor_outside_its_storage_is_refused(window, message, spoiled):
    with pytest.raises(CheckpointError, match=f"spoiled.pth: .*tensor '{EMBEDDING}'.*{message}"):
        read_torch(spoiled(WINDOW, window))


@pytest.mark.parametrize("old, new", [
    (b"X\x07\x00\x00\x00storage", b"X\x06\x00\x00\x00module"),
    (b"X\x07\x00\x00\x00storage", b"K\x07"),
    (b"ctorch\nHalfStorage\n", b"X\x01\x00\x00\x00H"),
    (b"ctorch\nHalfStorage\n", b"ccollections\nOrderedDict\n"),
    (b"X\x01\x00\x00\x000", b"K\x00"),
    (b"X\x03\x00\x00\x00cpu", b"N"),
    (b"M\x00\x80t", b"J\xff\xff\xff\xfft"),
    (b"M\x00\x80t", b"t"),
    (b"tq\x07Q", b"tq\x07(K\x01tQ"),
])
def test_a_reference_that_is_no_storage_is_refused(old, new, spoiled):
    with pytest.raises(CheckpointError, match=f"spoiled.pth: .*tensor '{EMBEDDING}': a reference .*expected a storage"):
        read_torch(spoiled(old, new))


def test_a_storage_that_the_archive_lacks_is_named(spoiled):
    with pytest.raises(CheckpointError, match=f"tensor '{EMBEDDING}': its storage '0' is not in the archive"):
        read_torch(spoiled(members={"glm3_merged/data/0": None}))


@pytest.mark.parametrize("key", ["../0", "/etc/passwd", "x"])
def test_a_storage_key_is_no_path(key, spoiled):
    text = key.encode()
    with pytest.raises(CheckpointError, match=f"its storage '{key}' is not in the archive"):
        read_torch(spoiled(b"X\x01\x00\x00\x000", b"X" + len(text).to_bytes(4, "little") + text))


def test_a_compressed_member_is_refused(spoiled):
    with pytest.raises(CheckpointError, match=f"tensor '{EMBEDDING}': its member 'glm3_merged/data/0' is compressed"):
        read_torch(spoiled(compress=zipfile.ZIP_DEFLATED))


def test_a_member_of_another_size_than_its_storage_is_refused(spoiled):
    message = f"tensor '{EMBEDDING}': its storage '0' of 32768 float16 needs 65536 bytes, it has 65534"
    with pytest.raises(CheckpointError, match=message):
        read_torch(spoiled(members={"glm3_merged/data/0": bytes(65534)}))


def test_a_big_endian_archive_is_refused(spoiled):
    with pytest.raises(CheckpointError, match="byte order is b'big'"):
        read_torch(spoiled(members={"glm3_merged/byteorder": b"big"}))


@pytest.mark.parametrize("value, message", [
    ([1, 2], "a list, expected the tensors of a state_dict"), ({"epoch": 3}, "'epoch': a int, expected a tensor"),
    ({"state_dict": {}}, "'state_dict': a dict, expected a tensor; save model.state_dict"),
    ({1: 2}, "the key 1, expected a name"), ({"a": 1.5, "b": None, "c": (1, 2, 3, 4)}, "'a': a float"),
])
def test_anything_but_a_state_dict_is_refused(value, message, spoiled):
    with pytest.raises(CheckpointError, match=message):
        read_torch(spoiled(members={MEMBER: pickle.dumps(value, 2)}))


def test_a_pickle_that_doubles_itself_takes_no_memory(spoiled):
    laughs = b"\x80\x02}(X\x01\x00\x00\x00aK\x00" + b"q\x01h\x01\x86" * 200 + b"Qu."
    with pytest.raises(CheckpointError, match="tensor 'a': a reference"):
        read_torch(spoiled(members={MEMBER: laughs}))


@pytest.mark.parametrize("name", ["glm3_merged.pth", "glm3_merged_legacy.pth"])
def test_a_file_cut_anywhere_is_refused(name, golden, tmp_path):
    whole = (golden / name).read_bytes()
    draw = np.random.default_rng(0)
    for size in [*range(0, 200, 7), *draw.integers(200, len(whole), 60), len(whole) - 1]:
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut.pth: not read"):
            read_torch(tmp_path / "cut.pth")


def test_a_cut_legacy_file_names_the_tensor(golden, tmp_path):
    whole = (golden / "glm3_merged_legacy.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="tensor 'transformer.*': the file ends 10 bytes before its storage does"):
        read_torch(tmp_path / "cut.pth")


@pytest.mark.parametrize("name", ["glm3_merged.pth", "glm3_merged_legacy.pth"])
def test_a_file_changed_anywhere_reads_or_is_refused_and_never_raises_another_error(name, golden, tmp_path):
    whole = (golden / name).read_bytes()
    draw = np.random.default_rng(1)
    directory = whole.rindex(b"PK\x01\x02") - 2500 if name == "glm3_merged.pth" else 0
    for at in [*draw.integers(0, 4500, 400), *draw.integers(directory, len(whole), 200)]:
        changed = bytearray(whole)
        changed[at] = draw.integers(256)
        (tmp_path / "changed.pth").write_bytes(changed)
        try:
            dict(read_torch(tmp_path / "changed.pth"))
        except CheckpointError:
            pass


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" * 40, bytes(50), b"\x80\x02.", b"\x80\x02K\x01.",
                                     pickle.dumps(0x1950A86A20F9469CFC6C, 2), b"(((((", b"u", b"\x85."])
def test_no_torch_file_is_a_checkpoint_error(content, tmp_path):
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="bad.bin: not read, for it is no state_dict of PyTorch"):
        read_torch(tmp_path / "bad.bin")


@pytest.fixture
def bin_shards(hub, tmp_path) -> Path:
    """The golden shards of PyTorch with their index and config.json, to be spoiled."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in [*hub.glob("pytorch_model*"), hub / "config.json"]:
        shutil.copy(file, folder)
    return folder


def spoil_index(folder: Path, change) -> None:
    path = folder / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = change(index["weight_map"])
    path.write_text(json.dumps(index))


def refusal(source: Path, tmp_path: Path) -> str:
    """What a conversion says, having written nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        convert_weights(source, tmp_path / "result" / "t.ckpt", progress=False)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def test_an_index_cannot_name_a_file_outside_its_folder(bin_shards, tmp_path):
    spoil_index(bin_shards, lambda names: names | {"transformer.output_layer.weight": "../secret.bin"})
    assert ("pytorch_model.bin.index.json: names a file outside its folder: ../secret.bin, for "
            "'transformer.output_layer.weight'") in refusal(bin_shards, tmp_path)


def test_an_index_that_leaves_a_shard_out_is_refused(bin_shards, tmp_path):
    second = "pytorch_model-00002-of-00002.bin"
    spoil_index(bin_shards, lambda names: {name: file for name, file in names.items() if file != second})
    assert f"its files are numbered, and it leaves out {second}" in refusal(bin_shards, tmp_path)


def test_a_shard_that_lacks_what_the_index_has_there_is_named(bin_shards, tmp_path):
    spoil_index(bin_shards, lambda names: names | {EMBEDDING: "pytorch_model-00002-of-00002.bin"})
    assert f"'{EMBEDDING}' is not in pytorch_model-00002-of-00002.bin, where the index" in refusal(bin_shards, tmp_path)


def test_a_cut_shard_is_refused_before_anything_is_written(bin_shards, tmp_path):
    shard = bin_shards / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert "pytorch_model-00002-of-00002.bin: not read" in refusal(bin_shards, tmp_path)


def test_a_trapped_shard_is_refused_before_anything_is_written(bin_shards, tmp_path):
    (bin_shards / "pytorch_model-00002-of-00002.bin").write_bytes(pickle.dumps({EMBEDDING: Bomb("true")}, 2))
    said = refusal(bin_shards, tmp_path)
    assert "pytorch_model-00002-of-00002.bin: not read" in said and f"tensor '{EMBEDDING}': the global" in said
