"""Choosing tokens: the reference's probabilities, and settings that are checked."""

import json

import numpy as np
import pytest
from support import TINY

from glm3kit.config.groups import GenerateConfig
from glm3kit.config.load import load_config
from glm3kit.errors import ConfigError
from glm3kit.generate.sampling import sampling_probabilities


def test_probabilities_equal_the_reference(golden_texts):
    cases = np.load(golden_texts / "sampling.npz")
    specs = json.loads(str(cases["specs"]))
    assert len(specs) == 9
    for i, spec in enumerate(specs):
        probs = sampling_probabilities(cases["logits"], cases["previous_ids"], **spec)
        np.testing.assert_allclose(probs, cases[f"probs_{i}"], rtol=0, atol=1e-5, err_msg=str(spec))


def test_probabilities_follow_by_hand():
    logits = np.log([[0.1, 0.2, 0.3, 0.4]])
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    for changes, probs in [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_k": 9}, [0.1, 0.2, 0.3, 0.4]),
        ({"top_p": 0.75}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"top_p": 0.01}, [0, 0, 0, 1]),
        ({"top_k": 2, "top_p": 0.5}, [0, 0, 0, 1]),
    ]:
        np.testing.assert_allclose(sampling_probabilities(logits, [[]], **plain | changes)[0], probs, atol=1e-12)
    penalised = sampling_probabilities(np.array([[2.0, -1.0, 0.0]]), [[0, 1, 1]], **plain | {"repetition_penalty": 2.0})
    scores = np.exp([1.0, -2.0, 0.0])  # positive logits are divided, negative ones multiplied, and once each
    np.testing.assert_allclose(penalised[0], scores / scores.sum())


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": 0}, r"temperature is 0, expected above 0 \(do_sample=False takes the most likely token\)"),
    ({"temperature": -1.0}, "temperature is -1.0, expected above 0"),
    ({"temperature": float("nan")}, "temperature is nan, expected above 0"),
    ({"top_p": 0}, "top_p is 0, expected above 0, at most 1"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"top_k": -1}, "top_k is -1, expected at least 0"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0, expected above 0"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
    ({"max_length": -5}, "max_length is -5, expected at least 1"),
    ({"eos_token_id": None}, r"eos_token_id is None, expected an id, a list of ids, or \[\] for none"),
    ({"seed": -1}, "seed is -1, expected at least 0"),
    ({"num_beams": 0}, "num_beams is 0, expected at least 1"),
    ({"num_beams": 4, "do_sample": True}, "num_beams is 4, expected .* and 1 with do_sample"),
    ({"length_penalty": float("inf")}, "length_penalty is inf, expected a number"),
    ({"early_stopping": "soon"}, "early_stopping is 'soon', expected True, False or 'never'"),
])
def test_settings_out_of_range_are_named_with_what_was_expected(settings, message):
    with pytest.raises(ConfigError, match=message):
        GenerateConfig.checked(**settings)


def test_unknown_settings_are_named_with_those_there_are():
    with pytest.raises(ConfigError, match="generate: beams is unknown, expected max_length, .*num_beams"):
        GenerateConfig.checked(beams=4)


def test_settings_may_be_numbers_and_arrays_of_numpy():
    ids = [np.int64(7), np.array(7), np.array([7], np.int32), [np.int32(7)], (7,), 7]
    assert {GenerateConfig.checked(eos_token_id=given).eos_token_id for given in ids} == {(7,)}
    assert GenerateConfig.checked(eos_token_id=np.array([])).eos_token_id == ()
    settings = GenerateConfig.checked(top_k=np.int32(3), temperature=np.float32(0.5), do_sample=np.bool_(True))
    assert settings == GenerateConfig(top_k=3, temperature=0.5, do_sample=True)


def test_a_configuration_may_set_all_that_generate_takes(tmp_path):
    given = ["generate.num_beams=4", "generate.early_stopping=never", "generate.eos_token_id=[3, 4]"]
    config = load_config(TINY, given)
    assert (config.generate.num_beams, config.generate.early_stopping) == (4, "never")
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").generate == config.generate
    with pytest.raises(ConfigError, match="generate.num_beams: num_beams is 4, expected 1 with do_sample"):
        load_config(TINY, ["generate.num_beams=4", "generate.do_sample=true"])


def test_stop_ids_that_were_not_set_leave_those_of_the_tokenizer(tmp_path):
    assert GenerateConfig().eos_token_id == (2, 64795, 64797)
    assert "eos_token_id" not in GenerateConfig(top_k=1).model_dump()
    assert GenerateConfig(eos_token_id=5).model_dump()["eos_token_id"] == (5,)
    load_config(TINY).save(tmp_path / "config.yaml")
    assert "eos_token_id" not in load_config(tmp_path / "config.yaml").generate.model_dump()
