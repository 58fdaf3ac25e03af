"""What several tests use: where things are, the golden weights, waiting with a limit."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "glm3kit" / "tiny" / "tokenizer.model"


def assert_golden(tensors: Mapping[str, np.ndarray], published: Mapping[str, np.ndarray]) -> None:
    """The 24 weights of the golden model, bit for bit, under MindSpore's names."""
    assert len(tensors) == 3 * 7 + 3
    for name, array in published.items():
        if name == "transformer.rotary_pos_emb.inv_freq":
            assert name not in tensors
            continue
        name = name.replace("word_embeddings.weight", "embedding_table")
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)
