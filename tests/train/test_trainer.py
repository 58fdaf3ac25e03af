"""Training by one process: the reference's 20 steps, accumulation, overflow."""

import numpy as np
import pytest
from support import golden_net, reference_batches

from glm3kit.config.groups import ModelConfig, TrainConfig
from glm3kit.errors import ConfigError, DataError, JobError
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.model.held_out import HeldOutLoss
from glm3kit.train.trainer import Trainer, fit, run_steps


@pytest.fixture(scope="module")
def net():
    return golden_net()


@pytest.fixture(scope="module")
def trainers(net, restartable):
    """What starts training from the golden weights, with a step as one graph and as two; see `restartable`."""
    return [restartable(Trainer(net, settings, total_steps=20)) for settings in (config(), config(loss_scale=1.0))]


@pytest.fixture
def fused(trainers):
    return trainers[0]


@pytest.fixture
def in_two(trainers):
    return trainers[1]


@pytest.fixture(scope="module")
def batches(golden):
    return reference_batches()


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"learning_rate": 1e-3, "end_learning_rate": 1e-5} | changes)


def assert_reference_curve(history, reference):
    np.testing.assert_allclose([r["loss"] for r in history], reference["train.loss"], rtol=1e-3)
    np.testing.assert_allclose([r["grad_norm"] for r in history], reference["train.grad_norm"], rtol=1e-3)
    np.testing.assert_allclose([r["learning_rate"] for r in history], reference["train.lr"], rtol=1e-6)


def test_twenty_steps_equal_the_reference(fused, net, batches, reference):
    assert_reference_curve(run_steps(fused(), batches), reference)
    final = {name.removeprefix("transformer.encoder."): p.asnumpy() for name, p in net.parameters_dict().items()}
    np.testing.assert_allclose(final["final_layernorm.weight"], reference["train.final.final_layernorm"], atol=1e-5)
    # A key's bias in the half that is not rotated adds the same to all scores of a query: its gradient is rounding
    # noise, which Adam blows up to whole steps.
    moved = np.ones(128, bool)
    moved[64:96].reshape(2, 16)[:, 8:] = False
    np.testing.assert_allclose(final["layers.0.self_attention.query_key_value.bias"][moved],
                               reference["train.final.query_key_value.bias.0"][moved], atol=1e-5)


def halves(batches):
    return [(ids[i:i + 2], labels[i:i + 2]) for ids, labels in batches for i in (0, 2)]


def test_accumulated_micro_batches_equal_the_whole_batch(in_two, batches, reference):
    trainer = in_two(gradient_accumulation_steps=2, loss_scale=None)
    assert_reference_curve(run_steps(trainer, halves(batches)), reference)


def test_accumulation_counts_tokens_and_not_rows(fused, in_two, batches):
    (ids, labels), *_ = batches
    labels = labels.copy()
    labels[0, 5:] = -100  # halves that weigh differently
    whole, = run_steps(fused(total_steps=1), [(ids, labels)])
    split, = run_steps(in_two(total_steps=1, gradient_accumulation_steps=2), halves([(ids, labels)]))
    assert split["loss_tokens"] == whole["loss_tokens"] == 3 * 47 + 5
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


def test_a_fixed_loss_scale_changes_nothing(in_two, batches, reference):
    assert_reference_curve(run_steps(in_two(loss_scale=1024.0), batches), reference)


def test_an_overflow_leaves_weights_and_moments_and_halves_the_scale(in_two, net, batches):
    trainer = in_two(loss_scale="dynamic")
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


def make_nan(trainer):
    weight = trainer.net.parameters_dict()["transformer.output_layer.weight"]
    weight.copy_(weight * float("nan"))


def test_numbers_that_are_not_finite_stop_a_run_with_advice(fused, batches):
    trainer = fused()
    make_nan(trainer)
    with pytest.raises(JobError, match="step 1: loss nan.*INFNAN_MODE.*learning_rate"):
        run_steps(trainer, batches)


def test_float16_weights_are_updated_from_float32_masters(batches, reference):
    net = golden_net(param_dtype="float16")
    history = fit(net, batches, config())
    np.testing.assert_allclose([r["loss"] for r in history], reference["train.loss"], rtol=2e-3)
    assert {str(p.dtype) for p in net.trainable_params()} == {"Float16"}


def test_batches_that_end_too_early_are_an_error(fused, net, batches):
    with pytest.raises(DataError, match="ended after step 1 of 20"):
        run_steps(fused(), batches[:1])
    with pytest.raises(DataError, match="total_steps"):
        fit(net, iter(batches), config())


def test_recomputed_layers_give_the_same_curve(batches, reference):
    assert_reference_curve(fit(golden_net(), batches, config(recompute=True)), reference)


def test_float16_with_a_dynamic_scale_follows_the_reference(batches, reference):
    net = golden_net(param_dtype="float16", compute_dtype="float16")
    history = fit(net, batches, config(loss_scale="dynamic"))
    assert {record["loss_scale"] for record in history} == {65536.0} and not any(r["overflow"] for r in history)
    np.testing.assert_allclose([r["loss"] for r in history], reference["train.loss"], rtol=1e-2)
    np.testing.assert_allclose([r["grad_norm"] for r in history], reference["train.grad_norm"], rtol=3e-2)


def test_an_overflow_that_no_scale_avoids_stops_the_run_with_advice(in_two, batches):
    trainer = in_two(loss_scale="dynamic")
    make_nan(trainer)
    trainer.scale.value = 2.0
    assert trainer.advance(batches[:1])["overflow"], "the scale can still be halved"
    with pytest.raises(JobError, match="step 2: .*loss scale 1; .*MS_ASCEND_CHECK_OVERFLOW_MODE=INFNAN_MODE"):
        trainer.advance(batches[1:2])


def test_bfloat16_on_a_cpu_is_an_error_that_says_what_to_set(golden):
    with pytest.raises(ConfigError, match="compute_dtype is bfloat16.*on a CPU; set model.compute_dtype=float32"):
        ChatGLM3(ModelConfig.from_hf(golden / "hf/config.json", compute_dtype="bfloat16"))


def test_held_out_loss_is_that_of_the_weights_as_they_are_now(fused, net, batches, reference):
    trainer, held_out = fused(), HeldOutLoss(net)
    given = [(reference["loss.input_ids"], reference["loss.labels"])]
    assert held_out.mean(given) == pytest.approx(float(reference["loss.value"]), rel=1e-5)
    seen = []
    history = run_steps(trainer, batches, lambda record, trainer: seen.append(held_out.mean(batches[-1:])))
    assert seen[18] == pytest.approx(history[19]["loss"], rel=1e-6), "before the last step the last batch is held out"
    with pytest.raises(DataError, match="no label counts"):
        held_out.mean([(batches[0][0], np.full_like(batches[0][1], -100))])
