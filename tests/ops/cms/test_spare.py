"""What a learning call allocates: nothing of the size of weights once a state has learned; and what becomes of the
memory when a call fails, or another state is made from one."""

import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig

F64 = torch.float64
RULES = {
    "gd": {}, "momentum": {"optimizer": "momentum"}, "adam": {"optimizer": "adam"}, "muon": {"optimizer": "muon"},
    "preconditioned": {"precondition": 1.0},
}


class Allocations(TorchDispatchMode):
    """Counts tensors of at least ``size`` numbers that operators return in memory of their own."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= self.size * t.element_size():
                if t.untyped_storage().data_ptr() not in given:
                    self.found.append((str(func), tuple(t.shape)))
        return out


def model(dtype=F64, **cms) -> HopeForCausalLM:
    torch.manual_seed(0)
    config = CMSConfig(16, (4, 8), **{"lr": 0.05, "intermediate_size": 96} | cms)
    titans = TitansConfig(16, chunk_memory=4, chunk_other=4)
    return HopeForCausalLM(HopeConfig(24, 16, 2, titans=titans, cms=config), dtype=dtype)


def learned(state) -> list[torch.Tensor]:
    return [t for cms in state.cms for part in (cms.weights, cms.moments, cms.inverses, cms.grads)
            for level in part if level is not None for t in level.values()]


@pytest.mark.parametrize("rule", ["gd", "momentum"])
def test_a_learning_call_allocates_no_weights(rule):
    hope = model(**RULES[rule])
    ids = torch.randint(0, 24, (2, 70))
    with torch.no_grad():
        _, state = hope(ids[:, :34], learn="next_token")
        hope(ids[:, 34:50], state, learn="next_token")
        for forgotten in (False, True):
            if forgotten:
                for cms in state.cms:
                    cms.spare.clear()
            with Allocations(2 * 16 * 96) as counter:
                hope(ids[:, 50:60], state, learn="next_token")
            assert bool(counter.found) == forgotten, counter.found


@pytest.mark.parametrize("rule", RULES)
def test_calls_that_swap_memory_learn_what_one_call_learns(rule):
    """Rows in different places: those that are not due keep what they have, whichever memory it is in."""
    hope = model(**RULES[rule])
    ids = torch.randint(0, 24, (2, 60))
    with torch.no_grad():
        state, read = None, [0, 0]
        for lengths in ([9, 4], [8, 8], [0, 12], [12, 3], [9, 20], [22, 13]):
            part = torch.stack([ids[b, p : p + 22] if p + 22 <= 60 else torch.cat([ids[b, p:], ids[b, : p - 38]])
                                for b, p in enumerate(read)])
            _, state = hope(part, state, learn="next_token", lengths=lengths)
            read = [p + n for p, n in zip(read, lengths)]
        assert read == [60, 60]
        _, want = hope(ids, learn="next_token")
    assert len(learned(state)) == len(learned(want)) > 7
    for a, b in zip(learned(state), learned(want)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_a_call_that_fails_after_several_refreshes_changes_nothing(rule, monkeypatch):
    hope = model(**RULES[rule])
    ids = torch.randint(0, 24, (2, 60))
    with torch.no_grad():
        _, state = hope(ids[:, :20], learn="next_token")
        hope(ids[:, 20:30], state, learn="next_token")
        twin, before = state.clone(), [t.clone() for t in state.tensors()]
        counters = [list(c) for c in state._counters()]
        calls, logits = [], hope.logits

        def failing(*args):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("interrupted")
            return logits(*args)

        monkeypatch.setattr(hope, "logits", failing)
        with pytest.raises(RuntimeError, match="interrupted"):
            hope(ids[:, 30:], state, learn="next_token")
        monkeypatch.undo()
        assert all(map(torch.equal, before, state.tensors()))
        assert counters == [list(c) for c in state._counters()]
        a, _ = hope(ids[:, 30:], state, learn="next_token")
        b, _ = hope(ids[:, 30:], twin, learn="next_token")
    assert torch.equal(a, b) and all(map(torch.equal, state.tensors(), twin.tensors()))


def test_spare_memory_is_no_part_of_a_state_and_of_no_copy(tmp_path):
    hope = model()
    ids = torch.randint(0, 24, (2, 60))
    with torch.no_grad():
        _, state = hope(ids[:, :20], learn="next_token")
        kept = state.clone()
        size = state.nbytes()
        hope(ids[:, 20:40], state, learn="next_token")
        assert state.nbytes() == size and state.cms[0].spare
        copies = [state.clone(), state.select([0, 1]), state.detach(), state.to(F64), state.constant(),
                  pickle.loads(pickle.dumps(state))]
        assert not any(cms.spare for copy in copies for cms in copy.cms)
        frozen = [t.clone() for t in state.tensors()]
        hope(ids[:, 20:40], kept, learn="next_token")
        assert all(map(torch.equal, kept.tensors(), frozen))
        hope(ids[:, 40:], state, learn="next_token")  # in the memory that was spare
        for copy in copies[:4] + copies[5:]:
            assert all(map(torch.equal, copy.tensors(), frozen))


def test_memory_of_another_mode_is_not_written():
    hope = model(optimizer="momentum")
    ids = torch.randint(0, 24, (1, 90))
    modes = [torch.inference_mode, torch.no_grad, torch.inference_mode, torch.inference_mode, torch.no_grad,
             torch.no_grad, torch.enable_grad, torch.no_grad, torch.no_grad]
    state = None
    for i, mode in enumerate(modes):
        with mode():
            _, state = hope(ids[:, 10 * i : 10 * i + 10], state, learn="next_token")
    with torch.no_grad():
        _, want = hope(ids, learn="next_token")
    for a, b in zip(learned(state), learned(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
