"""The memory estimate: by hand on small numbers, and beside what was published for the same settings."""

import json

import pytest

from glm3kit.__main__ import main
from glm3kit.config.groups import RunConfig
from glm3kit.setup.memory import COMMUNICATION, adapter_count, estimate_memory, parameter_count

SMALL = dict(num_layers=1, padded_vocab_size=10, hidden_size=8, ffn_hidden_size=12, kv_channels=4,
             num_attention_heads=2, multi_query_group_num=1)
SIX_B = dict(data=dict(max_source_length=64, max_target_length=128))  # 8 rows of 193 tokens: a published setting
LORA = dict(rank=8, alpha=32, dropout=0.1, targets=["query_key_value"])


def run(model=(), train=(), **groups):
    data = groups.pop("data", dict(max_source_length=1, max_target_length=1))  # rows of 3 tokens
    return RunConfig(model=dict(model), train=dict(train), data=data, parallel=groups)


def test_parts_are_those_of_hand_arithmetic():
    # query_key_value (8 + 4 + 4) x (8 + 1), dense 8 x 8, MLP 3 x 12 x 8, norms 2 x 8; embedding, output 10 x 8; norm 8
    assert parameter_count(run(SMALL).model) == 144 + 64 + 288 + 16 + 2 * 80 + 8 == 680
    # A token: norms 2 x 4 x 8, inputs of the matrices 2 x (8 + 8 + 8 + 12), q, k and v 2 x 16, attention 2 x 8, MLP
    # 2 x 3 x 12; softmax of 2 heads with 3 tokens in 2 bytes. 6 tokens.
    layer = 6 * (64 + 72 + 32 + 16 + 72 + 2 * 3 * 2)
    train = dict(batch_size=2)
    assert estimate_memory(run(SMALL, train, data_parallel=2)) == {
        "weights": 680 * 2, "masters": 340 * 4, "moments": 340 * 8, "gradients": 340 * 4, "activations": layer,
        # the gradient of gate and up, 24 x 8, in 2 and 4 bytes, is more than three of 6 x 10 logits in 4
        "passing": 24 * 8 * 6, "communication": COMMUNICATION}
    recomputed = estimate_memory(run(SMALL, train | dict(recompute=True)))
    assert recomputed["activations"] == 6 * 8 * 2 and recomputed["passing"] == layer + 24 * 8 * 6
    assert recomputed["communication"] == 0 and recomputed["moments"] == 680 * 8, "alone"


def test_every_parameter_is_counted_and_slices_add_up():
    cfg = run().model
    assert parameter_count(cfg) == 6_243_584_000  # as published
    norms = (2 * cfg.num_layers + 1) * cfg.hidden_size  # whole on both ranks
    assert 2 * parameter_count(cfg, 2) == parameter_count(cfg) + norms


@pytest.mark.parametrize("train, data_parallel, published", [
    (dict(batch_size=8, recompute=True), 8, 25.2), (dict(batch_size=8, lora=LORA), 4, 22.38)])
def test_the_estimate_is_within_15_percent_of_published_figures(train, data_parallel, published):
    config = run(train=train, data_parallel=data_parallel, data=SIX_B["data"])
    assert config.model.seq_length == 193
    assert sum(estimate_memory(config).values()) / 1e9 == pytest.approx(published, rel=0.15)


def test_what_is_shared_by_more_ranks_is_less_on_each():
    alone, two, whole = (estimate_memory(run(data_parallel=n, shard_optimizer=shard))
                         for n, shard in ((1, True), (2, True), (2, False)))
    for part in ("masters", "moments", "gradients"):
        assert 2 * two[part] == alone[part] == whole[part]
    assert two["weights"] == alone["weights"]
    assert estimate_memory(run(tensor_parallel=2))["weights"] < 0.51 * alone["weights"]
    float32 = estimate_memory(run(dict(param_dtype="float32", compute_dtype="float32")))
    assert float32["masters"] == 0, "float32 weights of one rank are their own masters"


def test_flash_attention_keeps_no_matrix_of_token_pairs():
    rows = dict(max_seq_length=2048)
    plain, flash = (estimate_memory(run(dict(use_flash_attention=on), dict(batch_size=1), data=rows))
                    for on in (False, True))
    assert plain["activations"] - flash["activations"] == 28 * 2048 * 32 * (2048 * 2 - 64)


def test_adapters_need_state_and_frozen_weights_none():
    config = run(train=dict(lora=LORA))
    assert adapter_count(config) == 28 * 8 * (4096 + 4608)
    parts = estimate_memory(config)
    assert parts["moments"] == 8 * adapter_count(config)
    assert parts["weights"] == 2 * parameter_count(config.model) + 4 * adapter_count(config)


def test_the_verb_prints_the_parts_and_their_sum(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("train: {batch_size: 8}\nparallel: {data_parallel: 8}\n")
    assert main(["memory", str(tmp_path / "run.yaml"), "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert parts["weights"] == 2 * 6_243_584_000 and parts["sum"] == sum(parts.values()) - parts["sum"]
    assert main(["memory", str(tmp_path / "run.yaml"), "train.batch_size=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["weights", "12.49", "GB"] and lines[-1].startswith("sum")
