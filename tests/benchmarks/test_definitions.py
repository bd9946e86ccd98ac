"""The hash of what a function reaches: which changes of a small package it sees, and which it does not."""

from pathlib import Path

import pytest

from benchmarks import native
from benchmarks.definitions import Outside, Ref, Tree

FILES = {
    "__init__": "from .a import start\n",
    "a": '''"""A docstring."""
import torch.nn.functional as F
from . import b
from .b import Shape, scale as enlarged

LIMIT = 3
PATH = __file__ + "/data"


def start(x: int) -> int:
    """Says what it does."""
    from .c import even

    return b.shift(F.relu(x)) + enlarged(x) + LIMIT + even(x) + len(PATH)


def other(x):
    return Shape(x).area()
''',
    "b": '''
import torch


def shift(x, step=1):
    return torch.ops.hope_kernels.moved(x, step)


def scale(x):
    return [x * 2 for x in (x,)][0]


class Shape:
    side: int = 0

    def area(self):
        shift = self.side
        return shift * 2
''',
    "c": '''
import torch

from .a import LIMIT as bound


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and n < bound and even(n - 1)


library = torch.library.Library("hope_kernels", "FRAGMENT")
library.define("moved(Tensor x, int step) -> Tensor")


def implementation(x, step):
    return x + step


library.impl("moved", implementation, "CPU")


@torch.library.register_fake("hope_kernels::moved")
def _(x, step):
    return x


def unused():
    return 0
''',
}


def tree(root: Path, **changes: str) -> Tree:
    """The package with files replaced; "" leaves one out."""
    folder = root / f"{len(list(root.iterdir()))}" / "hope_kernels"
    folder.mkdir(parents=True)
    for name, text in (FILES | changes).items():
        if text:
            (folder / f"{name}.py").write_text(text)
    return Tree(folder.parent)


def changed(name: str, old: str, new: str) -> dict[str, str]:
    assert old in FILES[name]
    return {name: FILES[name].replace(old, new)}


@pytest.fixture
def before(tmp_path):
    return tree(tmp_path).hashes(["a:start"])


def test_what_is_reached(tmp_path):
    reached = tree(tmp_path).reached(["a:start"])
    names = {(r.module.removeprefix("hope_kernels."), r.name) for r in reached if not r.name.startswith("!")}
    assert names == {
        ("a", "start"), ("a", "LIMIT"), ("a", "PATH"), ("b", "shift"), ("b", "scale"), ("c", "even"),
        ("c", "odd"), ("c", "library"), ("c", "implementation"), ("torch.ops", "moved")}
    assert len([r for r in reached if r.name.startswith("!")]) == 3  # define, impl, register_fake
    assert len(tree(tmp_path).reached(["a:start"], cut=("*.c",))) == 6


@pytest.mark.parametrize("name, old, new", [
    ("a", "LIMIT = 3", "LIMIT = 4"), ("a", "F.relu", "F.gelu"), ("a", "+ LIMIT", "- LIMIT"),
    ("a", "b.shift(", "b.scale("), ("b", "step=1", "step=2"), ("b", "x * 2 for", "x * 3 for"),
    ("c", "n - 1)\n\n\ndef odd", "n - 3)\n\n\ndef odd"), ("c", "n < bound", "n <= bound"),
    ("c", "return x + step", "return x - step"), ("c", '"CPU"', '"CUDA"'),
    ("c", "    return x\n", "    return x + 0\n"),
])
def test_a_change_of_what_is_reached_is_seen(tmp_path, before, name, old, new):
    assert tree(tmp_path, **changed(name, old, new)).hashes(["a:start"]) != before


@pytest.mark.parametrize("name, old, new", [
    ("a", "Says what it does.", "Says more."), ("a", "x: int) -> int", "x: float) -> float"),
    ("a", "LIMIT = 3", "# a remark\n\nLIMIT  =  3"),
    ("a", "import torch.nn.functional as F", "from torch.nn import functional as F"),
    ("a", "Shape(x)", "Shape(-x)"), ("a", '+ "/data"', '+ "/../data"'), ("c", "return 0", "return 1"),
    ("b", "side: int = 0", "side: float = 1"),
])
def test_what_is_not_reached_or_says_nothing_is_not_seen(tmp_path, before, name, old, new):
    assert tree(tmp_path, **changed(name, old, new)).hashes(["a:start"]) == before


def test_moved_renamed_and_merged_definitions_are_the_same(tmp_path, before):
    other = "from .d import LIMIT"
    moved = {name: text.replace("from .a import LIMIT", other) for name, text in FILES.items()}
    a = FILES["a"].replace("LIMIT = 3\n", "").replace("from . import b\n", f"from . import b\n{other}\n")
    assert tree(tmp_path, **moved | {"a": a, "d": "LIMIT = 3\n"}).hashes(["a:start"]) == before
    renamed = {}
    for name, text in FILES.items():
        text = text.replace("odd", "uneven").replace("scale as", "magnify as")
        renamed[name] = text.replace("def scale", "def magnify")
    assert tree(tmp_path, **renamed).hashes(["a:start"]) == before
    copied = FILES["a"] + "\n\ndef scale(x):\n    return [x * 2 for x in (x,)][0]\n"
    copied = copied.replace(", scale as enlarged", "").replace("enlarged(", "scale(")
    assert tree(tmp_path, a=copied).hashes(["a:start"]) == before
    assert tree(tmp_path).entry(":start") == Ref("hope_kernels.a", "start")


def test_a_class_counts_as_a_whole_and_locals_hide_what_they_are_called_as(tmp_path):
    found = tree(tmp_path)
    assert found.reached(["a:other"]) == {Ref("hope_kernels.a", "other"), Ref("hope_kernels.b", "Shape")}
    changes = changed("b", "shift * 2", "shift * 3")
    assert tree(tmp_path, **changes).hashes(["a:other"]) != found.hashes(["a:other"])
    assert found.find("torch", "nn") == Outside("torch.nn")


def test_an_entry_point_that_is_not_there_is_named(tmp_path):
    for entry in ("a:nothing", "nowhere:start"):
        with pytest.raises(LookupError, match=entry):
            tree(tmp_path).hashes([entry])
    with pytest.raises(LookupError, match="csrc/none"):
        native.hashes(["csrc/none*.cpp"], tmp_path)


def test_tokens_of_c_files(tmp_path):
    def written(folder: str, **files: str) -> set[str]:
        for name, text in files.items():
            path = tmp_path / folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return native.hashes(["main.cpp"], tmp_path / folder)

    header, source = "#pragma once\nint twice(int);\n", 'int twice(int x) { return x << 1; }  // "two"\n'
    main = '#include "h.h"\n#define N 2\nint main() { return twice(N) - \'/\'; }\n'
    found = written("first", main_cpp=main, h_h=header, h_cpp=source)
    assert len(found) == 3  # with the source beside the header
    spaced = main.replace(" {", "\n{ /* a\nremark */").replace('"h.h"', '"in/k.h" // moved')
    remarked = "\n" + source.replace("two", "2")
    assert written("second", main_cpp=spaced, in__k_h=header, in__k_cpp=remarked) == found
    changes = ("main_cpp", "N 2", "N 3"), ("h_cpp", "x << 1", "x < < 1"), ("main_cpp", "2\n", "2 ")
    for name, old, new in changes:
        files = {"main_cpp": main, "h_h": header, "h_cpp": source}
        assert written(f"other {name} {new!r}", **files | {name: files[name].replace(old, new)}) != found
    (tmp_path / "first" / "emulator").mkdir()
    assert written("first", main_cpp='#include "emulator/e.h"\n' + main, emulator__e_h="int e;\n") == found
