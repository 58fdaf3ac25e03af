"""What an import costs: `import glm3kit` loads nothing, and the parts that need no MindSpore do not load it."""

import json
import subprocess
import sys

import pytest
from support import ROOT

import glm3kit

ROOMS_WITH_MINDSPORE = ("parallel", "generate", "model", "train", "evaluate", "__main__")
WITHOUT_MINDSPORE = [name for name in (
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / "glm3kit").rglob("[a-z]*.py")))
    if name.split(".")[1] not in ROOMS_WITH_MINDSPORE]


def modules_loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("statement", ["import glm3kit", "import glm3kit.__main__ as m; m.main(['--help'])"])
def test_the_package_and_the_help_of_the_command_line_load_no_third_party_package(statement):
    loaded = modules_loaded_by(statement) - modules_loaded_by("pass")  # which loads what .pth files of the place name
    assert loaded - sys.stdlib_module_names == {"glm3kit"}


def test_the_parts_that_need_no_mindspore_do_not_load_it():
    everything = "; ".join(f"import {name}" for name in WITHOUT_MINDSPORE)
    assert "mindspore" not in modules_loaded_by(everything)


@pytest.mark.parametrize("name", glm3kit.__all__)
def test_every_public_name_is_found(name):
    assert getattr(glm3kit, name).__name__ == name
    assert name in dir(glm3kit)


def test_modules_are_found_as_attributes():
    assert glm3kit.errors.Glm3KitError is sys.modules["glm3kit.errors"].Glm3KitError


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'ChatGLM4'"):
        _ = glm3kit.ChatGLM4
    assert not hasattr(glm3kit, "_repr_html_")
