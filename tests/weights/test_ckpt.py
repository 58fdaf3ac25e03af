"""MindSpore's files, as it writes them and as it reads ours; damaged ones are refused."""

import numpy as np
import pytest

from glm3kit.errors import CheckpointError
from glm3kit.weights.formats.ckpt import write_ckpt
from glm3kit.weights.formats.safetensors import write_safetensors
from glm3kit.weights.read import read_weights
from glm3kit.weights.tensors import BFLOAT16, cast


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
