"""Verbs of weights: converting with a second look, merging into files of a size."""

from support import small_config

from glm3kit.weights.random import write_random_hub_weights


def test_a_conversion_is_verified_at_once_and_later_and_not_overwritten(tmp_path, capsys, status_of):
    hub, result = write_random_hub_weights(small_config().model, tmp_path / "hub"), str(tmp_path / "w.safetensors")
    assert status_of("convert", str(hub), result, "--verify") == 0
    assert " MB\n" in (printed := capsys.readouterr().out) and "10 tensors are as they were written" in printed
    assert status_of("convert", "--verify", result) == 0
    assert capsys.readouterr().out == f"{result}: 10 tensors are as they were written\n"
    assert status_of("convert", str(hub), result) == 1
    assert "--force" in capsys.readouterr().err
    assert status_of("convert", str(hub), result, "--force") == 0


def test_without_a_destination_there_must_be_something_to_verify(capsys, status_of):
    assert status_of("convert", "only-one") == 2
    assert "glm3kit convert: error: DST is missing" in capsys.readouterr().err
