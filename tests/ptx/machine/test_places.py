"""Registers share places only where no path has both their values: checked by walking paths."""

import random

import pytest

from tools.ptx.registers import blocks, intervals, places


def programs(count):
    """Random control flow: some instructions jump, some end, each defines and uses a few of ten names."""
    for seed in range(count):
        draw = random.Random(seed)
        length = draw.randint(3, 14)
        names = [f"r{k}" for k in range(draw.randint(2, 7))]
        defined = [draw.sample(names, draw.randint(0, 2)) for _ in range(length)]
        used = [draw.sample(names, draw.randint(0, 2)) for _ in range(length)]
        targets = [draw.randrange(length) if draw.random() < 0.3 else None for _ in range(length)]
        falls = [draw.random() < (0.6 if t is not None else 0.97) for t in targets]
        falls[-1] = False
        size = {name: draw.choice([1, 1, 2]) for name in names}
        yield seed, defined, used, targets, falls, size


def followers(i, targets, falls, length):
    found = [i + 1] if falls[i] and i + 1 < length else []
    return found + ([targets[i]] if targets[i] is not None else [])


def live_after(i, name, defined, used, targets, falls):
    """Whether a path from behind instruction i comes to a use of the name before a definition."""
    seen, todo = set(), followers(i, targets, falls, len(used))
    while todo:
        k = todo.pop()
        if k in seen:
            continue
        seen.add(k)
        if name in used[k]:
            return True
        if name not in defined[k]:
            todo += followers(k, targets, falls, len(used))
    return False


def test_no_two_values_live_at_once_share_a_place():
    shared = 0
    for seed, defined, used, targets, falls, size in programs(400):
        place, count = places(intervals(defined, used, targets, falls), size)
        assert all(0 <= place[n] and place[n] + size[n] <= count for n in place)
        taken = {n: set(range(place[n], place[n] + size[n])) for n in place}
        for i in range(len(used)):
            after = {n for n in size if live_after(i, n, defined, used, targets, falls)}
            # what an instruction writes, whatever is kept over it, and what it reads
            for n in {*defined[i]}:
                for other in (after | {*used[i], *defined[i]}) - {n}:
                    assert not taken[n] & taken[other], (seed, i, n, other)
            for n in after:
                for other in after - {n}:
                    assert not taken[n] & taken[other], (seed, i, n, other)
        shared += sum(size[n] for n in place) - count
    assert shared > 50  # they do share


def run(path, defined, used, place, size, initial):
    """Values read along a path of instructions: of every use, which definition it saw."""
    memory, seen = {}, []
    for name, value in initial.items():
        for p in range(size[name]) if name in place else ():
            memory[place[name] + p] = (value, p)
    for step, i in enumerate(path):
        seen += [tuple(memory.get(place[n] + p) for p in range(size[n])) for n in used[i]]
        for n in defined[i]:
            for p in range(size[n]):
                memory[place[n] + p] = ((step, n), p)
    return seen


def test_walks_read_what_they_would_read_with_places_of_their_own():
    for seed, defined, used, targets, falls, size in programs(300):
        place, _ = places(intervals(defined, used, targets, falls), size)
        own, at = {}, 0
        for n in size:
            own[n], at = at, at + size[n]
        draw = random.Random(seed + 1)
        for _ in range(20):
            path, i = [], 0
            while i is not None and len(path) < 40:
                path.append(i)
                after = followers(i, targets, falls, len(used))
                i = draw.choice(after) if after else None
            found = run(path, defined, used, place, size, {})
            expected = run(path, defined, used, own, size, {})
            # a value that was never written may be anything
            assert all(f == e for f, e in zip(found, expected) if None not in e), seed


@pytest.mark.parametrize("targets,falls,expected", [
    ([None] * 3, [True, True, False], [(0, 3, [])]),
    ([2, None, None], [True, True, False], [(0, 1, [1, 2]), (1, 2, [2]), (2, 3, [])]),
    ([None, 0, None], [True, True, False], [(0, 2, [2, 0]), (2, 3, [])]),
    ([2, None, 0], [False, False, False], [(0, 1, [2]), (1, 2, []), (2, 3, [0])]),
])
def test_blocks(targets, falls, expected):
    assert blocks(3, targets, falls) == expected
