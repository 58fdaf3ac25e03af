"""Conversations: a turn computes what is new and says what a fresh decoder says."""

import numpy as np
import pytest
from mindspore import Tensor
from support import FLOAT32

from glm3kit.config.groups import LoraConfig, ModelConfig, TrainConfig
from glm3kit.errors import ConfigError, Glm3KitError, PromptError
from glm3kit.generate.decoder import Decoder
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.train.trainer import fit
from glm3kit.weights.random import random_weights

SETTINGS = {"max_new_tokens": 6, "eos_token_id": []}
OPENING = [3, 1, 4, 1, 5]


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many tokens each call of a decoder has computed, padding not counted."""
    counts: list[int] = []
    run = Decoder.run

    def counted(self, input_ids, positions, lengths):
        counts.append(int(lengths.asnumpy().sum()))
        return run(self, input_ids, positions, lengths)

    monkeypatch.setattr(Decoder, "run", counted)
    return counts


def fresh(net: ChatGLM3, prompt: list[int]) -> list[int]:
    return net.generate(prompt, **SETTINGS)[0][len(prompt):].tolist()


def test_a_turn_computes_only_what_is_new(net, computed):
    talk = net.conversation(**SETTINGS)
    first = list(talk(OPENING))
    assert computed == [5, 1, 1, 1, 1, 1]  # the sixth new token is chosen, not run
    computed.clear()
    second_prompt = [*OPENING, *first, 9, 2, 6]
    second = list(talk(second_prompt))
    assert computed == [4, 1, 1, 1, 1, 1]  # that token, and the three of the question
    computed.clear()
    assert first == fresh(net, OPENING) and second == fresh(net, second_prompt)
    assert computed == [5, 1, 1, 1, 1, 1, 14, 1, 1, 1, 1, 1]


def test_a_prompt_that_departs_is_computed_from_there_on(net, computed):
    talk = net.conversation(**SETTINGS)
    first = list(talk(OPENING))
    edited = [*OPENING[:3], 7, 7, 7, 7]
    for prompt, new in ((edited, 4), (OPENING, 2), (OPENING, 1), ([9, *OPENING], 6), ([*OPENING, *first], 11)):
        computed.clear()
        answer = list(talk(prompt))
        assert computed[0] == new, f"{prompt}: {computed}"
        assert answer == fresh(net, prompt)
        list(talk(prompt))  # `fresh` has used the decoder: fill it again


def test_another_generation_in_between_is_no_part_of_the_conversation(net, computed):
    talk, other = net.conversation(**SETTINGS), net.conversation(**SETTINGS)
    expected = fresh(net, [*OPENING, 8])
    list(talk(OPENING))
    list(other([*OPENING[:2], 8, 8]))
    net.generate([2] * 9, **SETTINGS)
    computed.clear()
    assert list(talk([*OPENING, 8])) == expected
    assert computed[0] == 6


def test_a_turn_that_is_left_early_leaves_what_it_has_computed(net, computed):
    talk = net.conversation(**SETTINGS)
    turn = talk(OPENING)
    said = [next(turn), next(turn)]
    turn.close()
    computed.clear()
    prompt = [*OPENING, *said, 9]
    assert list(talk(prompt)) == fresh(net, prompt)
    assert computed[0] == 2  # what was said last, and the new one


def test_turns_at_the_end_of_the_window_are_those_of_a_fresh_decoder(net):
    talk = net.conversation(max_new_tokens=20, eos_token_id=[])
    ids = [1] * 60
    while len(ids) < net.cfg.seq_length:
        answer = list(talk(ids))
        assert answer == net.generate(ids, max_new_tokens=20, eos_token_id=[])[0][len(ids):].tolist()
        ids = [*ids, *answer, 3][:net.cfg.seq_length]
    with pytest.raises(PromptError, match="prompt 0 has 96 tokens and the model's window .* no room for an answer"):
        talk(ids)


def test_numbers_that_are_none_are_forgotten(net):
    talk = net.conversation(**SETTINGS)
    expected = list(talk(OPENING))
    bias = net.transformer.encoder.layers[0].self_attention.query_key_value.bias
    values = bias.asnumpy().copy()
    bias.asnumpy()[:] = np.nan  # a view: in place
    try:
        with pytest.raises(Glm3KitError, match="no finite numbers"):
            list(talk([*OPENING, 7]))
    finally:
        bias.asnumpy()[:] = values
    assert list(talk(OPENING)) == expected


@pytest.fixture
def small_net(golden) -> ChatGLM3:
    """One layer, for tests that change it."""
    return ChatGLM3(ModelConfig.from_hf(golden / "hf/config.json", num_layers=1, **FLOAT32))


def test_training_and_filling_between_two_turns_are_seen(small_net):
    net = small_net
    talk = net.conversation(**SETTINGS)
    list(talk(OPENING))
    rows = np.random.default_rng(0).integers(0, 512, (2, 2, 8)).astype(np.int32)
    fit(net, [tuple(rows)], TrainConfig(learning_rate=0.5, total_steps=1))
    trained = list(talk([*OPENING, 7]))
    assert trained == fresh(net, [*OPENING, 7])
    list(talk([*OPENING, 7]))  # `fresh` has used the decoder: fill it again
    net.fill(random_weights(net.cfg, seed=1))
    filled = list(talk([*OPENING, 7]))
    assert filled == fresh(net, [*OPENING, 7]) != trained


def test_an_adapter_drops_nothing_while_it_generates(small_net):
    net = small_net
    rows = np.random.default_rng(0).integers(0, 512, (2, 2, 8)).astype(np.int32)
    fit(net, [tuple(rows)], TrainConfig(learning_rate=0.5, total_steps=1, lora=LoraConfig(dropout=0.5)))
    assert net.training and fresh(net, OPENING) == fresh(net, OPENING)
    assert net.training
    ids = net.generate(OPENING, **SETTINGS)[0]
    net.set_train(False)
    logits = net(Tensor(ids[None, :-1])).asnumpy()[0, len(OPENING) - 1:]
    assert logits.argmax(1).tolist() == ids[len(OPENING):].tolist()


def test_a_turn_may_have_settings_of_its_own(net):
    talk = net.conversation(**SETTINGS)
    assert list(talk(OPENING, max_new_tokens=2)) == fresh(net, OPENING)[:2]
    assert list(talk(OPENING)) == fresh(net, OPENING)


def test_settings_out_of_range_are_errors_before_the_first_turn(net):
    with pytest.raises(ConfigError, match="top_p is 2"):
        net.conversation(top_p=2)
    with pytest.raises(ConfigError, match="stream: num_beams is 2, expected 1"):
        net.conversation(num_beams=2)
