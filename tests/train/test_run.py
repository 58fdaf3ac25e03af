"""Training by one process: the reference's 20 steps, the schedule, accumulation, overflow."""

from types import SimpleNamespace

import numpy as np
import pytest
from fit_golden import reference_batches
from mindspore import Parameter, Tensor

from glm3kit.config.groups import ModelConfig, TrainConfig
from glm3kit.errors import ConfigError, DataError, JobError
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.model.held_out import HeldOutLoss
from glm3kit.model.load import load_weights
from glm3kit.parallel import ALONE
from glm3kit.train.optimizer import LossScale, bias_corrected, decays, learning_rate
from glm3kit.train.step import Totals
from glm3kit.train.trainer import Trainer, fit
from glm3kit.weights.names import parameter_shapes


@pytest.fixture
def net(golden):
    cfg = ModelConfig.from_hf(golden / "hf/config.json", param_dtype="float32", compute_dtype="float32")
    net = ChatGLM3(cfg)
    load_weights(net, golden / "hf")
    return net


@pytest.fixture(scope="module")
def reference(golden):
    return np.load(golden / "reference.npz")


@pytest.fixture(scope="module")
def batches(golden):
    return reference_batches(golden)


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"learning_rate": 1e-3, "end_learning_rate": 1e-5} | changes)


def assert_reference_curve(history, reference):
    np.testing.assert_allclose([r["loss"] for r in history], reference["train.loss"], rtol=1e-3)
    np.testing.assert_allclose([r["grad_norm"] for r in history], reference["train.grad_norm"], rtol=1e-3)
    np.testing.assert_allclose([r["learning_rate"] for r in history], reference["train.lr"], rtol=1e-6)


def test_twenty_steps_equal_the_reference(net, batches, reference):
    history = fit(net, batches, config())
    assert_reference_curve(history, reference)
    final = {name.removeprefix("transformer.encoder."): p.asnumpy() for name, p in net.parameters_dict().items()}
    np.testing.assert_allclose(final["final_layernorm.weight"], reference["train.final.final_layernorm"], atol=1e-5)
    # A key's bias in the half that is not rotated adds the same to all scores of a query: its gradient is rounding
    # noise, which Adam blows up to whole steps.
    moved = np.ones(128, bool)
    moved[64:96].reshape(2, 16)[:, 8:] = False
    np.testing.assert_allclose(final["layers.0.self_attention.query_key_value.bias"][moved],
                               reference["train.final.query_key_value.bias.0"][moved], atol=1e-5)


def test_accumulated_micro_batches_equal_the_whole_batch(net, batches, reference):
    halves = [(ids[i:i + 2], labels[i:i + 2]) for ids, labels in batches for i in (0, 2)]
    assert_reference_curve(fit(net, halves, config(gradient_accumulation_steps=2)), reference)


def test_accumulation_counts_tokens_and_not_rows(net, batches):
    (ids, labels), *_ = batches
    labels = labels.copy()
    labels[0, 5:] = -100  # rows that weigh differently
    rate = config(learning_rate=0.0, end_learning_rate=0.0)
    whole, = fit(net, [(ids, labels)], rate)
    split, = fit(net, [(ids[i:i + 1], labels[i:i + 1]) for i in range(4)],
                 rate.model_copy(update={"gradient_accumulation_steps": 4}))
    assert split["loss_tokens"] == whole["loss_tokens"] == 3 * 47 + 5
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


def test_a_fixed_loss_scale_changes_nothing(net, batches, reference):
    assert_reference_curve(fit(net, batches, config(loss_scale=1024.0)), reference)


def test_an_overflow_leaves_weights_and_moments_and_halves_the_scale(net, batches):
    trainer = Trainer(net, config(loss_scale="dynamic"), total_steps=20)
    trainer.advance(batches[:1])
    trainer.scale.value = 1e45  # beyond float32
    before = {p.name: p.asnumpy().copy() for p in (*net.trainable_params(), *trainer.optimizer.state())}
    record = trainer.advance(batches[1:2])
    assert record["overflow"] and record["loss_scale"] == 1e45
    assert trainer.scale.value == 5e44
    for parameter in (*net.trainable_params(), *trainer.optimizer.state()):
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name], parameter.name)
    trainer.scale.value = 1024.0
    assert not trainer.advance(batches[1:2])["overflow"], "the step after an overflow is a good one"


def test_the_dynamic_scale_doubles_after_a_thousand_good_steps():
    scale = LossScale("dynamic")
    assert scale.value == 65536
    for _ in range(999):
        scale.update(overflow=False)
    assert scale.value == 65536
    scale.update(overflow=False)
    assert scale.value == 131072


def test_numbers_that_are_not_finite_stop_a_run_with_advice(net, batches):
    ids, labels = batches[0]
    net.parameters_dict()["transformer.output_layer.weight"].set_data(
        net.parameters_dict()["transformer.output_layer.weight"] * float("nan"))
    with pytest.raises(JobError, match="step 1: loss nan.*INFNAN_MODE.*learning_rate"):
        fit(net, [(ids, labels)], config())


def test_float16_weights_are_updated_from_float32_masters(golden, batches, reference):
    cfg = ModelConfig.from_hf(golden / "hf/config.json", compute_dtype="float32")
    net = ChatGLM3(cfg)
    load_weights(net, golden / "hf")
    history = fit(net, batches, config())
    np.testing.assert_allclose([r["loss"] for r in history], reference["train.loss"], rtol=2e-3)
    assert {str(p.dtype) for p in net.trainable_params()} == {"Float16"}


def test_batches_that_end_too_early_are_an_error(net, batches):
    with pytest.raises(DataError, match="ended after step 1 of 2"):
        fit(net, batches[:1], config(total_steps=2))
    with pytest.raises(DataError, match="total_steps"):
        fit(net, iter(batches), config())


def test_warm_up_rises_in_steps_and_the_polynomial_falls_to_its_end():
    schedule = config(warmup_steps=4, learning_rate=1.0, end_learning_rate=0.1)
    rates = [learning_rate(step, 13, schedule) for step in range(14)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(np.diff(rates[4:]), -0.1)
    assert rates[-1] == pytest.approx(0.1)


def test_bias_corrections_are_those_of_adam():
    rate, eps, decay = bias_corrected(3, 0.01, config(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))
    m, v, c1, c2 = 0.3, 0.04, 1 - 0.9**3, 1 - 0.95**3
    assert rate * m / (v**0.5 + eps) == pytest.approx(0.01 * (m / c1) / ((v / c2)**0.5 + 1e-8))
    assert decay == pytest.approx(0.01 * 0.1)


def test_the_gradient_norm_of_a_large_matrix_keeps_its_digits():
    gradient = np.random.default_rng(0).standard_normal((8192, 512)).astype(np.float32)
    matrix = Parameter(Tensor(gradient), "transformer.embedding.embedding_table")
    totals = Totals(SimpleNamespace(trainable_params=lambda: [matrix], cfg=ModelConfig()), ALONE)
    norm = totals((Tensor(gradient),), Tensor([3.0, 2.0]), Tensor(4.0)).asnumpy()[1]
    assert norm == pytest.approx(np.linalg.norm(gradient.astype(np.float64)) / (2 * 4), rel=1e-6)


def test_weight_decay_spares_biases_and_norms():
    spared = {name for name in parameter_shapes(ModelConfig(num_layers=1)) if not decays(name)}
    assert {name.removeprefix("transformer.encoder.") for name in spared} == {
        "layers.0.input_layernorm.weight", "layers.0.self_attention.query_key_value.bias",
        "layers.0.post_attention_layernorm.weight", "final_layernorm.weight"}


def test_recomputed_layers_give_the_same_curve(net, batches, reference):
    assert_reference_curve(fit(net, batches, config(recompute=True)), reference)


def test_float16_with_a_dynamic_scale_follows_the_reference(golden, batches, reference):
    net = ChatGLM3(ModelConfig.from_hf(golden / "hf/config.json"))
    load_weights(net, golden / "hf")
    history = fit(net, batches, config(loss_scale="dynamic"))
    assert {record["loss_scale"] for record in history} == {65536.0} and not any(r["overflow"] for r in history)
    np.testing.assert_allclose([r["loss"] for r in history], reference["train.loss"], rtol=1e-2)
    np.testing.assert_allclose([r["grad_norm"] for r in history], reference["train.grad_norm"], rtol=3e-2)


def test_an_overflow_that_no_scale_avoids_stops_the_run_with_advice(net, batches):
    trainer = Trainer(net, config(loss_scale="dynamic"), total_steps=20)
    weight = net.parameters_dict()["transformer.output_layer.weight"]
    weight.set_data(weight * float("nan"))
    trainer.scale.value = 2.0
    assert trainer.advance(batches[:1])["overflow"], "the scale can still be halved"
    with pytest.raises(JobError, match="step 2: .*loss scale 1; .*MS_ASCEND_CHECK_OVERFLOW_MODE=INFNAN_MODE"):
        trainer.advance(batches[1:2])


def test_bfloat16_on_a_cpu_is_an_error_that_says_what_to_set(golden):
    with pytest.raises(ConfigError, match="compute_dtype is bfloat16.*on a CPU; set model.compute_dtype=float32"):
        ChatGLM3(ModelConfig.from_hf(golden / "hf/config.json", compute_dtype="bfloat16"))


def test_held_out_loss_is_that_of_the_weights_as_they_are_now(net, batches, reference):
    held_out = HeldOutLoss(net)
    given = [(reference["loss.input_ids"], reference["loss.labels"])]
    assert held_out.mean(given) == pytest.approx(float(reference["loss.value"]), rel=1e-5)
    seen = []
    history = fit(net, batches, config(), on_step=lambda record, trainer: seen.append(held_out.mean(batches[-1:])))
    assert seen[18] == pytest.approx(history[19]["loss"], rel=1e-6), "before the last step the last batch is held out"
    with pytest.raises(DataError, match="no label counts"):
        held_out.mean([(batches[0][0], np.full_like(batches[0][1], -100))])
