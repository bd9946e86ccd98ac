"""Models of transformers as HOPE-Attention: the same logits without learning, the right MLPs learn, and the
streaming contract holds."""

import ast
import json
import pathlib

import pytest
import torch
import torch.nn.functional as F
from numerics import relative

import hope_kernels as hk
from hope_kernels.layers.attention import rope_rates

transformers = pytest.importorskip("transformers")

V = 50
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", rope_theta=5e5, factor=3.0)
TYPES = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config,
         "mistral": transformers.MistralConfig,
         "qwen3": transformers.Qwen3Config, "gemma2": transformers.Gemma2Config,
         "gemma3": transformers.Gemma3TextConfig}


def original(kind="llama", seed=0, dtype=torch.float32, **options):
    """A small model with every weight moved off its initial value."""
    shape = dict(vocab_size=V, hidden_size=32, intermediate_size=44, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=512, attn_implementation="sdpa", pad_token_id=None,
                 bos_token_id=None, eos_token_id=None)
    if kind == "gemma3":  # whose width of a head, and whose queries' scale, are numbers of their own
        shape |= dict(head_dim=12, query_pre_attn_scalar=10, sliding_window=9, num_hidden_layers=4,
                      layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"])
    elif kind == "qwen3":
        shape |= dict(head_dim=12)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(TYPES[kind](**{**shape, **options}), dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


MODELS = {
    "llama": {},
    "tied, llama3": dict(tie_word_embeddings=True, rope_parameters=LLAMA3),
    "mlp bias, linear": dict(mlp_bias=True, rope_parameters=LINEAR),
    "one key head": dict(num_key_value_heads=1, rms_norm_eps=1e-3),
    "all key heads": dict(kind="qwen2", num_key_value_heads=4, tie_word_embeddings=True),
    "biases": dict(kind="qwen2"),
    "mistral": dict(kind="mistral", sliding_window=None),
    "head width": dict(head_dim=16),
    "qwen3": dict(kind="qwen3"),
    "qwen3, narrow heads, tied": dict(kind="qwen3", head_dim=6, tie_word_embeddings=True, num_key_value_heads=1),
    "gemma3": dict(kind="gemma3", layer_types=["full_attention"] * 4),
    "gemma3, linear": dict(kind="gemma3", layer_types=["full_attention"] * 4, rms_norm_eps=1e-3,
                           rope_parameters={"full_attention": LINEAR}),
}
WINDOWS = {
    "mistral": dict(kind="mistral", sliding_window=9),
    "qwen2": dict(kind="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=0),
    "qwen3": dict(kind="qwen3", use_sliding_window=True, sliding_window=9, max_window_layers=0),
}
MIXED = {  # windows in some layers only
    "qwen2": dict(kind="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "gemma3": dict(kind="gemma3"),
    "gemma3, linear": dict(kind="gemma3", rope_parameters={
        "full_attention": LINEAR, "sliding_attention": dict(rope_type="default", rope_theta=500.0)}),
}
named = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
windowed = pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS.keys())


def ids(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, V, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, sequence: torch.Tensor, **options) -> torch.Tensor:
    out = model(sequence, **options)
    return out[0] if isinstance(out, tuple) else out.logits


@named
def test_same_bits_without_learning(options):
    theirs = original(**options)
    frozen, learns = hk.convert.llama(theirs, (4, 8), lr=0.0), hk.convert.llama(theirs, (4, 8))
    for sequence in (ids(1, 1), ids(2, 37), ids(2, 300)):
        expected = logits(theirs, sequence)
        assert expected.abs().max() > 1
        for ours, mode in ((frozen, "off"), (frozen, "next_token"), (learns, "off")):
            assert torch.equal(logits(ours, sequence, learn=mode), expected), (sequence.shape, mode)


def test_same_bits_at_widths_that_compiled_backends_serve():
    theirs = original(hidden_size=32, intermediate_size=48)
    ours, sequence = hk.convert.llama(theirs, (4, 8)), ids(2, 37)
    assert torch.equal(logits(ours, sequence), logits(theirs, sequence))


def test_bits_need_the_angles_of_the_original(tmp_path):
    theirs = original()
    ours = hk.convert.llama(theirs, 4)
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hope"]["rope_dtype"] = "float64"
    (tmp_path / "config.json").write_text(json.dumps(config))
    exact = hk.HopeForCausalLM.from_pretrained(tmp_path)
    x = ids(1, 300)
    assert not torch.equal(logits(exact, x), logits(theirs, x))
    assert relative(logits(exact, x), logits(theirs, x)) < 1e-4


@pytest.mark.parametrize("options", [*MODELS.values(), *WINDOWS.values(), *MIXED.values()])
def test_splits_and_decoding_give_the_original_to_rounding(options):
    theirs, sequence = original(**options), ids(2, 41)
    ours, expected = hk.convert.llama(theirs, (4, 8), lr=0.0), logits(theirs, sequence)
    assert relative(logits(ours, sequence), expected) < 1e-5
    for cuts in ([17, 24], [1] * 41):
        state, parts = None, []
        for part in sequence.split(cuts, 1):
            with torch.no_grad():
                out, state = ours(part, state, learn="next_token")
            parts.append(out)
        assert relative(torch.cat(parts, 1), expected) < 1e-5


@windowed
def test_a_window_is_carried(options):
    theirs = original(**options)
    assert hk.convert.llama(theirs, 4).config.window == 9
    ours, x = hk.convert.llama(theirs, 4), ids(1, 40)
    changed = torch.cat([(x[:, :1] + 1) % V, x[:, 1:]], 1)
    same = (logits(ours, x) == logits(ours, changed)).all(-1)[0]
    assert same[25:].all() and not same[24]  # three layers of 9 tokens see back 24 tokens


def test_windows_of_some_layers_are_carried():
    assert hk.convert.llama(original(**MIXED["qwen2"]), 4).config.window == (None, 9, 9)
    config = hk.convert.llama(original(**MIXED["gemma3, linear"]), 4).config
    assert config.window == (9, 9, None, 9) and config.rope_theta == (500.0, 500.0, LINEAR["rope_theta"], 500.0)
    scaling = hk.RopeScaling("linear", LINEAR["factor"])
    assert config.rope_scaling == (None, None, scaling, None)
    assert hk.HopeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_window_and_sinks_of_the_callers():
    def made(options, **arguments):
        config = hk.convert.llama(original(**options), 4, **arguments).config
        return config.window, config.sinks

    assert made({}, window=20) == (20, 0) and made({}, window=20, sinks=3) == (20, 3)
    assert made(WINDOWS["mistral"], sinks=3) == (9, 3) and made(WINDOWS["mistral"], window=20, sinks=3) == (20, 3)
    # of layers with and without a window, those that have a smaller one keep it, as they were trained
    assert made(MIXED["gemma3"], window=20, sinks=3) == ((9, 9, 20, 9), (0, 0, 3, 0))
    assert made(MIXED["gemma3"], window=6, sinks=3) == (6, 3)
    assert made(MIXED["qwen2"], window=9, sinks=3) == (9, (3, 0, 0))
    for options in ({}, MIXED["gemma3"]):
        with pytest.raises(ValueError, match="convert.llama: argument sinks is 3, expected 0 without a window"):
            made(options, sinks=3)
    for bad in ({"window": 0}, {"window": 2.5}, {"window": True}, {"window": 8, "sinks": -1}, {"sinks": "4"}):
        with pytest.raises(ValueError, match=f"convert.llama: argument {list(bad)[-1]} is "):
            made({}, **bad)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_sinks_stay_visible(kind):
    theirs, x = original(kind, num_hidden_layers=1), ids(1, 40)
    ours = hk.convert.llama(theirs, 4, window=8, sinks=3)

    def differs(at: int) -> torch.Tensor:
        changed = x.clone()
        changed[0, at] = (changed[0, at] + 1) % V
        return (logits(ours, x) != logits(ours, changed)).any(-1)[0]

    assert all(differs(at)[at:].all() for at in range(3))
    assert differs(3)[3:11].all() and not differs(3)[11:].any()
    # as long as nothing has left the window, the original
    assert relative(logits(ours, x)[:, :11], logits(theirs, x)[:, :11]) < 1e-5
    assert relative(logits(ours, x)[:, 11:], logits(theirs, x)[:, 11:]) > 1e-3


@pytest.mark.parametrize("rope", [dict(rope_type="default", rope_theta=1e6), LINEAR, LLAMA3])
def test_frequencies(rope):
    theirs = original(rope_parameters=rope, hidden_size=256, num_hidden_layers=1)
    config = hk.convert.llama(theirs, 4).config
    found = rope_rates(config)
    assert torch.equal(found, theirs.model.rotary_emb.inv_freq)
    exact = rope_rates(config.replace(rope_dtype="float64"))
    assert exact.dtype == torch.float64 and ((found - exact) / exact).abs().max() < 1e-6
    plain = rope["rope_theta"] ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert ((exact / plain).min() > 0.999) == (rope["rope_type"] == "default")


def test_frequencies_of_local_and_global_layers():
    theirs = original(**MIXED["gemma3, linear"])
    ours, rotary = hk.convert.llama(theirs, 4), theirs.model.rotary_emb
    for block, kind in zip(ours.blocks, theirs.config.layer_types):
        assert torch.equal(block.mixer.rates, getattr(rotary, f"{kind}_inv_freq"))


def test_weights_of_a_tensor_subclass_are_refused():
    """Quantized or distributed tensors that hide behind the shape and dtype of a weight."""

    class Packed(torch.Tensor):
        pass

    theirs = original()
    up = theirs.model.layers[1].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.detach().as_subclass(Packed))
    with pytest.raises(ValueError, match="type of model.layers.1.mlp.up_proj.weight is 'Packed'"):
        hk.convert.llama(theirs, 4)


@pytest.mark.parametrize("options", [
    dict(kind="qwen2", rope_parameters=LLAMA3), dict(kind="qwen3"), MODELS["gemma3"], MIXED["gemma3, linear"],
])
def test_half_precision_stays_and_is_no_worse_than_the_original(options):
    theirs = original(dtype=torch.bfloat16, **options)
    ours = hk.convert.llama(theirs, (4, 8), lr=0.0)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    wide = original(dtype=torch.float64, **options)
    wide.load_state_dict(theirs.state_dict())
    x = ids(4, 60)
    truth = logits(wide, x)
    assert logits(ours, x).dtype == torch.bfloat16
    assert relative(logits(ours, x), truth) <= 2 * relative(logits(theirs, x), truth)


def test_periods_and_rates_by_block():
    theirs = original(num_hidden_layers=5)
    periods = lambda model: [c.chunks for c in model.config.cms]
    assert periods(hk.convert.llama(theirs, (4, 8))) == [(4,), (4,), (4,), (8,), (8,)]
    assert periods(hk.convert.llama(theirs, [8, 4, 12])) == [(8,), (8,), (4,), (4,), (12,)]
    assert periods(hk.convert.llama(theirs, 16)) == [(16,)] * 5
    rates = lambda **options: [c.learning_rates for c in hk.convert.llama(theirs, (4, 8), **options).config.cms]
    assert rates() == [hk.CMSConfig(32, 4).learning_rates] * 3 + [hk.CMSConfig(32, 8).learning_rates] * 2
    assert rates()[0][0] > 0
    assert rates(lr=[0.5, 0]) == [(0.5,)] * 3 + [(0,)] * 2
    assert rates(lr=0.25, optimizer="momentum") == [(0.25,)] * 5
    assert {c.optimizer for c in hk.convert.llama(theirs, 4, optimizer="muon").config.cms} == {"muon"}


def test_options_of_the_levels():
    theirs = original()
    made = hk.convert.llama(theirs, (4, 8), optimizer="momentum", momentum=0.5).config.cms
    assert {(c.optimizer, c.momentum) for c in made} == {("momentum", 0.5)}
    made = hk.convert.llama(theirs, (4, 8), rank=2, precondition=10.0).config.cms
    assert {(c.rank, c.precondition, c.lr) for c in made} == {(2, 10.0, None)}
    with pytest.raises(ValueError, match="CMSConfig: momentum is 2.0, expected a float in"):
        hk.convert.llama(theirs, 4, momentum=2.0)
    for name, value in (("speed", 3), ("mlp", "gelu"), ("bias", True), ("variant", "nested")):
        with pytest.raises(ValueError, match=f"convert.llama: argument {name} is {value!r}, expected no such"):
            hk.convert.llama(theirs, 4, **{name: value})


@pytest.mark.parametrize(
    "options", [dict(kind="qwen2"), dict(kind="qwen3"), dict(kind="gemma3", layer_types=["full_attention"])]
)
def test_one_refresh_is_a_gradient_step_of_the_original(options):
    """One layer: its keys do not depend on its MLP, so what the second segment sees of the first is as it was."""
    C, lr = 8, 0.05
    theirs, sequence = original(**options, num_hidden_layers=1, dtype=torch.float64), ids(1, 16)
    out, _ = hk.convert.llama(theirs, C, lr=lr)(sequence, learn="next_token")
    before = logits(theirs, sequence)
    assert relative(out[:, :C], before[:, :C]) < 1e-5
    F.cross_entropy(theirs(sequence).logits[0, :C], sequence[0, 1 : C + 1], reduction="sum").backward()
    with torch.no_grad():
        for p in theirs.model.layers[0].mlp.parameters():
            p -= lr * p.grad
    after = logits(theirs, sequence)
    assert relative(after[:, C:], before[:, C:]) > 1e-2
    # the original's norm computes in fp32, in fp64 models too
    assert relative(out[:, C:], after[:, C:]) < 1e-5


def test_learning_adapts():
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1))
    model = hk.convert.llama(theirs, (8, 16), lr=(0.02, 0.02))
    sequence = ids(2, 12).repeat(1, 20)

    def falls(mode: str) -> float:
        loss = F.cross_entropy(logits(model, sequence, learn=mode)[:, :-1].mT, sequence[:, 1:], reduction="none")
        return float(loss[:, :12].mean() - loss[:, -24:].mean())

    assert falls("next_token") > 1.0 > 0.3 > falls("off")


@pytest.mark.parametrize("options, arguments", [
    (MODELS["tied, llama3"], {}), (MODELS["mlp bias, linear"], {}), (MODELS["biases"], {}),
    (WINDOWS["mistral"], {}), (MODELS["head width"], dict(window=5, sinks=2)),
    (MODELS["qwen3"], dict(window=3, sinks=6)), (MIXED["gemma3"], {}),
    (MIXED["gemma3, linear"], dict(window=11, sinks=4)), (MODELS["qwen3"], dict(precondition=10.0)),
    (MIXED["gemma3"], dict(optimizer="adam", rank=3, window=11, sinks=4)),
])
def test_prefill_is_decoding_with_learning(options, arguments, tmp_path):
    model = hk.convert.llama(original(dtype=torch.float64, **options), (4, 8), lr=0.02, **arguments)
    sequence = ids(2, 26)
    whole = logits(model, sequence, learn="next_token")
    assert relative(whole, logits(model, sequence)) > 1e-3
    state, parts = None, []
    with torch.no_grad():
        for t in range(26):
            out, state = model(sequence[:, t : t + 1], state, learn="next_token")
            parts.append(out)
            if t == 13:  # saved in an open segment, and continued by the model as loaded from its files
                state.save(tmp_path / "state.safetensors")
                model.save_pretrained(tmp_path / "model")
                loaded = hk.HopeForCausalLM.from_pretrained(tmp_path / "model")
                assert loaded.config == model.config
                rest, _ = loaded(
                    sequence[:, 14:], hk.load_state(tmp_path / "state.safetensors"), learn="next_token"
                )
        ragged, _ = model(sequence, lengths=[26, 11], learn="next_token")
    assert relative(torch.cat(parts, 1), whole) < 1e-10
    assert relative(rest, whole[:, 14:]) < 1e-10
    assert relative(ragged[0], whole[0]) < 1e-10 and relative(ragged[1, :11], whole[1, :11]) < 1e-10


@pytest.mark.parametrize("options", [dict(kind="qwen2"), dict(kind="qwen3"), MIXED["gemma3, linear"]])
def test_writes_on_as_the_original_and_resumes(options):
    theirs, prompt = original(**options), ids(1, 9)
    frozen = hk.convert.llama(theirs, 4, lr=0.0)
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False)[:, 9:]
    assert torch.equal(frozen.generate(prompt, 12).tokens, expected)
    model = hk.convert.llama(theirs, 4, lr=0.05)
    first = model.generate(prompt, 5)
    assert torch.equal(
        torch.cat([first.tokens, model.generate(None, 7, first.state).tokens], 1), model.generate(prompt, 12).tokens
    )
    with pytest.raises(ValueError, match="stop strings"):
        frozen.generate(prompt, 2, stop=["."])


@pytest.mark.parametrize("kind, tied", [("qwen2", True), ("qwen2", False), ("gemma3", True)])
def test_the_original_is_not_touched(kind, tied):
    theirs = original(kind, tie_word_embeddings=tied)
    kept = {n: p.clone() for n, p in theirs.state_dict().items()}
    before = torch.get_rng_state()
    with torch.inference_mode():
        ours = hk.convert.llama(theirs, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert (ours.head is None) == tied and not ours.training and all(p.requires_grad for p in ours.parameters())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(ids(1, 20), learn="next_token")[0].square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, kept[n]) for n, p in theirs.state_dict().items())
    assert not torch.equal(ours.embed.weight, theirs.model.embed_tokens.weight)


@pytest.mark.parametrize("options, message", [
    (dict(kind="gemma2", attn_implementation="eager"), "config.model_type is 'gemma2'"),
    (dict(hidden_act="gelu"), "config.hidden_act is 'gelu'"),
    (dict(attention_bias=True), "self_attn.o_proj.bias"),
    (dict(rope_parameters={**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 64}),
        "'rope_type'.* is 'yarn'"),
    (dict(kind="gemma3", hidden_activation="silu"), "config.hidden_activation is 'silu'"),
    (dict(kind="gemma3", attn_logit_softcapping=50.0), "config.attn_logit_softcapping is 50.0"),
    (dict(kind="gemma3", final_logit_softcapping=30.0), "config.final_logit_softcapping is 30.0"),
    (dict(kind="gemma3", use_bidirectional_attention=True), "config.use_bidirectional_attention is True"),
    (dict(kind="gemma3", rope_parameters={"full_attention": LINEAR, "sliding_attention": {
        **LINEAR, "rope_type": "dynamic"}}), r"config.rope_parameters\['sliding_attention'\].* is 'dynamic'"),
])
def test_refuses_what_it_cannot_express(options, message):
    with pytest.raises(ValueError, match=f"convert.llama: .*{message}.*expected"):
        hk.convert.llama(original(**options), 4)


def test_refuses_other_modules():
    def changed(change):
        model = original()
        change(model)
        return model

    def q_norm(m):
        m.model.layers[1].self_attn.q_norm = torch.nn.RMSNorm(8)

    def no_gate(m):
        m.model.layers[0].mlp.gate_proj = torch.nn.Identity()

    def narrow(m):
        m.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)

    def mixed(m):
        m.model.norm.double()

    def quantized(m):
        m.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 32, dtype=torch.int8), requires_grad=False)

    for change, message in ((q_norm, "self_attn.q_norm.weight"), (no_gate, "gate"), (narrow, "up"),
                            (mixed, "dtype of hf_model"),
                            (quantized, "dtype of lm_head.weight"), (lambda m: m.to("meta"), "device of ")):
        with pytest.raises(ValueError, match=f"(?s)convert.llama: .*{message}"):
            hk.convert.llama(changed(change), 4)
    for other in (torch.nn.Linear(3, 3), original().model, None):
        with pytest.raises(ValueError, match="convert.llama: "):
            hk.convert.llama(other, 4)


@pytest.mark.parametrize("chunks", [0, -4, (), (4, 6), (2, 4, 8, 16), (True,), 4.5, "4", (4, None), None])
def test_refuses_chunks(chunks):
    with pytest.raises(ValueError, match="convert.llama: argument chunks"):
        hk.convert.llama(original(), chunks)


@pytest.mark.parametrize("options",
                                     [{"lr": (0.1,)}, {"lr": (0.1, 0.1, 0.1)}, {"lr": -1.0},
                                         {"lr": float("nan")}, {"lr": "fast"},
                                     {"optimizer": "sgd"}])
def test_refuses_rates(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        hk.convert.llama(original(), (4, 8), **options)


def test_configurations_in_files():
    plain = hk.HopeConfig(V, 32, 2, mixer="attention", num_heads=4)
    old = {n: v for n, v in plain.to_dict().items() if not n.startswith("rope_s") and n != "rope_dtype"}
    assert hk.HopeConfig.from_dict(old) == plain and plain.rope_dtype == "float64" and plain.rope_scaling is None
    fields = {n: v for n, v in LLAMA3.items() if n != "rope_theta"}
    for scaling in (fields, {"rope_type": "linear", "factor": 2}):
        config = plain.replace(rope_scaling=scaling, rope_dtype="float32")
        assert hk.HopeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.rope_scaling == hk.RopeScaling(**scaling)


@pytest.mark.parametrize("change", [
    {"rope_type": "yarn"}, {"factor": 0}, {"factor": None}, {"low_freq_factor": None},
    {"low_freq_factor": 4.0}, {"rope_type": "linear"},
    {"original_max_position_embeddings": float("inf")}, {"extra": 1},
])
def test_refuses_rope_scaling(change):
    scaling = {n: v for n, v in LLAMA3.items() if n != "rope_theta"} | change
    with pytest.raises(ValueError, match="RopeScaling: "):
        hk.HopeConfig(V, 32, 2, mixer="attention", num_heads=4, rope_scaling=scaling)


@pytest.mark.parametrize("change", [{"rope_dtype": "bfloat16"}, {"rope_scaling": "linear"}])
def test_refuses_rope_fields(change):
    with pytest.raises(ValueError, match=f"HopeConfig: {next(iter(change))}"):
        hk.HopeConfig(V, 32, 2, mixer="attention", num_heads=4, **change)


def test_the_package_does_not_import_transformers():
    found, asking, root = set(), [], pathlib.Path(hk.__file__).parent
    for file in root.rglob("*.py"):
        if root / "hf" in file.parents:  # which nothing else of the package imports: tests/hf/test_apart.py
            continue
        source = file.read_text(encoding="utf-8")
        asking += [file.name] if 'extra("transformers"' in source else []
        for node in ast.walk(ast.parse(source)):
            found |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            found |= {node.module} if isinstance(node, ast.ImportFrom) and node.module else set()
    assert "torch" in found and not any(name.startswith("transformers") for name in found)
    assert asking == ["sources.py"]  # of the command, while it converts


def test_a_converted_model_learns_in_the_blocks_it_is_told():
    model = hk.convert.llama(original(), 8, lr=0.05, learn_blocks=(-1,))
    assert model.config.learn_blocks == (2,) and model.config.block_cms[0].learning_rates == (0,)
    state = model.init_state(1)
    with torch.no_grad():
        model(ids(1, 17), state, learn="next_token")
    assert [c.weights[0] is not None for c in state.cms] == [False, False, True]
    with pytest.raises(ValueError, match="HopeConfig: learn_blocks is"):
        hk.convert.llama(original(), 8, learn_blocks=(3,))
