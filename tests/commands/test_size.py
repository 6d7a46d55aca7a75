"""The code stays readable in one sitting: short files, short functions, small rooms, one direction of imports."""

import ast
import subprocess

import pytest

from tests.launch import ROOT

FILE, FUNCTION, ROOM = 500, 60, 10  # lines, lines, files
# jpeg.c is one decoder; a Triton kernel's list of parameters, a line each with its shape, counts as lines of it.
LONGER = {"shards/read/jpeg.c": 744, "pool_forward": 72, "pooled_backward": 63, "unpool_lrn": 65, "train": 80}


def files(*ends: str) -> list[str]:
    """Files of the project without tests, as paths from its root."""
    listed = subprocess.check_output(["git", "ls-files", "job", "shards", "slurm", "setup.py"], cwd=ROOT, text=True)
    return [path for path in listed.split("\n") if path.endswith(ends) and (ROOT / path).exists()]


@pytest.mark.parametrize("path", files(".py", ".c", ".sh"))
def test_files_and_functions_are_short(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= LONGER.get(path, FILE)
    if path.endswith(".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGER.get(node.name, FUNCTION), f"{node.name} has {lines} lines"


def test_rooms_are_small_and_say_what_lives_there():
    rooms = {path.rpartition("/")[0] for path in files(".py") if path.startswith(("job/", "shards/"))}
    for room in rooms:
        modules = [path for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= ROOM, room
        assert ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())), room


def imports(path: str) -> set[str]:
    """Modules of this project that a module imports at its top."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            found.update(name for name in names if (ROOT / (name.replace(".", "/") + ".py")).exists())
    return found


def test_modules_import_in_one_direction():
    graph = {
        path[:-3].replace("/", "."): imports(path) for path in files(".py") if path.startswith(("job/", "shards/"))
    }
    assert not [(name, used) for name, all in graph.items() for used in all if "shards." in name and "job." in used]
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for used in graph[name]:
                visit(used, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
