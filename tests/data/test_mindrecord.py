"""Token files as MindRecord: MindSpore's own loader reads the same rows."""


import numpy as np
import pytest
from mindspore.dataset import MindDataset
from support import TINY

from glm3kit import tiny
from glm3kit.__main__ import main
from glm3kit.config.load import load_config
from glm3kit.data.encode import prepare_data
from glm3kit.data.mindrecord import write_mindrecord


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """The held-out rows of the tiny model."""
    folder = tmp_path_factory.mktemp("output")
    config = load_config(TINY, [f"output_dir={folder}", f"data.train_path={tiny.CONVERSATIONS}"])
    return prepare_data(config, progress=False)["eval"]


def test_mind_dataset_reads_every_row_back_padded(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("glm3kit.data.mindrecord.ROWS_AT_ONCE", 7)
    path = write_mindrecord(tokens, tmp_path / "deep/eval-d/eval.mindrecord", 192, pad_id=0)
    loader = MindDataset(str(path), ["input_ids", "labels"], shuffle=False)
    rows = loader.create_tuple_iterator(output_numpy=True, num_epochs=1)
    count = 0
    for (ids, labels), (expected_ids, expected_labels) in zip(rows, tokens, strict=True):
        length, count = len(expected_ids), count + 1
        assert ids.dtype == labels.dtype == np.int32 and ids.shape == labels.shape == (192,)
        assert np.array_equal(ids[:length], expected_ids) and np.array_equal(labels[:length], expected_labels)
        assert np.all(ids[length:] == 0) and np.all(labels[length:] == -100)
    assert count == len(tokens) > 100
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["eval-d"]


def test_what_is_written_already_is_not_written_again(tokens, tmp_path):
    path = write_mindrecord(tokens, tmp_path / "eval-d/eval.mindrecord", 192)
    written = path.stat().st_mtime_ns
    assert write_mindrecord(tokens, path, 192).stat().st_mtime_ns == written


def test_a_failure_leaves_nothing_half_written(tokens, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("glm3kit.files.sync", fail)
    with pytest.raises(OSError, match="no space"):
        write_mindrecord(tokens, tmp_path / "eval-d/eval.mindrecord", 192)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_it_beside_the_token_file(tokens, tmp_path, capsys):
    call = ["data", str(TINY), f"output_dir={tmp_path}", f"data.train_path={tiny.DEV}", "data.eval_path=[]"]
    assert main([*call, "--format", "mindrecord"]) == 0
    (path,) = tmp_path.glob("mindrecord/train-*/train.mindrecord")
    assert f"{path}: 256 rows of 192 tokens" in capsys.readouterr().err
    assert MindDataset(str(path)).get_dataset_size() == len(tokens)
