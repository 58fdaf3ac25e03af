"""Verbs of the model: what a call must name, and what the demo needs."""

import sys

from support import TINY


def test_a_model_without_weights_is_a_wrong_call_that_names_what_is_missing(capsys, status_of):
    for call in (["chat"], ["predict", "--prompt", "x"], ["evaluate"]):
        assert status_of(*call[:1], str(TINY), "model.tokenizer_path=null", *call[1:]) == 2
        message = capsys.readouterr().err
        for key in ("model.tokenizer_path", "model.checkpoint_name_or_path"):
            assert f"{key} is not set; set it in the configuration, or add {key}=PATH" in message


def test_the_demo_says_how_to_install_what_it_needs(capsys, monkeypatch, status_of):
    monkeypatch.delitem(sys.modules, "glm3kit.notebook.demo", raising=False)
    monkeypatch.setitem(sys.modules, "nbclient", None)  # an import of it fails as if it were not installed
    assert status_of("demo") == 1
    assert "the demo needs nbclient, not installed" in capsys.readouterr().err
