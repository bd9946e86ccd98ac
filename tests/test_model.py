"""The whole model: learning while reading against a plain autograd rule, and the streaming contract with
learning on."""

import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from numerics import relative
from small_model import V, ids, tiny

from hope_kernels import CMSConfig, HopeForCausalLM


def with_pending(model, tokens: int) -> HopeForCausalLM:
    for block in model.blocks:
        block.cms.pending = tokens
    return model


def variants():
    yield "hope", tiny()
    yield "titans", tiny("titans")
    yield "attention", tiny("attention")
    yield "window", tiny("attention", window=5)
    yield "sinks", tiny("attention", window=5, sinks=3)
    yield "per block", tiny("attention", window=(4, None), sinks=(2, 0), rope_theta=(100.0, 1e4), qk_norm=True,
                            head_dim=6, attention_scale=0.5, post_norm=True, embed_scale=8**0.5,
                            cms=CMSConfig(8, (4, 8), mlp="geglu", post_norm=True, lr=0.02))
    yield "nested-momentum", tiny(
        cms=CMSConfig(8, (4, 8, 16), variant="nested", optimizer="momentum", lr=0.01, expansion=1.0)
    )
    yield "independent-muon", tiny(
        cms=CMSConfig(8, (2, 6), variant="independent", optimizer="muon", mlp="swiglu", norm="layernorm")
    )
    yield "pending", with_pending(tiny(cms=CMSConfig(8, (4, 8), lr=0.02, expansion=2.0)), 8)
    yield "two-periods", tiny(
        cms=(CMSConfig(8, (4,), lr=0.02, expansion=1.0), CMSConfig(8, (8, 16), lr=0.01, expansion=1.0))
    )


MODELS = dict(variants())
named = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def plain_learning(model: HopeForCausalLM, sequence: torch.Tensor) -> torch.Tensor:
    """learn="next_token" for one row, gradient descent, sequential CMS, written without any of the engine's
    learning code: segment by segment, functional_call over the parameters, one autograd call per segment,
    plain subtraction."""
    C = model.segment
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    learned = {}
    for b, cms in enumerate(model.config.block_cms):
        for l, (period, lr) in enumerate(zip(cms.chunks, cms.learning_rates)):
            for name in ("up", "down"):
                learned[f"blocks.{b}.cms.levels.{l}.{name}"] = [period, lr, 0.0]
    state, logits = model.init_state(1), []
    for start in range(0, len(sequence), C):
        segment = sequence[start : start + C].unsqueeze(0)
        leaves = {n: params[n].clone().requires_grad_() for n in learned}
        constants = [m.detach() for m in state.mixers]

        def forward(weights, segment=segment, constants=constants):
            h, mixers = F.embedding(segment, weights["embed.weight"]), []
            for b, block in enumerate(model.blocks):
                own = {
                    n.removeprefix(f"blocks.{b}."): w for n, w in weights.items() if n.startswith(f"blocks.{b}.")
                }
                y, mixer = block.mixer.scan(block.norm(h), constants[b], [segment.shape[1]], constant_memory=True)
                mixers.append(mixer)
                h = h + y
                for l in range(len(block.cms.levels)):
                    n = F.rms_norm(h, (8,), own[f"cms.levels.{l}.norm_gain"], 1e-6)
                    h = h + F.gelu(
                        n @ own[f"cms.levels.{l}.up"].T, approximate="tanh"
                    ) @ own[f"cms.levels.{l}.down"].T
            return model.norm(h) @ weights["embed.weight"].T, mixers

        out, mixers = forward({**params, **leaves})
        state.mixers = [m.detach() for m in mixers]
        logits.append(out.detach())
        end = start + C
        if end >= len(sequence):
            break
        loss = F.cross_entropy(out[0], sequence[start + 1 : end + 1], reduction="sum")
        for (name, entry), g in zip(learned.items(), torch.autograd.grad(loss, list(leaves.values()))):
            period, lr, total = entry
            entry[2] = total + g
            if end % period == 0:
                params[name] = params[name] - lr * entry[2]
                entry[2] = 0.0
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", ["hope", "titans", "attention", "pending", "two-periods"])
def test_learning_equals_plain_autograd(name):
    model = MODELS[name]
    sequence = ids(1, 71, 3)
    with torch.no_grad():
        ours, _ = model(sequence, learn="next_token")
        frozen, _ = model(sequence)
    assert relative(ours, frozen) > 1e-4
    assert relative(ours, plain_learning(model, sequence[0])) < 1e-10


@named
@settings(max_examples=2)
@given(cuts=st.lists(st.integers(0, 70), max_size=6), seed=st.integers(0, 99))
def test_any_split_equals_one_call(model, cuts, seed):
    tokens, edges = ids(2, 70, seed), sorted({0, 70, *cuts})
    with torch.no_grad():
        whole, _ = model(tokens, learn="next_token")
        state, parts = None, []
        for a, b in zip(edges, edges[1:]):
            logits, state = model(tokens[:, a:b], state, learn="next_token")
            parts.append(logits)
    assert relative(torch.cat(parts, 1), whole) < 1e-10


@named
def test_token_by_token_equals_one_call(model):
    tokens = ids(2, 40)
    with torch.no_grad():
        whole, _ = model(tokens, learn="next_token")
        state, parts = model.init_state(2), []
        for t in range(40):
            logits, state = model(tokens[:, t : t + 1], state, learn="next_token")
            parts.append(logits)
    assert relative(torch.cat(parts, 1), whole) < 1e-10


@named
@settings(max_examples=2)
@given(calls=st.lists(st.tuples(*[st.integers(0, 19)] * 3), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_ragged_company_equals_rows_alone(model, calls, seed):
    """Different lengths per row and call; rows reordered between calls."""
    streams = ids(3, 80, seed)
    order, at, outs = [0, 1, 2], [0, 0, 0], [[], [], []]
    with torch.no_grad():
        state = model.init_state(3)
        for lengths in calls:
            T = max(max(lengths), 1)
            x = torch.zeros(3, T, dtype=torch.long)
            for slot, row in enumerate(order):
                x[slot, : lengths[slot]] = streams[row, at[row] : at[row] + lengths[slot]]
            logits, state = model(x, state, lengths=lengths, learn="next_token")
            for slot, row in enumerate(order):
                outs[row].append(logits[slot, : lengths[slot]])
                assert not logits[slot, lengths[slot] :].any()
                at[row] += lengths[slot]
            order, state = [order[i] for i in (1, 2, 0)], state.select([1, 2, 0])
        for row in range(3):
            if at[row]:
                alone, _ = model(streams[row : row + 1, : at[row]], learn="next_token")
                assert relative(torch.cat(outs[row]).unsqueeze(0), alone) < 1e-10


@named
@settings(max_examples=2)
@given(data=st.data())
def test_mode_is_a_property_of_each_token(model, data):
    """Stretches read with learn="off" between others: how the calls are cut does not matter, and the weights
    stand still meanwhile."""
    edges = sorted({0, 60, *data.draw(st.lists(st.integers(0, 60), max_size=3))})
    modes = [data.draw(st.sampled_from(["off", "next_token"])) for _ in edges[1:]]
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=5))
    tokens = ids(1, 60, 5)

    def run(extra):
        state, parts = None, []
        for a, b, mode in zip(edges, edges[1:], modes):
            inner = sorted({a, b, *[c for c in extra if a < c < b]})
            for c, d in zip(inner, inner[1:]):
                before = None if state is None else [w for cms in state.cms for w in cms.weights]
                logits, state = model(tokens[:, c:d], state, learn=mode)
                if mode == "off" and before is not None:
                    assert all(
                        x is y for x, y in zip(before, [w for cms in state.cms for w in cms.weights])
                        if x is None or y is None
                    )
                parts.append(logits)
        return torch.cat(parts, 1)

    with torch.no_grad():
        assert relative(run(cuts), run([])) < 1e-10


def test_sessions_go_on_in_another_process(tmp_path):
    names, prompt, straight, begun = ["hope", "attention", "nested-momentum"], ids(1, 37, 8), {}, {}
    for name in names:
        model = MODELS[name]
        model.save_pretrained(tmp_path / name)
        straight[name] = model.generate(prompt, 30, temperature=1.0, seed=3).tokens[0].tolist()
        out = model.generate(prompt, 12, temperature=1.0, seed=3)
        out.state.save(tmp_path / f"{name}.safetensors")
        begun[name] = out.tokens[0].tolist()
    script = (
        "import hope_kernels as hk\n"
        f"for name in {names}:\n"
        f"    model = hk.HopeForCausalLM.from_pretrained({str(tmp_path)!r} + '/' + name)\n"
        f"    state = hk.load_state({str(tmp_path)!r} + f'/{{name}}.safetensors')\n"
        "    print(model.generate(None, 18, state, temperature=1.0, seed=3).tokens[0].tolist())\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name, line in zip(names, printed, strict=True):
        assert begun[name] + eval(line) == straight[name], name


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
def test_all_rates_zero_is_learning_off_bit_for_bit(mixer):
    model = tiny(mixer, cms=CMSConfig(8, (4, 8), lr=0.0, expansion=1.0))
    tokens = ids(2, 50)
    with torch.no_grad():
        a = b = None
        for cut in ((0, 3), (3, 31), (31, 50)):
            off, a = model(tokens[:, slice(*cut)], a)
            on, b = model(tokens[:, slice(*cut)], b, learn="next_token")
            assert torch.equal(off, on)
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors()))


def test_level_with_rate_zero_is_never_copied():
    model = tiny(cms=CMSConfig(8, (4, 8), lr=(0.05, 0.0), expansion=1.0))
    with torch.no_grad():
        _, state = model(ids(1, 41), learn="next_token")
    for cms in state.cms:
        assert cms.weights[0] is not None and cms.weights[1] is None


def test_grad_mode_leaves_the_state_alone_and_trains():
    model = tiny()
    tokens = ids(2, 30)
    with torch.no_grad():
        _, state = model(tokens[:, :10], learn="next_token")
    before = [t.clone() for t in state.tensors()]
    logits, after = model(tokens[:, 10:], state, learn="next_token")
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors())) and state.pos == [10, 10]
    with torch.no_grad():
        given = state.clone()  # advancing the graph's own inputs in place would be refused by backward
        same, advanced = model(tokens[:, 10:], given, learn="next_token")
    assert advanced is given and relative(logits, same) < 1e-12
    logits.square().sum().backward()
    # the levels that this sequence has refreshed are its own constants
    trained = [p for n, p in model.named_parameters() if "mixer" in n or "embed" in n or "levels.2" in n]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert after.pos == [30, 30]


def test_learning_lowers_the_loss_on_a_repeating_text():
    model = tiny(cms=CMSConfig(8, (4, 8), lr=0.05))
    text = ids(1, 10, 1).repeat(1, 60)
    with torch.no_grad():
        off, _ = model(text)
        on, _ = model(text, learn="next_token")

    def loss(logits):
        return float(F.cross_entropy(logits[0, 300:-1], text[0, 301:]))

    assert loss(on) < 0.7 * loss(off)


def test_pretrained_round_trip(tmp_path):
    for name, model in MODELS.items():
        model.save_pretrained(tmp_path / name)
        again = HopeForCausalLM.from_pretrained(tmp_path / name)
        assert again.config == model.config
        assert torch.equal(again(ids(1, 9))[0], model(ids(1, 9))[0])


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2)])
def test_frozen_blocks_are_as_blocks_that_learn_next_to_nothing(mixer, frozen):
    """Blocks below the first that learns take no part in the backward; what the others learn does not know."""
    ids, logits = torch.randint(0, V, (2, 30), generator=torch.Generator().manual_seed(0)), []
    for least in (0.0, 1e-300):
        rates = [least if b in frozen else 0.05 for b in range(3)]
        model = tiny(mixer, layers=3, cms=tuple(CMSConfig(8, (4, 8), expansion=2.0, lr=r) for r in rates))
        with torch.no_grad():
            logits.append(model(ids, lengths=[30, 17], learn="next_token")[0])
    assert relative(*logits) < 1e-12
    with torch.no_grad():
        assert not torch.equal(logits[0], model(ids, lengths=[30, 17])[0])
