"""The package's checkpoints in our HOPEModel: logits, streaming, generation, sessions, files."""

import pytest
import torch

import hope_kernels as hk
from hope_kernels.compat import nested_learning as ours
from hope_kernels.state_file import load_state, save_state

package = pytest.importorskip("nested_learning.model")
levels = pytest.importorskip("nested_learning.levels")

SELFMOD = [
    {}, {"self_mod_chunk_size": 4, "self_mod_chunk_size_memory": 8},
    {"self_mod_chunk_size": 4, "qk_l2_norm": True, "self_mod_adaptive_q": True},
    {"self_mod_chunk_size": 3, "self_mod_use_alpha": False, "self_mod_local_conv_window": None},
    {"self_mod_chunk_size": 3, "self_mod_use_skip": False, "self_mod_objective": "dot"},
]
ATTENTION = [{}, {"qk_l2_norm": True}]


def pair(variant, dtype=torch.float64, **options):
    """(ours, theirs) on the same weights, every one of them moved off its special initial value."""
    torch.manual_seed(0)
    chosen = {"vocab_size": 31, "dim": 16, "num_layers": 2, "heads": 2, "self_mod_lr": 0.02,
              "titan_level": levels.LevelSpec("titan", 1), "block_variant": variant, **options}
    chosen.setdefault("cms_levels", [levels.LevelSpec("fast", 4), levels.LevelSpec("slow", 8)])
    config = package.ModelConfig(**chosen)
    theirs = package.HOPEModel(config).to(dtype).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p) / max(p.shape[-1], 1) ** 0.5)
    mine = ours.HOPEModel(config, dtype=dtype, lr=0.05).eval()
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


@torch.no_grad()
def written(theirs, ids):
    """Logits of the package for one row whose memories write while they read: an all-zero teach signal, which
    moves no CMS level."""
    signal = torch.zeros(*ids.shape, theirs.config.dim, dtype=theirs.embed.weight.dtype)
    return theirs(ids, fast_state=theirs.init_fast_state(), teach_signal=signal)


def close(a, b, tolerance=1e-11):
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("options", ATTENTION)
@torch.no_grad()
def test_attention_has_the_logits_of_the_package(options):
    mine, theirs = pair("hope_attention", **options)
    ids = torch.randint(0, 31, (3, 21))
    assert close(mine(ids)[0], theirs(ids))


@pytest.mark.parametrize("options", SELFMOD)
@torch.no_grad()
def test_self_modifying_has_the_logits_of_the_package(options):
    mine, theirs = pair("hope_selfmod", **options)
    ids = torch.randint(0, 31, (1, 21))
    expected = written(theirs, ids)
    assert not close(theirs(ids), expected, 1e-4)  # the writes count
    assert close(mine(ids)[0], expected)


@pytest.mark.parametrize("variant,options", [("hope_attention", {}), ("hope_selfmod", SELFMOD[1])])
@torch.no_grad()
def test_split_anywhere_and_in_company(variant, options):
    mine, _ = pair(variant, **options)
    ids = torch.randint(0, 31, (2, 21))
    whole, state = mine(ids)[0], mine.init_state(2)
    parts = [mine(part, state)[0] for part in ids.split((5, 1, 15), 1)]
    assert close(torch.cat(parts, 1), whole) and close(mine(ids[1:])[0], whole[1:])


@pytest.mark.parametrize("variant,options", [("hope_attention", ATTENTION[1]), ("hope_selfmod", SELFMOD[2])])
@torch.no_grad()
def test_learning_sessions_and_generation(variant, options, tmp_path):
    mine, _ = pair(variant, **options)
    ids = torch.randint(0, 31, (1, 19))
    off, state = mine(ids)[0], mine.init_state(1)
    learned = mine(ids, state, learn="next_token")[0]
    assert close(learned[:, :4], off[:, :4]) and not close(learned[:, 12:], off[:, 12:], 1e-4)
    path = tmp_path / "session.safetensors"
    save_state(state, path)
    again = load_state(path)
    more = torch.randint(0, 31, (1, 9))
    assert torch.equal(mine(more, state, learn="next_token")[0], mine(more, again, learn="next_token")[0])
    tokens = mine.generate(ids, 6, learn="off").tokens
    greedy, read = [], ids
    for _ in range(6):
        greedy.append(mine(read)[0][:, -1].argmax(-1, keepdim=True))
        read = torch.cat([read, greedy[-1]], 1)
    assert torch.equal(tokens[:, -6:], torch.cat(greedy, 1))


@pytest.mark.parametrize("variant,options", [("hope_attention", ATTENTION[1]), ("hope_selfmod", SELFMOD[1])])
@torch.no_grad()
def test_folders(variant, options, tmp_path):
    mine, _ = pair(variant, **options)
    mine.save_pretrained(tmp_path)
    again = ours.HOPEModel.from_pretrained(tmp_path)
    ids = torch.randint(0, 31, (1, 9))
    assert torch.equal(again(ids)[0], mine(ids)[0])
    with pytest.raises(ValueError, match="does not fit its config.json"):
        hk.HopeForCausalLM.from_pretrained(tmp_path)


def test_our_own_configuration_is_the_packages():
    theirs = package.ModelConfig(31, 16, 1, 2, levels.LevelSpec("t", 1), [levels.LevelSpec("fast", 4)])
    mine = ours.ModelConfig(31, 16, 1, 2, ours.LevelSpec("t", 1), [ours.LevelSpec("fast", 4)])
    assert {k: v for k, v in vars(mine).items() if k not in ("titan_level", "cms_levels")} == {
        k: v for k, v in vars(theirs).items() if k not in ("titan_level", "cms_levels")
    }
    mine.block_variant = "hope_selfmod"
    assert ours.HOPEModel(mine).config.cms.chunks == (4,)


@pytest.mark.parametrize("options,message", [
    ({"block_variant": "hope_hybrid"}, "block_variant is 'hope_hybrid', expected 'hope_selfmod'"),
    ({"block_variant": "transformer"}, "block_variant is 'transformer'"),
    ({"cms_use_layernorm": False}, "cms_use_layernorm is False"),
    ({"self_mod_stopgrad_vhat": False}, "self_mod_stopgrad_vhat is False"),
    ({"self_mod_momentum": 0.9}, "self_mod_momentum is 0.9, expected 0"),
    ({"self_mod_chunk_size": 4, "self_mod_chunk_size_memory": 6}, "one dividing the other"),
    ({"block_variant": "hope_attention", "local_conv_window": 4}, "local_conv_window is 4"),
    ({"cms_levels": [ours.LevelSpec("a", 4), ours.LevelSpec("b", 6)]}, "each dividing the next"),
])
def test_what_has_no_equal_is_refused_by_name(options, message):
    config = ours.ModelConfig(**{
        "vocab_size": 31, "dim": 16, "num_layers": 1, "heads": 2, "titan_level": None,
        "cms_levels": [ours.LevelSpec("fast", 4)], "block_variant": "hope_selfmod", **options
    })
    with pytest.raises(ValueError, match=message):
        ours.HOPEModel(config)


def test_a_checkpoint_with_more_than_the_model_has():
    mine, theirs = pair("hope_selfmod")
    with pytest.raises(ValueError, match="argument state_dict has extra.weight"):
        mine.load_state_dict({**theirs.state_dict(), "extra.weight": torch.zeros(1)})
    other, _ = pair("hope_attention")
    with pytest.raises((ValueError, KeyError)):
        other.load_state_dict(theirs.state_dict())
