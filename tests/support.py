"""What several tests use: where things are, small sizes, the golden model, waiting with a limit."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm3kit.config.groups import RunConfig
from glm3kit.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TINY = ROOT / "configs" / "tiny.yaml"
TOKENIZER = ROOT / "glm3kit" / "tiny" / "tokenizer.model"
FLOAT32 = {"param_dtype": "float32", "compute_dtype": "float32"}
# Overrides of tiny.yaml for runs whose arithmetic does not matter: a step takes milliseconds.
SMALL = ("model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.kv_channels=8",
         "train.batch_size=2")


def small_config(*changes: str) -> RunConfig:
    """tiny.yaml made small, with these changes."""
    return load_config(TINY, [*SMALL, *changes])


def golden_net(*topology: Any, **changes: Any) -> Any:
    """A ChatGLM3 with the golden weights.

    topology: the rank's place if it is one of several; changes: of the configuration, by default float32.
    """
    from glm3kit import ChatGLM3, ModelConfig, load_weights  # here: most tests that use this file need no MindSpore

    net = ChatGLM3(ModelConfig.from_hf(GOLDEN / "hf" / "config.json", **FLOAT32 | changes), *topology)
    load_weights(net, GOLDEN / "hf")
    return net


def next_token_labels(input_ids: np.ndarray) -> np.ndarray:
    """Labels of plain language modelling: the token after each, none after the last."""
    labels = np.full_like(input_ids, -100)
    labels[..., :-1] = input_ids[..., 1:]
    return labels


def reference_batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """input_ids and labels, (4, 48) each, of the twenty steps that the reference took from the golden weights."""
    return [(ids, next_token_labels(ids)) for ids in np.load(GOLDEN / "reference.npz")["train.input_ids"]]


def until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Wait until a condition holds and return what it gave; fail after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)
    return found


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
