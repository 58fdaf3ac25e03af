"""Batches of a token file: ranks, epochs, resuming, padding, drawing ahead."""

import threading
from pathlib import Path

import numpy as np
import pytest

from glm3kit.data.batches import Batches, pack_rows, prefetch
from glm3kit.data.token_file import ADGEN, EncodedRows, TokenFile, write_token_file
from glm3kit.errors import DataError

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


def threads() -> list[str]:
    """The threads that draw batches."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("glm3kit-batches")]


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


# --- padding to a few lengths


@pytest.mark.parametrize("ranks", [1, 5])
def test_a_global_batch_is_padded_to_the_first_bucket_that_its_longest_row_fits_into(ten, ranks):
    # Rows of 2 to 11 ids, five to a global batch: the longest have 6 and 11.
    options = dict(ranks=ranks, shuffle=False, drop_last=False, bucket_lengths=(5, 6, 10))
    shares = [Batches(ten, 5 // ranks, 20, rank=rank, **options) for rank in range(ranks)]
    for share in shares:
        assert [ids.shape for ids, _ in share] == [(5 // ranks, 6), (5 // ranks, 20)]


def test_every_rank_pads_a_batch_to_the_same_length(ten):
    options = dict(seed=4, ranks=2, epochs=20, bucket_lengths=(4, 6, 8, 9))
    shapes = [[ids.shape for ids, _ in Batches(ten, 1, 20, rank=rank, **options)] for rank in range(2)]
    assert shapes[0] == shapes[1] and {length for _, length in shapes[0]} == {4, 6, 8, 9, 20}


def test_buckets_change_the_padding_only(ten):
    plain, short = Batches(ten, 3, 20, seed=1), Batches(ten, 3, 20, seed=1, bucket_lengths=(8, 12))
    for (ids, labels), (short_ids, short_labels) in zip(plain, short, strict=True):
        length = short_ids.shape[1]
        assert np.array_equal(ids[:, :length], short_ids) and np.array_equal(labels[:, :length], short_labels)
        assert np.all(ids[:, length:] == 0) and np.all(labels[:, length:] == -100)


# --- drawing ahead


def test_batches_are_drawn_in_order_and_a_few_ahead():
    drawn = []
    source = prefetch(lambda step: drawn.append(step) or step * 10, range(10), ahead=2)
    assert drawn == []  # nothing before it is asked for
    assert next(source) == 0
    assert list(source) == [10 * step for step in range(1, 10)] and drawn == list(range(10))


def test_a_batch_is_drawn_while_the_one_before_is_in_use():
    second = threading.Event()
    source = prefetch(lambda step: second.set() if step == 1 else None, range(2))
    next(source)
    assert second.wait(60)  # without anybody asking for it


def test_an_error_while_drawing_is_raised_where_its_batch_is_asked_for():
    def draw(step: int) -> int:
        if step == 2:
            raise OSError("the disk is gone")
        return step

    source = prefetch(draw, range(5))
    assert [next(source), next(source)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(source)
    assert not threads()


def test_the_thread_ends_with_the_iterator(ten):
    for _ in Batches(ten, 2, 20):
        pass
    assert not threads()
    source = iter(Batches(ten, 2, 20, epochs=1000))
    next(source)
    assert threads()
    source.close()
    assert not threads()
    next(iter(Batches(ten, 2, 20, epochs=1000)))  # thrown away at once
    assert not threads()


# --- several rows in one


@pytest.mark.parametrize("lengths, capacity, packs", [
    ([3, 5, 2], 5, [[1], [0, 2]]),
    ([], 5, []),
    ([5], 5, [[0]]),
    ([1, 1, 1], 2, [[0, 1], [2]]),
    ([4, 3, 2, 1], 5, [[0, 3], [1, 2]]),
    ([2, 6, 5, 4, 3], 10, [[1, 3], [2, 4, 0]]),  # 6 + 4 before 6 + 3: the best fit
])
def test_each_row_goes_where_it_fits_best(lengths, capacity, packs):
    assert pack_rows(lengths, capacity) == packs


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_packed_once_within_the_bound_of_the_method(seed):
    numbers = np.random.default_rng(seed)
    lengths, capacity = numbers.integers(1, 200, 3000), 256
    packs = pack_rows(lengths, capacity)
    assert sorted(sum(packs, [])) == list(range(3000))
    assert max(lengths[pack].sum() for pack in packs) <= capacity
    least = max(int(np.ceil(lengths.sum() / capacity)), int((lengths > capacity / 2).sum()))
    assert least <= len(packs) <= 11 / 9 * least + 1


def test_short_rows_fill_a_long_window_almost_whole():
    lengths = np.random.default_rng(0).integers(40, 190, 5000)
    assert lengths.sum() / (len(pack_rows(lengths, 2048)) * 2048) > 0.99


def test_packed_rows_are_all_there_once_with_numbers_of_their_own(ten):
    (batch,) = [Batches(ten, 5, 15, shuffle=False, packing=True).batch(0)]
    seen = []
    for input_ids, labels, segment_ids in zip(*batch, strict=True):
        assert input_ids.dtype == labels.dtype == segment_ids.dtype == np.int32
        for segment in range(1, segment_ids.max() + 1):
            at = np.flatnonzero(segment_ids == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))  # one stretch
            ids, row_labels = ten[int(input_ids[at[0]]) - FIRST]
            assert np.array_equal(input_ids[at], ids) and np.array_equal(labels[at], row_labels)
            seen.append(int(ids[0]) - FIRST)
        rest = segment_ids == 0
        assert np.all(input_ids[rest] == 0) and np.all(labels[rest] == -100)
        assert not np.any(np.diff(rest.astype(int)) < 0)  # padding stands at the end
    assert sorted(seen) == list(range(10))  # 65 tokens in 5 rows of 15


def test_packed_batches_are_shared_out_resumed_and_repeated_as_others_are(ten):
    options = dict(seed=3, epochs=4, packing=True)
    whole = list(Batches(ten, 4, 15, **options))
    shares = [Batches(ten, 2, 15, rank=rank, ranks=2, **options) for rank in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for array, *pieces in zip(batch, *parts, strict=True):
            assert np.array_equal(array, np.concatenate(pieces))
    for start in range(len(whole)):
        resumed = Batches(ten, 4, 15, start_step=start, **options)
        assert np.array_equal(next(iter(resumed))[0], whole[start][0])
    assert any(not np.array_equal(whole[0][0], batch[0]) for batch in whole[1:])


def test_too_few_packed_rows_for_a_batch_are_an_error_that_counts_them(ten):
    with pytest.raises(DataError, match="5 packed rows do not fill one batch of 6 rows"):
        Batches(ten, 6, 15, packing=True)
