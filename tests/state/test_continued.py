"""A session that goes on with other settings: the next step is the new model's, and nothing learned is lost."""

import copy

import pytest
import torch
from small_model import ids, tiny

from hope_kernels import CMSConfig, ContinuumMemory, HopeConfig, load_state, state_file
from hope_kernels.layers.attention import CausalAttention

CMS = CMSConfig(8, (4, 8), expansion=2.0, lr=(0.02, 0.01))
EXACT = dict(rtol=0, atol=1e-12)
BEFORE, AFTER = 23, 26  # tokens read before and after; the open segment has begun at 20

# what is changed, from what
CHANGES = {
    "other rates": ({}, dict(cms=CMS.replace(lr=(0.1, 0.003)))),
    "momentum begins": ({}, dict(cms=CMS.replace(optimizer="momentum"))),
    "momentum ends": (dict(cms=CMS.replace(optimizer="momentum")), {}),
    "another momentum": (dict(cms=CMS.replace(optimizer="momentum")),
                         dict(cms=CMS.replace(optimizer="momentum", momentum=0.5))),
    "adam begins": (dict(cms=CMS.replace(optimizer="momentum")), dict(cms=CMS.replace(optimizer="adam"))),
    "adam with other betas": (dict(cms=CMS.replace(optimizer="adam")),
                              dict(cms=CMS.replace(optimizer="adam", betas=(0.8, 0.9)))),
    "relative rates": (dict(cms=CMS.replace(optimizer="momentum")),
                       dict(cms=CMS.replace(optimizer="momentum", relative=True))),
    "steps keep what was learned": ({}, dict(cms=CMS.replace(precondition=10.0))),
    "steps keep it no more": (dict(cms=CMS.replace(precondition=10.0)), {}),
    "muon": ({}, dict(cms=CMS.replace(optimizer="muon"))),
    "fewer blocks": ({}, dict(learn_blocks=(-1,))),
    "other blocks": (dict(learn_blocks=(0,)), dict(learn_blocks=(2,))),
    "nothing learns any more": ({}, dict(cms=CMS.replace(lr=0.0))),
    "learning begins": (dict(cms=CMS.replace(lr=0.0)), {}),
    "a slow level is frozen": ({}, dict(cms=CMS.replace(lr=(0.02, 0.0)))),
    "a narrower window": (dict(window=11), dict(window=5)),
    "a wider window": (dict(window=5), dict(window=11)),
    "no window": (dict(window=5), {}),
    "a window": ({}, dict(window=5)),
    "sinks beside a window": ({}, dict(window=5, sinks=2)),
    "a wider window beside sinks": (dict(window=5, sinks=3), dict(window=11, sinks=3)),
    "windows of some blocks": (dict(window=(5, None, 7), sinks=(2, 0, 0)), dict(window=(11, 4, None), sinks=(2, 0, 0))),
    "everything": (dict(window=5, learn_blocks=(0, 1)),
                   dict(window=9, learn_blocks=(1, 2), cms=CMS.replace(lr=0.004, optimizer="momentum"))),
}
changed = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())


def model(**options):
    return tiny("attention", layers=3, **{"cms": CMS, **options})


def read(m, tokens, state, cuts=(), lengths=None):
    logits, at = [], 0
    with torch.no_grad():
        for to in (*cuts, tokens.shape[1]):
            rows = None if lengths is None else [min(max(n - at, 0), to - at) for n in lengths]
            y, state = m(tokens[:, at:to], state, rows, learn="next_token")
            logits, at = [*logits, y], to
    return torch.cat(logits, 1), state


def started(change, cuts=(), tokens=BEFORE, batch=2):
    """(the model before, the one after, the state between)."""
    one, other = model(**change[0]), model(**change[1])
    _, state = read(one, ids(batch, tokens, 3), one.init_state(batch), cuts)
    return one, other, state


@changed
def test_the_next_call_is_the_new_models_however_it_is_split_saved_or_padded(change, tmp_path):
    _, other, state = started(change)
    tokens = ids(2, AFTER, 4)
    want, end = read(other, tokens, state.clone())
    for before in ((9, 20), (1, 2, 3, 22)):  # how the state came to be
        got, same = read(other, tokens, started(change, before)[2])
        torch.testing.assert_close(got, want, **EXACT)
    got, same = read(other, tokens, state.clone(), (1, 4, 17))
    torch.testing.assert_close(got, want, **EXACT)
    state.save(tmp_path / "s")
    got, same = read(other, tokens, load_state(tmp_path / "s"))
    assert torch.equal(got, want) and same.config is other.config
    same.save(tmp_path / "t")
    got, same = read(other, ids(2, 9, 5), load_state(tmp_path / "t"))
    torch.testing.assert_close(got, read(other, ids(2, 9, 5), end.clone())[0], **EXACT)
    got, _ = read(other, tokens, state.clone(), (), [AFTER, 7])
    torch.testing.assert_close(got[0], want[0], **EXACT)
    torch.testing.assert_close(got[1, :7], want[1, :7], **EXACT)
    end.validate("after", values=True)


@changed
def test_the_given_state_stays_as_it_is_in_grad_mode_and_after_an_error(change):
    _, other, state = started(change)
    tokens, was = ids(2, AFTER, 4), state.clone()
    want, _ = read(other, tokens, state.clone())
    got, new = other(tokens, state, learn="next_token")
    torch.testing.assert_close(got.detach(), want, **EXACT)
    broken = copy.deepcopy(other)
    with torch.no_grad():
        broken.embed.weight[int(tokens[0, -1])] = float("nan")
    state.fingerprint = was.fingerprint = None
    with pytest.raises(ValueError, match="non-finite"), torch.no_grad():
        broken(tokens, state, learn="next_token", check_finite=True)
    assert state.config is was.config and new.config is other.config and state.pos == was.pos
    assert torch.equal(state.ids, was.ids) and state.seen == was.seen
    for mine, theirs in zip(state.states()[1:], was.states()[1:], strict=True):
        for a, b in zip(mine.compact().tensors(), theirs.compact().tensors(), strict=True):
            assert torch.equal(a, b)


@changed
def test_a_guard_and_kept_segments_go_on_too(change, tmp_path):
    """Once from memory and once from a file, with text and with replay: the same, and valid."""
    one, other = model(**change[0]), model(**change[1])
    with torch.no_grad():
        _, state = one(ids(2, 3, 3), guard=True, learn="next_token")
        state = one.read(ids(2, 20, 4), state, replay=3).state
        state.save(tmp_path / "s")
        ends = []
        for held in (state, load_state(tmp_path / "s")):
            other.replay(held)
            y, end = other(ids(2, 14, 5), held, learn="next_token")
            ends.append(y)
    parts = [s for s in (end, end.guard, end.kept) if s is not None]  # what cannot learn has no guard
    assert torch.equal(*ends) and {s.config for s in parts} == {other.config}
    end.validate("after", values=True)


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
def test_a_state_from_a_file_is_compared_by_identity_after_its_first_call(mixer, tmp_path):
    one = tiny(mixer, layers=3, cms=CMS, learn_blocks=(1,))
    with torch.no_grad():
        one(ids(1, 9, 3), state := one.init_state(1), learn="next_token", guard=True)
    fresh = [s.config for s in state.states()]
    state.save(tmp_path / "s")
    loaded = load_state(tmp_path / "s")
    assert [s.config for s in loaded.states()] == fresh
    read(one, ids(1, 1, 4), loaded)
    assert all(s.config is c for s, c in zip(loaded.states(), fresh, strict=True))


def test_what_a_window_had_passed_stays_passed():
    """A wider window begins where the narrower one stood, and from then on reaches back to there; a layer's
    own call does the same as a model's."""
    config = HopeConfig(10, 8, 1, mixer="attention", num_heads=2, window=4)
    torch.manual_seed(0)
    narrow = CausalAttention(config, dtype=torch.float64)
    wide = CausalAttention(config.replace(window=None), dtype=torch.float64)
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    with torch.no_grad():
        _, state = narrow(x[:, :20])
        y, after = wide(x[:, 20:], state.clone())
        assert after.lost == [16] and after.base == [16] and after.config is wide.config
        # the same keys at the same positions: the layer that saw the tokens from the 16th on
        alone = wide.init_state(1)
        alone.pos[:], alone.base[:], alone.lost[:] = [16], [16], [16]
        torch.testing.assert_close(y, wide(x[:, 16:], alone)[0][:, 4:], **EXACT)
        pure, same = wide(x[:, 20:], state, update=False)
    assert torch.equal(pure, y) and same is state and state.config is config


def test_other_sinks_are_refused_once_a_window_has_dropped_tokens():
    before, after = model(window=20, sinks=1), model(window=20, sinks=2)
    _, state = read(before, ids(1, 21, 3), before.init_state(1))
    read(after, ids(1, 3, 4), state.clone())
    _, state = read(before, ids(1, 1, 5), state)
    with pytest.raises(ValueError, match="sinks is 2 and was 1 when tokens left the window"):
        read(after, ids(1, 3, 4), state)
    assert state.config is before.config
    read(before, ids(1, 3, 4), state)


@pytest.mark.parametrize("lost, message", [([17], "state.lost"), ([15], "state.base"), ([-1], "state.lost")])
def test_a_damaged_cache_is_refused_as_before(lost, message):
    config = HopeConfig(10, 8, 1, mixer="attention", num_heads=2, window=4)
    wide = CausalAttention(config.replace(window=None))
    with torch.no_grad():
        _, state = CausalAttention(config)(torch.randn(1, 20, 8))
        state = wide(torch.randn(1, 2, 8), state.replace(fingerprint=None))[1]
    state.validate("as it is")
    with pytest.raises(ValueError, match=message):
        state.replace(lost=type(state.lost)(lost)).validate("changed")


def test_pending_factors_are_folded_at_the_rate_they_were_learned_with():
    torch.manual_seed(0)
    layers = [ContinuumMemory(CMS.replace(lr=rate), dtype=torch.float64) for rate in (0.02, 0.3, 0.0)]
    x, e = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    for other in layers[1:]:
        other.load_state_dict(layers[0].state_dict())
        ends = []
        for slots in (0, 8):
            layers[0].pending = slots
            with torch.no_grad():
                _, state = layers[0](x)
                layers[0].refresh(state, e)
                y, _ = other(x, state, learn=False)
            ends.append((y, other.detach_level(state, 0)))
        assert state.config is other.config
        torch.testing.assert_close(ends[0], ends[1], **EXACT)
        assert not torch.equal(ends[0][1]["up"], other.levels[0]["up"])


def test_a_layer_that_learns_no_more_owes_no_errors():
    torch.manual_seed(0)
    learns, frozen = (ContinuumMemory(CMS.replace(lr=rate)) for rate in (0.1, 0.0))
    frozen.load_state_dict(learns.state_dict())
    with torch.no_grad():
        _, state = learns(torch.randn(1, 4, 8))
        frozen(torch.randn(1, 7, 8), state)
        _, state = frozen(torch.randn(1, 2, 8), state)
        _, state = learns(torch.randn(1, 3, 8), state)
    state.validate("after")
    assert state.pos == [16] and state.tainted == [1]


STRUCTURES = {
    "cms.chunks": dict(cms=CMS.replace(chunks=(4, 16))),
    "cms.expansion": dict(cms=CMS.replace(expansion=4.0)),
    "cms.mlp": dict(cms=CMS.replace(mlp="swiglu")),
    "cms.variant": dict(cms=CMS.replace(variant="nested")),
    "num_kv_heads": dict(num_kv_heads=2),
    "rope_theta": dict(rope_theta=500.0),
    r"cms\[1\].chunks": dict(cms=(CMS, CMS.replace(chunks=(8, 16)), CMS)),
    r"cms\[2\]": dict(cms=(CMS, CMS, None)),
    "num_layers": dict(layers=2),
}


@pytest.mark.parametrize("field", STRUCTURES)
def test_another_structure_is_refused_by_the_name_of_its_field(field):
    other, one = tiny("attention", **{"layers": 3, "cms": CMS, **STRUCTURES[field]}), model()
    with pytest.raises(ValueError, match=rf"argument state belongs to HopeConfig\({field}=.*and not to "
                       rf"HopeConfig\({field}=") as error, torch.no_grad():
        other(ids(1, 3), one.init_state(1))
    assert len(str(error.value)) < 300


def test_a_state_whose_parts_disagree_names_the_field(tmp_path, monkeypatch):
    state = model().init_state(1)
    state.cms[1].config = CMS.replace(lr=0.5)
    with pytest.raises(ValueError, match=r"cms\[1\] of state belongs to CMSConfig\(lr=0.5, ...\) and not to "
                                         r"CMSConfig\(lr=\(0.02, 0.01\), ...\), its model's"):
        state.validate("x")
    with pytest.raises(ValueError, match=r"cms\[1\] of state belongs to CMSConfig\(lr=0.5, ...\)") as error:
        state.save(tmp_path / "s")
    assert len(str(error.value)) < 400 and not (tmp_path / "s").exists()
    with monkeypatch.context() as elsewhere:  # a file that another program has made
        elsewhere.setattr(state_file, "_whole", lambda tree, tensors: None)
        state.save(tmp_path / "s")
    with pytest.raises(ValueError, match=r"cms\[1\] of state belongs to CMSConfig\(lr=0.5, ...\)") as error:
        load_state(tmp_path / "s")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("before, after, kept", [
    (dict(optimizer="adam"), dict(optimizer="adam", lr=0.2), ["grads", "moments", "squares"]),
    (dict(optimizer="adam"), dict(optimizer="adam", betas=(0.5, 0.9)), ["grads"]),
    (dict(optimizer="adam"), dict(optimizer="momentum"), ["grads"]),
    (dict(optimizer="momentum"), dict(optimizer="momentum", momentum=0.2), ["grads", "moments"]),
    (dict(optimizer="momentum"), dict(optimizer="momentum", relative=True), ["grads"]),
    (dict(optimizer="momentum"), dict(), ["grads"]),
    (dict(optimizer="adam"), dict(optimizer="adam", lr=0.0), []),
])
def test_what_the_next_step_starts_from(before, after, kept):
    """What another optimizer would misread is gone, what it reads the same way is there; what was learned is."""
    torch.manual_seed(0)
    one, other = (ContinuumMemory(CMSConfig(8, (4, 16), lr=0.1).replace(**c)) for c in (before, after))
    other.load_state_dict(one.state_dict())
    state = one.init_state(1)
    with torch.no_grad():
        for _ in range(7):
            one.refresh(one(torch.randn(1, 4, 8), state)[1], torch.randn(1, 4, 8))
        new = other.continued(state)
    assert new.config is other.config and [w is v for w, v in zip(new.weights, state.weights)] == [True, True]
    held = [n for n in ("grads", "moments", "squares") if getattr(new, n)[1] is not None]
    assert held == kept and all(getattr(new, n)[1] is getattr(state, n)[1] for n in kept)
    assert new.steps == (state.steps if "squares" in kept else [[0], [0]])
    assert new.tokens == (state.tokens if "grads" in kept else [[0], [0]])
    new.validate("x", values=True)


def test_consolidation_takes_a_state_with_other_settings():
    one, other, state = started(CHANGES["momentum ends"], batch=1)
    learned = read(other, ids(1, AFTER, 4), state.clone())[0]
    with torch.no_grad():
        other.consolidate(state)
    torch.testing.assert_close(read(other, ids(1, AFTER, 4), state)[0], learned, **EXACT)
    assert state.config is other.config and all(m is None for c in state.cms for m in c.moments)
