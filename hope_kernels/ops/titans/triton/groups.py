"""The arguments of the memory's kernels, in groups: named tuples of pointers, and of numbers known at compile
time.

A launch passes a group of pointers as one argument, and Triton flattens it: a field is an argument like any
other, with its own type and alignment. A group of numbers is one ``tl.constexpr``; in a kernel its fields are
plain Python numbers. Where Triton insists on a constexpr (the shape of a tensor, the bound of a
``tl.static_range``) a field is given a name first: ``D: tl.constexpr = shape.D``.
"""

from collections import namedtuple

# -- pointers ------------------------------------------------------------------------------------------------

# What the memories of a call read and return, [B, T, H, D]; with adaptive_q q passes through o, and q is o.
Reads = namedtuple("Reads", "x q o")
# What tokens write with: k, v [B, slots, H, D], eta, alpha, beta [B, slots, H]. Given by the caller the slots
# are the call's tokens, pending they are those of the open chunk (state.py).
Writes = namedtuple("Writes", "k v eta alpha beta")
# Initial weights [H, ...] and deviations [B, H, ...], as state.py lays them out; or their adjoints, and then
# those of the initial weights are [B, H, ...] as well.
# Weights in force, as the updates of a call leave them for its later tasks, or those of a chunk that goes backwards,
# have no base: w2 and w1 in the dtype of the operands and w1s in fp32 stand where deviations do.
Weights = namedtuple("Weights", "base2 base1 base1s delta2 delta1 delta1s")
Momentum = namedtuple("Momentum", "s2 s1 s1s")  # laid out like the deviations
Biases = namedtuple("Biases", "eta alpha")  # of the gates, [H]
# Where the rows of a call stand (pos), how many tokens they read (lengths), [B]; the counters of the schedule
Progress = namedtuple("Progress", "pos lengths sync")
# What the tasks of one chunk of one clock hand to each other; shapes: tiles.scratch_shapes
Scratch = namedtuple("Scratch", "e es e2 a d norms keys rounded_keys erased_keys vectors gram2 sizes gain")
# What the programs of a (row, head) hand to each other in carry.py: tokens that have been read, and the clock's terms
Exchange = namedtuple("Exchange", "k eta alpha")
Shared = namedtuple("Shared", "keys vectors gram2")

# Of the backward. Slots lo .. hi that a row reads in a span, [B]
Place = namedtuple("Place", "lo hi")
# A span's tokens in its slots, k, v [B, S, H, D], eta, alpha [B, S, H]; or their adjoints
Slots = namedtuple("Slots", "k v eta alpha")
# What the memories of one clock share in a chunk: backward_clock.py
ClockTerms = namedtuple("ClockTerms", "products gram keys vectors")
# e, target [B H, M, D, C] and sizes [B H, M, 2, C] of a chunk: backward_tokens.py
Errors = namedtuple("Errors", "e target sizes")

# -- numbers -------------------------------------------------------------------------------------------------

# Heads, their width, hidden units; memories with D outputs and with one; rows of w2
Shape = namedtuple("Shape", "H D N MF MS R")
# The write rule and the gates: TitansConfig's switches (HAS_BASE: retain_to "init", SKIP: skip rows in w2,
# HAS_ALPHA: retention, DOT: objective "dot", CLIP: step_clip, UNIT_K: qk_l2norm, SOFTPLUS: eta's gate). ACT is
# one of ``ACTIVATION_CODES``.
Rule = namedtuple(
    "Rule",
    "ACT HAS_BASE SKIP HAS_ALPHA UNIT_K SOFTPLUS OWN_VALUES TARGET_NORM DOT DGD CLIP MOMENTUM ADAPTIVE_Q",
)
# Memories M0 .. M1, which commit every C tokens
Clock = namedtuple("Clock", "M0 M1 C")
# Hidden units and tokens a tile, of tasks that walk over all N (read, errors) and of tasks that own a tile of
# N (hidden, update)
Tiles = namedtuple("Tiles", "WALK_NT WALK_CT TILE_NT TILE_CT")
