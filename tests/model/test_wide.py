"""The widths of ChatGLM3-6B in one layer: a training step compiles and runs. Slow, and needs 14 GB of memory."""

import numpy as np
import psutil
import pytest
from support import ROOT

from glm3kit.config.groups import TrainConfig
from glm3kit.config.load import load_config
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.train.trainer import Trainer

NEEDED = 14e9  # bytes: 0.74 billion float32 weights, their gradients and two moments


@pytest.mark.slow
def test_a_layer_of_chatglm3_6b_trains_a_step():
    if (available := psutil.virtual_memory().available) < NEEDED:
        pytest.skip(f"{available / 1e9:.0f} GB of memory are available, {NEEDED / 1e9:.0f} needed")
    published = load_config(ROOT / "configs" / "run_glm3_6b_finetune_800T_A2_64G.yaml").model
    model = published.model_copy(update={"num_layers": 1, "param_dtype": "float32", "compute_dtype": "float32"})
    trainer = Trainer(ChatGLM3(model), TrainConfig(learning_rate=1e-3, end_learning_rate=1e-3), total_steps=2)
    input_ids = np.random.default_rng(0).integers(0, model.padded_vocab_size, (1, 64), dtype=np.int32)
    first, second = (trainer.advance([(input_ids, np.roll(input_ids, -1))]) for _ in range(2))
    # Weights of deviation 0.02 give logits of deviation 0.02 * sqrt(4096) = 1.28, so ln V + 1.28^2 / 2 is expected.
    assert first["loss"] == pytest.approx(np.log(65024) + 1.28**2 / 2, abs=0.5)
    assert second["loss"] < first["loss"] - 1, "the same row again"
