"""Generation against Transformers' GlmForCausalLM, which this project did not write: `make peers`."""

import numpy as np
import pytest
from support import golden_net

from glm3kit import ChatGLM3, convert_weights

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:.*written without a tokenizer")]


@pytest.fixture(scope="module")
def net() -> ChatGLM3:
    return golden_net()


@pytest.fixture(scope="module")
def peer(golden, tmp_path_factory):
    """Transformers' model with the same weights."""
    import torch
    from transformers import GlmForCausalLM

    folder = convert_weights(golden / "hf", tmp_path_factory.mktemp("peer") / "glm", to="hf-glm", progress=False)
    return GlmForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def continue_with_peer(peer, prompt: list[int], **settings) -> list[int]:
    """Prompt and new ids, without what pads the row after its stop id."""
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        (row,) = peer.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=511, **settings).tolist()
    stops = settings["eos_token_id"] or ()
    end = next((i + 1 for i, id_ in enumerate(row) if i >= len(prompt) and id_ in stops), len(row))
    return row[:end]


@pytest.fixture(scope="module")
def prompts(golden) -> list[list[int]]:
    reference = np.load(golden / "reference.npz")
    return [reference[f"greedy.prompt_{i}"].tolist() for i in range(3)]


@pytest.mark.parametrize("settings", [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 3.0},
    {"length_penalty": -1.0},
    {"early_stopping": True},
    {"early_stopping": "never", "length_penalty": 2.0},
    {"repetition_penalty": 1.5},
])
def test_beam_search_finds_what_transformers_finds(net, peer, prompts, settings):
    plain = [net.generate(prompt, max_new_tokens=12, eos_token_id=[])[0].tolist() for prompt in prompts]
    stops = [ids[len(prompt) + 4] for ids, prompt in zip(plain, prompts, strict=True)]  # met early by some beam
    found = []
    for prompt in prompts:
        options = {"num_beams": 4, "max_new_tokens": 12, "eos_token_id": stops, **settings}
        found.append(net.generate(prompt, **options)[0].tolist())
        assert found[-1] == continue_with_peer(peer, prompt, do_sample=False, **options)
    assert found != plain


def test_greedy_decoding_gives_the_tokens_of_transformers(net, peer, prompts):
    for prompt in prompts:
        for penalty in (1.0, 2.0):
            options = {"max_new_tokens": 24, "eos_token_id": [], "repetition_penalty": penalty}
            expected = continue_with_peer(peer, prompt, do_sample=False, **options | {"eos_token_id": None})
            assert net.generate(prompt, **options)[0].tolist() == expected
