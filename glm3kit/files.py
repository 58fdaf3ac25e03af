"""Writing files so that a kill at any moment leaves the previous one whole.

    atomic_write("job.json", json.dumps(state))
"""

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, a limit on the size of files
WRITEBACK = 32 << 20  # bytes of a file after which the system is asked to write them


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StreamedFile(io.BufferedWriter):
    """A new file whose bytes are on their way to the disk while it is written: a sync at the end has little to do."""

    def __init__(self, path: str | Path):
        super().__init__(io.FileIO(path, "wb"))
        self._sent = 0  # bytes

    def write(self, data: bytes | memoryview) -> int:
        written = super().write(data)
        position = self.tell()
        if position - self._sent >= WRITEBACK:
            # Of pages that are not written yet this says: write them, without waiting for it.
            os.posix_fadvise(self.fileno(), self._sent, position - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = position
        return written


def _remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it is synced and renamed to `path`, on failure removed.

    The folder is made if it does not exist. Two writers of one path do not meet: the temporary name holds the
    process id.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)  # what a killed process left, whose id came back
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        _remove(temporary)
    sync(path.parent)  # the rename itself must survive a power cut


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success it is synced and renamed to `path`, on failure removed.

    What stands at `path` is moved away just before the renaming and removed after it.
    """
    path = Path(path)
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    with atomic_path(path) as temporary:
        temporary.mkdir()
        yield temporary
        for entry in (*temporary.iterdir(), temporary):
            sync(entry)
        if path.exists():
            _remove(replaced)
            os.rename(path, replaced)
    _remove(replaced)


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write text (UTF-8) or bytes to `path` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
