"""Weights of every form and name, opened under MindSpore's names; what does not fit together is refused."""

import shutil

import numpy as np
import pytest
import safetensors.numpy
from support import assert_golden

from glm3kit.errors import CheckpointError
from glm3kit.weights.formats.ckpt import write_ckpt
from glm3kit.weights.names import part_of
from glm3kit.weights.read import read_weights

EMBEDDING = "transformer.embedding.embedding_table"
OUTPUT = "transformer.output_layer.weight"
INDEX = "model.safetensors.index.json"
ATTENTION = "transformer.encoder.layers.1.self_attention."
MLP = "transformer.encoder.layers.1.mlp."


def test_a_hub_folder_reads_as_mindspore_weights(hub, published):
    weights = read_weights(hub)
    assert_golden(weights, published)
    assert weights.dropped == ("transformer.rotary_pos_emb.inv_freq",)
    assert weights.origin[EMBEDDING] == ((hub / "model-00001-of-00002.safetensors",
                                          "transformer.embedding.word_embeddings.weight"),)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_weights_that_mindspore_saved_read_equal(form, published, tmp_path, ms):
    path = str(tmp_path / f"saved.{form}")
    ms.save_checkpoint([{"name": part_of(name).name, "data": ms.Tensor(array)}
                        for name, array in published.items()], path, format=form)
    assert_golden(read_weights(path), published)


def test_a_folder_of_ckpt_files_reads_as_one(hub, published, tmp_path):
    weights = read_weights(hub)
    names = list(weights)
    write_ckpt(tmp_path / "a.ckpt", {name: weights[name] for name in names[:10]})
    write_ckpt(tmp_path / "b.ckpt", {name: weights[name] for name in names[10:]})
    assert_golden(read_weights(tmp_path), published)


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


def test_a_tensor_that_its_shard_lacks_is_named(copied):
    shard = copied / "model-00002-of-00002.safetensors"
    tensors = safetensors.numpy.load_file(shard)
    safetensors.numpy.save_file({name: tensors[name] for name in tensors if name != OUTPUT}, shard)
    with pytest.raises(CheckpointError, match=f"'{OUTPUT}' is not in model-00002-of-00002.safetensors"):
        read_weights(copied)


def test_a_tensor_in_two_files_is_refused(copied):
    shutil.copy(copied / "model-00002-of-00002.safetensors", copied / "another.safetensors")
    (copied / INDEX).unlink()
    with pytest.raises(CheckpointError, match="is both in another.safetensors and in model-00002"):
        read_weights(copied)


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
