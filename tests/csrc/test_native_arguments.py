"""Arguments that would make the C++ library read or write past an end are refused, by Python where it hands
tensors over and once more by the library itself; and the activations at every size of their argument."""

import ctypes
from dataclasses import replace

import pytest
import torch
from problems import part, problem, run, same, single

from hope_kernels import TitansConfig, identity
from hope_kernels.ops import TokenInputs
from hope_kernels.ops.cms import cpp as cms
from hope_kernels.ops.cms import cpp_gated
from hope_kernels.ops.cms import cpp_step as cms_step
from hope_kernels.ops.conv import cpp as conv_cpp
from hope_kernels.ops.conv import cpp_training as conv_training
from hope_kernels.ops.linear import cpp as linear_cpp
from hope_kernels.ops.output_gate import cpp as gate_cpp
from hope_kernels.ops.output_gate import cpp_training as gate_training
from hope_kernels.ops.shared import cpu_library
from hope_kernels.ops.shared.cpu_library import POINTER, REAL, SIZE
from hope_kernels.ops.titans import cpp, cpp_training
from hope_kernels.ops.titans.cpp import titans_cpp, titans_cpp_gradient
from hope_kernels.ops.titans.cpp_training import titans_cpp_training
from hope_kernels.ops.titans.state import FastWeights, init_titans_state
from hope_kernels.ops.unit import cpp as unit_cpp

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

BAD_ARGUMENT = 2  # csrc/cpu/check.h
CONFIGS = [
    TitansConfig(16, 2, chunk_memory=4, chunk_other=8), TitansConfig.preset("titans", d_model=16, momentum=None),
    TitansConfig(16, 2, momentum="learned", chunk_memory=4, chunk_other=8),
    TitansConfig(16, 2, memory="linear", momentum=0.5, chunk_memory=4, chunk_other=8),
    TitansConfig(16, 2, adaptive_q=True, chunk_memory=4, chunk_other=8),
    TitansConfig(16, 2, memory="linear", adaptive_q=True, chunk_memory=8, chunk_other=4),
]
NAMES = ["self-modifying", "static", "momentum", "linear", "adaptive", "linear adaptive"]
FAR, MOST = 2**62, 2**63 - 1
WRAPPING = (2**28, 2**28, 2**24)  # each may be an extent; their product is 2^80, and 0 in 64 bits
SIZES = {
    "B": (-1, FAR), "T": (-1, FAR), "H": (0, -1, FAR), "D": (0, -8, 12, FAR), "N": (0, -8, 12, FAR, MOST),
    "Mf": (0, 2, 3, 4, 5), "Ms": (-1, 3, 9),
    "chunk_memory": (0, -4, 3, 2**31, FAR), "chunk_other": (0, -8, 3, 2**31, FAR), "chunk": (0, -1, FAR),
    "kept": (-1, 0, 1, FAR), "kept_q": (-1, 0, 1, FAR),
    "threads": (0, -1, FAR), "activation": (-1, 3),
}


def wrong_calls(call):
    """Copies of a right call with one thing wrong. What it points to stays as it is, but for lengths and
    positions."""
    names = [name for name, _ in call._fields_]
    for name, values in SIZES.items():
        for value in values if name in names else ():
            given = not name.startswith("kept") or getattr(call, f"{name}2")
            if given and value != getattr(call, name):
                yield f"{name}={value}", {name: value}
    for name, kind in call._fields_:
        if kind is ctypes.c_void_p and getattr(call, name) and name not in (
            "eta_bias", "alpha_bias", "pending_alpha", "alpha", *(() if call.N else ("base2",))  # w2 may have none
        ):
            yield f"{name}=null", {name: None}
    for name, value in (("len", -1), ("len", call.T + 1), ("len", FAR), ("pos", -1), ("pos", 2**63 - 1)):
        rows = (ctypes.c_int64 * call.B)(*([0] * (call.B - 1)), value)
        yield f"{name}[-1]={value}", {name: ctypes.addressof(rows), "alive": rows}


class Refusing:
    """The library, which is given every wrong call before the right one."""

    def __init__(self, tried: list):
        self.tried = tried

    def __getattr__(self, function):
        real = getattr(cpu_library._library(), function)

        def call(reference):
            right = reference._obj
            for what, changes in wrong_calls(right):
                wrong = type(right).from_buffer_copy(right)
                for name, value in changes.items():
                    setattr(wrong, name, value)
                assert real(ctypes.byref(wrong)) == BAD_ARGUMENT, f"{function}: {what}"
                self.tried.append(what)
            assert real(None) == BAD_ARGUMENT
            return real(reference)

        return call


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_library_refuses_a_call_before_it_writes(config, gradient, monkeypatch):
    w_init, inputs = map(single, problem(config, 2, 20))
    _, state = run(config, w_init, part(inputs, 0, 5), "cpp")
    now, before, tried, found = part(inputs, 5, 20), state.clone(), [], []
    for library in (cpp.library, lambda: Refusing(tried)):
        monkeypatch.setattr(cpp, "library", library)
        if gradient:
            o, new, back = titans_cpp_gradient(config, w_init, now, state, [15, 11])
            found.append((o, new, back(torch.ones_like(o))))
        else:
            with torch.no_grad():
                found.append((*titans_cpp(config, w_init, now, state, [15, 11]), torch.zeros(1)))
    assert len(tried) > 40 and same(state, before)
    (o, new, dq), (again, other, dq2) = found
    assert torch.equal(o, again) and same(new, other) and torch.equal(dq, dq2)  # refused calls have written nothing


@pytest.mark.parametrize("config", CONFIGS[:2], ids=NAMES[:2])
def test_the_library_refuses_a_backward_before_it_writes(config, monkeypatch):
    """The call inside it, as above, and pointers of its own."""
    w_init, inputs = map(single, problem(config, 2, 40))
    _, state = run(config, w_init, part(inputs, 0, 5), "cpp")
    alive = [t.requires_grad_() for t in (*w_init, *inputs) if t is not None]
    real, tried = cpu_library.library(), []

    class Refused:
        @staticmethod
        def hope_titans_backward(reference):
            right = reference._obj
            refused = [(what, "call", changes) for what, changes in wrong_calls(right.call) if what != "o=null"]
            refused += [(f"span={n}", "call", {"span": n}) for n in (0, -1, 3, FAR)]
            refused += [(f"spans={n}", "call", {"spans": n}) for n in (-1, 0, FAR)]
            refused += [(f"{name}_bar=null", "", {name: None}) for name, kind in right._fields_
                        if kind is ctypes.c_void_p and getattr(right, name) and not name.endswith("_bias")]
            for what, inside, changes in refused:
                wrong = type(right).from_buffer_copy(right)
                for name, value in changes.items():
                    setattr(wrong.call if inside else wrong, name, value)
                assert real.hope_titans_backward(ctypes.byref(wrong)) == BAD_ARGUMENT, what
                tried.append(what)
            assert real.hope_titans_backward(None) == BAD_ARGUMENT
            return real.hope_titans_backward(reference)

    found = []
    for library in (lambda: real, lambda: Refused):
        o, _ = titans_cpp_training(config, w_init, part(inputs, 5, 40), state, [35, 11])
        monkeypatch.setattr(cpp_training, "library", library)
        found.append(torch.autograd.grad(o.sum(), alive, allow_unused=True))
    assert len(tried) > 70
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found))


FUNCTIONS = {
    "conv": conv_cpp._forward, "conv_backward": conv_cpp._backward, "unit": unit_cpp._forward,
    "unit_backward": unit_cpp._backward, "output_gate": gate_cpp._forward,
    "output_gate_backward": gate_cpp._backward, "cms_gelu": cms._gelu_forward,
    "cms_gate": cpp_gated._gate,
    "linear": linear_cpp._linear, "rms_norm": linear_cpp._rms_norm, "gate": linear_cpp._gate,
    "cms_norm_backward": cms._norm_backward, "cms_step": cms_step._step, "cms_step_bf16": cms_step._step_bf16,
    "newton_schulz": cms_step._newton_schulz, "normalise": cms_step._normalise,
    "conv_weight_backward": conv_training._weight_backward,
    "output_gate_gain_backward": gate_training._gain_backward, "checksum": identity._in_cpp,
    "take_up": cpu_library.Function("hope_take_up", "cms", *[SIZE] * 3, REAL, *[POINTER] * 2),
    "precondition": cpu_library.Function("hope_precondition", "cms", *[SIZE] * 3, *[POINTER] * 2),
}


@pytest.mark.parametrize("name, right, wrong", [
    ("conv", (2, 5, 16, 4, 1, 1, 1, 1, 1, 1, 1),
        [(-1,), (2, -1), (2, 5, 12), (2, 5, 0), (2, 5, 16, 0), (2, 5, 16, 4, 0), (2, FAR), WRAPPING]),
    ("conv_backward", (2, 5, 16, 4, 1, 1, 1, 1),
        [(-1,), (2, -1), (2, 5, 12), (2, 5, 16, 0), (2, 5, 16, 4, -1), (FAR,), WRAPPING]),
    ("conv_weight_backward", (2, 5, 16, 4, 1, 1, 1, 1, 1),
        [(-1,), (2, -1), (2, 5, 12), (2, 5, 16, 0), (2, 5, 16, 4, 0), (FAR,), WRAPPING]),
    ("output_gate_gain_backward", (5, 2, 16, 1, 1, 1, 1, 1),
        [(-1,), (5, 0), (5, 2, 12), (5, 2, 16, 0), (FAR, FAR), WRAPPING]),
    ("checksum", (16, 1, 1), [(-1,), (FAR,)]),
    ("unit", (5, 16, 1, 1, 1), [(-1,), (5, 0), (5, 12), (5, 16, 0), (FAR,)]),
    ("unit_backward", (5, 16, 1, 1, 1, 1), [(-1,), (5, 0), (5, 12), (5, 16, 0), (FAR,)]),
    ("output_gate", (5, 2, 16, 1, 1, 1, 1, 1), [(-1,), (5, -2), (5, 2, 12), (5, 2, 16, 0), (FAR, FAR)]),
    ("output_gate_backward", (5, 2, 16, 1, 1, 1, 1, 1, 1, 1),
        [(-1,), (5, -2), (5, 2, 12), (5, 2, 16, 0), (FAR, FAR)]),
    ("cms_gelu", (16, 1, 0, 1, 1, 1), [(-8,), (12,), (16, 0), (FAR,)]),
    ("cms_gate", (16, 1, 1, 1, 1, 1), [(-8,), (12,), (16, 0), (FAR,)]),
    ("linear", (5, 16, 7, 1, 1, 1, 1, 1),
        [(-1,), (5, 0), (5, 16, -1), (5, 16, FAR), (5, 16, 7, 0), (FAR,), WRAPPING, (2**25, 2**25, 2**31)]),
    ("rms_norm", (5, 16, 1, 1e-6, 1, 1, 1), [(-1,), (5, 0), (5, 12), (5, 16, 0), (FAR,)]),
    ("gate", (5, 3, 1, 0.5, 1, 1, 1), [(-1,), (5, -1), (5, FAR), (FAR, FAR)]),
    ("cms_norm_backward", (5, 16, 1, 1e-6, 1, 1, 1, 1, 1, 1), [(-1,), (5, 0), (5, 12), (5, 16, 0), (FAR,)]),
    ("cms_step", (9, 1, 2, *[0.5] * 7, 1, 1, 1, 1, 1, 1), [(-1,), (FAR,), (9, 0), (9, 1, 3), (9, 1, -1)]),
    ("cms_step_bf16", (3, 5, 7, 1, 2, *[0.5] * 7, 1, 1, 1, 1, 1, 1, 1),
        [(-1,), (FAR,), (3, -1), (3, FAR), (3, 5, -1), (3, 5, FAR), (3, 5, 7, 0), (3, 5, 7, 1, 3)]),
    ("newton_schulz", (2, 5, 7, 1, 1, 1),
        [(-1,), (FAR,), (2, -1), (2, FAR), (2, 5, -1), (2, 5, FAR), (2, 2**30, 2**30), (2, 5, 7, 0),
         (2, 5, 7, FAR), WRAPPING]),
    ("normalise", (9, 1, 1), [(-1,), (FAR,), (9, 0)]),
    ("take_up", (9, 16, 1, 0.5, 1, 1),
        [(-1,), (FAR,), (9, 0), (9, 12), (9, FAR), (9, 16, 0), (9, 16, 1, 0.0), (9, 16, 1, float("nan"))]),
    ("precondition", (9, 16, 1, 1, 1), [(-1,), (FAR,), (9, 0), (9, 12), (9, FAR), (9, 16, 0)]),
])
def test_what_surrounds_the_memories_is_refused_as_well(name, right, wrong):
    """``right``: sizes, then addresses, which a refused call does not follow."""
    function = FUNCTIONS[name].bound()
    for changes in wrong:
        assert function(*changes, *right[len(changes) :]) == BAD_ARGUMENT, changes
    first = next(i for i, kind in enumerate(function.argtypes) if kind is ctypes.c_void_p)
    optional = {
        "output_gate": (1, 2), "output_gate_backward": (1,), "linear": (2,), "cms_gelu": (2,),
        "cms_norm_backward": (3, 5), "output_gate_gain_backward": (1,),
        "cms_step": (0, 1, 5), "cms_step_bf16": (2, 6),
    }.get(name, ())
    for i in range(first, len(right)):
        if i - first not in optional:
            assert function(*right[:i], None, *right[i + 1 :]) == BAD_ARGUMENT, f"pointer {i - first}"


def spoiled(t: torch.Tensor):
    yield "size", torch.zeros(1, 1, 1, 1)
    yield "dtype", t.double()
    yield "device", t.to("meta")


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_tensors_of_another_size_dtype_or_device_are_value_errors(config):
    w_init, inputs = map(single, problem(config, 2, 20))
    state = init_titans_state(config, w_init, 2)

    def refused(w_init, inputs, state):
        before = [t.clone() for t in state.tensors() if not t.is_meta]
        with pytest.raises(ValueError, match="cpp"), torch.no_grad():
            titans_cpp(config, w_init, inputs, state, [20, 13])
        assert all(torch.equal(a, b) for a, b in zip(before, (t for t in state.tensors() if not t.is_meta)))

    for name in cpp._WRITTEN:
        if getattr(state, name) is not None:
            for _, t in spoiled(getattr(state, name)):
                refused(w_init, inputs, replace(state, **{name: t}))
    for i, t in enumerate(w_init):
        for what, bad in spoiled(t) if t is not None else ():
            if what != "dtype":  # weights and inputs are cast
                refused(FastWeights(*(bad if j == i else u for j, u in enumerate(w_init))), inputs, state)
    for name in TokenInputs._fields:
        given = getattr(inputs, name)
        for what, bad in spoiled(given) if given is not None else ():
            # that one has the sizes
            if what != "dtype" and not (what == "size" and name == ("x" if config.self_modifying else "k")):
                refused(w_init, inputs._replace(**{name: bad}), state)
    for lengths in ([20], [20, 13, 1]):
        with pytest.raises(ValueError, match="expected one per row"), torch.no_grad():
            titans_cpp(config, w_init, inputs, state, lengths, update=False)


def test_surroundings_of_another_size_are_value_errors():
    x, weight, small, meta = torch.randn(2, 5, 16), torch.randn(16, 4), torch.zeros(3), torch.zeros(
        2, 5, 16, device="meta"
    )
    heads, tail = x.unflatten(-1, (2, 8)), torch.zeros(2, 3, 16)
    for call in (
        lambda: conv_cpp.causal_conv(x, small, weight, [5, 5]), lambda: conv_cpp.causal_conv(x, tail, weight, [5]),
        lambda: conv_cpp.causal_conv(x, tail, weight[:8], [5, 5]),
        lambda: conv_cpp.causal_conv(x, tail, weight, [5, 6]),
        lambda: conv_cpp.causal_conv(meta, tail, weight, [5, 5]), lambda: conv_cpp.causal_conv_backward(x, weight[:8]),
        lambda: unit_cpp.unit(meta), lambda: unit_cpp.unit(x[..., :12]), lambda: unit_cpp.unit_backward(small, x),
        lambda: gate_cpp.output_gate(heads, small, None), lambda: gate_cpp.output_gate(heads, None, small),
        lambda: gate_cpp.output_gate_backward(small, heads, None, None), lambda: cms.gelu(x, small, None),
        lambda: cms.gelu(x, x.clone(), small), lambda: cpp_gated.gated(small, x, True),
    ):
        with pytest.raises(ValueError, match="cpp"):
            call()


SIZES_OF_Z = [
    0.0, 1e-45, 1e-38, 1e-30, 1e-3, 1.0, 3.0, 5.5, 5.6, 10.0, 20.0, 87.0, 88.0, 89.0, 100.0, 1e4, 1e10, 1e18,
    2e19, 1e30, 1e38
]


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
def test_activations_and_their_slopes_at_every_size(activation):
    """o = z + sigma(z) and dq = 1 + sigma'(z), in a memory whose weights are the identity."""
    config = TitansConfig(
        8, self_modifying=False, activation=activation, qk_l2norm=False, chunk_memory=64, chunk_other=64
    )
    z = torch.tensor(SIZES_OF_Z + [-v for v in SIZES_OF_Z])
    q = z.view(1, -1, 1, 1).expand(1, -1, 1, 8).contiguous()
    zero, eye = torch.zeros(1, len(z), 1), torch.eye(8)
    w_init = FastWeights(eye.unsqueeze(0).clone(), eye.view(1, 1, 8, 8).clone(), None)
    inputs = TokenInputs(q, k=torch.zeros_like(q), v=torch.zeros_like(q), eta=zero, alpha=zero + 1)
    o, _, back = titans_cpp_gradient(config, w_init, inputs, init_titans_state(config, w_init, 1), [len(z)])
    dq, wide = back(torch.ones_like(q)), z.double().requires_grad_()
    small = wide.clamp(-50, 50)  # beyond, sigma(z) is 0 or z
    if activation == "silu":
        inner = wide * torch.sigmoid(small)
    else:
        inner = wide * (
            torch.special.ndtr(small) if activation == "gelu"
            else torch.sigmoid(1.5957691216 * (small + 0.044715 * small**3))
        )
    slope, = torch.autograd.grad(inner.sum(), wide)
    for column in range(8):
        torch.testing.assert_close(o[0, :, 0, column].double(), (wide + inner).detach(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(dq[0, :, 0, column].double(), 1 + slope, rtol=2e-6, atol=2e-6)


def test_the_activation_of_cms_levels_at_every_size():
    z = torch.tensor(SIZES_OF_Z + [-v for v in SIZES_OF_Z])
    z = torch.cat([z, torch.zeros(-len(z) % 8)])
    a, slope = torch.empty_like(z), torch.empty_like(z)
    cms.gelu(z, a, slope)
    gate = (z > 0).float()
    far = z.abs() > 20
    torch.testing.assert_close(a[far], (gate * z)[far], rtol=2e-6, atol=0.0)
    torch.testing.assert_close(slope[far], gate[far], rtol=2e-6, atol=1e-12)
    near = z[~far].double().requires_grad_()
    exact = torch.nn.functional.gelu(near, approximate="tanh")
    torch.testing.assert_close(a[~far].double(), exact.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(
        slope[~far].double(), torch.autograd.grad(exact.sum(), near)[0], rtol=2e-6, atol=1e-6
    )


def test_the_gate_of_a_layer_at_every_size():
    z = torch.tensor(SIZES_OF_Z + [-v for v in SIZES_OF_Z])
    z = torch.cat([z, torch.zeros(-len(z) % 8)]).view(1, -1, 1, 8)
    one, wide = torch.ones_like(z), z.flatten(2).double().requires_grad_()
    y, (_, dgate) = gate_cpp.output_gate(one, None, z.flatten(2)), gate_cpp.output_gate_backward(
        one.flatten(2), one, None, z.flatten(2)
    )
    exact = wide * torch.sigmoid(wide)
    torch.testing.assert_close(y.double(), exact.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(dgate.double(), torch.autograd.grad(exact.sum(), wide)[0], rtol=2e-6, atol=2e-6)
