"""Checkpoints: continuing equals not stopping, a kill at any moment leaves a whole one, damage is noticed."""

import os
import shutil
import types

import numpy as np
import pytest
from support import reference_batches

from glm3kit.checkpoint.folder import checkpoints, newest_checkpoint
from glm3kit.config.groups import ModelConfig, TrainConfig
from glm3kit.errors import CheckpointError
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import ALONE
from glm3kit.train.saving import load_checkpoint, save_checkpoint, usable_checkpoint
from glm3kit.train.trainer import Trainer, run_steps
from glm3kit.weights.formats.safetensors import read_safetensors
from glm3kit.weights.random import random_weights

TINY = ModelConfig(num_layers=2, padded_vocab_size=64, hidden_size=16, ffn_hidden_size=24, kv_channels=8,
                   num_attention_heads=4, seq_length=48, param_dtype="float32", compute_dtype="float32")
WEIGHTS = random_weights(TINY, seed=3)


@pytest.fixture(scope="module")
def batches(golden):
    return [(ids % 64, np.where(labels < 0, labels, labels % 64)) for ids, labels in reference_batches()[:6]]


def new_trainer(total_steps: int = 6, **changes) -> tuple[ChatGLM3, Trainer]:
    net = ChatGLM3(TINY.model_copy(update=changes), weights=WEIGHTS)
    return net, Trainer(net, TrainConfig(learning_rate=1e-2, loss_scale="dynamic"), total_steps)


@pytest.fixture(scope="module")
def fresh(restartable):
    """Start training from the same weights."""
    return restartable(new_trainer()[1])


def test_continuing_gives_the_losses_of_an_uninterrupted_run(fresh, batches, tmp_path):
    trainer = fresh()

    def save(record, trainer):
        save_checkpoint(tmp_path, trainer.net, trainer, ALONE, keep=2)

    whole = run_steps(trainer, batches, on_step=save)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_5", "step_6"], "the newest two are kept"
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2, "nothing else is left"

    load_checkpoint(checkpoints(tmp_path)[0], trainer.net, fresh(), ALONE)
    again = run_steps(trainer, batches[5:])
    assert [record["loss"] for record in again] == [record["loss"] for record in whole[5:]]


def test_masters_of_float16_weights_begin_as_the_float32_weights_of_a_checkpoint_without_them(fresh, batches, tmp_path):
    trainer = fresh()
    run_steps(trainer, batches)
    path = save_checkpoint(tmp_path, trainer.net, trainer, ALONE, keep=1)
    half = new_trainer(param_dtype="float16")
    load_checkpoint(path, *half, ALONE)
    masters = {p.name: p.asnumpy() for p in half[1].optimizer.state() if p.name.startswith("master.")}
    for parameter in trainer.net.trainable_params():
        np.testing.assert_array_equal(masters[f"master.{parameter.name}"], parameter.asnumpy())


def test_a_checkpoint_of_another_model_schedule_or_data_is_refused(tmp_path):
    net, trainer = new_trainer()
    path = save_checkpoint(tmp_path, net, trainer, ALONE, keep=1, data={"seed": 0, "rows_per_step": 4})
    ours = {"seed": 0, "rows_per_step": 4}
    other = ChatGLM3(TINY.model_copy(update={"ffn_hidden_size": 32}))
    with pytest.raises(CheckpointError, match=r"dense_h_to_4h.weight' is \[48, 16\], expected \[64, 16\]"):
        load_checkpoint(path, other, trainer, ALONE, ours)
    with pytest.raises(CheckpointError, match="a run of 6 steps, this one has 8"):
        load_checkpoint(path, *new_trainer(total_steps=8), ALONE, ours)
    with pytest.raises(CheckpointError, match="rows_per_step 4, here 8; continue"):
        load_checkpoint(path, net, trainer, ALONE, {"seed": 0, "rows_per_step": 8})


class Stored:
    """What saving needs of a parameter."""

    def __init__(self, name, values):
        self.name, self.values, self.shape, self.ndim = name, values, values.shape, values.ndim
        self.dtype = "Float32"

    def float(self):
        return self

    def asnumpy(self):
        return self.values


def scripted_run(step):
    """A model and a trainer at a step whose every value is that step, without MindSpore: they can be forked."""
    weights = [Stored(name, np.full(spec.shape, step, np.float32)) for name, spec in WEIGHTS.specs.items()]
    state = [Stored(f"exp_avg.{parameter.name}", parameter.values) for parameter in weights]
    net = types.SimpleNamespace(cfg=TINY, get_parameters=lambda: weights, trainable_params=lambda: weights)
    return net, types.SimpleNamespace(step=step, state=lambda: {"step": step}, config=TrainConfig(),
                                      optimizer=types.SimpleNamespace(state=lambda: state))


def save_and_die(folder, step, calls):
    """Save in a process that dies at the given call of what changes the disk; whether it was alive at the end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls -= 1
            if calls < 0:
                os._exit(9)
            return function(*args, **kwargs)
        return call

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    try:
        save_checkpoint(folder, *scripted_run(step), ALONE, keep=1)
    finally:
        os._exit(0)


def test_a_kill_at_any_moment_leaves_the_newest_complete_checkpoint(tmp_path):
    save_checkpoint(tmp_path, *scripted_run(1), ALONE, keep=1)
    found, calls, alive = [], 0, False
    while not alive:
        folder = shutil.copytree(tmp_path, tmp_path / f"at_{calls}", ignore=shutil.ignore_patterns("at_*"))
        alive = save_and_die(folder, 2, calls)
        newest = usable_checkpoint(folder, ALONE)
        step = int(newest.name.removeprefix("step_"))
        values = read_safetensors(newest / "optimizer" / "rank_0.safetensors")
        assert all((values[name] == step).all() for name in values) and len(values) == len(WEIGHTS)
        save_checkpoint(folder, *scripted_run(3), ALONE, keep=1)  # what was left behind is in nobody's way
        assert [path.name for path in (folder / "checkpoint").iterdir()] == ["step_3"]
        found.append(step)
        calls += 1
    assert found == sorted(found) and set(found) == {1, 2} and len(found) > 20, "there is one moment of change"


def test_a_damaged_checkpoint_is_set_aside_with_a_warning_and_the_one_before_is_used(tmp_path, capsys):
    def cut(path):
        path.write_bytes(path.read_bytes()[:-10])

    def change(path):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    for step in range(1, 6):
        save_checkpoint(tmp_path, *scripted_run(step), ALONE, keep=9)
    cut(tmp_path / "checkpoint/step_5/optimizer/rank_0.safetensors")
    change(tmp_path / "checkpoint/step_4/model/rank_0.safetensors")
    (tmp_path / "checkpoint/step_3/model/strategy.json").unlink()
    (tmp_path / "checkpoint/step_2/complete.json").write_text("{}")
    assert usable_checkpoint(tmp_path, ALONE).name == "step_1"
    warnings = capsys.readouterr().out.splitlines()
    expected = ("step_5 is damaged: optimizer/rank_0.safetensors has", "model/rank_0.safetensors has changed",
                "model/strategy.json is missing", "does not list its files")
    for line, message in zip(warnings, expected, strict=True):
        assert message in line and ".damaged, the one before is used" in line
    assert newest_checkpoint(tmp_path).name == "step_1"
    assert (tmp_path / "checkpoint/step_5.damaged").is_dir(), "kept, for whoever wants to know what happened"
    cut(tmp_path / "checkpoint/step_1/model/rank_0.safetensors")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint that is undamaged"):
        usable_checkpoint(tmp_path, ALONE)
