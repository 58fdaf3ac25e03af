"""What all tests share: where the reference values are, and a quiet MindSpore."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("GLOG_v", "3")  # before any import of mindspore: its warnings would fill the report

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference values and other people's data, outside the repository."""
    folder = Path(os.environ.get("GLM3KIT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference values: {folder} does not exist (set GLM3KIT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """The expected values computed with the official PyTorch code."""
    return shared / "golden"
