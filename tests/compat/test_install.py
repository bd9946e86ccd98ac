"""Our layer in the package's own HOPEModel, beside the package's."""

import copy
import sys

import pytest
import torch

from hope_kernels.compat import nested_learning as ours

package = pytest.importorskip("nested_learning.model")
levels = pytest.importorskip("nested_learning.levels")


@pytest.fixture
def installed():
    ours.install()
    yield
    ours.uninstall()


def config(**options):
    chosen = {
        "vocab_size": 31, "dim": 16, "num_layers": 2, "heads": 2, "block_variant": "hope_selfmod",
        "titan_level": levels.LevelSpec("titan", 1),
        "cms_levels": [levels.LevelSpec("fast", 4), levels.LevelSpec("slow", 8)], "self_mod_lr": 0.02,
        "self_mod_chunk_size": 4, "self_mod_chunk_size_memory": 8, **options,
    }
    return package.ModelConfig(**chosen)


def pair(dtype, **options):
    """The same model without and with our layer; weights in which the memories count."""
    ours.uninstall()
    torch.manual_seed(0)
    theirs = package.HOPEModel(config(**options)).to(dtype)
    ours.install()
    mine = package.HOPEModel(config(**options)).to(dtype)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    assert all(isinstance(b.selfmod, ours.SelfModifyingTitans) for b in mine.blocks)
    assert not any(isinstance(b.selfmod, ours.SelfModifyingTitans) for b in theirs.blocks)
    return mine, theirs


def teach_signal(model, logits, ids):
    """dL/dh of the mean next-token loss, h being what the head reads, as the package's training loop has it."""
    wrong = torch.softmax(logits, -1) - torch.nn.functional.one_hot(ids.roll(-1, 1), logits.shape[-1])
    wrong[:, -1] = 0
    return wrong @ model.lm_head.weight / max(1, ids.numel() - ids.shape[0])


def learned(model, ids, fast):
    """Logits of two pieces, each read without and then with its teach signal: reads, writes of the memories
    and updates of the CMS."""
    state, outputs, signal = model.init_fast_state() if fast else None, [], None
    with torch.no_grad():
        for part in ids.split(13, 1):
            logits = model(part, fast_state=state)
            signal = 50 * teach_signal(model, logits, part)
            outputs += [logits, model(part, fast_state=state, teach_signal=signal)]
    return torch.cat([o.flatten() for o in outputs])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("options", [{}, {"self_mod_chunk_size": 1, "self_mod_chunk_size_memory": None},
                                     {"self_mod_momentum": 0.9, "self_mod_adaptive_q": True}])
def test_their_model_learns_the_same_on_our_layer(installed, fast, options):
    mine, theirs = pair(torch.float64, **options)
    ids = torch.randint(0, 31, (1, 26))
    a, b = learned(mine, ids, fast), learned(theirs, ids, fast)
    assert not torch.allclose(b, learned(theirs, ids.flip(1), fast), atol=1e-2)
    assert float((a - b).abs().max()) < 1e-11 * float(b.abs().max())


def test_fp32_on_the_kernels(installed):
    mine, theirs = pair(torch.float32)
    ids = torch.randint(0, 31, (1, 26))
    exact = copy.deepcopy(theirs).double()
    truth = learned(exact, ids, True)
    mine_error, their_error = ((learned(m, ids, True) - truth).abs().max() for m in (mine, theirs))
    assert float(mine_error) <= 2 * float(their_error) + 1e-7


def test_gradients_of_training_are_the_same(installed):
    mine, theirs = pair(torch.float64)
    ids = torch.randint(0, 31, (2, 12))
    for model in (mine, theirs):
        torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-14), name


def test_uninstall_puts_the_package_back():
    blocks = sys.modules["nested_learning.hope.block"]
    before = blocks.SelfModifyingTitans, blocks.SelfModifyingTitansConfig
    ours.install()
    ours.install()
    assert blocks.SelfModifyingTitans is ours.SelfModifyingTitans
    ours.uninstall()
    ours.uninstall()
    assert (blocks.SelfModifyingTitans, blocks.SelfModifyingTitansConfig) == before


def test_without_the_package_there_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "nested_learning.hope.block", None)
    with pytest.raises(ImportError, match="nested-learning 0.2.0 is not installed"):
        ours.install()
