"""Weights against PyTorch and Transformers, which this project did not write: `make peers`."""

import numpy as np
import pytest

from glm3kit.weights import hf_name, read_weights

pytestmark = pytest.mark.peers


def test_torch_loads_what_we_read_from_the_hub_folder(golden):
    import torch

    loaded = torch.load(golden / "tiny" / "glm3_merged.pth", weights_only=True)
    weights = read_weights(golden / "tiny" / "hf")
    assert {hf_name(name) for name in weights} | set(weights.dropped) == set(loaded)
    for name, array in weights.items():
        np.testing.assert_array_equal(array, loaded[hf_name(name)].numpy(), err_msg=name)
