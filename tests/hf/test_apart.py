"""Nothing of the package uses hope_kernels.hf, and so transformers is imported only by whoever imports that."""

import ast
import subprocess
import sys
from pathlib import Path

import hope_kernels as hk

ROOT = Path(hk.__file__).parent


def test_nobody_imports_it():
    for file in ROOT.rglob("*.py"):
        if ROOT / "hf" in file.parents or file.name == "modeling_hope.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            assert module.split(".")[0] != "hf" and not module.startswith("hope_kernels.hf"), file
            assert not any(n == "hf" or n.startswith("hope_kernels.hf") for n in names), file


def test_without_transformers_it_says_what_is_missing():
    program = """
import sys
sys.modules["transformers"] = None
try:
    import hope_kernels.hf
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'hope_kernels[hf]'" in done.stdout
