"""Who imports whom, imports inside functions included: no circles."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("hope_kernels", "benchmarks", "tools")


def modules() -> dict[str, Path]:
    found = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def statements(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """All nodes of a module, but for what stands under ``if TYPE_CHECKING``."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse)
            continue
        yield node
        yield from statements(list(ast.iter_child_nodes(node)))


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a module imports: ``import a.b`` is a.b alone; ``from a import b`` is a.b where that is a
    module, else a."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return found & set(known)


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach one another, and modules that import themselves (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []
    found = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        open_.append(name)
        for other in sorted(edges[name]):
            if other not in number:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in open_:
                lowest[name] = min(lowest[name], number[other])
        if lowest[name] == number[name]:
            at = open_.index(name)
            found.append(set(open_[at:]))
            del open_[at:]

    for name in sorted(edges):
        if name not in number:
            visit(name)
    return [members for members in found if len(members) > 1 or members <= edges[next(iter(members))]]


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, path, known) for name, path in known.items()}


def test_there_are_no_circles_of_imports():
    edges = graph()
    assert len(edges) > 120 and sum(map(len, edges.values())) > 300
    assert circles(edges) == []


def test_the_package_knows_nothing_of_benchmarks_and_tools():
    for name, others in graph().items():
        if name.startswith("hope_kernels"):
            assert all(other.startswith("hope_kernels") for other in others), name
        if name.startswith("tools"):
            assert not any(other.startswith("benchmarks") for other in others), name


def test_circles_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}, "f": {"a"}}
    assert circles(edges) == [{"a", "b", "c"}, {"e"}]


def test_imports_are_read(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nimport p.a\n"
        "if TYPE_CHECKING:\n    from p import hidden\n"
        "def f():\n    from ..p import b, name\n    from . import c\n"
    )
    known = dict.fromkeys(("p", "p.a", "p.b", "p.hidden", "q", "q.c", "q.m"), path)
    assert imported("q.m", path, known) == {"p", "p.a", "p.b", "q.c"}
