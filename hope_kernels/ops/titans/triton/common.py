"""What the memory's Triton kernels share: weights as base + deviation, and which slots of a row
a step concerns.

Tokens are columns: activations are [features, tokens], weights stand on the left, so that a chunk of 16
tokens is the n side of a product and no tile is padded. A row's slots count from the start of its open chunk
of the longer clock; a tile's columns are fixed slots, masked by what the row reads in this call. So a
number's way through a reduction depends on its slot and on shapes of the model, never on how the sequence was
cut, on other rows, or on whether a state was given.
"""

import triton
import triton.language as tl


@triton.jit
def weight(delta_p, base_p, at, base_at, HAS_BASE: tl.constexpr):
    """w_base + delta at the given offsets, fp32."""
    w = tl.load(delta_p + at)
    if HAS_BASE:
        w += tl.load(base_p + base_at).to(tl.float32)
    return w


@triton.jit
def load_w2(weights, at, base_at, rule: tl.constexpr):
    """Elements of w2 in force."""
    return weight(weights.delta2, weights.base2, at, base_at, rule.HAS_BASE)


@triton.jit
def load_w1(weights, at, base_at, rule: tl.constexpr):
    return weight(weights.delta1, weights.base1, at, base_at, rule.HAS_BASE)


@triton.jit
def rounded_w2(weights, in_force, updated, at, base_at, rule: tl.constexpr):
    """Elements of w2 in force, in the dtype of the operands: as an update of this call has left them, or else
    summed here."""
    if updated:
        w = tl.load(in_force.delta2 + at)
    else:
        w = load_w2(weights, at, base_at, rule).to(in_force.delta2.dtype.element_ty)
    return w


@triton.jit
def rounded_w1(weights, in_force, updated, at, base_at, rule: tl.constexpr):
    if updated:
        w = tl.load(in_force.delta1 + at)
    else:
        w = load_w1(weights, at, base_at, rule).to(in_force.delta1.dtype.element_ty)
    return w


@triton.jit
def load_w1s(weights, at, base_at, rule: tl.constexpr):
    return weight(weights.delta1s, weights.base1s, at, base_at, rule.HAS_BASE)
