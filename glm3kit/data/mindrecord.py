"""The rows of a token file as MindRecord, for MindSpore's and MindFormers' own loaders.

    python -m glm3kit data configs/tiny.yaml --format mindrecord
    MindDataset("output/mindrecord/train-0123456789ab/train.mindrecord", ["input_ids", "labels"])
"""

from itertools import islice
from pathlib import Path

from glm3kit.data.token_file import TokenFile, pad_row
from glm3kit.files import atomic_folder

ROWS_AT_ONCE = 1000


def write_mindrecord(tokens: TokenFile, path: str | Path, seq_length: int, pad_id: int = 0) -> Path:
    """Write every row, padded to seq_length, as `input_ids` and `labels`, int32 (seq_length,); return `path`.

    path: ends with .mindrecord, in a folder that is made for it and its index. If the folder is there, all of it is
        already written, for it gets its name last.
    """
    from mindspore.mindrecord import FileWriter  # here: no other form of the data needs MindSpore, which takes seconds

    path = Path(path)
    if path.parent.exists():
        return path
    with atomic_folder(path.parent) as temporary:
        writer = FileWriter(str(temporary / path.name))
        column = {"type": "int32", "shape": [seq_length]}
        writer.add_schema({"input_ids": column, "labels": column}, "rows of a token file")
        rows = (pad_row(ids, labels, seq_length, pad_id) for ids, labels in tokens)
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_raw_data([{"input_ids": ids, "labels": labels} for ids, labels in some])
        writer.commit()
    return path
