"""Layouts: which rank holds which share, and that the shares of all ranks are the parameter."""

import numpy as np
import pytest

from glm3kit.checkpoint.layout import Layout, whole_tensors
from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import Topology
from glm3kit.train.saving import weight_layouts
from glm3kit.weights.names import parameter_shapes
from glm3kit.weights.random import random_weights
from glm3kit.weights.slices import Slicing, copies_of, slicing
from glm3kit.weights.tensors import Tensors

CFG = ModelConfig(num_layers=1, padded_vocab_size=64, hidden_size=16, ffn_hidden_size=24, kv_channels=4,
                  num_attention_heads=8, param_dtype="float32", compute_dtype="float32")


def files(layout, shares):
    """What each rank's file holds of a parameter `w`."""
    return {rank: Tensors.of({"w": shares[layout.share(rank)]}) for rank in range(layout.ranks)}


def test_slices_of_fused_weights_hold_whole_heads_of_each_part():
    cut = Slicing(0, (4, 2, 2))  # q of 4 rows, k and v of 2
    rows = np.array([["q0"], ["q1"], ["q2"], ["q3"], ["k0"], ["k1"], ["v0"], ["v1"]])
    assert cut.slice_of(rows, 0, 2).ravel().tolist() == ["q0", "q1", "k0", "v0"]
    assert cut.slice_of(rows, 1, 2).ravel().tolist() == ["q2", "q3", "k1", "v1"]


def test_with_more_ranks_than_groups_each_group_is_held_several_times():
    cut = Slicing(0, (8, 4, 4), unit=2)  # four query heads and two groups, of two rows
    assert [cut.ranges(rank, 4) for rank in range(4)] == [
        [(0, 2), (8, 10), (12, 14)], [(2, 4), (8, 10), (12, 14)],
        [(4, 6), (10, 12), (14, 16)], [(6, 8), (10, 12), (14, 16)]]
    assert copies_of(cut, 4) == (2, 2) and copies_of(cut, 2) == (8, 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_slices_put_together_are_the_whole(ranks):
    layouts = weight_layouts(ChatGLM3(CFG), Topology(0, 1, ranks)) if ranks < 4 else {
        name: Layout((4,), ((0,) if cut.axis == 0 else (), (0,) if cut.axis == 1 else ())[:len(shape)],
                     segments=cut.segments, unit=cut.unit) if (cut := slicing(name, CFG)) else Layout((4,), ((),))
        for name, shape in parameter_shapes(CFG).items()}
    weights = random_weights(CFG, seed=1)
    held = {rank: Tensors.of({name: cut.slice_of(weights[name], rank, ranks) if (cut := slicing(name, CFG))
                              else weights[name] for name in weights}) for rank in range(ranks)}
    whole = whole_tensors(held, layouts, "here")
    assert list(whole.specs.items()) == list(weights.specs.items())
    for name in weights:
        np.testing.assert_array_equal(whole[name], weights[name], name)


def test_a_matrix_cut_by_two_axes_and_the_optimizer_is_the_sum_of_its_shares():
    # dev_matrix [2, 2, 3]: rows by the axis of 3, columns by the middle one, shards over the first.
    layout = Layout((2, 2, 3), ((0,), (1,)), shards=2)
    whole = np.arange(12 * 4).reshape(12, 4)
    shares = {((r, c), s): whole[4 * r + 2 * s:4 * r + 2 * s + 2, 2 * c:2 * c + 2]
              for r in range(3) for c in range(2) for s in range(2)}
    assert layout.share(7) == ((1, 0), 1)  # rank 7 is [1, 0, 1] of [2, 2, 3]
    np.testing.assert_array_equal(whole_tensors(files(layout, shares), {"w": layout}, "here")["w"], whole)


def test_one_axis_cut_by_two_axes_of_the_ranks_counts_the_first_named_slower():
    layout = Layout((2, 2), ((1, 0),))
    shares = {((index,), 0): np.full(1, index) for index in range(4)}
    assert [layout.share(rank)[0] for rank in range(4)] == [(0,), (1,), (2,), (3,)]
    np.testing.assert_array_equal(whole_tensors(files(layout, shares), {"w": layout}, "here")["w"], range(4))


def test_shards_of_flattened_slices_are_put_together_without_their_padding():
    # Two data-parallel by two tensor-parallel ranks; slices (1, 5) of a matrix (2, 5), three values and a zero each.
    layout = Layout((2, 2), ((0,), ()), shards=2, flattened=(1, 5), step=2)
    whole = np.arange(1, 11).reshape(2, 5)
    shares = {((row, 0), 0): whole[row, :3] for row in range(2)} | {
        ((row, 0), 1): np.append(whole[row, 3:], 0) for row in range(2)}
    assert layout.share(2) == ((0, 0), 1)
    np.testing.assert_array_equal(whole_tensors(files(layout, shares), {"w": layout}, "here")["w"], whole)
    # What tensor parallelism leaves whole is shared by the ranks of data parallelism alone.
    norm = Layout((2, 2), ((),), shards=2, flattened=(5,), step=2)
    assert [norm.share(rank)[1] for rank in range(4)] == [0, 0, 1, 1]


def test_a_share_that_several_ranks_hold_may_be_missing_from_all_but_one():
    layout = Layout((2, 2), ((0,),))
    ranks = files(layout, {((0,), 0): np.zeros(2), ((1,), 0): np.ones(2)})
    del ranks[0], ranks[3]
    np.testing.assert_array_equal(whole_tensors(ranks, {"w": layout}, "here")["w"], [0, 0, 1, 1])
    del ranks[1]
    with pytest.raises(CheckpointError, match="missing: rank 1 or 3, for shares of 1 parameters such as 'w'"):
        whole_tensors(ranks, {"w": layout}, "here")
    elsewhere = Layout((1,), ((),), stage=1)  # rank 0 has no business with it, rank 1 should have it
    with pytest.raises(CheckpointError, match="missing: rank 1, for shares of 1 parameters such as 'w'"):
        whole_tensors({0: Tensors.of({"w": np.zeros(2)})}, {"w": elsewhere}, "here")


def test_shares_that_do_not_fit_are_named():
    layout = Layout((2,), ((0,),), segments=(4, 2))
    with pytest.raises(CheckpointError, match=r"'w': slices \[2\] do not make 6 along axis 0"):
        whole_tensors(files(layout, {((0,), 0): np.zeros(2), ((1,), 0): np.zeros(2)}), {"w": layout}, "here")
    with pytest.raises(CheckpointError, match=r"'w': shares \[\['float64', 3\], \['float64', 2\]\] differ"):
        whole_tensors(files(layout, {((0,), 0): np.zeros(3), ((1,), 0): np.zeros(2)}), {"w": layout}, "here")
    with pytest.raises(CheckpointError, match=r"of another run: it does not know \['w'\]"):
        whole_tensors(files(layout, {((0,), 0): np.zeros(3), ((1,), 0): np.zeros(3)}), {}, "here")


@pytest.mark.parametrize("given, message", [
    (dict(devices=(2, 0), axes=()), "is no layout of 1 to"),
    (dict(devices=(1 << 20,), axes=()), "is no layout of 1 to"),
    (dict(devices=(2,), axes=((1,),)), "does not name axes"),
    (dict(devices=(2, 2), axes=((0,), (0,))), "each once"),
    (dict(devices=(2, 2), axes=((0,),), shards=4), "2 ranks that hold the same slice cannot share it as 4"),
    (dict(devices=(3,), axes=((0,),), segments=(4, 4)), "cannot be cut"),
    (dict(devices=(2,), axes=((0,),), segments=(4,), unit=0), "cannot be cut"),
])
def test_a_layout_that_cannot_be_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        Layout(**given)
