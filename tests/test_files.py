"""Files and folders, whole or not at all."""

import os

from glm3kit.files import atomic_folder


def test_what_a_killed_process_of_the_same_id_left_is_in_nobodys_way(tmp_path):
    for end in ("tmp", "old"):
        (tmp_path / f".out.{os.getpid()}.{end}").mkdir()
        (tmp_path / f".out.{os.getpid()}.{end}" / "half").write_text("old")
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/new"]
