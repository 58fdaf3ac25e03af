"""What all tests share: where the reference values are, and a quiet MindSpore."""

import os
from pathlib import Path

import numpy as np
import pytest
from support import GOLDEN, ROOT, TOKENIZER

from glm3kit.text.tokenizer import ChatGLM3Tokenizer

os.environ.setdefault("GLOG_v", "3")  # before any import of mindspore: its warnings would fill the report


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference values and other people's data, outside the repository."""
    folder = Path(os.environ.get("GLM3KIT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference values: {folder} does not exist (set GLM3KIT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """A small ChatGLM3 of random weights, and what the official PyTorch code computes on it."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_texts(shared: Path) -> Path:
    """What the official tokenizer and encoding make of texts."""
    return shared / "golden" / "text"


@pytest.fixture(scope="session")
def hub(golden: Path) -> Path:
    """The golden model as a folder of a model hub."""
    return golden / "hf"


@pytest.fixture(scope="session")
def published(hub: Path) -> dict[str, np.ndarray]:
    """The golden tensors under their published names, read by the safetensors package."""
    import safetensors.numpy

    return {name: array for file in hub.glob("*.safetensors")
            for name, array in safetensors.numpy.load_file(file).items()}


@pytest.fixture(scope="session")
def tokenizer() -> ChatGLM3Tokenizer:
    """The tokenizer that comes with the kit."""
    return ChatGLM3Tokenizer(TOKENIZER)
