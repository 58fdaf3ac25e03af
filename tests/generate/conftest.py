"""What the tests of generation share: one golden model with its compiled graphs, which they leave as it is."""

import numpy as np
import pytest
from support import golden_net

from glm3kit.model.chatglm3 import ChatGLM3


@pytest.fixture(scope="session")
def reference(golden) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "reference.npz"))


@pytest.fixture(scope="session")
def net() -> ChatGLM3:
    return golden_net()
