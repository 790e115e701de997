"""Imports of the library follow its flow, and no module is too long to be read at one sitting."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "xent_metrics"
# A module or folder of the library imports those before it, and its own siblings.
LAYERS = (
    "distributed", "_compat", "_runtime", "_validate", "_rounding", "_student", "losses", "tally", "_intervals",
    "reading_info", "readings", "metrics", "functional", "_tokenizers", "token_bytes", "token_windows", "packing",
    "tags", "page", "validation_stats", "pictures", "summary", "tensorboard", "lightning",
)  # fmt: skip
LONGEST, LONGEST_MEDIAN = 450, 270


def modules_of(root: Path, library: str = LIBRARY) -> dict[str, Path]:
    """Return the file of each module, by its dotted name."""
    names = {}
    for path in sorted((root / library).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def runs(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every node that may run, functions included, what only type checkers read excluded."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = iter(node.orelse)
    else:
        yield node
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from runs(child)


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Return the modules of the library that a module imports, at its top or in a function."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in runs(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            # What is imported from a package may be a module of it.
            found.update(x if (x := f"{source}.{alias.name}") in modules else source for alias in node.names)
    return (found & set(modules)) - {name}


def graph_of(root: Path, library: str = LIBRARY) -> dict[str, set[str]]:
    """Return what each module imports."""
    modules = modules_of(root, library)
    return {name: imports_of(name, path, modules) for name, path in modules.items()}


def layer_of(name: str) -> str:
    """Return the layer that a module belongs to; empty for the library's own `__init__`."""
    return name.split(".")[1] if "." in name else ""


def against_the_flow(graph: dict[str, set[str]], layers: tuple[str, ...] = LAYERS) -> list[str]:
    """Return what is wrong: a module of no layer, or one that imports a later layer or the library as a whole."""
    wrong = [f"{name} is in no layer" for name in graph if layer_of(name) and layer_of(name) not in layers]
    for name, imported in graph.items():
        for other in imported if layer_of(name) else ():
            ranks = [layers.index(x) if x in layers else -1 for x in (layer_of(name), layer_of(other))]
            if not layer_of(other) or ranks[1] > ranks[0]:
                wrong.append(f"{name} imports {other}")
    return sorted(wrong)


def cycle_of(graph: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, if there are such."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Each can be understood after those that it imports."""
    assert cycle_of(graph_of(ROOT)) == []


def test_no_module_imports_a_later_layer() -> None:
    """Imports go one way, from what a model returns to what is shown of it, in functions too."""
    assert against_the_flow(graph_of(ROOT)) == []


def test_modules_are_short() -> None:
    """None is longer than can be read at one sitting, and most are much shorter."""
    lines = {name: len(path.read_text().splitlines()) for name, path in modules_of(ROOT).items()}
    assert {name: length for name, length in lines.items() if length > LONGEST} == {}
    assert statistics.median(n for name, n in lines.items() if modules_of(ROOT)[name].name != "__init__.py") <= (
        LONGEST_MEDIAN
    )


def test_an_import_brings_nothing_beside_torch_and_torchmetrics() -> None:
    """Each stage adds one dependency: metrics need torch and torchmetrics only, and without `"compile"` no compiler."""
    code = """
import sys, torchmetrics
before = set(sys.modules)
import torch
from xent_metrics import BinaryCrossEntropy, CrossEntropy
known = {"xent_metrics", *sys.stdlib_module_names}
print([m for m in {*sys.modules} - before if m.split(".")[0] not in known])
for backend in ("auto", "eager"):
    for target in (torch.zeros(300, dtype=torch.int64), torch.full((300, 5000), 1 / 5000)):
        metric = CrossEntropy(backend=backend)
        metric.update(torch.randn(300, 5000), target)
        metric.compute()
    BinaryCrossEntropy(backend=backend).update(torch.randn(300), torch.ones(300))
print([m for m in ("torch._dynamo", "torch._inductor") if m in sys.modules])
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.split() == ["[]", "[]"]


# The checks are checked, on small libraries.


def write(root: Path, files: dict[str, str]) -> dict[str, set[str]]:
    """Write the modules of a library named `lib`, and return what they import."""
    for name, source in {"__init__": "", **files}.items():
        path = root / "lib" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return graph_of(root, "lib")


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("from lib import a", {"lib.a"}),
        ("from lib import name", {"lib"}),
        ("from lib.a import name", {"lib.a"}),
        ("import lib.a as other", {"lib.a"}),
        ("from lib.b.c import name", {"lib.b.c"}),
        ("from lib.b import c, name", {"lib.b.c", "lib.b"}),
        ("from . import c", {"lib.b.c"}),
        ("from .c import name", {"lib.b.c"}),
        ("from ..a import name", {"lib.a"}),
        ("from .. import a", {"lib.a"}),
        ("def f():\n    from lib import a", {"lib.a"}),
        ("try:\n    import lib.a\nexcept ImportError:\n    pass", {"lib.a"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lib import a", set()),
        ("import typing\nif typing.TYPE_CHECKING:\n    pass\nelse:\n    from lib import a", {"lib.a"}),
        ("import torch, library.a", set()),
    ],
)
def test_every_form_of_import_is_seen(source: str, imported: set[str], tmp_path: Path) -> None:
    """Absolute and relative ones, of modules and of their names, in functions; none that only type checkers read."""
    graph = write(tmp_path, {"a": "", "b/__init__": "", "b/c": "", "b/d": source})
    assert graph["lib.b.d"] == imported


def test_a_circle_is_found() -> None:
    """Also where it goes through a third module, or a function; a diamond is none."""
    assert set(cycle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})) == {"a", "b", "c"}
    assert cycle_of({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def test_an_import_against_the_flow_is_found(tmp_path: Path) -> None:
    """A later layer, the library as a whole, and a module of no layer are wrong; siblings are not."""
    graph = write(
        tmp_path,
        {
            "__init__": "from lib import a, z",
            "a": "def f():\n    from lib.b import c",
            "b/__init__": "",
            "b/c": "from lib import a\nfrom lib.b import d",
            "b/d": "import lib",
            "z": "",
        },
    )
    wrong = ["lib.a imports lib.b.c", "lib.b.d imports lib", "lib.z is in no layer"]
    assert against_the_flow(graph, ("a", "b")) == wrong
