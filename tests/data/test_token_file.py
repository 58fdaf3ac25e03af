"""The token file on disk: what is written is read back; damage, kills, two writers."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from glm3kit.data.token_file import (
    ADGEN,
    CONVERSATION,
    EncodedRows,
    TokenFile,
    has_digest,
    shift_labels,
    write_token_file,
)
from glm3kit.errors import DataError


def write(folder: Path, rows: list[list[int]], digest: str = "d") -> TokenFile:
    """A token file of rows of ids; every prediction counts but a row's last."""
    ids = np.array(sum(rows, []), np.int32)
    mask = np.concatenate([[1] * (len(row) - 1) + [0] for row in rows])
    origins = [(0, number, ADGEN, 1, len(row) - 2) for number, row in enumerate(rows, 1)]
    return write_token_file(folder, digest, [EncodedRows(ids, mask, [len(row) for row in rows], origins)],
                            {"rows": len(rows)})


def test_labels_are_the_next_ids_where_the_prediction_counts():
    ids, mask = np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 1, 0, 1, 0])
    assert shift_labels(ids, mask).tolist() == [-100, 7, -100, 9, -100]
    assert shift_labels(ids, mask).dtype == np.int32


# --- on disk


def test_rows_are_read_back_as_they_were_written(tmp_path):
    first = ([1, 2, 3, 4, 5], [0, 1, 0, 1, 0], [3, 2], [(0, 4, ADGEN, 1, 1), (0, 9, ADGEN, 1, 0)])
    second = ([6, 7], [1, 0], [2], [(1, 2, CONVERSATION, 3, 5)])
    batches = [EncodedRows(np.array(ids, np.int32), np.array(mask), *rest) for ids, mask, *rest in (first, second)]
    write_token_file(tmp_path / "deep/tokens", "d", batches, {"rows": 3})
    tokens = TokenFile.open(tmp_path / "deep/tokens")
    assert [(ids.tolist(), labels.tolist()) for ids, labels in tokens] == [
        ([1, 2, 3], [-100, 3, -100]), ([4, 5], [5, -100]), ([6, 7], [7, -100])]
    assert (len(tokens), tokens.longest, tokens.digest, tokens.report) == (3, 3, "d", {"rows": 3})
    assert tokens.lengths.tolist() == [3, 2, 2] and tokens[-1][0].tolist() == [6, 7]
    assert [column.tolist() for column in tokens.origins] == [[0, 0, 1], [4, 9, 2], [0, 0, 1], [1, 1, 3], [1, 0, 5]]
    with pytest.raises(IndexError):
        tokens[3]


def test_a_token_file_is_mapped_not_read_and_cannot_be_changed(tmp_path):
    ids, labels = write(tmp_path / "tokens", [[1, 2], [3, 4, 5]])[0]
    assert isinstance(ids.base, np.memmap) and isinstance(labels.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "ids.bin").write_bytes(b"\0" * 8),
    lambda folder: (folder / "labels.bin").unlink(),
    lambda folder: (folder / "origins.bin").write_bytes(b"\0" * 20),
    lambda folder: (folder / "offsets.bin").write_bytes(b""),
    lambda folder: (folder / "offsets.bin").write_bytes(b"\0" * 16),
    lambda folder: (folder / "offsets.bin").write_bytes(b"\0" * 13),
    lambda folder: (folder / "tokens.json").write_text("{"),
    lambda folder: (folder / "tokens.json").write_text("[]"),
    lambda folder: (folder / "tokens.json").write_text('{"format": 99, "digest": "d", "report": {}}'),
    shutil.rmtree,
])
def test_a_damaged_token_file_is_an_error_and_writing_again_repairs_it(tmp_path, damage):
    write(tmp_path / "tokens", [[1, 2], [3, 4, 5]])
    damage(tmp_path / "tokens")
    with pytest.raises(DataError, match="encode the data again"):
        TokenFile.open(tmp_path / "tokens")
    assert not has_digest(tmp_path / "tokens", "d")
    assert len(write(tmp_path / "tokens", [[1, 2], [3, 4, 5]])) == 2


def test_no_rows_make_no_token_file(tmp_path):
    with pytest.raises(DataError, match="3 rows were read, none of them usable"):
        write_token_file(tmp_path / "tokens", "d", [], {"rows_read": 3})
    assert list(tmp_path.iterdir()) == []


def test_a_new_token_file_takes_the_place_of_an_old_one(tmp_path):
    old = write(tmp_path / "tokens", [[1, 2]], "old")
    new = write(tmp_path / "tokens", [[3, 4], [5, 6]], "new")
    assert (len(new), new.digest) == (2, "new")
    assert old[0][0].tolist() == [1, 2]  # who has mapped the old one keeps it
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens"]


@pytest.mark.parametrize("step", ["glm3kit.files.sync", "glm3kit.data.token_file.atomic_write", "os.rename"])
def test_a_failure_while_writing_leaves_the_previous_token_file_whole(tmp_path, monkeypatch, step):
    write(tmp_path / "tokens", [[1, 2]], "old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "tokens", [[3, 4]], "new")
    assert TokenFile.open(tmp_path / "tokens").digest == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens"]


def test_a_token_file_that_another_process_has_finished_first_is_used(tmp_path, monkeypatch):
    rename = os.rename

    def late(source, target):  # the other process puts the same folder there just before
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert len(write(tmp_path / "tokens", [[1, 2]])) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens"]


def test_the_header_is_json_that_people_can_read(tmp_path):
    write(tmp_path / "tokens", [[1, 2], [3, 4, 5]])
    header = json.loads((tmp_path / "tokens/tokens.json").read_text(encoding="utf-8"))
    assert header == {"format": 2, "digest": "d", "report": {"rows": 2}}
    assert (tmp_path / "tokens/ids.bin").stat().st_size == 4 * 5
