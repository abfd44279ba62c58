"""Imports lead down: no module imports one of a higher room, and no modules import each other in a circle.

All imports count: at the top of a module, inside a function, and those that only a type checker reads.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "twigvlm"

# From the ground up. A module belongs to the room of the first name in its path; modules of one tier may import each other.
TIERS = (
    {"errors", "files", "heap", "config", "images", "inputs", "compat", "timing", "visualize", "sapling"},
    {"base", "twig", "kv"},
    {"pruning"},
    {"speculation"},
    {"engine"},
    # "": the package's own face, twigvlm/__init__.py
    {"", "model", "hf", "loading", "conversation", "checkpoints", "diagnosis"},
    {"training", "evaluation", "serving", "integrations"},
    {"cli", "__main__"},
)
TIER_OF = {room: tier for tier, rooms in enumerate(TIERS) for room in rooms}

# Modules of these names compute and know of no model library.
PURE = {"budget", "cut", "losses", "masks", "nodes", "plackett_luce", "select", "walk"}


def module_name(path, source):
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path, name):
    """The dotted names that a module's text imports, wherever in it; of `from a import b`: a.b."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def import_graph(source):
    """Module -> the modules under `source` that it imports."""
    paths = {module_name(path, source): path for path in source.rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        imported = set()
        for target in imported_names(path, name):
            # A name that is no module is an attribute of the module before its last dot.
            found = target if target in paths else target.rpartition(".")[0]
            if found in paths:
                imported.add(found)
        graph[name] = imported
    return graph


def room(module):
    return [*module.split("."), ""][1]


def tier_of(module):
    return TIER_OF[room(module)]


def cycle_in(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


GRAPH = import_graph(PACKAGE.parent)
EDGES = {(module, imported) for module, targets in GRAPH.items() for imported in targets}


def test_every_module_belongs_to_a_room():
    assert {room(module) for module in GRAPH} <= TIER_OF.keys()


def test_no_module_imports_from_a_higher_room():
    assert not {(module, name) for module, name in EDGES if tier_of(name) > tier_of(module)}


def test_no_modules_import_each_other_in_a_circle():
    assert cycle_in(GRAPH) is None


def test_pure_modules_import_no_transformers():
    pure = sorted(module for module in GRAPH if module.rpartition(".")[2] in PURE)
    assert {module.rpartition(".")[2] for module in pure} == PURE
    assert pure
    # None in sys.modules makes an import fail, so that the traceback shows which module asked for it.
    code = "\n".join(["import sys", "sys.modules['transformers'] = None", *(f"import {module}" for module in pure)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        (["cli.commands"], ["fastapi", "torch"]),  # options and their help
        (["serving.protocol", "serving.fetch"], ["torch"]),
        # Batch files and Ray Data answer requests without HTTP; only requests with a schema need llguidance.
        (["serving.batch"], ["fastapi", "llguidance"]),
    ],
)
def test_serving_imports_what_it_needs_alone(modules, without):
    if modules != ["cli.commands"]:
        pytest.importorskip("pydantic")
    lines = [*(f"sys.modules[{name!r}] = None" for name in without), *(f"import twigvlm.{name}" for name in modules)]
    code = "\n".join(["import sys", *lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "import shop.shelf",
        "from shop.shelf import price",
        "from shop import shelf",
        "from . import shelf",
        "from .shelf import price",
        "def f():\n    from shop.shelf import price",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from shop.shelf import price",
    ],
)
def test_imports_of_every_form_are_found(tmp_path, text):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "shelf.py").write_text("import shop.till\n")
    (tmp_path / "shop" / "till.py").write_text(text)
    graph = import_graph(tmp_path)
    assert "shop.shelf" in graph["shop.till"]
    assert set(cycle_in(graph)) == {"shop.shelf", "shop.till"}
