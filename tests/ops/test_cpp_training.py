"""What surrounds the memories, and CMS levels, under training on the C++ backend: values and gradients by every
input against PyTorch in fp64, with the error that PyTorch has in fp32; gradients of gradients; and who falls back."""

import pytest
import torch
from native_model import small
from numerics import within_yardstick

from hope_kernels import CMSConfig
from hope_kernels.layers.norm import rms_normed
from hope_kernels.ops.cms import cpp_training as cms
from hope_kernels.ops.cms import level
from hope_kernels.ops.cms.matrix import Matrix
from hope_kernels.ops.conv.cpp_training import causal_conv_training
from hope_kernels.ops.conv.forward import causal_conv_chunked
from hope_kernels.ops.output_gate.cpp_training import output_gate_training
from hope_kernels.ops.output_gate.forward import output_gate_chunked
from hope_kernels.ops.shared import cpu_library
from hope_kernels.ops.unit.cpp_training import unit_training
from hope_kernels.ops.unit.forward import l2norm

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def read_by(module, config, residual):
    def read(x, gain, up, down, *biases):
        tensors = {"norm_gain": gain, "up": Matrix.of(up), "down": Matrix.of(down)}
        tensors |= dict(zip(("up_bias", "down_bias"), biases))
        return module.level_forward(x, tensors, config, 1e-6, residual=residual, keep=False)[0],

    return read


def level_case(T: int, residual: bool, bias: bool):
    config = CMSConfig(16, (4,), expansion=1.5)
    biases = (randn(24), randn(16)) if bias else ()
    return (
        read_by(cms, config, residual), read_by(level, config, residual),
        (randn(3, T, 16), randn(16), randn(24, 16) / 4, randn(16, 24) / 5, *biases),
    )


def norm(backend):
    def read(x, weight):
        module = torch.nn.RMSNorm(16, eps=1e-5, dtype=x.dtype)
        module._parameters["weight"] = weight
        return rms_normed(module, x, backend),

    return read


def conv(function, *, lengths=None):
    return lambda x, tail, weight: function(x, tail, weight, lengths)


CASES = {
    "conv": lambda: (conv(causal_conv_training), conv(causal_conv_chunked),
                     (randn(2, 100, 16), randn(2, 3, 16), randn(16, 4))),
    "conv of fewer tokens than taps": lambda: (conv(causal_conv_training), conv(causal_conv_chunked),
                                               (randn(2, 2, 8), randn(2, 3, 8), randn(8, 4))),
    "conv of one tap": lambda: (conv(causal_conv_training), conv(causal_conv_chunked),
                                (randn(1, 5, 8), randn(1, 0, 8), randn(8, 1))),
    "conv with padding": lambda: (conv(causal_conv_training, lengths=[3, 5]), conv(causal_conv_chunked, lengths=[3, 5]),
                                  (randn(2, 5, 8), randn(2, 3, 8), randn(8, 4))),
    "gate": lambda: (lambda *t: (output_gate_training(*t),), lambda *t: (output_gate_chunked(*t),),
                     (3 * randn(2, 70, 3, 8), randn(3, 8), randn(2, 70, 24))),
    "gate without a norm": lambda: (lambda o, g: (output_gate_training(o, None, g),),
                                    lambda o, g: (output_gate_chunked(o, None, g),),
                                    (randn(1, 9, 2, 16), randn(1, 9, 32))),
    "norm without a gate": lambda: (lambda o, g: (output_gate_training(o, g, None),),
                                    lambda o, g: (output_gate_chunked(o, g, None),),
                                    (randn(1, 200, 2, 8), randn(2, 8))),
    "norm": lambda: (norm("cpp"), norm("chunked"), (randn(2, 70, 16), randn(16))),
    "unit": lambda: (lambda t: (unit_training(t),), lambda t: (l2norm(t),), (randn(2, 5, 3, 8),)),
    "level": lambda: level_case(130, True, False),
    "level without its residual": lambda: level_case(3, False, False),
    "level with biases": lambda: level_case(70, True, True),
}


def passed(function, tensors, errors, wanted, dtype=torch.float32):
    held = [t.to(dtype).requires_grad_(w) for t, w in zip(tensors, wanted)]
    results = function(*held)
    sources = [t for t, w in zip(held, wanted) if w]
    pairs = [(y, e.to(dtype)) for y, e in zip(results, errors) if e is not None and y.requires_grad]
    found = torch.autograd.grad([y for y, _ in pairs], sources, [e for _, e in pairs], allow_unused=True)
    depends = [torch.tensor(float(y.requires_grad), dtype=dtype) for y in results]
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(sources, found)]
    return [*(y.detach() for y in results), *depends, *grads]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    torch.manual_seed(0)
    ours, chunked, tensors = CASES[name]()
    shapes = [y.shape for y in chunked(*tensors)]
    every = [True] * len(tensors)
    some = [[i == j for j in range(len(tensors))] for i in range(len(tensors))]
    for wanted in (every, *some, [True, False, *every[2:]]):
        wanted = wanted[:len(tensors)]
        for errors in ([randn(*s) for s in shapes], [randn(*shapes[0]), *[None] * (len(shapes) - 1)]):
            exact = passed(chunked, tensors, errors, wanted, torch.float64)
            found, peer = passed(ours, tensors, errors, wanted), passed(chunked, tensors, errors, wanted)
            for i, (a, b, c) in enumerate(zip(found, peer, exact, strict=True)):
                within_yardstick(a, b, c, f"{name} {wanted} {i}")


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_gradients(name):
    torch.manual_seed(1)
    ours, chunked, tensors = CASES[name]()

    def twice(function, dtype):
        held = [t.to(dtype).requires_grad_() for t in tensors]
        y = function(*held)[0]
        first = torch.autograd.grad(y.square().sum(), held, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), held)

    exact = twice(chunked, torch.float64)
    for a, b, c in zip(twice(ours, torch.float32), twice(chunked, torch.float32), exact, strict=True):
        within_yardstick(a, b, c, name, b.double())


def test_threads_change_no_bit():
    torch.manual_seed(2)
    for name in ("conv", "gate", "norm without a gate", "norm"):
        ours, _, tensors = CASES[name]()
        tensors = tuple(t.repeat(8, *[1] * (t.dim() - 1)) if t.dim() > 2 else t for t in tensors)
        errors, found, before = None, [], torch.get_num_threads()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            errors = errors or [randn(*y.shape) for y in ours(*(t.float() for t in tensors))]
            found.append(passed(ours, tensors, errors, [True] * len(tensors)))
        torch.set_num_threads(before)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True)), name


def test_what_rows_have_learned_is_read_in_pytorch():
    torch.manual_seed(3)
    config = CMSConfig(8, (4,), expansion=1.0)
    own = Matrix(None, torch.randn(2, 8, 8), (True, True))
    tensors = {"norm_gain": torch.ones(8, requires_grad=True), "up": own, "down": Matrix.of(torch.randn(8, 8))}
    x = torch.randn(2, 3, 8)
    ours, theirs = (m.level_forward(x, tensors, config, 1e-6, residual=True, keep=False)[0] for m in (cms, level))
    assert torch.equal(ours, theirs)


def test_gradients_of_modules_that_stand_twice_can_be_differentiated_again():
    """A tensor of one call may have been made of another one's: that way is counted once."""
    for share in ("norm", "cms"):
        model = small(d=16)
        setattr(model.blocks[1], share, getattr(model.blocks[0], share))
        text = torch.randint(0, 40, (2, 20))
        found = []
        for backend, again in ((None, False), (None, True), ("chunked", True)):
            logits, _ = model(text, backend=backend)
            loss = logits.logsumexp(-1).square().mean()
            of = list(getattr(model.blocks[0], share).parameters())
            found.append(torch.autograd.grad(loss, of, create_graph=again))
        for plain, again, chunked in zip(*found):
            torch.testing.assert_close(again, chunked, rtol=1e-3, atol=1e-5 * float(chunked.detach().abs().max()))
            torch.testing.assert_close(plain, chunked, rtol=1e-3, atol=1e-5 * float(chunked.detach().abs().max()))
