"""The table of tiles serves everything that the backend says it serves, with tiles that divide what they tile."""

from itertools import product

import pytest

pytest.importorskip("triton")
from hope_kernels import TitansConfig  # noqa: E402
from hope_kernels.ops.shared.triton_build import SHARED_KIB  # noqa: E402
from hope_kernels.ops.titans.triton import tiles as table  # noqa: E402
from hope_kernels.ops.titans.triton.carried import carried  # noqa: E402
from hope_kernels.ops.titans.triton.tiles import CHUNKS, ITEMSIZE, MULTIPLES, TABLE, WIDTHS, tile_row  # noqa: E402


def test_every_served_shape_has_one_row_whose_tiles_divide_it():
    used = set()
    for D, mult, C, itemsize, arch in product(WIDTHS, MULTIPLES, CHUNKS, set(ITEMSIZE.values()), SHARED_KIB):
        found = tile_row(D, C, itemsize, arch)
        WALK_NT, WALK_CT, TILE_NT, TILE_CT = found.tiles
        used.add(found)
        assert D * mult % WALK_NT == D * mult % TILE_NT == C % WALK_CT == C % TILE_CT == 0, (D, mult, C, itemsize)
        assert min(found.tiles) >= 16, "a product has no smaller sides"
    assert used == set(TABLE)


def test_only_heads_of_64_on_two_architectures_have_tiles_of_their_own():
    for D, C, itemsize, arch in product(WIDTHS, CHUNKS, (2, 4), SHARED_KIB):
        own = (D, itemsize) == (64, 2) and C >= 64 and arch in (90, 100)
        assert (tile_row(D, C, itemsize, arch).tiles != tile_row(D, C, itemsize, 80).tiles) == own
        assert not own or tile_row(D, C, itemsize, arch).tiles == (64, 64, 64, 64)


@pytest.mark.parametrize("D, itemsize, arch", product(WIDTHS, (2, 4), (80, 90)))
def test_two_clocks_share_a_kernel(D, itemsize, arch):
    for C_memory, C_other in product(CHUNKS, repeat=2):
        config = TitansConfig(2 * D, 2, chunk_memory=C_memory, chunk_other=C_other)
        found = table.constants(config, itemsize, True, arch)
        fast, slow = min(C_memory, C_other), max(C_memory, C_other)
        for name, C in ("fast", fast), ("slow", slow):
            want = tile_row(D, C, itemsize, arch).tiles
            assert found[name].C == C
            assert found[f"{name}_tiles"] == (
                want if fast == slow else want._replace(WALK_CT=16, TILE_CT=16)
            )
        chosen = table.options(config, itemsize, arch)
        assert chosen["maxnreg"] == tile_row(D, slow, itemsize, arch).registers
        assert chosen["maxnreg"] >= tile_row(D, fast, itemsize, arch).registers
        # a program must fit: 64 K registers a multiprocessor
        assert chosen["maxnreg"] * chosen["num_warps"] * 32 <= 65536
        for shapes, C in zip(table.scratch_shapes(config, itemsize, arch), (fast, slow)):
            assert shapes.norms[1] * tile_row(D, C, itemsize, arch).tiles.TILE_NT == D


def test_the_compile_report_sees_every_row_and_the_full_one_every_shape():
    for full in (False, True):
        specs = list(table.specializations(full))
        seen = {
            (c["shape"].D, s.signature["reads"].q, c["fast"].C, c["fast_tiles"]) for s in specs
            for c in (s.constexprs,)
        }
        for D, itemsize, C, tiles, *_ in TABLE:
            assert (D, "*fp32" if itemsize == 4 else "*bf16", C, tiles) in seen
    shapes: dict[tuple, list[int]] = {}
    for s in specs:
        shape = (*s.constexprs["shape"], s.constexprs["fast"].C, s.signature["reads"].q)
        shapes.setdefault(shape, []).extend(s.archs)
    whole = [archs for archs in shapes.values() if set(archs) == set(SHARED_KIB)]
    assert len(whole) == len(WIDTHS) * len(MULTIPLES) * len(CHUNKS) * len(ITEMSIZE)
    for s in specs:
        for arch in s.archs:
            C = s.constexprs["fast"].C
            if s.constexprs["slow"].M1 == s.constexprs["slow"].M0:
                itemsize = 4 if s.signature["reads"].q == "*fp32" else 2
                seen_by = 80 if s.constexprs["rule"].MOMENTUM else arch  # momentum spills in larger tiles
                row = tile_row(s.constexprs["shape"].D, C, itemsize, seen_by)
                narrow = s.constexprs["rule"].MOMENTUM and row.D == 64
                want = row.tiles._replace(TILE_CT=16) if narrow else row.tiles
                assert s.constexprs["fast_tiles"] == want


def test_what_is_carried_is_a_default_layer_with_heads_of_64():
    usual = TitansConfig(512, 8)
    assert all(carried(usual, 2, arch) for arch in (80, 86, 89, 90))
    assert not any(carried(usual, 2, arch) for arch in (100, 120)) and not carried(usual, 4, 90)
    for change in (
        {"num_heads": 4}, {"num_heads": 16}, {"hidden_mult": 2}, {"chunk_memory": 32}, {"chunk_other": 32},
        {"chunk_memory": 64, "chunk_other": 64}, {"momentum": 0.5}, {"adaptive_q": True}, {"retention": False},
        {"scalar_skip": True}, {"retain_to": "zero"}, {"memory": "linear"}, {"self_modifying": False},
    ):
        assert not carried(usual.replace(**change), 2, 90), change
