"""Dropout by a key: its share, its independence, the same masks in slices, backwards and after a resume."""

import numpy as np
import pytest
from mindspore import Tensor, ops

from glm3kit.config.groups import LoraConfig, ModelConfig, TrainConfig
from glm3kit.model.adapter import Dropout, mask_key, set_key
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import ALONE, Topology
from glm3kit.train.saving import load_checkpoint, save_checkpoint
from glm3kit.train.trainer import Trainer

CFG = ModelConfig(num_layers=2, padded_vocab_size=64, hidden_size=32, ffn_hidden_size=48, kv_channels=8,
                  num_attention_heads=4, seq_length=16, param_dtype="float32", compute_dtype="float32")
P = 0.1
N, C = 1024, 512


@pytest.fixture
def key():
    key = mask_key()
    set_key(key, seed=0, step=0, micro_step=0)
    return key


def kept(dropout: Dropout, shape=(N, C)) -> np.ndarray:
    return dropout.set_train()(Tensor(np.ones(shape, np.float32))).asnumpy() > 0


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def test_the_share_is_dropped_the_rest_scaled_and_nothing_outside_training(key):
    dropout = Dropout(P, key, place=0).set_train()
    x = np.random.default_rng(0).normal(size=(N, C)).astype(np.float32)
    y = dropout(Tensor(x)).asnumpy()
    mask = y != 0
    np.testing.assert_allclose(y[mask], x[mask] / (1 - P), rtol=1e-6)
    assert mask.mean() == pytest.approx(1 - P, abs=4 * np.sqrt(P * (1 - P) / mask.size))
    for axis, size in enumerate(mask.shape):  # each token and each feature alike
        assert mask.mean(axis).std() == pytest.approx(np.sqrt(P * (1 - P) / size), rel=0.1)
    dropout.set_train(False)
    np.testing.assert_array_equal(dropout(Tensor(x)).asnumpy(), x)


def test_masks_of_other_keys_places_tokens_and_features_are_independent(key):
    mask = kept(Dropout(P, key, place=0))
    limit = 4 / np.sqrt(mask.size)
    others = {"place": kept(Dropout(P, key, place=1))}
    for name, other in {"seed": (1, 0, 0), "step": (0, 1, 0), "micro step": (0, 0, 1)}.items():
        set_key(key, *other)
        others[name] = kept(Dropout(P, key, place=0))
    for name, other in others.items():
        assert abs(correlation(mask, other)) < limit, name
    centred = mask - mask.mean()
    for matrix, size in ((centred @ centred.T, C), (centred.T @ centred, N)):  # any two tokens, any two features
        pairs = matrix[~np.eye(len(matrix), dtype=bool)] / (size * P * (1 - P))
        assert pairs.std() * np.sqrt(size) == pytest.approx(1, rel=0.02)
        assert abs(pairs).max() < 6.5 / np.sqrt(size)


def test_ranks_drop_in_their_slices_what_one_process_drops_in_the_whole(key):
    mask = kept(Dropout(P, key, place=3))
    for rank in range(4):
        topology = Topology(rank, data_parallel=2, tensor_parallel=2)
        rows, columns = (slice(half * size // 2, (half + 1) * size // 2)
                         for half, size in ((topology.data_rank, N), (topology.tensor_rank, C)))
        np.testing.assert_array_equal(kept(Dropout(P, key, 3, topology), (N // 2, C)), mask[rows])
        np.testing.assert_array_equal(kept(Dropout(P, key, 3, topology, sliced=True), (N // 2, C // 2)),
                                      mask[rows, columns])


def test_the_gradient_passes_where_the_value_did(key):
    dropout = Dropout(P, key, place=0).set_train()
    x = Tensor(np.ones((8, 16), np.float32))
    np.testing.assert_array_equal(ops.GradOperation()(dropout)(x).asnumpy(), dropout(x).asnumpy())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_drops_what_the_uninterrupted_one_dropped(tmp_path, accumulation):
    rows = np.random.default_rng(0).integers(0, 64, (6 * accumulation, 2, 2, 16), np.int32)
    config = TrainConfig(learning_rate=0.1, batch_size=2, total_steps=6, gradient_accumulation_steps=accumulation,
                         lora=LoraConfig(rank=4, dropout=0.3, targets=("query_key_value", "dense_4h_to_h")))

    net = ChatGLM3(CFG)
    trainer = Trainer(net, config, 6)  # one for all runs, so that it compiles once; a checkpoint takes it back
    micro = [tuple(batch) for batch in rows]
    steps = [micro[i:i + accumulation] for i in range(0, len(micro), accumulation)]

    def losses(start: int, end: int) -> list[float]:
        return [trainer.advance(batches)["loss"] for batches in steps[start:end]]

    start = save_checkpoint(tmp_path, net, trainer, ALONE, 2)
    first = losses(0, 3)
    halfway = save_checkpoint(tmp_path, net, trainer, ALONE, 2)
    rest = losses(3, 6)
    load_checkpoint(halfway, net, trainer, ALONE)
    assert losses(3, 6) == rest
    load_checkpoint(start, net, trainer, ALONE)
    assert losses(0, 6) == first + rest
    trainer.config = config.model_copy(update={"seed": 1})
    load_checkpoint(start, net, trainer, ALONE)
    assert losses(0, 6)[1:] != (first + rest)[1:]  # the first has adapters that add nothing
