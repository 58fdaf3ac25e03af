"""The model against the official PyTorch code: logits, hidden states, loss, gradients; and against chatglm.cpp's."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from support import FLOAT32, golden_net

from glm3kit.config.groups import ModelConfig
from glm3kit.generate.decoder import Decoder
from glm3kit.model.chatglm3 import ChatGLM3, RMSNorm, rotary_tables, rotation_matrix
from glm3kit.model.load import AutoModel
from glm3kit.train.step import SummedLoss
from glm3kit.weights.names import hf_name, parameter_shapes
from glm3kit.weights.read import read_weights


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_a_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(ModelConfig(hidden_size=2, layernorm_epsilon=1e-12, param_dtype="float32"))
    norm.weight.set_data(Tensor([1.0, 2.0], ms.float32))
    x = Tensor([[1.0, 7.0], [3.0, -3.0]], ms.float32)  # root mean squares 5 and 3
    np.testing.assert_allclose(norm(x).asnumpy(), [[0.2, 2.8], [1, -2]], rtol=1e-6)


def test_a_rotation_turns_pairs_of_the_first_half_by_position_times_frequency():
    cos, sin = rotary_tables(4, 8)  # pairs (0, 1) with frequency 1 and (2, 3) with 10000 ** -0.5; 4 to 7 stay
    x = np.array([1, 0, 0, 1, 5, 6, 7, 8], np.float32)
    turned = x * cos[3] + x @ rotation_matrix(8) * sin[3]
    expected = [np.cos(3), np.sin(3), -np.sin(0.03), np.cos(0.03), 5, 6, 7, 8]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_parameters_have_the_names_and_shapes_of_the_checkpoint(net):
    assert {p.name: tuple(p.shape) for p in net.get_parameters()} == parameter_shapes(net.cfg)


def test_logits_equal_the_reference(net, reference):
    logits = net(Tensor(reference["forward.input_ids"]))
    assert logits.dtype == ms.float32
    np.testing.assert_allclose(logits.asnumpy(), reference["forward.logits"], rtol=0, atol=2e-4)


def test_hidden_states_equal_the_reference_layer_by_layer(net, reference):
    seen = []
    cells = [net.transformer.embedding, *net.transformer.encoder.layers]
    hooks = [cell.register_forward_hook(lambda cell, inputs, output: seen.append(output.asnumpy())) for cell in cells]
    net(Tensor(reference["forward.input_ids"]))
    for hook in hooks:
        hook.remove()
    assert len(seen) == net.cfg.num_layers + 1
    for i, hidden in enumerate(seen):
        np.testing.assert_allclose(hidden, reference[f"forward.hidden_{i}"], rtol=0, atol=2e-5)


def test_rows_padded_on_the_left_equal_the_reference(net, reference):
    mask = reference["padded.attention_mask"]
    assert mask.min() == 0
    logits = net(Tensor(reference["padded.input_ids"]), Tensor(mask)).asnumpy()
    np.testing.assert_allclose(logits[:, -1], reference["padded.last_logits"], rtol=0, atol=2e-4)


def test_a_token_does_not_see_what_follows(net, reference):
    ids = reference["forward.input_ids"][:1].copy()
    before = net(Tensor(ids)).asnumpy()
    ids[0, 12:] = 7
    np.testing.assert_allclose(net(Tensor(ids)).asnumpy()[0, :12], before[0, :12], rtol=0, atol=1e-5)


def test_loss_and_every_gradient_equal_the_reference(net, reference):
    of_loss = ms.value_and_grad(net.loss, None, net.trainable_params())
    loss, gradients = of_loss(Tensor(reference["loss.input_ids"]), Tensor(reference["loss.labels"]))
    assert float(loss.asnumpy()) == pytest.approx(float(reference["loss.value"]), rel=1e-5)
    square = 0.0
    for parameter, gradient in zip(net.trainable_params(), gradients, strict=True):
        expected = reference[f"grad.{hf_name(parameter.name)}"]
        assert relative(gradient.asnumpy(), expected) < 1e-3, parameter.name
        square += float(np.square(gradient.asnumpy()).sum())
    assert square ** 0.5 == pytest.approx(float(reference["loss.global_grad_norm"]), rel=1e-3)


def test_labels_of_minus_100_carry_no_loss(net, reference):
    ids, labels = reference["loss.input_ids"], reference["loss.labels"].copy()
    labels[1:] = -100
    several, alone = (net.loss(Tensor(ids[:n]), Tensor(labels[:n])).asnumpy() for n in (4, 1))
    assert float(several) == pytest.approx(float(alone), rel=1e-5)
    assert float(net.loss(Tensor(ids), Tensor(np.full_like(labels, -100))).asnumpy()) == 0


def test_input_longer_than_the_window_is_an_error(net):
    window = net.cfg.seq_length
    assert net(Tensor(np.ones((1, window), np.int32))).shape == (1, window, net.cfg.padded_vocab_size)
    with pytest.raises(ValueError, match=f"{window + 1} tokens a row, more than seq_length {window}"):
        net(Tensor(np.ones((1, window + 1), np.int32)))


def test_decoding_with_the_cache_equals_the_reference_and_recomputing(net, reference):
    ids = reference["forward.input_ids"]
    lengths = np.array([5, 9], np.int32)  # the rows of a batch stand at different positions
    prompts = np.where(np.arange(16) < lengths[:, None], ids[:, :16], 0)  # padded on the right
    decoder = Decoder(net, 2)
    hidden = decoder.hidden(Tensor(prompts), Tensor([0, 0], ms.int32)).asnumpy()
    states = [[*hidden[row, :length]] for row, length in enumerate(lengths)]
    for step in range(4):
        new = decoder.hidden(Tensor(ids[[0, 1], lengths + step][:, None]), Tensor(lengths + step)).asnumpy()
        for row in range(2):
            states[row].append(new[row, 0])
    recomputed = net.hidden(Tensor(ids)).asnumpy()
    for row, length in enumerate(lengths + 4):
        found = np.stack(states[row])
        np.testing.assert_allclose(found, recomputed[row, :length], rtol=0, atol=2e-5)
        logits = net.logits(Tensor(found)).asnumpy()
        np.testing.assert_allclose(logits, reference["forward.logits"][row, :length], rtol=0, atol=2e-4)


def test_three_calls_on_one_cache_equal_chatglm_cpp(shared):
    """Layout of the file: weights of a 1-layer model, then ids and outputs of the final norm, little-endian."""
    cfg = ModelConfig(num_layers=1, padded_vocab_size=5, hidden_size=32, ffn_hidden_size=48, kv_channels=4,
                      num_attention_heads=8, multi_query_group_num=2, seq_length=8, **FLOAT32)
    net = ChatGLM3(cfg)
    raw = (shared / "data" / "chatglm_cpp" / "glm3_model.data").read_bytes()
    position = 0

    def read(shape: tuple[int, ...], dtype: str = "<f4") -> np.ndarray:
        nonlocal position
        count = int(np.prod(shape))
        array = np.frombuffer(raw, dtype, count, position).reshape(shape).copy()
        position += 4 * count
        return array

    for name, shape in parameter_shapes(cfg).items():
        if "output_layer" not in name:
            net.parameters_dict()[name].set_data(Tensor(read(shape)))
    decoder, position_of_token = Decoder(net, 1), 0
    for tokens in (3, 1, 1):
        ids, expected = read((1, tokens), "<i4"), read((tokens, 32))
        hidden = decoder.hidden(Tensor(ids), Tensor([position_of_token], ms.int32)).asnumpy()[0]
        np.testing.assert_allclose(hidden, expected, rtol=0, atol=2e-5)
        position_of_token += tokens
    assert position == len(raw)


def test_from_config_loads_the_weights_that_the_configuration_names(hub, reference):
    net = AutoModel.from_config(ModelConfig.from_hf(hub / "config.json", checkpoint_name_or_path=str(hub), **FLOAT32))
    logits = net(Tensor(reference["forward.input_ids"])).asnumpy()
    np.testing.assert_allclose(logits, reference["forward.logits"], rtol=0, atol=2e-4)


@pytest.fixture
def flash_calls(monkeypatch):
    """Puts a stand-in in the place of ops.flash_attention_score, held to its documentation: half precision, BNSD,
    True hides. Returns the shapes of the masks that it is given.
    """
    calls = []

    def stand_in(query, key, value, head_num, attn_mask, scalar_value, input_layout):
        B, H, T, d = query.shape
        G, S = key.shape[1:3]
        assert input_layout == "BNSD" and head_num == H and value.shape == key.shape == (B, G, S, d) and H % G == 0
        assert query.dtype == key.dtype == value.dtype == ms.float16 and attn_mask.dtype == ms.bool_
        assert attn_mask.shape in ((T, S), (B, 1, T, S))
        calls.append(attn_mask.shape)
        key, value = (ops.repeat_interleave(x.astype(ms.float32), H // G, axis=1) for x in (key, value))
        scores = ops.matmul(query.astype(ms.float32), key.swapaxes(2, 3)) * scalar_value
        probs = ops.softmax(ops.masked_fill(scores, attn_mask, -1e30), -1)
        return ops.matmul(probs, value).astype(ms.float16)

    monkeypatch.setattr("glm3kit.model.chatglm3.on_ascend", lambda: True)
    monkeypatch.setattr("mindspore.ops.flash_attention_score", stand_in)
    return calls


def test_flash_attention_gets_ascends_layout_and_gives_the_same_logits(reference, flash_calls):
    fused = golden_net(param_dtype="float16", compute_dtype="float16", use_flash_attention=True)
    ids = Tensor(reference["forward.input_ids"])
    np.testing.assert_allclose(fused(ids).asnumpy(), reference["forward.logits"], atol=2e-2)
    padded, mask = Tensor(reference["padded.input_ids"]), Tensor(reference["padded.attention_mask"])
    np.testing.assert_allclose(fused(padded, mask).asnumpy()[:, -1], reference["padded.last_logits"], atol=2e-2)
    (B, T), layers = padded.shape, fused.cfg.num_layers
    assert flash_calls == [(ids.shape[1],) * 2] * layers + [(B, 1, T, T)] * layers
    with pytest.raises(ValueError, match="use_flash_attention is true, but compute_dtype is float32"):
        ModelConfig(use_flash_attention=True, compute_dtype="float32")


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_gives_the_same_gradients(hub, reference, flash_calls, packed):
    ids = reference["forward.input_ids"].astype(np.int32)
    segments = [Tensor(np.broadcast_to(1 + np.arange(ids.shape[1]) // 7, ids.shape).astype(np.int32))]
    gradients, weights = [], read_weights(hub)
    for flash in (False, True):
        net = ChatGLM3(ModelConfig.from_hf(hub / "config.json", num_layers=1, param_dtype="float32",
                                           compute_dtype="float16", use_flash_attention=flash), weights=weights)
        loss = SummedLoss(net)
        backward = ops.GradOperation(get_by_list=True)(loss, ms.ParameterTuple(net.trainable_params()))
        inputs = Tensor(ids[:, :-1]), Tensor(ids[:, 1:]), *(segment[:, :-1] for segment in segments if packed)
        gradients.append([gradient.asnumpy() for gradient in backward(*inputs)])
        names = [parameter.name for parameter in net.trainable_params()]
    assert len(flash_calls) == 1
    for name, plain, fused in zip(names, *gradients, strict=True):
        assert np.linalg.norm(fused - plain) < 5e-3 * np.linalg.norm(plain), name
