"""Whole runs on the embedded data: launched processes, metrics, checkpoints, going on after an end."""

import json

import numpy as np
import pytest
from support import TOKENIZER, small_config

from glm3kit.checkpoint.folder import checkpoints
from glm3kit.checkpoint.merge import merge
from glm3kit.config.groups import ModelConfig
from glm3kit.config.load import load_config
from glm3kit.data.encode import encode_conversation
from glm3kit.data.token_file import IGNORE_INDEX
from glm3kit.errors import JobError
from glm3kit.jobs.launch import launch
from glm3kit.jobs.metrics import read_metrics
from glm3kit.train.run import run_rank
from glm3kit.weights.names import parameter_shapes
from glm3kit.weights.random import random_weights, write_random_hub_weights
from glm3kit.weights.read import read_weights


def small_run(folder, *changes):
    return small_config("train.total_steps=6", "train.save_steps=3", "train.keep_checkpoints=2", "train.eval_steps=4",
                        "parallel.peak_tflops=0.1", f"output_dir={folder}", *changes)


def steps_of(folder):
    return [record for record in read_metrics(folder) if "loss" in record]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two data-parallel processes that has ended."""
    return launch(small_run(tmp_path_factory.mktemp("run"), "name=whole"), progress=False)


@pytest.mark.ranks
def test_a_run_leaves_its_configuration_metrics_logs_and_checkpoints(finished):
    assert finished.state()["state"] == "succeeded"
    assert load_config(finished.folder / "config.yaml").train.total_steps == 6
    records = steps_of(finished.folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    logged = read_metrics(finished.folder / "log" / "rank_0.log")
    assert logged[-1]["loss"] == pytest.approx(records[-1]["loss"], abs=1e-3)
    assert [path.name for path in checkpoints(finished.folder)] == ["step_3", "step_6"]
    assert records[0]["loss"] == pytest.approx(np.log(2048), rel=0.02), "random weights know nothing of 2048 words"


@pytest.mark.ranks
def test_metrics_say_where_a_step_s_time_went_and_what_it_used(finished):
    for record in steps_of(finished.folder):
        assert record["data_time_ms"] + record["compute_time_ms"] == pytest.approx(record["step_time_ms"], rel=0.05)
        assert record["tokens_per_second_per_device"] * 2 == pytest.approx(record["tokens_per_second"])
        # 2 processes x 2 rows x 192 tokens a step; a weight of the layer and of the output layer 6 operations a token
        tokens = 2 * 2 * 192 / (record["step_time_ms"] / 1000)
        assert record["tokens_per_second"] == pytest.approx(tokens, rel=0.01)
        weights = 32 * (8 * 8 + 2 * 2 * 8 + 8 * 8 + 3 * 48) + 32 * 2048
        flops = 6 * weights + 12 * 8 * 8 * 192
        assert record["model_flop_utilisation"] == pytest.approx(tokens / 2 * flops / 0.1e12, rel=0.01)
        assert 0.1 < record["memory_gb"] < 20


@pytest.mark.ranks
def test_one_process_gives_the_curve_of_two_on_the_same_global_batch(finished, tmp_path):
    alone = small_run(tmp_path, "name=alone", "parallel.data_parallel=1", "train.batch_size=4")
    run_rank(alone)
    held_out = [{r["step"]: r["eval_loss"] for r in read_metrics(folder) if "eval_loss" in r}
                for folder in (finished.folder, alone.job_dir)]
    assert list(held_out[0]) == [4, 6] and held_out[0] == pytest.approx(held_out[1], rel=1e-4)
    assert held_out[0][6] < held_out[0][4] < np.log(2048)
    two, one = steps_of(finished.folder), steps_of(alone.job_dir)
    for key in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose([r[key] for r in one], [r[key] for r in two], rtol=1e-4, err_msg=key)


@pytest.mark.ranks
def test_merged_weights_of_a_run_are_those_of_a_model(finished, tmp_path):
    merged = read_weights(merge(finished.folder, tmp_path / "merged.ckpt", progress=False))
    model = load_config(finished.folder / "config.yaml").model
    assert {name: spec.shape for name, spec in merged.specs.items()} == parameter_shapes(model)
    start = random_weights(model, seed=0)
    moved = [name for name in merged if not np.array_equal(merged[name], start[name])]
    assert len(moved) == len(merged), "every parameter was trained"


@pytest.mark.ranks
def test_weights_of_another_model_fail_the_run_with_the_reason(tmp_path):
    other = ModelConfig(num_layers=1, padded_vocab_size=64, hidden_size=32, ffn_hidden_size=48, kv_channels=8,
                        num_attention_heads=4, param_dtype="float32")
    write_random_hub_weights(other, tmp_path / "hub")
    config = small_run(tmp_path, f"model.checkpoint_name_or_path={tmp_path / 'hub'}", "parallel.data_parallel=1")
    with pytest.raises(JobError, match="vocabulary of 64 rows.*set padded_vocab_size"):
        launch(config, progress=False)
    assert json.loads((config.job_dir / "job.json").read_text())["state"] == "failed"


def test_full_fine_tuning_on_conversations_with_tools_learns_what_the_assistant_says(tokenizer, tmp_path):
    lines = (TOKENIZER.parent / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    with_tools = [line for line in lines if '"tools"' in line and '"observation"' in line]
    assert len(with_tools) > 40
    (tmp_path / "train.jsonl").write_text("\n".join(with_tools[:40]), encoding="utf-8")
    (tmp_path / "eval.jsonl").write_text("\n".join(with_tools[40:48]), encoding="utf-8")
    config = small_run(
        tmp_path, "name=tools", "model.hidden_size=64", "parallel.data_parallel=1",
        f"data.train_path={tmp_path / 'train.jsonl'}", f"data.eval_path={tmp_path / 'eval.jsonl'}",
        "train.batch_size=8", "train.total_steps=40", "train.eval_steps=20", "train.learning_rate=0.02",
        "train.save_steps=null")
    history = run_rank(config)
    # Of the labels of an epoch those of the assistant's turns count, and no other.
    labels = [encode_conversation(json.loads(line), tokenizer, config.model.seq_length)[1]
              for line in with_tools[:40]]
    assert sum(record["loss_tokens"] for record in history[:5]) == (np.array(labels) != IGNORE_INDEX).sum()
    assert history[0]["loss"] == pytest.approx(np.log(2048), rel=0.02)
    assert history[-1]["loss"] < 3
    held_out = [record["eval_loss"] for record in read_metrics(config.job_dir) if "eval_loss" in record]
    assert len(held_out) == 2 and held_out[-1] < 3.5, held_out
