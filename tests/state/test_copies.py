"""One rule for copies: what a state's methods return is independent of it, whichever of the two is advanced,
in place or not."""

import copy
import pickle

import pytest
import torch

from hope_kernels import CMSConfig, ContinuumMemory, HopeConfig, HopeForCausalLM, SelfModifyingTitans, TitansConfig
from hope_kernels.layers.attention import CausalAttention

D = 16


def token_model(mixer: str) -> HopeForCausalLM:
    config = HopeConfig(
        32, D, 1, mixer=mixer, num_heads=2, window=6 if mixer == "attention" else None,
        cms=CMSConfig(D, (4, 8), lr=0.05)
    )
    return HopeForCausalLM(config).eval()


def reader(kind: str):
    """(state after 21 tokens, read): read(state, a, b) reads tokens a..b in place and returns the outputs."""
    torch.manual_seed(0)
    x, ids = torch.randn(2, 60, D), torch.randint(0, 32, (2, 60))
    if kind in MODELS:
        model = token_model("attention" if kind == "attention model" else "self_modifying")
        read = lambda state, a, b: model(ids[:, a:b], state, learn="next_token")[0]
        state = model.init_state(2)
    elif kind == "cms":
        layer = ContinuumMemory(CMSConfig(D, (4, 8), lr=0.05, optimizer="momentum"))

        def read(state, a, b):
            parts = []
            for t in range(a, b):
                parts.append(layer(x[:, t : t + 1], state)[0])
                layer.refresh(state, 0.01 * parts[-1])
            return torch.cat(parts, 1)

        state = layer.init_state(2)
    else:
        attention = HopeConfig(32, D, 1, "attention", num_heads=2)
        layer = SelfModifyingTitans(TitansConfig(D, 2)) if kind == "titans" else CausalAttention(attention)
        read = lambda state, a, b: layer(x[:, a:b], state)[0]
        state = layer.init_state(2)
    with torch.no_grad():
        read(state, 0, 21)
    return state, read


COPIES = {
    "clone": lambda s: s.clone(), "detach": lambda s: s.detach(), "to a device": lambda s: s.to("cpu"),
    "to a dtype": lambda s: s.to(torch.float32),
    "select": lambda s: s.select([0, 1]), "select a mask": lambda s: s.select(torch.tensor([True, True])),
    "replace": lambda s: s.replace(),
    "snapshot": lambda s: s.snapshot(), "copy": copy.copy, "deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)), "apart": lambda s: s.apart(),
}


MODELS = ("model", "attention model")


@pytest.mark.parametrize(("kind", "way"), [
    (kind, way) for kind in ("titans", "attention", "cms", *MODELS) for way in COPIES
    if way != ("snapshot" if kind in MODELS else "apart")  # a model's snapshot is a field of its state
])
def test_either_side_may_be_read_on(kind, way):
    state, read = reader(kind)
    with torch.no_grad():
        expected = [read(copy.deepcopy(state), 21, b) for b in (22, 40)]  # one token, and over many boundaries
        for first_is_original in (True, False):
            for b, right in zip((22, 40), expected):
                original = copy.deepcopy(state)
                other = COPIES[way](original)
                first, second = (original, other) if first_is_original else (other, original)
                read(first, 21, 50)
                assert second.pos == [21, 21]
                assert torch.equal(read(second, 21, b), right)


def test_a_copy_carries_no_model():
    state, _ = reader("model")
    size = len(pickle.dumps(state))
    assert size < 1.3 * sum(t.untyped_storage().nbytes() for t in state.tensors()) + 20_000
    again = pickle.loads(pickle.dumps(state))
    assert again.owner is None and all(s.owner is None for s in again.states())
    assert str(again.fingerprint) == str(state.fingerprint)


def test_select_takes_a_mask_as_a_mask():
    layer = SelfModifyingTitans(TitansConfig(D, 2))
    with torch.no_grad():
        _, state = layer(torch.randn(3, 9, D), lengths=[9, 4, 6])
    for mask in ([False, True, True], torch.tensor([False, True, True])):
        assert state.select(mask).pos == [4, 6]
        assert torch.equal(state.select(mask).pending_k, state.pending_k[1:])
    assert state.select([True, True, True]).pos == state.pos and state.select([False] * 3).batch == 0
    assert state.select([-1, 0, 0]).pos == [6, 9, 9] and state.select(
        torch.tensor([2], dtype=torch.int32)
    ).pos == [6]
    for wrong in ([True, False], torch.tensor([True]), [0.0, 1.0], torch.tensor([0.5]), [[0]],
                  torch.tensor([[0]]), [True, 0, 1], ["0"],
                  1, None):
        with pytest.raises(ValueError, match=r"TitansState.select: argument rows is"):
            state.select(wrong)
    for absent in ([3], [-4], torch.tensor([7])):
        with pytest.raises(IndexError, match="does not exist in a batch of 3"):
            state.select(absent)


def _advance_elsewhere(inbox, outbox) -> None:
    torch.set_num_threads(1)
    state = inbox.get()
    for t in state.tensors():
        t.add_(1)
    outbox.put([t.is_shared() for t in state.tensors() if t.numel()])


def test_a_state_from_another_process_is_independent():
    torch.manual_seed(0)
    model = token_model("self_modifying")
    with torch.no_grad():
        _, state = model(torch.randint(0, 32, (1, 9)), learn="next_token")
    before = [t.clone() for t in state.tensors()]
    processes = torch.multiprocessing.get_context("spawn")
    inbox, outbox = processes.Queue(), processes.Queue()
    child = processes.Process(target=_advance_elsewhere, args=(inbox, outbox))
    child.start()
    inbox.put(state)
    assert not any(outbox.get(timeout=120))
    child.join()
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
