"""Named arrays that are read when asked for, and casts between their types."""

import numpy as np
import pytest

from glm3kit.weights.read import read_weights
from glm3kit.weights.tensors import BFLOAT16, Tensors, TensorSpec, cast

OUTPUT = "transformer.output_layer.weight"


def test_reading_a_mapping_opens_nothing_but_the_headers(hub):
    read = []
    lazy = Tensors({"a": TensorSpec("float16", (2,))}, lambda name: read.append(name) or np.zeros(2, np.float16))
    assert lazy.specs["a"].nbytes == 4 and "a" in lazy and "b" not in lazy and not read
    assert lazy["a"].shape == (2,) and read == ["a"]
    with pytest.raises(ValueError, match="read-only"):
        read_weights(hub)[OUTPUT][0] = 0


def test_bfloat16_rounds_to_nearest_even_as_mindspore_does(ms):
    values = np.random.default_rng(1).standard_normal(100_000).astype(np.float32) * 1e3
    values = np.concatenate([values, [0, -0.0, np.inf, -np.inf, 3.3895e38, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40],
                             (values.view(np.uint32) & 0xFFFF8000).view(np.float32)]).astype(np.float32)
    expected = ms.Tensor(values).astype(ms.bfloat16).astype(ms.float32).asnumpy()
    np.testing.assert_array_equal(cast(cast(values, "bfloat16"), "float32"), expected)


def test_not_a_number_stays_so_in_bfloat16():
    values = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(cast(cast(values, "bfloat16"), "float32")).all()


def test_bfloat16_to_float32_and_back_is_exact():
    every = np.arange(65536, dtype=np.uint16).view(BFLOAT16)
    numbers = cast(every, "float32")
    keep = ~np.isnan(numbers)
    assert (cast(numbers, "bfloat16").view(np.uint16)[keep] == every.view(np.uint16)[keep]).all()


def test_arithmetic_on_stored_bfloat16_is_that_of_its_numbers():
    ones = np.array([0x3F80, 0x3F80], np.uint16).view(BFLOAT16)
    assert (ones + 1).astype(np.float32).tolist() == [2, 2] and (ones + 1).dtype == BFLOAT16


def test_values_beyond_float16_are_counted():
    with pytest.warns(UserWarning, match="out.weight: 2 of 4 values are beyond float16"):
        result = cast(np.array([1e6, -7e4, 65504, np.inf], np.float32), "float16", "out.weight")
    assert result.tolist() == [np.inf, -np.inf, 65504, np.inf]


def test_a_cast_follows_the_values_and_not_their_order_in_memory():
    values = np.random.default_rng(2).standard_normal((7, 11), np.float32)
    np.testing.assert_array_equal(cast(values.T, "float16"), values.T.astype(np.float16))
    assert cast(np.arange(3), "float16").dtype == np.int64  # counters are no weights
