"""Which code a measured case depends on: nothing that is measured is missed, moving files makes nothing old,
and changing what several cases share makes exactly those older."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import native, records, sources
from benchmarks.definitions import Tree
from benchmarks.plan import plan

CASES = {
    "titans chunked": {"kind": "prefill", "backend": "chunked"},
    "titans cpp": {"kind": "prefill", "backend": "cpp"},
    "titans cuda": {"kind": "prefill", "backend": "cuda"},
    "titans triton": {"kind": "step", "backend": "triton"},
    "gradient triton": {"kind": "grad", "backend": "triton"},
    "layer chunked": {"kind": "layer", "backend": "chunked"},
    "layer cpp": {"kind": "layer", "backend": "cpp"},
    "layer triton": {"kind": "layer", "backend": "triton"},
    "conv triton": {"kind": "conv", "backend": "triton"},
    "gate chunked": {"kind": "gate", "backend": "chunked"},
    "cms on a CPU": {"kind": "forward", "backend": None, "device": "cpu"},
    "cms triton": {"kind": "refresh", "backend": "triton", "device": "cuda"},
    "attention": {"kind": "attention", "backend": None, "device": "cpu"},
    "model on a CPU": {"kind": "model", "backend": None, "device": "cpu"},
    "model on a GPU": {"kind": "model", "backend": None, "device": "cuda"},
}


def hashes(root: Path) -> dict[str, str | None]:
    return {name: sources.kernel_hash(case, root) for name, case in CASES.items()}


def differing(root: Path) -> set[str]:
    present = hashes(sources.ROOT)
    return {name for name, found in hashes(root).items() if found != present[name]}


@pytest.fixture
def copy(tmp_path):
    """The code without the rest of the repository."""
    for folder in ("hope_kernels", "csrc", "tools"):
        left_out = shutil.ignore_patterns("assets", "*.so", "__pycache__")
        shutil.copytree(sources.ROOT / folder, tmp_path / folder, ignore=left_out)
    shutil.copy(sources.ROOT / "setup.py", tmp_path / "setup.py")
    return tmp_path


def file_of(function: str, root: Path) -> Path:
    """The file of the package that defines a function; "name(first" tells equal names apart."""
    start = re.compile("^def " + re.escape(function if "(" in function else f"{function}("), re.M)
    (found,) = (p for p in (root / "hope_kernels").rglob("*.py") if start.search(p.read_text()))
    return found


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def made_absolute(text: str, package: tuple[str, ...]) -> str:
    """A module with ``from ..a import b`` written as ``from hope_kernels.a import b``."""
    def full(match: re.Match) -> str:
        base = package[: len(package) + 1 - len(match[2])]
        return f"{match[1]}from {'.'.join([*base, *filter(None, [match[3]])])} import "

    return re.sub(r"^( *)from (\.+)([\w.]*) import ", full, text, flags=re.M)


def redirected(text: str, was: str, now: str) -> str:
    """A module whose imports of one module go to another, both by their full names."""
    (parent, name), (new_parent, new_name) = was.rsplit(".", 1), now.rsplit(".", 1)
    text = re.sub(rf"^( *)from {re.escape(was)} import ", rf"\1from {now} import ", text, flags=re.M)
    alone = rf"^( *)from {re.escape(parent)} import {name}( as (\w+))?$"
    other = lambda m: f"{m[1]}from {new_parent} import {new_name} as {m[3] or name}"
    return re.sub(alone, other, text, flags=re.M)


def move(old: Path, new: Path, root: Path) -> None:
    """A module of the package goes to another path, and all imports follow it."""
    package = root / "hope_kernels"
    for path in package.rglob("*.py"):
        path.write_text(made_absolute(path.read_text(), path.relative_to(root).parent.parts))
    new.parent.mkdir(parents=True, exist_ok=True)
    old.rename(new)
    for path in package.rglob("*.py"):
        path.write_text(redirected(path.read_text(), dotted(old, root), dotted(new, root)))


@pytest.mark.parametrize("function, place", [
    ("l2norm", "ops/shared/vectors.py"), ("aligned", "tensors.py"),
    ("sigma(z, ACT", "ops/shared/deep/activations.py"),
])
def test_moving_a_module_makes_nothing_old(copy, function, place):
    path = file_of(function, copy)
    move(path, copy / "hope_kernels" / place, copy)
    assert not path.exists() and differing(copy) == set()


def test_moving_and_commenting_c_files_makes_nothing_old(copy):
    cpu = copy / "csrc" / "cpu"
    (cpu / "lanes").mkdir()
    (cpu / "vec_x86.h").rename(cpu / "lanes" / "avx.h")
    for path in cpu.glob("*.*"):
        text = path.read_text().replace('"vec_x86.h"', '"lanes/avx.h"  // eight at a time')
        path.write_text("// a remark\n\n" + text)
    assert differing(copy) == set()


TRITON_MEMORIES = {"titans triton", "gradient triton", "layer triton", "model on a GPU"}
GPU_MODEL = {"model on a GPU"}
CPU_TITANS = {"titans cpp", "layer cpp", "model on a CPU", *GPU_MODEL}


@pytest.mark.parametrize("function, old, new, changed", [
    # shared by the memories and the levels
    ("sigma(z, ACT", "    return ", "    return 1.0 * ", {*TRITON_MEMORIES, "cms triton"}),
    ("l2norm", "    return ", "    return 1.0 * ", {
        "titans chunked", "layer chunked", "gradient triton", "model on a CPU", *GPU_MODEL}),
    ("causal_conv_kernel", "tl.where(", "tl.where(True & ", {"conv triton", "layer triton", *GPU_MODEL}),
    ("project", "    return ", "    return 1.0 * ", {
        "layer chunked", "layer cpp", "layer triton", "attention", "model on a CPU", *GPU_MODEL}),
])
def test_changing_a_shared_function_makes_older_what_uses_it(copy, function, old, new, changed):
    path = file_of(function, copy)
    text = path.read_text()
    at = text.index(f"def {function}")
    assert old in text[at:]
    path.write_text(text[:at] + text[at:].replace(old, new, 1))
    assert differing(copy) == changed


@pytest.mark.parametrize("file, changed", [
    ("csrc/cpu/titans.cpp", CPU_TITANS), ("csrc/cpu/cms.cpp", {"cms on a CPU", "model on a CPU", *GPU_MODEL}),
    ("csrc/cpu/layer.cpp", {"layer cpp", "model on a CPU", *GPU_MODEL}),
    ("csrc/cpu/vec.h", {*CPU_TITANS, "cms on a CPU", "attention"}),
    ("csrc/cpu/attention.cpp", {"attention", "model on a CPU", *GPU_MODEL}),
])
def test_changing_c_code_makes_older_what_uses_it(copy, file, changed):
    path = copy / file
    path.write_text(path.read_text() + "\nint more;\n")
    assert differing(copy) == changed


def test_changing_a_message_of_a_check_makes_nothing_old(copy):
    path = file_of("check_tensor", copy)
    path.write_text(path.read_text() + "\nMORE = 1\n")
    edit(path, "def check_tensor(", "def check_nothing():\n    pass\n\n\ndef check_tensor(")
    assert differing(copy) == set()


# -- what is measured is reached -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    """Every code that a run measures, on either device."""
    found = {sources.code(case | {"device": device}) for device in ("cuda", "cpu") for quick in (False, True)
             for _, _, case, _ in plan(device, quick) if case}
    return found - {None}


def test_every_case_is_known(measured):
    assert len(measured) > 20 and sources.EVERYTHING not in measured
    assert sources.code({"kind": "not known"}) == sources.EVERYTHING
    assert sources.kernel_hash({"kind": "not known"}) and sources.kernel_hash({"kind": "fla"}) is None
    backends = {sources.kernel_hash({"kind": "prefill", "backend": b}) for b in sources.TITANS}
    assert len(backends) == len(sources.TITANS)


def test_every_kernel_is_reached(measured):
    tree = Tree(sources.ROOT)
    reached = set().union(*(tree.reached(c.names, c.cut) for c in measured))
    of_triton = lambda s: any("jit" in ast.unparse(d) for d in s.decorator_list)
    is_kernel = lambda s: isinstance(s, ast.FunctionDef) and of_triton(s)
    kernels = [(module, name) for module in tree.names
               for name, found in tree.module(module).definitions.items() if any(map(is_kernel, found))]
    assert len(kernels) > 50 and set(kernels) <= reached
    files = set().union(*(native.reached(c.files, sources.ROOT) for c in measured if c.files))
    code = {p for end in ("cpp", "cu", "h", "cuh") for p in sources.ROOT.glob(f"csrc/c*/**/*.{end}")}
    assert code == files


def test_a_case_does_not_depend_on_other_backends():
    tree = Tree(sources.ROOT)

    def modules(name: str) -> str:
        found = sources.code(CASES[name])
        return " ".join(sorted({ref.module for ref in tree.reached(found.names, found.cut)}))

    assert "triton" not in modules("layer cpp") and "cuda" not in modules("layer cpp")
    assert ".cpp" not in modules("layer chunked") and "triton" not in modules("layer chunked")
    assert "triton" not in modules("model on a CPU") and "cuda" not in modules("model on a CPU")
    assert "backward" not in modules("titans triton") and "backward" in modules("gradient triton")


# -- committed results ---------------------------------------------------------------------------------------


def test_committed_results_say_which_code_they_measured():
    for run in records.runs(records.RESULTS).values():
        for stem, data in run.items():
            for _, record in () if stem in ("env", "correctness") else records.measured(data):
                if "kernel" not in record:
                    # verified.json says it of every kernel, by hashes of its own
                    assert stem == "verified" or sources.age(record) == ""
                    continue
                assert re.fullmatch("[0-9a-f]{16}", record["kernel"]), stem
                assert sources.age(record) in ("current", "older")
                json.dumps(record.get("kernel_of") or record["case"])
