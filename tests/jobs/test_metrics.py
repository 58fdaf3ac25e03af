"""Metrics: every log form of MindFormers, and a metrics.jsonl that survives kills and resumes."""

import gzip
import json
import math
import subprocess
from contextlib import closing

import numpy as np
import pytest

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import DataError
from glm3kit.jobs.metrics import MetricsWriter, flops_per_token, format_step_line, read_metrics

FULL = "full_v1.1_llama3_lora_worker_0.log.gz"


@pytest.fixture(scope="module")
def logs(shared):
    return shared / "data" / "logs"


# Logs of MindFormers; the expected values were read off the files by eye


@pytest.mark.parametrize("name, count, index, expected", [
    ("A_v0.6_info.log", 5, 0, {"epoch": 1, "step": 4, "loss": 2.244, "step_time_ms": 507844.205, "learning_rate": 0.0,
                               "overflow": True, "loss_scale": 268435460.0}),
    ("A_v0.6_info.log", 5, 2, {"epoch": 1, "step": 116, "loss": 2.220, "step_time_ms": 1951.612,
                               "learning_rate": 2.4499998e-06, "overflow": False, "loss_scale": 16384.0}),
    ("B_v0.6_console.log", 3, 1, {"epoch": 1, "step": 808, "loss": 0.702, "step_time_ms": 27411.658,
                                  "learning_rate": 3.08156e-10, "overflow": False, "loss_scale": 65536.0}),
    ("D_v1.1_worker0_excerpt.log", 41, 1, {"epoch": 1, "step": 4, "loss": 2.603, "step_time_ms": 1432.0,
                                           "learning_rate": 3.75e-07, "overflow": False, "loss_scale": 1.0}),
    ("E_v1.5_msrun_worker0.log", 5, 3, {"epoch": 1, "step": 4, "loss": 9.287, "step_time_ms": 1756.0,
                                        "learning_rate": 9.928079e-06, "overflow": False, "loss_scale": 1.0,
                                        "grad_norm": 21.932272}),
    ("F_mindrlhf_print_output_info.txt", 1, 0, {"epoch": 1, "step": 2, "loss": 0.744, "step_time_ms": 68580.279,
                                                "learning_rate": 8e-08, "overflow": False, "loss_scale": 128.0}),
    ("G_v1.6_doc_extra_lines.log", 3, 2, {"epoch": 1, "step": 2, "loss": 11.905, "step_time_ms": 2775.0,
                                          "learning_rate": 2.5641025e-08, "overflow": False, "loss_scale": 1.0,
                                          "grad_norm": 45.702465}),
    ("H_v2.0_pynative.log", 3, 2, {"step": 53, "loss": 11.687554, "step_time_ms": 535.0, "learning_rate": 1e-06,
                                   "grad_norm": 14.964324}),
    (FULL, 1337, 267, {"epoch": 2, "step": 535 + 1, "loss": 1.845, "step_time_ms": 1410.0,
                       "learning_rate": 9.259875e-06, "overflow": False, "loss_scale": 1.0}),
])
def test_every_log_form_gives_all_its_steps_and_keys(name, count, index, expected, logs):
    records = read_metrics(logs / name)
    assert len(records) == count
    assert records[index] == expected


def test_a_whole_run_equals_what_awk_finds_in_it(logs):
    script = r"""/loss: / { match($0, /loss: [0-9.]+/); loss = substr($0, RSTART + 6, RLENGTH - 6)
                            match($0, /Epoch:\[ *[0-9]+/); epoch = substr($0, RSTART + 7, RLENGTH - 7)
                            match($0, /step:\[ *[0-9]+/); step = substr($0, RSTART + 6, RLENGTH - 6)
                            print (epoch - 1) * 535 + step, loss }"""
    text = gzip.decompress((logs / FULL).read_bytes())
    table = subprocess.run(["awk", script], input=text, capture_output=True, check=True).stdout.split()
    records = read_metrics(logs / FULL)
    assert len(table) == 2 * 1337
    assert [record["step"] for record in records] == [int(value) for value in table[::2]]
    assert [record["loss"] for record in records] == [float(value) for value in table[1::2]]


def test_steps_count_on_from_epoch_to_epoch(logs):
    steps = [record["step"] for record in read_metrics(logs / FULL)]
    assert steps == list(range(2, 5 * 535, 2))  # printed every second step


def test_a_number_that_cannot_be_told_is_left_out(logs):
    records = read_metrics(logs / "E_v1.5_msrun_worker0.log")
    assert ["grad_norm" in record for record in records] == [False, False, True, True, True]  # "[1 31049]" in two


def test_a_loss_that_is_no_number_is_read(tmp_path):
    (tmp_path / "a.log").write_text("{ Epoch:[  1/  2], step:[    3/   19], loss: nan, per_step_time: 12ms, lr: 1e-05")
    record, = read_metrics(tmp_path / "a.log")
    assert math.isnan(record["loss"]) and record["step"] == 3


def test_our_lines_are_those_of_mindformers_1_1(logs):
    text = gzip.decompress((logs / FULL).read_bytes()).decode()
    lines = [line.partition(" - INFO - ")[2] for line in text.splitlines() if "loss: " in line]
    records = read_metrics(logs / FULL)
    assert [format_step_line(record, epochs=5, steps_per_epoch=535) for record in records] == lines


def test_our_lines_are_read_back(tmp_path):
    record = {"epoch": 2, "step": 25, "loss": 1.125, "step_time_ms": 750.0, "learning_rate": 1.25e-05,
              "overflow": True, "loss_scale": 65536.0, "grad_norm": 0.75}
    (tmp_path / "rank_0.log").write_text(f"2024-07-05 17:38:28,040 - {format_step_line(record, 3, 20)}\n")
    assert read_metrics(tmp_path / "rank_0.log") == [record]


def test_a_log_without_steps_says_what_was_expected(tmp_path):
    (tmp_path / "a.log").write_text("compiling\nplease wait\n")
    with pytest.raises(DataError, match="a.log: 2 lines, none of which is a step's; expected lines such as 'Epoch"):
        read_metrics(tmp_path / "a.log")


@pytest.mark.parametrize("change", [lambda data: data[:-2000], lambda data: data[:3000] + b"\xff" * 50 + data[3050:],
                                    lambda data: data[:1] + b"\x8b" + b"no gzip"])
def test_a_damaged_archive_is_a_data_error(change, logs, tmp_path):
    (tmp_path / "a.gz").write_bytes(change((logs / FULL).read_bytes()))
    with pytest.raises(DataError, match="a.gz: cannot be read"):
        read_metrics(tmp_path / "a.gz")


def test_a_missing_file_is_a_data_error(tmp_path):
    for path in (tmp_path / "metrics.jsonl", tmp_path):
        with pytest.raises(DataError, match="metrics.jsonl: no such file"):
            read_metrics(path)


# metrics.jsonl


STEPS = [{"step": step, "loss": 8 / step, "learning_rate": 1e-5, "tokens_per_second": 123.5} for step in (1, 2, 3)]


def written(path, records):
    with closing(MetricsWriter(path)) as metrics:
        for record in records:
            metrics.write(record)
    return path


def test_what_is_written_is_read(tmp_path):
    records = [*STEPS, {"step": 3, "eval_loss": 2.5}]
    path = written(tmp_path / "job" / "metrics.jsonl", records)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert read_metrics(path) == read_metrics(tmp_path / "job") == records
    (tmp_path / "metrics.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_metrics(tmp_path / "metrics.jsonl.gz") == records


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path):
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    for number, record in enumerate(STEPS, 1):
        metrics.write(record)
        assert read_metrics(tmp_path) == STEPS[:number]
    metrics.close()


def test_a_job_before_its_first_step_has_no_records(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    assert read_metrics(tmp_path) == []
    MetricsWriter(tmp_path / "metrics.jsonl").close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("half", ['{"step": 4, "lo', '{"step": 4, "loss": 2.5', "{", '{"step": 4, "loss": '])
def test_a_line_that_is_being_written_is_left_out_and_a_resumed_job_overwrites_it(half, tmp_path):
    path = written(tmp_path / "metrics.jsonl", STEPS)
    path.write_text(path.read_text() + half)
    assert read_metrics(path) == STEPS
    written(path, [{"step": 4, "loss": 2.0}])
    assert read_metrics(path) == [*STEPS, {"step": 4, "loss": 2.0}]


def test_a_last_line_without_end_counts_if_it_is_whole(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}')
    assert [record["loss"] for record in read_metrics(tmp_path / "m.jsonl")] == [2.5, 2.0]


def test_the_last_record_of_a_repeated_step_counts(tmp_path):
    path = written(tmp_path / "metrics.jsonl", [*STEPS, {"step": 2, "eval_loss": 5.0}])
    written(path, [{"step": 2, "loss": 3.5}, {"step": 3, "loss": 2.5}, {"step": 4, "loss": 2.0}])
    assert [(record["step"], record.get("loss"), record.get("eval_loss")) for record in read_metrics(path)] == [
        (1, 8.0, None), (2, 3.5, None), (2, None, 5.0), (3, 2.5, None), (4, 2.0, None)]


@pytest.mark.parametrize("garbage", ["garbage", "[1]", '{"step": "1", "loss": 2}', '{"step": 1}', '{"loss": 3}',
                                     '{"step": 1.5, "loss": 1}', "\x00\x00", "[" * 100_000,
                                     '{"step": 1, "lo{"step": 1, "loss": 2}'])
def test_garbage_is_an_error_with_its_line(garbage, tmp_path):
    path = written(tmp_path / "metrics.jsonl", STEPS)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], garbage, *lines[2:]]) + "\n")
    with pytest.raises(DataError, match="metrics.jsonl:3: "):
        read_metrics(path)


def test_numbers_that_are_not_finite_survive_in_valid_json(tmp_path):
    path = written(tmp_path / "metrics.jsonl", [{"step": 1, "loss": math.nan, "grad_norm": np.float32("inf")}])
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None}
    record, = read_metrics(path)
    assert math.isnan(record["loss"]) and math.isnan(record["grad_norm"])


def test_numpy_numbers_are_written_and_none_is_left_out(tmp_path):
    path = written(tmp_path / "metrics.jsonl", [{"step": np.int64(1), "loss": np.array(2.5), "loss_scale": None,
                                                 "overflow": np.bool_(True)}])
    assert read_metrics(path) == [{"step": 1, "loss": 2.5, "overflow": True}]


def test_operations_are_six_a_weight_and_token_and_four_with_frozen_weights():
    sizes = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=12, kv_channels=4, num_attention_heads=4,
                        multi_query_group_num=2, padded_vocab_size=100)
    weights = 2 * (8 * (16 + 8 + 8) + 16 * 8 + 8 * 24 + 12 * 8) + 8 * 100  # qkv, dense, gate and up, down; output layer
    attention = 12 * 2 * 4 * 4 * 10
    assert flops_per_token(sizes, 10) == 6 * weights + attention
    assert flops_per_token(sizes, 10, lora=True) == 4 * weights + attention
