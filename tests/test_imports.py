"""Which part may import which (the layout of the package), and what no part imports."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "imagent_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = (
    "scoring", "types", "images", "config", "distributed", "model", "chat", "data", "tools", "rollout", "rl", "runs", "evals",
    "curation", "serving", "planner", "tiny",
)  # fmt: skip
"""From the lowest to the highest. A room imports rooms below it only; the files beside the rooms may import all."""


def imported(path: Path) -> set[str]:
    """Absolute names of the modules a file imports anywhere in it; `from a import b` gives both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def test_relative_and_nested_imports_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "imagent_jax" / "tools" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ..rl import mask\ndef f():\n    import torch.nn as n\n    from . import y\n")
    assert imported(file) == {"imagent_jax.rl", "imagent_jax.rl.mask", "torch.nn", "imagent_jax.tools", "imagent_jax.tools.y"}


def room_of(path: Path) -> str:
    """The room of a file; "" for a file beside the rooms."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return name if name in ROOMS else ""


def rooms_imported(path: Path) -> set[str]:
    """The other rooms that a file imports; "" for a file beside the rooms."""
    names = {name.split(".")[1] for name in imported(path) if name.startswith("imagent_jax.")}
    return {name if name in ROOMS else "" for name in names} - {room_of(path)}


def test_every_folder_is_a_room():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    allowed = set(ROOMS[: ROOMS.index(room)])
    wrong = [f"{path.relative_to(ROOT)} imports {other or 'an entry point'}" for path in SOURCES if room_of(path) == room
             for other in sorted(rooms_imported(path) - allowed)]  # fmt: skip
    assert wrong == []


def test_rooms_form_at_most_eight_layers(capsys):
    """A room's layer is one above the highest room that it imports."""
    layers: dict[str, int] = {}
    for room in ROOMS:
        below = {other for path in SOURCES if room_of(path) == room for other in rooms_imported(path)}
        layers[room] = 1 + max((layers[other] for other in below), default=0)
    with capsys.disabled():
        for layer in sorted(set(layers.values())):
            print(f"\nlayer {layer}: {', '.join(room for room in ROOMS if layers[room] == layer)}", end="")
    assert max(layers.values()) <= 8


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions count."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    graph = {name: {other for other in imported(path) if other in names and other != name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_nothing_imports_torch_or_tensorflow():
    banned = {"torch", "torchvision", "tensorflow", "keras", "tf_keras"}
    wrong = [f"{path.relative_to(ROOT)} imports {n}" for path in SOURCES for n in imported(path) if n.split(".")[0] in banned]
    assert wrong == []


@pytest.mark.slow(3)
def test_the_main_job_starts_without_tensorflow():
    code = "import sys, imagent_jax.train; print(sorted(m for m in sys.modules if m.split('.')[0] == 'tensorflow'))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("part", ["model", "rl", "tools"])
def test_the_root_shows_the_parts_as_links(part):
    link = ROOT / part
    assert link.is_symlink() and link.readlink() == Path("imagent_jax") / part
    assert link.resolve() == (PACKAGE / part).resolve() and (link / "__init__.py").is_file()


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=lambda f: str(f.relative_to(ROOT)))
def test_every_package_says_what_it_is(folder):
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert docstring and len(docstring.splitlines()[0]) > 25


def test_every_module_that_declares_array_shapes_is_checked_in_tests():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    [checked] = [option.partition("=")[2].split(",") for option in options if option.startswith("--jaxtyping-packages")]
    declares = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in SOURCES
        if any(name == "jaxtyping" or name.startswith("jaxtyping.") for name in imported(path))
    }
    assert len(declares) > 10 and declares <= set(checked)


def test_every_place_that_the_architecture_names_exists():
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("## Where is …?")[1].split("## ")[0]
    places = [place for row in table.splitlines() if row.startswith("|") for place in row.split("|")[2].split(";")]
    named = [re.findall(r"`([^`]+)`", place) for place in places if "`" in place]
    assert len(named) > 20
    for file, *symbols in named:
        tree = ast.parse((PACKAGE / file).read_text())
        for symbol in symbols:
            body = tree.body
            for name in symbol.split("."):
                found = [node for node in body if name in declared(node)]
                assert found, f"{file} has no {symbol}"
                body = getattr(found[0], "body", [])


def declared(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.Assign):
        return {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    if isinstance(node, ast.AnnAssign):
        return {node.target.id}
    return {getattr(node, "name", "")}
