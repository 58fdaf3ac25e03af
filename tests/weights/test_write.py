"""Writing: in shards, whole or not at all."""

import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
from support import assert_golden

from glm3kit.errors import CheckpointError
from glm3kit.weights.convert import convert_weights
from glm3kit.weights.formats.ckpt import write_ckpt
from glm3kit.weights.formats.safetensors import write_safetensors
from glm3kit.weights.read import read_weights
from glm3kit.weights.tensors import Tensors
from glm3kit.weights.write import write_weights

OUTPUT = "transformer.output_layer.weight"


def test_any_lazy_tensors_are_written_in_shards(tmp_path):
    arrays = {f"t{n}": np.full((100, 10), n, np.float32) for n in range(5)}
    write_weights(tmp_path / "out", Tensors.of(arrays), max_shard_size=9000, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", *(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)), "model.safetensors.index.json"]
    weights = read_weights(tmp_path / "out")
    for name, array in arrays.items():
        np.testing.assert_array_equal(weights[name], array)


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


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from glm3kit import files
from glm3kit.weights.convert import convert_weights, verify_weights

src, dst, old, new = map(Path, sys.argv[1:5])
to, size = ("mindspore", None) if dst.suffix else ("hf", 200_000)
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
    settings = {"to": "hf", "max_shard_size": 200_000} if name == "hf" else {}
    old, new = (convert_weights(sources["bin"], tmp_path / folder / name, dtype=dtype, progress=False, **settings)
                for folder, dtype in (("old", "float32"), ("new", "keep")))
    destination = tmp_path / name
    if replacing:
        convert_weights(sources["bin"], destination, dtype="float32", progress=False, **settings)
    done = subprocess.run([sys.executable, "-c", KILLED, sources["bin"], destination, old, new],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 10 < int(done.stdout) < 199, "it died at several moments and then came through"
