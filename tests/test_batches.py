"""Batches of a token file: ranks, epochs, resuming, padding."""

from pathlib import Path

import numpy as np
import pytest

from glm3kit.batches import Batches
from glm3kit.errors import DataError
from glm3kit.token_file import ADGEN, EncodedRows, TokenFile, write_token_file

FIRST = 100  # row i begins with the id 100 + i


def write(folder: Path, rows: list[list[int]]) -> TokenFile:
    """A token file of rows of ids; every prediction counts but a row's last."""
    ids = np.array(sum(rows, []), np.int32)
    mask = np.concatenate([[1] * (len(row) - 1) + [0] for row in rows])
    origins = [(0, number, ADGEN, 1, len(row) - 2) for number, row in enumerate(rows, 1)]
    return write_token_file(folder, "d", [EncodedRows(ids, mask, [len(row) for row in rows], origins)], {})


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> TokenFile:
    """Ten rows of 2 to 11 ids; row i begins with 100 + i."""
    return write(tmp_path_factory.mktemp("ten") / "tokens", [[FIRST + i, *range(1, i + 2)] for i in range(10)])


def rows_of(batches) -> list[list[int]]:
    """Which rows stand in each batch."""
    return [[int(first) - FIRST for first in input_ids[:, 0]] for input_ids, _ in batches]


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
