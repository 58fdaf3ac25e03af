"""The schedule, the loss scale and AdamW's corrections by hand arithmetic."""

import numpy as np
import pytest

from glm3kit.config.groups import ModelConfig, TrainConfig
from glm3kit.train.optimizer import LossScale, bias_corrected, decays, learning_rate
from glm3kit.weights.names import parameter_shapes


def test_the_dynamic_scale_doubles_after_a_thousand_good_steps():
    scale = LossScale("dynamic")
    assert scale.value == 65536
    for _ in range(999):
        scale.update(overflow=False)
    assert scale.value == 65536
    scale.update(overflow=False)
    assert scale.value == 131072


def test_warm_up_rises_in_steps_and_the_polynomial_falls_to_its_end():
    schedule = TrainConfig(warmup_steps=4, learning_rate=1.0, end_learning_rate=0.1)
    rates = [learning_rate(step, 13, schedule) for step in range(14)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(np.diff(rates[4:]), -0.1)
    assert rates[-1] == pytest.approx(0.1)


def test_bias_corrections_are_those_of_adam():
    rate, eps, decay = bias_corrected(3, 0.01, TrainConfig(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))
    m, v, c1, c2 = 0.3, 0.04, 1 - 0.9**3, 1 - 0.95**3
    assert rate * m / (v**0.5 + eps) == pytest.approx(0.01 * (m / c1) / ((v / c2)**0.5 + 1e-8))
    assert decay == pytest.approx(0.01 * 0.1)


def test_weight_decay_spares_biases_and_norms():
    spared = {name for name in parameter_shapes(ModelConfig(num_layers=1)) if not decays(name)}
    assert {name.removeprefix("transformer.encoder.") for name in spared} == {
        "layers.0.input_layernorm.weight", "layers.0.self_attention.query_key_value.bias",
        "layers.0.post_attention_layernorm.weight", "final_layernorm.weight"}
