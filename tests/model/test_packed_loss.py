"""Several records in one row: the model computes each as if it stood alone."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from glm3kit.config.groups import ModelConfig, TrainConfig
from glm3kit.data.batches import Batches
from glm3kit.data.token_file import CONVERSATION, EncodedRows, write_token_file
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.train.trainer import fit

WINDOW = 24
CONFIG = ModelConfig(num_layers=2, padded_vocab_size=64, hidden_size=32, ffn_hidden_size=48, kv_channels=8,
                     num_attention_heads=4, multi_query_group_num=2, seq_length=WINDOW, param_dtype="float32",
                     compute_dtype="float32")


@pytest.fixture(scope="module")
def net() -> ChatGLM3:
    return ChatGLM3(CONFIG)


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> tuple[Batches, Batches]:
    """Eight short records, one a row and packed into a few; half of the predictions count."""
    numbers = np.random.default_rng(1)
    rows = [numbers.integers(1, 64, length) for length in (3, 9, 5, 12, 7, 4, 8, 6)]
    masks = [np.r_[numbers.integers(0, 2, len(row) - 2), 1, 0] for row in rows]
    encoded = EncodedRows(np.concatenate(rows), np.concatenate(masks), [len(row) for row in rows],
                          [(0, line, CONVERSATION, 1, 1) for line in range(8)])
    tokens = write_token_file(tmp_path_factory.mktemp("packed") / "tokens", "d", [encoded], {})
    packed = Batches(tokens, 1, WINDOW, shuffle=False, packing=True)
    assert len(packed) < 4
    return Batches(tokens, 8, WINDOW, shuffle=False), Batches(tokens, len(packed), WINDOW, shuffle=False, packing=True)


def tensors(batches: Batches) -> list[Tensor]:
    return [Tensor(array) for array in batches.batch(0)]


def test_the_loss_of_packed_records_is_that_of_the_records_alone(net, batches):
    alone, packed = map(tensors, batches)
    assert packed[0].shape[0] < alone[0].shape[0]
    expected = float(net.loss_sum(*alone).asnumpy())
    assert float(net.loss_sum(*packed).asnumpy()) == pytest.approx(expected, rel=1e-5)
    assert float(net.loss(*packed).asnumpy()) == pytest.approx(float(net.loss(*alone).asnumpy()), rel=1e-5)
    assert float(net.loss_sum(*packed[:2]).asnumpy()) != pytest.approx(expected, rel=1e-4)  # without segment_ids


def test_the_gradients_of_packed_records_are_those_of_the_records_alone(net, batches):
    parameters = net.trainable_params()
    alone, packed = ([gradient.asnumpy() for gradient in ms.grad(net.loss_sum, None, parameters)(*tensors(source))]
                     for source in batches)
    for parameter, first, second in zip(parameters, alone, packed, strict=True):
        assert np.abs(first - second).max() <= 1e-5 * max(np.abs(first).max(), 1.0), parameter.name


def test_no_token_sees_another_record(net, batches):
    ids, _, segments = (tensor.asnumpy() for tensor in tensors(batches[1]))
    changed = np.where(segments == 2, (ids + 7) % 63 + 1, ids).astype(np.int32)
    first, second = (net.hidden(Tensor(x), None, Tensor(segments)).asnumpy().copy() for x in (ids, changed))
    assert np.array_equal(first[segments != 2], second[segments != 2])
    assert np.abs(first[segments == 2] - second[segments == 2]).max() > 1e-3


def test_training_on_packed_records_takes_the_same_steps(batches):
    curves = []
    for source, scale in ((batches[0], None), (batches[1], None), (batches[1], 1.0)):  # 1.0: gradients accumulate
        history = fit(ChatGLM3(CONFIG), [source.batch(0)] * 3, TrainConfig(learning_rate=1e-2, loss_scale=scale))
        curves.append([(record["loss"], record["grad_norm"], record["loss_tokens"]) for record in history])
    assert curves[0][0][0] > curves[0][2][0]
    for curve in curves[1:]:
        assert curve == [pytest.approx(record, rel=1e-4) for record in curves[0]]
