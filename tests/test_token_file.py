"""The token file on disk, and the batches drawn from it: damage, kills, ranks, resuming."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import glm3kit.token_file
from glm3kit.errors import DataError
from glm3kit.token_file import Batches, TokenFile, has_digest, shift_labels, write_token_file

FIRST = 100  # row i begins with the id 100 + i


def write(folder: Path, rows: list[list[int]], digest: str = "d") -> TokenFile:
    """A token file of rows of ids; every prediction counts but a row's last."""
    ids = np.array(sum(rows, []), np.int32)
    mask = np.concatenate([[1] * (len(row) - 1) + [0] for row in rows])
    return write_token_file(folder, digest, [(ids, mask, [len(row) for row in rows])], {"rows": len(rows)})


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> TokenFile:
    """Ten rows of 2 to 11 ids; row i begins with 100 + i."""
    return write(tmp_path_factory.mktemp("ten") / "tokens", [[FIRST + i, *range(1, i + 2)] for i in range(10)])


def rows_of(batches) -> list[list[int]]:
    """Which rows stand in each batch."""
    return [[int(first) - FIRST for first in input_ids[:, 0]] for input_ids, _ in batches]


def test_labels_are_the_next_ids_where_the_prediction_counts():
    ids, mask = np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 1, 0, 1, 0])
    assert shift_labels(ids, mask).tolist() == [-100, 7, -100, 9, -100]
    assert shift_labels(ids, mask).dtype == np.int32


# --- on disk


def test_rows_are_read_back_as_they_were_written(tmp_path):
    first = ([1, 2, 3, 4, 5], [0, 1, 0, 1, 0], [3, 2])
    second = ([6, 7], [1, 0], [2])
    batches = [(np.array(ids, np.int32), np.array(mask), lengths) for ids, mask, lengths in (first, second)]
    write_token_file(tmp_path / "deep/tokens", "d", batches, {"rows": 3})
    tokens = TokenFile.open(tmp_path / "deep/tokens")
    assert [(ids.tolist(), labels.tolist()) for ids, labels in tokens] == [
        ([1, 2, 3], [-100, 3, -100]), ([4, 5], [5, -100]), ([6, 7], [7, -100])]
    assert (len(tokens), tokens.longest, tokens.digest, tokens.report) == (3, 3, "d", {"rows": 3})
    assert tokens[-1][0].tolist() == [6, 7]
    with pytest.raises(IndexError):
        tokens[3]


def test_a_token_file_is_mapped_not_read_and_cannot_be_changed(ten):
    ids, labels = ten[0]
    assert isinstance(ids.base, np.memmap) and isinstance(labels.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "ids.bin").write_bytes(b"\0" * 8),
    lambda folder: (folder / "labels.bin").unlink(),
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


@pytest.mark.parametrize("step", ["sync", "atomic_write", "_publish"])
def test_a_failure_while_writing_leaves_the_previous_token_file_whole(tmp_path, monkeypatch, step):
    write(tmp_path / "tokens", [[1, 2]], "old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(glm3kit.token_file, step, fail)
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


def test_the_header_is_json_that_people_can_read(ten):
    header = json.loads((ten.folder / "tokens.json").read_text(encoding="utf-8"))
    assert header == {"format": 1, "digest": "d", "report": {"rows": 10}}
    assert (ten.folder / "ids.bin").stat().st_size == 4 * sum(range(2, 12))


# --- batches


def test_a_batch_is_padded_rows_and_ignored_labels(ten):
    input_ids, labels = Batches(ten, 2, 20, shuffle=False, pad_id=9).batch(1)
    assert input_ids.shape == labels.shape == (2, 20) and input_ids.dtype == labels.dtype == np.int32
    assert input_ids[0].tolist() == [102, 1, 2, 3] + [9] * 16
    assert labels[0].tolist() == [1, 2, 3] + [-100] * 17
    assert input_ids[1].tolist() == [103, 1, 2, 3, 4] + [9] * 15


def test_every_epoch_draws_each_row_once_in_an_order_of_its_own(ten):
    batches = Batches(ten, 5, 32, seed=7, epochs=3)
    drawn = rows_of(batches)
    assert len(batches) == len(drawn) == 6 and batches.steps_per_epoch == 2
    epochs = [drawn[0] + drawn[1], drawn[2] + drawn[3], drawn[4] + drawn[5]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [batches.epoch_of(step) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    assert epochs[1] == np.random.default_rng([7, 1]).permutation(10).tolist()


def test_the_seed_decides_the_order(ten):
    assert rows_of(Batches(ten, 5, 32, seed=1)) == rows_of(Batches(ten, 5, 32, seed=1))
    assert rows_of(Batches(ten, 5, 32, seed=1)) != rows_of(Batches(ten, 5, 32, seed=2))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(ten, ranks):
    whole = rows_of(Batches(ten, 4, 32, seed=3, epochs=2))
    shares = [rows_of(Batches(ten, 4 // ranks, 32, seed=3, epochs=2, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    assert {len(share) for share in shares} == {4}


def test_a_resumed_run_draws_what_the_first_would_have_drawn(ten):
    whole = rows_of(Batches(ten, 3, 32, seed=3, epochs=4))
    assert len(whole) == 12
    for step in range(13):
        assert rows_of(Batches(ten, 3, 32, seed=3, epochs=4, start_step=step)) == whole[step:]


def test_every_row_is_seen_once_where_nothing_is_dropped(ten):
    shares = [Batches(ten, 4, 32, rank=rank, ranks=2, shuffle=False, drop_last=False) for rank in range(2)]
    assert [rows_of(share) for share in shares] == [[[0, 1, 2, 3], [8, 9, -FIRST, -FIRST]],
                                                    [[4, 5, 6, 7], [-FIRST] * 4]]
    input_ids, labels = shares[1].batch(1)
    assert np.all(input_ids == 0) and np.all(labels == -100)


def test_fewer_rows_than_one_global_batch_are_a_clear_error(ten):
    with pytest.raises(DataError, match="10 rows do not fill one batch of 4 rows on each of 3 devices"):
        Batches(ten, 4, 32, ranks=3)
    assert len(Batches(ten, 4, 32, ranks=3, drop_last=False)) == 1


def test_rows_longer_than_the_window_are_an_error_with_both_numbers_and_the_fix(ten):
    with pytest.raises(DataError, match=r"up to 11 tokens, but seq_length is 10; make max_source_length \+ max_target"):
        Batches(ten, 1, 10)
    assert len(Batches(ten, 1, 11)) == 10


def test_a_step_past_the_end_is_an_error(ten):
    with pytest.raises(DataError, match="start_step is 6, but 1 epochs have 5 steps"):
        Batches(ten, 2, 32, start_step=6)
