"""Blocks that learn and blocks that do not: what ``learn_blocks`` says is what lr = 0 in the others says, and
below the lowest learning block nothing is computed for learning."""

import json

import pytest
import torch
from small_model import ids, tiny

from hope_kernels import CMSConfig, HopeConfig, load_state
from hope_kernels.ops.cms import chain

CMS = CMSConfig(8, (4, 8), expansion=2.0, lr=(0.02, 0.01))
FROZEN = CMS.replace(lr=0.0)
MIXERS = ("self_modifying", "attention")


def learned(model, tokens, cuts=(23,)):
    state, logits, at = model.init_state(tokens.shape[0]), [], 0
    with torch.no_grad():
        for to in (*cuts, tokens.shape[1]):
            y, state = model(tokens[:, at:to], state, learn="next_token")
            logits, at = [*logits, y], to
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("mixer", MIXERS)
def test_other_blocks_have_rates_of_zero(mixer):
    chosen = tiny(mixer, layers=4, cms=CMS, learn_blocks=(1, -1))
    plain = tiny(mixer, layers=4, cms=(FROZEN, CMS, FROZEN, CMS))
    assert chosen.config.learn_blocks == (1, 3) and chosen.config.block_cms == plain.config.block_cms
    a, b = learned(chosen, ids(2, 41)), learned(plain, ids(2, 41))
    assert torch.equal(a[0], b[0])
    for mine, theirs in zip(a[1].cms, b[1].cms):
        assert mine.weights[0].keys() == theirs.weights[0].keys() if mine.weights[0] else theirs.weights[0] is None
    assert [any(w is not None for w in c.weights) for c in a[1].cms] == [False, True, False, True]


@pytest.mark.parametrize("mixer", MIXERS)
def test_below_the_lowest_learning_block_there_is_no_graph(mixer, monkeypatch):
    """A third of six blocks learns: the pass that learns has a graph in these two alone, and their levels are
    all that runs backward."""
    model = tiny(mixer, layers=6, cms=CMS, learn_blocks=(4, 5))
    graphs, backward, names = [], [], {id(b): i for i, b in enumerate(model.blocks)}
    for block in model.blocks:
        block.register_forward_hook(lambda block, _, out: graphs.append((names[id(block)], out[0].requires_grad)))
    run = chain._Learning.backward
    monkeypatch.setattr(chain._Learning, "backward", staticmethod(lambda *a: backward.append(1) or run(*a)))
    learned(model, ids(2, 21), ())  # five segments of four tokens, and one token that is only read
    assert {i for i, graph in graphs if graph} == {4, 5}
    assert len(backward) == 5 * 2 * CMS.num_levels


def test_a_session_of_some_blocks_is_split_saved_and_restored(tmp_path):
    model, tokens = tiny("attention", layers=3, cms=CMS, learn_blocks=[2], window=9), ids(2, 45)
    whole, state = learned(model, tokens, ())
    with torch.no_grad():
        parts, at = [], 0
        held = model.init_state(2)
        for to in (3, 20, 33, 45):
            y, held = model(tokens[:, at:to], held, learn="next_token")
            held.save(tmp_path / "s")
            parts, held, at = [*parts, y], load_state(tmp_path / "s"), to
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_frozen_blocks_share_one_configuration_that_stays_the_same_object():
    config = HopeConfig(32, 8, 6, cms=CMS, learn_blocks=(-1,))
    first = config.block_cms
    assert config.block_cms is first and all(c is first[0] for c in first[:5]) and first[5] is CMS
    assert config.learns and not config.replace(learn_blocks=()).learns
    assert HopeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.segment == 4 and config.replace(learn_blocks=None).block_cms == (CMS,) * 6


@pytest.mark.parametrize("blocks", [3, (6,), (-7,), (1, -5), (True,), (1.0,), "01"])
def test_other_values_are_refused(blocks):
    with pytest.raises(ValueError, match="HopeConfig: learn_blocks is"):
        HopeConfig(32, 8, 6, cms=CMS, learn_blocks=blocks)


def test_a_block_without_a_cms_cannot_learn():
    with pytest.raises(ValueError, match="blocks with a CMS, which block 1 has not"):
        HopeConfig(32, 8, 2, cms=(CMS, None), learn_blocks=(1,))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("change", [{}, dict(optimizer="adam", rank=2), dict(relative=True), dict(precondition=9.0),
                                    dict(lr=0.0)])
def test_what_a_session_costs_is_known_before(mixer, change):
    """The bytes of a state that has learned in every level, part by part and all together."""
    cms = CMS.replace(**change)
    model = tiny(mixer, layers=3, cms=cms, learn_blocks=(1, 2), **({"window": 6} if mixer == "attention" else {}))
    want, (_, state) = model.state_bytes(2, 25), learned(model, ids(2, 25), ())
    for part, names in {"weights": "weights", "copies": "copies", "grads": "grads", "moments": "moments squares",
                        "pending": "left right", "preconditioners": "inverses following"}.items():
        held = [d for c in state.cms for n in names.split() for d in getattr(c, n) if d is not None]
        assert want[part] == sum(t.numel() * t.element_size() for d in held for t in d.values())
    if mixer == "attention":
        reach, numbers = 6 + 4, 2 * 2 * 4  # window and segment; of a token: keys and values, two rows, one head of 4
        assert want["mixers"] == 3 * reach * numbers * 8
    else:
        assert sum(want.values()) == state.nbytes()
    assert want["segment"] == state.ids.nbytes
