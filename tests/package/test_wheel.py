"""What an installation consists of: the wheel's tag, its files and metadata, and that nothing warns."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "hope_kernels", "csrc", "tools")
# instead of the C++ code, which would take long to compile: how it is compiled is what is tested here
STUB = """
#include <omp.h>
extern "C" int hope_threads() {
  int n = 0;
#pragma omp parallel num_threads(2)
#pragma omp atomic
  n += 1;
  return n;
}
"""
LOAD = "import ctypes, sys, torch; print(ctypes.CDLL(sys.argv[1]).hope_threads())"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("sources")
    left_out = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, copy / name)
    for path in (copy / "csrc/cpu").iterdir():
        path.unlink()
    (copy / "csrc/cpu/stub.cpp").write_text(STUB)
    return copy


def build(sources: Path, cpu: str) -> tuple[Path, str]:
    """The wheel, and what its building printed."""
    out = sources / "dist" / cpu
    code = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"
    environment = os.environ | {"HOPE_KERNELS_CPU": cpu, "HOPE_KERNELS_CUDA": "0"}
    out.mkdir(parents=True)
    done = subprocess.run((sys.executable, "-c", code), cwd=sources, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not done.returncode, done.stdout
    return next(out.glob("*.whl")), done.stdout


@pytest.fixture(scope="module")
def plain(sources) -> tuple[Path, str]:
    return build(sources, "0")


@pytest.fixture(scope="module")
def metadata(plain) -> Message:
    with zipfile.ZipFile(plain[0]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(wheel.read(name))


def test_without_a_compiled_library_one_wheel_serves_every_machine(plain):
    assert plain[0].name.endswith("-py3-none-any.whl")


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(plain):
    with zipfile.ZipFile(plain[0]) as wheel:
        packed = {n for n in wheel.namelist() if ".dist-info/" not in n}
    listed = subprocess.run(("git", "ls-files", "hope_kernels"), cwd=ROOT, capture_output=True, text=True)
    # README files explain the code beside them to those who read the repository
    expected = {n for n in listed.stdout.split() if n.endswith((".py", ".typed", ".html")) or "/assets/" in n}
    if not expected:
        pytest.skip("not in a git repository")
    assert {"hope_kernels/py.typed", "hope_kernels/assets/hope-byte/model.safetensors"} < expected
    assert packed == expected


def test_building_warns_of_nothing(plain):
    lines = [line for line in plain[1].splitlines() if "warning" in line.lower() and "byte-compiling" not in line]
    assert not lines, plain[1]


def test_the_metadata_says_what_it_is_and_who_explains_it(metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert metadata["License-Expression"] == "MIT" and metadata["Requires-Python"] == ">=3.11"
    assert [url.split(", ")[1] for url in metadata.get_all("Project-URL")] == [
        "https://arxiv.org/abs/2512.24695", "https://arxiv.org/abs/2501.00663"
    ]


def test_all_asks_for_every_extra_but_that_of_the_tests(metadata):
    extras = set(metadata.get_all("Provides-Extra"))
    assert {"hf", "serve", "ray", "llama", "all"} < extras
    (everything,) = (r for r in metadata.get_all("Requires-Dist") if r.endswith('extra == "all"'))
    named = everything.partition("[")[2].partition("]")[0]
    assert set(named.split(",")) == extras - {"all", "test"}


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="has no C++ library")
def test_the_library_asks_for_a_platform_for_no_python_and_takes_the_openmp_of_pytorch(sources):
    if not shutil.which(os.environ.get("CXX", "g++").split()[0]):
        pytest.skip("no C++ compiler")
    wheel, said = build(sources, "1")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl"), said
    with zipfile.ZipFile(wheel) as packed:
        library = packed.extract("hope_kernels/_titans_cpu.so", sources)
    assert b"libgomp" not in Path(library).read_bytes()  # nor in its list of needed libraries
    done = subprocess.run((sys.executable, "-c", LOAD, library), capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr
