"""What stands beside results: where they came from, and their checksums."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

import glm3kit
from glm3kit.errors import CheckpointError
from glm3kit.weights.convert import convert_weights, verify_weights
from glm3kit.weights.names import hf_name


def test_the_manifest_says_what_was_made_of_what(sources, published, tmp_path):


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
