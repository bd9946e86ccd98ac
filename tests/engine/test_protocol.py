"""The engine knows models by ``engine/protocol.py`` alone, and its files know each other by public names."""

import ast
from pathlib import Path

import pytest

import hope_kernels
from hope_kernels.engine.protocol import Model

FILES = sorted((Path(hope_kernels.__file__).parent / "engine").glob("*.py"))


def imported(tree: ast.Module) -> list[tuple[str, str]]:
    """(module, name) of everything that a file takes from its own package."""
    return [(node.module or "", alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
            and node.level for alias in node.names]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_engine_imports_no_model_and_no_private_name(file):
    tree = ast.parse(file.read_text())
    found = imported(tree)
    assert not [f for f in found if "model" in (f[0], f[1])]
    assert not [f for f in found if f[1].startswith("_")]
    modules = {name for _, name in found}
    private = [
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
        and n.value.id in modules and n.attr.startswith("_")
    ]
    assert not private


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_parameter_of_the_engine_has_a_type(file):
    bare = [
        f"{f.name}({a.arg})" for f in ast.walk(ast.parse(file.read_text())) if isinstance(f, ast.FunctionDef)
        for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.annotation is None
        and a.arg != "self"
    ]
    assert not bare


def test_the_model_has_what_the_protocol_asks_for():
    names = {n for n in vars(Model) if not n.startswith("_")}
    assert len(names) > 9
    model = hope_kernels.HopeForCausalLM(hope_kernels.HopeConfig(8, 4, 1))
    assert not [n for n in names if not hasattr(model, n)]
