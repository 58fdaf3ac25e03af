"""A configuration file with its overrides: paths, derived values, and faults that are all reported together."""

import pytest

from glm3kit.config.load import load_config
from glm3kit.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_yaml(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_yaml


def test_floats_without_a_point_are_numbers(write):
    assert load_config(write("train: {learning_rate: 1e-5, end_learning_rate: 1E-6}")).train.learning_rate == 1e-5


def test_seq_length_is_derived_from_the_data(write):
    config = load_config(write("data: {max_source_length: 64, max_target_length: 127}"))
    assert config.model.seq_length == 192


def test_a_model_without_data_keeps_its_window(write):
    assert load_config(write("model: {seq_length: 1024}")).model.seq_length == 1024


def test_a_conflicting_seq_length_is_an_error_with_line_and_sum(write):
    path = write("model:\n  seq_length: 193\ndata:\n  max_source_length: 64\n  max_target_length: 127\n")
    with pytest.raises(ConfigError, match=r"run.yaml:2: model.seq_length is 193.*64 \+ .*127 \+ 1 = 192"):
        load_config(path)


@pytest.mark.parametrize("lengths", ["[128, 64]", "[64, 64]", "[64, 192]"])
def test_lengths_of_buckets_rise_and_stay_below_the_window(write, lengths):
    with pytest.raises(ConfigError, match=r"run.yaml:2: data: bucket_lengths .* stay below seq_length 192"):
        load_config(write(f"data:\n  bucket_lengths: {lengths}\n"))
    assert load_config(write("data:\n  bucket_lengths: [64, 128]\n")).data.bucket_lengths == (64, 128)


def test_all_faults_are_reported_together_with_their_lines(write):
    path = write("model:\n  num_layer: 3\n  hidden_size: big\ntrain:\n  epochs: 1.5\n  loss_scale: high\nmodels: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["train.batch_size=two", "data.rows=3", "nonsense"])
    message = str(caught.value)
    for part in ("run.yaml:2: model.num_layer: unknown key; did you mean 'num_layers'?",
                 "run.yaml:3: model.hidden_size: should be a valid integer, got 'big'",
                 "run.yaml:5: train.epochs: should be a valid integer",
                 "run.yaml:6: train.loss_scale: should be a valid number",
                 "run.yaml:7: models: unknown key; did you mean 'model'?",
                 "override 'train.batch_size=two': train.batch_size: should be a valid integer",
                 "override 'data.rows=3': data.rows: unknown key",
                 "override 'nonsense': expected group.key=value"):
        assert part in message, f"{part!r} is missing in\n{message}"


def test_conflicts_between_groups_are_reported_together_each_at_its_line(write):
    path = write("model:\n  seq_length: 100\n  adapters_path: a\ndata:\n  max_source_length: 64\n"
                 "train:\n  eval_steps: 5\nparallel: {data_parallel: 2}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["parallel.tensor_parallel=3"])
    faults = str(caught.value).splitlines()
    for fault, start in zip(faults, ("run.yaml:2: model.seq_length is 100, but in data",
                                     "run.yaml:3: model.adapters_path is set, but",
                                     "run.yaml:7: train.eval_steps is set, but",
                                     "override 'parallel.tensor_parallel=3': parallel.tensor_parallel is 3, which"),
                            strict=True):
        assert start in fault


def test_a_key_that_stands_twice_is_an_error(write):
    with pytest.raises(ConfigError, match=r"run.yaml:3: key 'epochs' stands twice \(lines 2 and 3\)"):
        load_config(write("train:\n  epochs: 1\n  epochs: 2\n"))


@pytest.mark.parametrize("text", ["- a list", "model: [", "\tmodel: 1", "1: 2",
                                  "!!python/object/apply:os.system ['true']"])
def test_a_file_that_is_no_mapping_of_groups_is_an_error(write, text):
    with pytest.raises(ConfigError, match="run.yaml"):
        load_config(write(text))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_overrides_win_and_create_groups(write):
    config = load_config(write("train: {batch_size: 4}"), ["train.batch_size=2", "generate.top_p=0.8", "name=other"])
    assert (config.train.batch_size, config.generate.top_p, config.name) == (2, 0.8, "other")


def test_paths_are_relative_to_the_file_and_overrides_to_the_working_directory(write, tmp_path, monkeypatch):
    path = write("data: {train_path: rows.json}\nmodel:\n  tokenizer_path: ../tokenizer.model\n"
                 "  checkpoint_name_or_path: ~nobody-here/w\n")
    monkeypatch.chdir("/")
    config = load_config(path, ["data.eval_path=held_out.json"])
    assert config.data.train_path == (str(tmp_path / "rows.json"),)
    assert config.data.eval_path == ("/held_out.json",)
    assert config.model.tokenizer_path == str(tmp_path.parent / "tokenizer.model")
    assert config.model.checkpoint_name_or_path == str(tmp_path / "~nobody-here/w"), "no such user: a name like others"


def test_a_saved_configuration_reads_back_equal(write, tmp_path):
    config = load_config(write("train: {betas: [0.9, 0.999]}\ndata: {train_path: [a.json, b.json]}"))
    config.save(tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_an_override_that_is_no_yaml_is_told_with_the_other_faults(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write("train: {epochs: 0}"), ["data.train_path=[a", "train.lora={rnk: 4}"])
    message = str(caught.value)
    for part in ("override 'data.train_path=[a'", "run.yaml:1: train.epochs", "train.lora.rnk: unknown key; did you"):
        assert part in message
