"""Installing: what the package asks for, what the development environment pins, what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    pytest.skip("tomllib comes with Python 3.11", allow_module_level=True)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LIBRARY = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
DEMO = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["optional-dependencies"]["demo"])}
DEV = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["optional-dependencies"]["dev"])}
PEERS = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["optional-dependencies"]["peers"])}


def imported_distributions(*folders: str) -> set[str]:
    """The installed distributions that the Python files of some folders import, by name."""
    modules = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
    providers = packages_distributions()
    third_party = modules - sys.stdlib_module_names - {"glm3kit", "conftest"}
    return {canonicalize_name(providers[module][0]) for module in third_party if module in providers}


@pytest.mark.parametrize("version", ["2.7.1", "2.8.0", "2.9.0", "2.10.0", "2.11.0"])
def test_a_preinstalled_mindspore_satisfies_the_library(version):
    assert LIBRARY["mindspore"].specifier.contains(version)


def test_a_mindspore_older_than_the_oldest_tried_is_replaced():
    assert not LIBRARY["mindspore"].specifier.contains("2.6.0")


def test_numpy_2_which_breaks_mindspore_is_refused():
    assert LIBRARY["numpy"].specifier.contains("1.26.4")
    assert not LIBRARY["numpy"].specifier.contains("2.0.0")


def test_the_library_pins_no_version_exactly():
    assert not [str(r) for r in LIBRARY.values() if "==" in str(r.specifier)]


def test_the_library_declares_what_it_imports_and_nothing_else():
    assert imported_distributions("glm3kit") == set(LIBRARY) | set(DEMO)


def test_every_package_that_the_tests_import_is_pinned():
    assert imported_distributions("glm3kit", "tests", "benchmarks") <= set(DEV) | set(PEERS)


def test_the_development_environment_pins_every_package_exactly():
    loose = [str(r) for r in (DEV | PEERS).values() if [s.operator for s in r.specifier] != ["=="]]
    assert not loose


def test_the_pins_fit_the_ranges_of_the_library():
    for name, requirement in (LIBRARY | DEMO).items():
        (pin,) = DEV[name].specifier
        assert requirement.specifier.contains(pin.version), f"{name} {pin.version} is outside {requirement}"


def test_environment_yml_has_exactly_the_pins_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = (item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert pip == [*PROJECT["optional-dependencies"]["dev"], "-e ."]
    assert "python=3.11" in environment["dependencies"]


def test_the_wheel_holds_the_modules_and_the_tiny_data(tmp_path):
    source = tmp_path / "source"  # a copy of what git tracks: a build writes beside its source
    files = subprocess.run(["git", "ls-files", "-z", "glm3kit", "pyproject.toml", "README.md", "LICENSE"], cwd=ROOT,
                           check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    for name in files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    build = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, source],
                           capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert {name for name in files if name.startswith("glm3kit/")} <= inside
