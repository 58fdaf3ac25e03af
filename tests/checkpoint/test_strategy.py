"""Strategy files: read in both of MindSpore's forms, one or a folder of them, and written as MindSpore reads them."""

import json
import random

import pytest
from mindspore.parallel._parallel_serialization import (
    _build_searched_strategy,
    _convert_to_list,
    _merge_protobuf_strategy,
)
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from glm3kit.checkpoint.layout import Layout
from glm3kit.checkpoint.strategy import read_strategy, write_strategy
from glm3kit.errors import CheckpointError

LAYOUTS = {
    "a.weight": Layout((2, 2), ((0,), ()), shards=2, step=2),
    "a.bias": Layout((4, 2), ((0,),)),
    "b.weight": Layout((2, 2, 2), ((2,), (0,))),
    "norm": Layout((2, 2), ((),), shards=4),
    "both": Layout((2, 2, 2), ((1, 0), ())),
}


def protobuf(layouts, stage=0):
    """The layouts as MindSpore itself writes them, through its own generated classes."""
    message = ParallelStrategyMap(current_stage=stage)
    operator = message.parallel_strategy_item.add(node_name="MatMul-op0")
    operator.parallel_strategys.stage = stage
    operator.parallel_strategys.parallel_strategy.add().dim.extend([2, 1])
    for name, layout in layouts.items():
        item = message.parallel_layout_item.add(param_name=name).parallel_layouts
        item.dev_matrix.add().dim.extend(layout.devices)
        if any(len(axes) > 1 for axes in layout.axes):
            for axes in layout.axes:
                item.tensor_map.add().dim.extend(axes or [-1])
        else:
            item.tensor_map.add().dim.extend([axes[0] if axes else -1 for axes in layout.axes])
        item.param_split_shape.add()
        item.indices_offset.add()
        item.field = 0
        item.opt_weight_shard_step = layout.step if layout.shards > 1 else 0
        item.opt_weight_shard_size = layout.shards if layout.shards > 1 else 0
    return message


def test_protobuf_that_mindspore_wrote_is_read(tmp_path):
    path = tmp_path / "ckpt_strategy_rank_0.ckpt"
    path.write_bytes(protobuf(LAYOUTS).SerializeToString())
    assert read_strategy(path) == LAYOUTS


def test_what_is_written_is_read_by_mindspore_and_by_us(tmp_path):
    path = tmp_path / "strategy.json"
    layouts = {name: layout for name, layout in LAYOUTS.items() if name != "both"}  # JSON has no two axes for one
    layouts["ours"] = Layout((2, 2), ((0,), ()), 2, (4, 2, 2), 2, (4, 3), 2)
    write_strategy(path, layouts)
    assert read_strategy(path) == layouts
    theirs = _convert_to_list(_build_searched_strategy(str(path)))
    assert theirs["a.weight"][:2] == [[2, 2], [0, -1]] and theirs["a.weight"][4:6] == [2, 2]
    assert theirs["norm"][4:6] == [1, 4]


def test_all_ranks_that_hold_a_slice_may_share_it(tmp_path):
    path = tmp_path / "strategy.json"
    item = {"dev_matrix": [4, 2], "tensor_map": [0, -1], "opt_weight_shard_step": 2, "opt_weight_shard_size": -1}
    path.write_text(json.dumps({"parallel_strategy_item": {}, "parallel_layout_item": {"w": item}}))
    assert read_strategy(path)["w"].shards == 4


def test_a_folder_holds_a_file_of_every_rank_and_stage(tmp_path):
    first, second = {"embedding": LAYOUTS["norm"], "a": LAYOUTS["a.weight"]}, {"embedding": LAYOUTS["norm"],
                                                                               "b": LAYOUTS["a.weight"]}
    for rank in range(8):
        message = protobuf(second if rank > 3 else first, stage=rank // 4)
        (tmp_path / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(message.SerializeToString())
    layouts = read_strategy(tmp_path)
    assert {name: layout.stage for name, layout in layouts.items()} == {"embedding": 0, "a": 0, "b": 1}
    assert layouts["b"].holders() == {((0, 0), 0): [4], ((1, 0), 0): [5], ((0, 0), 1): [6], ((1, 0), 1): [7]}

    # What MindSpore merges such files to says the same.
    merged = tmp_path.parent / "merged.ckpt"
    _merge_protobuf_strategy([str(path) for path in sorted(tmp_path.iterdir())], str(merged))
    assert read_strategy(merged) == layouts

    (tmp_path / "ckpt_strategy_rank_9.ckpt").write_bytes(protobuf(LAYOUTS).SerializeToString())
    with pytest.raises(CheckpointError, match="rank_0.ckpt and ckpt_strategy_rank_9.ckpt say.*different runs"):
        read_strategy(tmp_path)


@pytest.mark.parametrize("name, content", [
    ("a.json", b"{}"), ("a.json", b"[1, 2]"), ("a.json", b"\xff\xfe"), ("a.json", b"[" * 100_000),
    ("a.json", b'{"parallel_layout_item": {}}'),
    ("a.json", b'{"parallel_layout_item": {"w": {"dev_matrix": [2], "tensor_map": [5]}}}'),
    ("a.json", b'{"parallel_layout_item": {"w": {"dev_matrix": ["2"], "tensor_map": [0]}}}'),
    ("a.json", b'{"parallel_layout_item": {"w": {"dev_matrix": [99999999999], "tensor_map": [0]}}}'),
    ("a.ckpt", b""), ("a.ckpt", b"\x1a\xff"), ("a.ckpt", b"no strategy at all"),
    ("a.ckpt", protobuf(LAYOUTS).SerializeToString()[:-3]),
])
def test_what_is_no_strategy_file_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: no strategy file of MindSpore's"):
        read_strategy(tmp_path / name)


def test_a_missing_file_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(CheckpointError, match="none.json: cannot be read"):
        read_strategy(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match="an empty folder"):
        read_strategy(tmp_path)


def test_damage_anywhere_is_an_error_or_another_strategy_but_never_a_crash(tmp_path):
    path = tmp_path / "a.json"
    write_strategy(path, {"a.weight": LAYOUTS["a.weight"]})
    chance = random.Random(0)
    for name, whole in (("a.ckpt", protobuf(LAYOUTS).SerializeToString()), ("a.json", path.read_bytes())):
        for _ in range(300):
            content = bytearray(whole)
            for _ in range(3):
                content[chance.randrange(len(content))] = chance.choice(b"0123456789-[]{},\x00\xff\x80\x0a")
            (tmp_path / name).write_bytes(content)
            try:
                read_strategy(tmp_path / name)
            except CheckpointError as err:
                assert name in str(err)
