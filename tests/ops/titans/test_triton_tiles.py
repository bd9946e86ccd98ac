"""The table of tiles serves everything that the backend says it serves, with tiles that divide what they tile."""

from itertools import product

import pytest

pytest.importorskip("triton")
from hope_kernels import TitansConfig  # noqa: E402
from hope_kernels.ops.titans.triton import tiles as table  # noqa: E402
from hope_kernels.ops.titans.triton.tiles import CHUNKS, ITEMSIZE, MULTIPLES, TABLE, WIDTHS, tile_row  # noqa: E402


def test_every_served_shape_has_one_row_whose_tiles_divide_it():
    used = set()
    for D, mult, C, itemsize in product(WIDTHS, MULTIPLES, CHUNKS, set(ITEMSIZE.values())):
        found = tile_row(D, C, itemsize)
        WALK_NT, WALK_CT, TILE_NT, TILE_CT = found.tiles
        used.add(found)
        assert D * mult % WALK_NT == D * mult % TILE_NT == C % WALK_CT == C % TILE_CT == 0, (D, mult, C, itemsize)
        assert min(found.tiles) >= 16, "a product has no smaller sides"
    assert used == set(TABLE)


@pytest.mark.parametrize("D, itemsize", product(WIDTHS, (2, 4)))
def test_two_clocks_share_a_kernel(D, itemsize):
    for C_memory, C_other in product(CHUNKS, repeat=2):
        config = TitansConfig(2 * D, 2, chunk_memory=C_memory, chunk_other=C_other)
        found, fast, slow = table.constants(config, itemsize, True), min(C_memory, C_other), max(C_memory, C_other)
        for name, C in ("fast", fast), ("slow", slow):
            want = tile_row(D, C, itemsize).tiles
            assert found[name].C == C
            assert found[f"{name}_tiles"] == (
                want if fast == slow else want._replace(WALK_CT=16, TILE_CT=16)
            )
        chosen = table.options(config, itemsize)
        assert chosen["maxnreg"] == tile_row(D, slow, itemsize).registers >= tile_row(D, fast, itemsize).registers
        # a program must fit: 64 K registers a multiprocessor
        assert chosen["maxnreg"] * chosen["num_warps"] * 32 <= 65536
        for shapes, C in zip(table.scratch_shapes(config, itemsize), (fast, slow)):
            assert shapes.norms[1] * tile_row(D, C, itemsize).tiles.TILE_NT == D


def test_the_compile_report_sees_every_row_and_the_full_one_every_shape():
    for full in (False, True):
        specs = list(table.specializations(full))
        seen = {
            (c["shape"].D, s.signature["reads"].q, c["fast"].C, c["fast_tiles"].WALK_NT)
            for s in specs for c in (s.constexprs,)
        }
        for D, itemsize, C, tiles, _ in TABLE:
            assert (D, "*fp32" if itemsize == 4 else "*bf16", C, tiles.WALK_NT) in seen
    shapes = {
        (*s.constexprs["shape"], s.constexprs["fast"].C, s.signature["reads"].q) for s in specs
        if len(s.archs) == 6
    }
    assert len(shapes) == len(WIDTHS) * len(MULTIPLES) * len(CHUNKS) * len(ITEMSIZE)
