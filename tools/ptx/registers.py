"""Which of a kernel's registers share a place: PTX has one for every value, thousands of them, and a warp's
registers should stay in the cache.

Lanes that branch apart write their own lanes only, so values may share a place wherever they do on one path.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Name = str


def blocks(count: int, targets: Sequence[int | None], falls: Sequence[bool]) -> list[tuple[int, int, list[int]]]:
    """(first, end, first instructions of the successors) of every basic block. targets: of an instruction that
    may jump; falls: whether the next instruction may follow."""
    starts = {0} | {t for t in targets if t is not None and t < count}
    starts |= {i + 1 for i in range(count - 1) if targets[i] is not None or not falls[i]}
    order = [*sorted(starts), count]
    found = []
    for first, end in zip(order, order[1:]):
        next_ones = [end] if falls[end - 1] and end < count else []
        target = targets[end - 1]
        if target is not None and target < count:
            next_ones.append(target)
        found.append((first, end, next_ones))
    return found


def intervals(
    defined: Sequence[Sequence[Name]], used: Sequence[Sequence[Name]], targets: Sequence[int | None],
    falls: Sequence[bool],
) -> dict[Name, tuple[int, int]]:
    """name -> (first, last) instruction at which it has to be kept, by liveness over all paths."""
    count = len(defined)
    found = blocks(count, targets, falls)
    at = {first: k for k, (first, _, _) in enumerate(found)}
    number: dict[Name, int] = {}
    for names in (*defined, *used):
        for name in names:
            number.setdefault(name, len(number))
    upward, killed = [], []  # used before it is defined in the block; defined in it
    for first, end, _ in found:
        use = define = 0
        for i in range(first, end):
            for name in used[i]:
                if not define >> number[name] & 1:
                    use |= 1 << number[name]
            for name in defined[i]:
                define |= 1 << number[name]
        upward.append(use)
        killed.append(define)
    into, out = upward[:], [0] * len(found)
    changed = True
    while changed:
        changed = False
        for k in range(len(found) - 1, -1, -1):
            after = 0
            for start in found[k][2]:
                after |= into[at[start]]
            before = upward[k] | (after & ~killed[k])
            if after != out[k] or before != into[k]:
                out[k], into[k], changed = after, before, True
    names = list(number)
    kept: dict[Name, tuple[int, int]] = {}

    def keep(name: Name, first: int, last: int) -> None:
        old = kept.get(name, (first, last))
        kept[name] = (min(old[0], first), max(old[1], last))

    for (first, end, _), before, after in zip(found, into, out):
        for live, place in ((before, first), (after, end - 1)):
            while live:
                low = live & -live
                keep(names[low.bit_length() - 1], place, place)
                live ^= low
        for i in range(first, end):
            for name in (*defined[i], *used[i]):
                keep(name, i, i)
    return kept


def places(kept: dict[Name, tuple[int, int]], size: dict[Name, int]) -> tuple[dict[Name, int], int]:
    """(name -> place, how many places) for names of ``size`` 1 or 2 places; no two that are kept at the same
    time overlap."""
    free: dict[int, list[int]] = {1: [], 2: []}
    ends: list[tuple[int, int, int]] = []
    given, top = {}, 0
    for name, (first, last) in sorted(kept.items(), key=lambda item: item[1]):
        while ends and ends[0][0] < first:
            _, place, width = heapq.heappop(ends)
            heapq.heappush(free[width], place)
        width = size[name]
        if free[width]:
            given[name] = heapq.heappop(free[width])
        else:
            given[name], top = top, top + width
        heapq.heappush(ends, (last, given[name], width))
    return given, top
