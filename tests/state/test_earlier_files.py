"""States and models written by earlier code load, and go on to the outputs that code gave: to 1e-12 in fp64
on the chunked backend, since another PyTorch or processor may sum in another order."""

import pickle
from pathlib import Path

import pytest
import torch
from numerics import relative
from safetensors.torch import load_file

from hope_kernels import CMSConfig, ContinuumMemory, HopeForCausalLM, SelfModifyingTitans, TitansConfig, load_state

EARLIER = Path(__file__).parents[1] / "data" / "earlier"  # its README says of which code


def restored(name: str):
    """What was written of a layer: weights, and inputs and outputs that follow the state; and the state."""
    found = load_file(EARLIER / f"{name}.safetensors")
    weights = {n.removeprefix("weights."): t for n, t in found.items() if n.startswith("weights.")}
    return weights, found, load_state(EARLIER / f"{name}-state.safetensors")


def writes_the_same(state, name: str, folder: Path) -> bool:
    """Saving what was loaded loses nothing."""
    state.save(folder / name)
    ours, theirs = (load_file(f) for f in (folder / name, EARLIER / f"{name}-state.safetensors"))
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


@torch.no_grad()
def test_a_titans_layer_inside_a_chunk(tmp_path):
    weights, found, state = restored("titans")
    assert list(state.pos) == [19, 6] and writes_the_same(state, "titans", tmp_path)
    layer = SelfModifyingTitans(state.config, dtype=torch.float64)
    layer.load_state_dict(weights)
    y, state = layer(found["x"], state, backend="chunked")
    assert relative(y, found["y"]) < 1e-12 and list(state.pos) == [30, 17]


@torch.no_grad()
def test_a_cms_whose_levels_have_learned(tmp_path):
    weights, found, state = restored("cms")
    assert list(state.pos) == [14, 14] and writes_the_same(state, "cms", tmp_path)
    layer = ContinuumMemory(state.config, dtype=torch.float64)
    layer.load_state_dict(weights)
    fresh, _ = layer(found["x"][:, :2], backend="chunked")
    y, state = layer(found["x"][:, :2], state, backend="chunked")
    state = layer.refresh(state, found["errors"], backend="chunked")
    z, _ = layer(found["x"][:, 2:], state, backend="chunked")
    assert relative(torch.cat([y, z], 1), found["y"]) < 1e-12
    assert relative(fresh, y) > 1e-3  # both levels are not what they were


@torch.no_grad()
@pytest.mark.parametrize("learn", ["next_token", "off"])
def test_a_model_inside_a_segment_that_has_learned(learn, tmp_path):
    model = HopeForCausalLM.from_pretrained(EARLIER / "model").eval()
    found, state = load_file(EARLIER / "model.safetensors"), load_state(EARLIER / "model-state.safetensors")
    assert list(state.pos) == [23, 17] and any(state.seen) and writes_the_same(state, "model", tmp_path)
    logits, _ = model(found["ids"], state, learn=learn, backend="chunked")
    same = relative(logits, found["logits"])
    assert same < 1e-12 if learn == "next_token" else same > 1e-3


@pytest.mark.parametrize("state, now, then", [
    (lambda: SelfModifyingTitans(TitansConfig(16)).init_state(2), b"ops.titans.state", b"ops.titans.fast_weights"),
    (lambda: ContinuumMemory(CMSConfig(16, (4,))).init_state(2), b"ops.cms.state", b"layers.cms_state"),
])
def test_pickles_find_the_classes_that_have_moved(state, now, then):
    state = state()
    text = pickle.dumps(state, protocol=0)
    assert b"hope_kernels." + now in text
    found = pickle.loads(text.replace(b"hope_kernels." + now, b"hope_kernels." + then))
    assert type(found) is type(state) and found.pos == state.pos


def test_pickles_from_before_adam_have_its_fields():
    layer = ContinuumMemory(CMSConfig(16, (4, 8), optimizer="momentum"))
    with torch.no_grad():
        _, state = layer(torch.randn(2, 4, 16))
        state = layer.refresh(state, torch.randn(2, 4, 16))
        fields = {n: v for n, v in state.clone().__getstate__().items() if n not in ("squares", "tokens", "steps")}
        found = type(state).__new__(type(state))
        found.__setstate__(fields)
        x, error = torch.randn(2, 4, 16), torch.randn(2, 4, 16)
        a, _ = layer(x, found)
        b, _ = layer(x, state)
        found.owned_by(layer)
        layer.refresh(found, error)
        layer.refresh(state, error)
    assert torch.equal(a, b) and all(map(torch.equal, found.tensors(), state.tensors()))
