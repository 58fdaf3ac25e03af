"""The rooms of glm3kit: an import goes to a room further up, never down and never in a circle; what a file may hold."""

import ast
from functools import cache
from pathlib import Path

from support import ROOT

# The ground first. A file may import files of its own room and of those before it.
ROOMS = ("errors", "files", "tiny", "config", "text", "weights", "data", "chat", "checkpoint", "setup", "parallel",
         "generate", "model", "jobs", "train", "evaluate", "notebook", "cli", "__main__")
WITH_MINDSPORE = {"parallel", "generate", "model", "train", "evaluate"}
WITH_MINDSPORE_IN_A_FUNCTION = {"glm3kit.data.mindrecord"}
PACKAGE = ROOT / "glm3kit"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FACES = {name for name, path in FILES.items() if path.name == "__init__.py"} - {"glm3kit.tiny"}  # that is all of a room


def room(module: str) -> str:
    return f"{module}.".split(".")[1]


@cache
def syntax(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> list[tuple[str, int, bool]]:
    """What a file imports, types included: (module, line, whether inside a function)."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: imports are absolute"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend((part if part in FILES else node.module, node.lineno, inside) for part in parts)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(syntax(module), False)
    return found


def ours(module: str) -> list[tuple[str, int]]:
    return [(name, line) for name, line, _ in imports(module) if name == "glm3kit" or name.startswith("glm3kit.")]


ALL = sorted(FILES.keys() - {"glm3kit"})  # the package's own file hands public names on, from every room


def test_every_file_is_in_a_room():
    assert {room(module) for module in ALL} == set(ROOMS)


def test_an_import_goes_to_a_room_further_up():
    down = [f"{module}:{line}: {name}" for module in ALL for name, line in ours(module)
            if name != "glm3kit" and ROOMS.index(room(name)) > ROOMS.index(room(module))]
    assert not down


def test_a_file_imports_files_and_not_the_face_of_a_room():
    faces = [f"{module}:{line}: {name}" for module in FILES.keys() - FACES for name, line in ours(module)
             if name in FACES - {"glm3kit"}]
    assert not faces
    through_all = [module for module in ALL for node in ast.walk(syntax(module)) if isinstance(node, ast.ImportFrom)
                   and node.module == "glm3kit" and [alias.name for alias in node.names] != ["__version__"]]
    assert not through_all


def test_no_files_import_each_other_in_a_circle():
    ahead = {module: {name for name, _ in ours(module)} - {module, "glm3kit"} for module in ALL}
    while free := [module for module, names in ahead.items() if not names & ahead.keys()]:
        for module in free:
            del ahead[module]
    assert not sorted(ahead), "each of these imports another of them"


def test_mindspore_is_imported_only_where_it_computes():
    found = {(module, inside) for module in FILES for name, _, inside in imports(module)
             if name.partition(".")[0] == "mindspore" and room(module) not in WITH_MINDSPORE}
    assert found == {("glm3kit.data.mindrecord", True)}


def test_an_import_inside_a_function_says_why():
    """Those of verbs all have one reason, which `cli` gives: a verb loads what it needs when it runs."""
    silent = []
    for module in [module for module in FILES if module == "glm3kit" or room(module) not in ("cli", "__main__")]:
        lines = FILES[module].read_text(encoding="utf-8").splitlines()
        silent += [f"{module}:{line}: {name}" for name, line, inside in imports(module) if inside
                   and "#" not in lines[line - 1] and not lines[line - 2].strip().startswith("#")]
    assert not silent


def test_files_and_functions_stay_small():
    long = [f"{module}: {lines} lines" for module, path in FILES.items()
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > (40 if module in FACES - {"glm3kit"}
                                                                                 else 400)]
    for module in FILES:
        functions = (node for node in ast.walk(syntax(module)) if isinstance(node, ast.FunctionDef))
        long += [f"{module}.{node.name}: {lines} lines" for node in functions
                 if (lines := node.end_lineno - node.lineno + 1) > 60]
    assert not long
