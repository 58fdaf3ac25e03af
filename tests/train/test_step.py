"""What ranks agree on: the gradient norm."""

from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from glm3kit.config.groups import ModelConfig
from glm3kit.parallel import ALONE
from glm3kit.train.step import Totals


def test_the_gradient_norm_of_a_large_matrix_keeps_its_digits():
    gradient = np.random.default_rng(0).standard_normal((8192, 512)).astype(np.float32)
    matrix = Parameter(Tensor(gradient), "transformer.embedding.embedding_table")
    totals = Totals(SimpleNamespace(trainable_params=lambda: [matrix], cfg=ModelConfig()), ALONE)
    norm = totals((Tensor(gradient),), Tensor([3.0, 2.0]), Tensor(4.0)).asnumpy()[1]
    assert norm == pytest.approx(np.linalg.norm(gradient.astype(np.float64)) / (2 * 4), rel=1e-6)
