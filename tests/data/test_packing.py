"""Rows packed into windows: every row once, none too long, hardly any room left."""

import numpy as np
import pytest

from glm3kit.data.batches import pack_rows


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
