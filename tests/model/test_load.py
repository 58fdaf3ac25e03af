"""Weights into a model: in its type, or refused as a whole."""

import mindspore as ms
import numpy as np
import pytest

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.model.load import AutoModel, load_weights
from glm3kit.weights.names import hf_name, part_of


@pytest.fixture
def model(hub):
    """Build a ChatGLM3 of the golden sizes, but for the changes."""
    return lambda **changes: ChatGLM3(ModelConfig.from_hf(hub / "config.json", **changes))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_load_into_a_model_in_its_type(dtype, hub, published, model):
    net = model(param_dtype=dtype)
    load_weights(net, hub)
    loaded = net.parameters_dict()
    assert set(loaded) == {part_of(name).name for name in published if "inv_freq" not in name}
    for name, parameter in loaded.items():
        assert parameter.dtype == getattr(ms, dtype)
        expected = ms.Tensor(published[hf_name(name)].astype(np.float32)).astype(parameter.dtype).astype(ms.float32)
        np.testing.assert_array_equal(parameter.astype(ms.float32).asnumpy(), expected.asnumpy())


def test_a_model_of_another_vocabulary_is_refused_and_stays_as_it_was(hub, model):
    net = model(padded_vocab_size=528, param_dtype="float32")
    before = {name: parameter.asnumpy().copy() for name, parameter in net.parameters_dict().items()}
    with pytest.raises(CheckpointError, match="vocabulary of 512 rows, the model asks for 528: set padded_vocab_size"):
        load_weights(net, hub)
    for name, parameter in net.parameters_dict().items():
        np.testing.assert_array_equal(parameter.asnumpy(), before[name])


def test_a_model_with_more_layers_names_every_missing_parameter(hub, model):
    with pytest.raises(CheckpointError) as caught:
        load_weights(model(num_layers=4), hub)
    assert str(caught.value).count("missing: 'transformer.encoder.layers.3.") == 7


def test_a_model_that_gets_weights_at_once_is_built_without_drawing_others(hub, published, monkeypatch):
    cfg = ModelConfig.from_hf(hub / "config.json", param_dtype="float32", checkpoint_name_or_path=str(hub))
    monkeypatch.setattr("glm3kit.model.chatglm3.random_weights", None)  # would be called to draw
    net = AutoModel.from_config(cfg)
    for name, parameter in net.parameters_dict().items():
        np.testing.assert_array_equal(parameter.asnumpy(), published[hf_name(name)].astype(np.float32))
    with pytest.raises(TypeError):
        ChatGLM3(cfg)
