"""The choice among backends: by what entries say of themselves, and of no operator by name."""

import ast
import inspect
import re

import pytest
import torch

from hope_kernels import available_backends, backend
from hope_kernels.backend import BY_ALL, BY_INPUTS, NO_GRADIENT, Entry, Request, choose, gradient, names

REQUEST = Request(None, torch.float32, torch.device("cpu"), NO_GRADIENT)


def entries(why: str | None = None, missing: str | None = None):
    return (
        Entry("cpp", lambda request: "cpp", lambda request: why, lambda: missing, default=True),
        Entry("triton", lambda request: "triton", serves=("cuda",)),
        Entry("chunked", lambda request: "chunked", default=True, serves=("*",)),
    )


def test_the_first_that_may_be_chosen_and_serves():
    assert choose("op", entries(), REQUEST) == choose("op", entries(), REQUEST, "cpp") == "cpp"
    for others in (entries("too wide"), entries(missing="not built")):
        assert choose("op", others, REQUEST) == "chunked"
    assert choose("op", entries(), REQUEST, "triton") == choose("op", entries(), REQUEST, "cuda") == "triton"
    assert choose("op", entries(), REQUEST, "reference") == "chunked"
    assert choose("op", entries("too wide"), REQUEST, "cpp") == "chunked"  # it stands in for all


@pytest.mark.parametrize(
    "why, missing, reason", [("too wide", None, "too wide"), ("too wide", "not built", "not built")]
)
def test_an_explicit_choice_is_never_replaced_by_another(why, missing, reason):
    with pytest.raises(ValueError, match=f"op: backend 'cpp' cannot be used: {reason}; the chunked backend"):
        choose("op", entries(why, missing)[:2], REQUEST, "cpp")
    with pytest.raises(ValueError, match="no such operator"):
        choose("op", entries()[:2], REQUEST, "reference")


def test_unknown_names_are_refused_with_the_known_ones():
    known = ("reference", "cpp", "chunked", "triton", "cuda")
    with pytest.raises(ValueError, match=f"op: unknown backend 'mps', expected one of {re.escape(str(known))}"):
        choose("op", entries(), REQUEST, "mps")
    assert names() == tuple(available_backends()) == known


def test_a_reason_is_not_asked_for_where_the_process_cannot_use_the_backend():
    def fails(request):
        raise AssertionError("a library that is not there was asked")

    found = (Entry("cuda", fails, fails, lambda: "needs a CUDA device", default=True), entries()[2])
    assert choose("op", found, REQUEST) == "chunked"


def test_gradients_follow_the_mode():
    assert gradient(False) == BY_ALL and gradient(True) == BY_INPUTS
    with torch.no_grad():
        assert gradient(False) == gradient(True) == NO_GRADIENT


def test_it_knows_no_operator_by_name():
    """Adding an operator or a backend edits its own folder: no name of one is in the code that chooses."""
    tree = ast.parse(inspect.getsource(backend))
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    code = [t for t in texts if "\n" not in t and len(t.split()) == 1]
    assert not {"titans", "cms", "conv", "output_gate", "unit", "cpp", "triton", "cuda", "reference"} & set(code)
