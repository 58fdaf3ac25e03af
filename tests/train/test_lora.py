"""LoRA against the reference: losses, merged weights; adapters alone, beside whole weights, and folded in."""

import numpy as np
import pytest
from mindspore import Tensor
from support import ROOT, golden_net, next_token_labels

from glm3kit.checkpoint.merge import merge
from glm3kit.config.groups import LoraConfig, RunConfig, TrainConfig
from glm3kit.config.load import load_config
from glm3kit.errors import CheckpointError, ConfigError
from glm3kit.model.held_out import HeldOutLoss
from glm3kit.model.load import load_weights
from glm3kit.parallel import ALONE
from glm3kit.train.lora import add_adapters, merge_adapters, save_adapters
from glm3kit.train.saving import load_checkpoint, save_checkpoint
from glm3kit.train.trainer import Trainer, fit
from glm3kit.weights.adapters import fold_adapters
from glm3kit.weights.formats.safetensors import read_safetensors
from glm3kit.weights.names import parameter_shapes
from glm3kit.weights.random import random_weights
from glm3kit.weights.read import read_weights

QKV = "transformer.encoder.layers.{}.self_attention.query_key_value"


@pytest.fixture(scope="module")
def reference(golden):
    return dict(np.load(golden / "lora.npz"))


def lora_config(reference, **changes) -> LoraConfig:
    return LoraConfig(rank=int(reference["rank"]), alpha=float(reference["alpha"]), **changes)


def train_config(reference) -> TrainConfig:
    rate = float(reference["lr"])
    return TrainConfig(learning_rate=rate, end_learning_rate=rate, weight_decay=0.0, max_grad_norm=None,
                       betas=(0.9, 0.95), lora=lora_config(reference))


def weights_of(net) -> dict[str, np.ndarray]:
    return {name: p.asnumpy().copy() for name, p in net.parameters_dict().items()}


def add_reference_adapters(net, reference, **changes):
    add_adapters(net, lora_config(reference, **changes))
    for layer in range(net.cfg.num_layers):
        net.parameters_dict()[QKV.format(layer) + ".lora_a"].asnumpy()[:] = reference[f"lora_a.{layer}"]


@pytest.fixture(scope="module")
def trained(reference):
    """The model after the reference's ten steps, its weights before, and what was recorded."""
    net = golden_net()
    before = weights_of(net)
    add_reference_adapters(net, reference)
    batches = [(ids, next_token_labels(ids)) for ids in reference["input_ids"]]
    return net, before, fit(net, batches, train_config(reference))


def test_ten_steps_have_the_losses_of_the_reference(trained, reference):
    _, _, history = trained
    np.testing.assert_allclose([record["loss"] for record in history], reference["loss"], rtol=1e-5)


def test_only_adapters_are_trained(trained):
    net, before, _ = trained
    assert {p.name.rpartition(".")[2] for p in net.trainable_params()} == {"lora_a", "lora_b"}
    now = weights_of(net)
    assert all(np.array_equal(now[name], before[name]) for name in before)
    assert all(now[QKV.format(i) + ".lora_b"].any() for i in range(net.cfg.num_layers))


def test_folded_weights_equal_the_reference_and_give_the_same_logits(trained, golden, reference, tmp_path):
    net, before, _ = trained
    ids = Tensor(reference["input_ids"][0])
    beside = net(ids).asnumpy()
    file = save_adapters(net, tmp_path / "adapters.safetensors")
    assert file.stat().st_size < 20_000, "adapters alone"

    loaded = golden_net()
    load_weights(loaded, golden / "hf", adapters=file)
    folded = weights_of(loaded)
    assert {name: array.shape for name, array in folded.items()} == parameter_shapes(net.cfg)
    for layer in range(net.cfg.num_layers):
        np.testing.assert_allclose(folded[QKV.format(layer) + ".weight"], reference[f"merged_qkv.{layer}"], atol=2e-5)
    np.testing.assert_allclose(loaded(ids).asnumpy(), beside, atol=1e-4)

    adapted = golden_net()
    add_adapters(adapted, lora_config(reference))
    for name, parameter in adapted.parameters_dict().items():
        parameter.copy_(net.parameters_dict()[name])
    merge_adapters(adapted)
    now = weights_of(adapted)
    assert set(now) == set(before) and all(np.array_equal(now[name], folded[name]) for name in folded)
    assert len(adapted.trainable_params()) == len(before), "a plain model again"
    np.testing.assert_allclose(adapted(ids).asnumpy(), beside, atol=1e-4)


def test_generation_uses_the_adapters(trained, golden, reference):
    net, _, _ = trained
    prompt = reference["input_ids"][0, 0, :8].tolist()
    answer = net.generate([prompt], max_new_tokens=8, eos_token_id=[])[0]
    logits = net(Tensor(answer[None])).asnumpy()[0]
    assert logits[7:15].argmax(axis=1).tolist() == answer[8:].tolist()


@pytest.fixture(scope="module")
def fresh(reference, restartable):
    """Start training adapters on two matrices a layer."""
    lora = lora_config(reference, targets=("query_key_value", "dense_4h_to_h"))
    config = train_config(reference).model_copy(update={"lora": lora})
    return restartable(Trainer(golden_net(), config, total_steps=4))


@pytest.mark.parametrize("adapters_only", [False, True])
def test_a_checkpoint_goes_on_and_merges_by_itself(adapters_only, fresh, golden, reference, tmp_path):
    lora = lora_config(reference, adapters_only=adapters_only, targets=("query_key_value", "dense_4h_to_h"))
    batches = [(ids, next_token_labels(ids)) for ids in reference["input_ids"][:2]]
    trainer = fresh(lora=lora)
    net, config = trainer.net, trainer.config
    trainer.advance(batches[:1])
    path = save_checkpoint(tmp_path / "job", net, trainer, ALONE, keep=1)
    folded = golden_net()
    load_weights(folded, golden / "hf", adapters=tmp_path / "job")
    size = (path / "model/rank_0.safetensors").stat().st_size
    assert size < 30_000 if adapters_only else size > 400_000
    expected = trainer.advance(batches[1:])["loss"]

    load_checkpoint(path, net, fresh(lora=lora), ALONE)
    assert trainer.advance(batches[1:])["loss"] == expected

    if adapters_only:
        with pytest.raises(CheckpointError, match="adapters alone, and no config.yaml"):
            merge(tmp_path / "job", tmp_path / "merged.safetensors", progress=False)
    base = golden / "hf" if adapters_only else None
    file = merge(tmp_path / "job", tmp_path / "merged.safetensors", base=base, progress=False)
    RunConfig(model=net.cfg.model_copy(update={"checkpoint_name_or_path": str(golden / "hf")}),
              train=config).save(tmp_path / "job/config.yaml")
    by_itself = merge(tmp_path / "job", tmp_path / "by_itself.safetensors", progress=False)
    assert by_itself.read_bytes() == file.read_bytes(), "the base is what the job's config.yaml names"
    merged = read_weights(file)
    assert {name: spec.shape for name, spec in merged.specs.items()} == parameter_shapes(net.cfg)
    for name, array in weights_of(folded).items():
        np.testing.assert_allclose(np.asarray(merged[name], np.float32), array, rtol=2e-3, atol=1e-6, err_msg=name)
    alone = merge(tmp_path / "job", tmp_path / "adapters.safetensors", adapters=True, progress=False)
    load_weights(folded, golden / "hf", adapters=alone)
    strategy = (path / "model/strategy.json").rename(tmp_path / "strategy.json")
    given = merge(tmp_path / "job", tmp_path / "given.safetensors", strategy, adapters=True, progress=False)
    assert given.read_bytes() == alone.read_bytes()


def test_adapters_of_other_settings_or_another_model_are_refused(trained, golden, reference, tmp_path):
    net, _, _ = trained
    with pytest.raises(ConfigError, match="adapters already.*of rank 4.*rank 8.*merge_adapters"):
        add_adapters(net, LoraConfig(rank=8))
    file = save_adapters(net, tmp_path / "adapters.safetensors")
    fewer = net.cfg.model_copy(update={"num_layers": 2})
    with pytest.raises(CheckpointError, match="(?s)do not fit the weights.*layers.2.*is missing"):
        fold_adapters(read_safetensors(file), random_weights(fewer, 0), "adapters")
    with pytest.raises(CheckpointError, match="holds no adapters"):
        load_weights(net, golden / "hf", adapters=golden / "hf/model-00001-of-00002.safetensors")


def test_dropout_changes_training_and_not_what_is_measured(trained, reference):
    batches = [(ids, next_token_labels(ids)) for ids in reference["input_ids"][:3]]
    net = golden_net()
    add_reference_adapters(net, reference, dropout=0.5)
    config = train_config(reference).model_copy(update={"lora": lora_config(reference, dropout=0.5)})
    dropped, kept = fit(net, batches, config), trained[2]
    assert kept[0]["loss"] == pytest.approx(dropped[0]["loss"], rel=1e-6), "B is zero at first"
    assert kept[2]["loss"] != dropped[2]["loss"] == pytest.approx(kept[2]["loss"], rel=0.05)
    measure = HeldOutLoss(net)
    assert measure.mean(batches) == measure.mean(batches)


def test_adapters_without_weights_to_fold_them_into_are_a_fault_of_the_configuration():
    with pytest.raises(ValueError, match="train.lora.adapters_only is set.*checkpoint_name_or_path names no weights"):
        RunConfig(train=TrainConfig(lora=LoraConfig(adapters_only=True)))
    with pytest.raises(ConfigError, match="train.lora.rnk: unknown key; did you mean 'rank'"):
        load_config(ROOT / "configs/tiny.yaml", ["train.lora.rnk=4"])
