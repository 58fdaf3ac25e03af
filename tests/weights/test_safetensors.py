"""Files of safetensors, against the package of that name; damaged ones are refused."""

import json

import numpy as np
import pytest
import safetensors.numpy

from glm3kit.errors import CheckpointError
from glm3kit.weights.formats.safetensors import read_safetensors, write_safetensors
from glm3kit.weights.read import read_weights


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


def test_a_file_that_is_not_there_is_said_once(tmp_path):
    with pytest.raises(CheckpointError, match=r"^\S+: it cannot be read \(No such file"):
        read_safetensors(tmp_path / "none.safetensors")
