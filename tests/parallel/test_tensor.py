"""A model whose heads and hidden units are divided equals a single process: training, reading, learning,
generation, replay, sessions."""

import tempfile
from collections import Counter
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from processes import apart, refusal
from small_model import ids
from torch.distributed.device_mesh import init_device_mesh

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig, load_state
from hope_kernels.identity import checksum
from hope_kernels.ops.cms.schedule import hidden_dim, matrices
from hope_kernels.ops.shared import across
from hope_kernels.parallel import clip_grad_norm_, load_session, save_session, tensor_parallel, whole_model

pytestmark = pytest.mark.skipif(processes.WHY_NOT is not None, reason=str(processes.WHY_NOT))
WORLDS = (2, pytest.param(4, marks=pytest.mark.slow))
H = 4  # heads


def titans(**options):
    return {"titans": TitansConfig(16, H, **{"chunk_memory": 4, "chunk_other": 4} | options)}


def cms(**options):
    return CMSConfig(16, (4, 8), **{"expansion": 2.0, "lr": 0.02, **options})


MODELS = {
    "self-modifying": ("self_modifying", titans(chunk_other=2), cms()),
    "titans": ("titans", {"titans": TitansConfig.preset("titans", d_model=16, num_heads=H, chunk_memory=4,
                                                        chunk_other=4)}, cms(optimizer="momentum", relative=True)),
    "bare": ("self_modifying", titans(in_proj=False, out_proj=False, gate=False, out_norm=False,
                                      conv_window=None, momentum=0.5), cms(mlp="swiglu", bias=True, optimizer="muon")),
    "zero": ("self_modifying", titans(retain_to="zero", adaptive_q=True, hidden_mult=2),
             cms(variant="independent", norm="layernorm", bias=True, relative=True)),
    "attention": ("attention", {"num_heads": 8, "num_kv_heads": H, "attention_bias": True, "qk_norm": True,
                                "head_dim": 4, "window": 12, "sinks": 2},
                  cms(mlp="geglu", lr=None, post_norm=True)),
}


def made(kind, seed=0) -> HopeForCausalLM:
    mixer, options, levels = MODELS[kind]
    torch.manual_seed(seed)
    blocks = 2 if kind in ("self-modifying", "attention") else 1
    config = HopeConfig(32, 16, blocks, mixer=mixer, cms=levels, **options)
    model = HopeForCausalLM(config, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for block in model.blocks if kind == "self-modifying" else ():
        block.cms.pending = 24  # factors wait before they are folded
    return model.eval()


@pytest.fixture(params=WORLDS, ids=["2", "4"])
def found(request) -> dict:
    return processes.report(__file__, request.param)


@pytest.mark.parametrize("kind", MODELS)
def test_training_equals_a_single_process(found, kind):
    """Two steps of SGD, gradients clipped, and then a checkpoint that a plain model reads, and the other
    way round."""
    of = found[f"train {kind}"]
    assert of["loss"] < 1e-12 and of["weights"] < 1e-12 and of["norm"] < 1e-12
    assert of["checkpoint"] == 0 and of["loaded"] == 0 and of["mark"]


@pytest.mark.parametrize("kind", MODELS)
def test_reading_learning_and_generation_equal_a_single_process(found, kind):
    """Split over several calls, across boundaries of all levels, flushed and read on; under the guard."""
    of = found[f"read {kind}"]
    assert max(of["off"], of["learned"], of["flushed"]) < 1e-11 and of["moved"] > 1e-4
    assert of["generated"] and of["rows"] < 1e-11


def test_gradients_that_are_handed_to_a_layer_are_committed_as_in_a_single_process(found):
    assert found["commit"] < 1e-11


def test_replay_equals_a_single_process(found):
    assert found["replay"] < 1e-11


@pytest.mark.parametrize("kind", MODELS)
def test_sessions_are_files_of_plain_models(found, kind):
    of = found[f"session {kind}"]
    assert of["mark"] and of["plain"] < 1e-11 and of["again"] < 1e-11


def test_what_is_exchanged_is_what_the_document_counts(found):
    """docs/parallel.md. Two blocks of a memory and two levels; one all-reduce is the comparison before the call."""
    of = found["counts"]
    assert of["off"] == {"all_reduce": 1 + 2 * 3, "all_gather": 2}
    # a segment of four tokens, its backward, and the token after it
    learned = {"all_reduce": 1 + 2 * 3 + (1 + 2 + 1) + 2 * 3, "all_gather": 4, "reduce_scatter": 1}
    assert of["learning"] == learned
    assert of["backward"] == {"all_reduce": 2 * 4, "reduce_scatter": 2}


def test_the_cpu_kernels_serve_parts(found):
    """fp32, widths that the C++ backend serves: as far from fp64 as a single process is."""
    of = found["cpp"]
    assert of["ours"] < 1e-4 and of["ours"] < 3 * of["single"] + 1e-6 and of["backend"]


def test_every_backend_serves_parts(found):
    """Each is told of the heads at hand. Triton in its interpreter, where there is one."""
    assert found["backends"]["reference"] < 1e-12 and found["backends"].get("triton", 0) < 1e-4


def test_what_cannot_be_divided_is_refused(found):
    of = found["refused"]
    assert "precondition=0.1, which mixes all hidden units" in of["precondition"]
    assert "rank=4, which mixes" in of["rank"] and "lr='learned', expected numbers" in of["learned"]
    assert "heads, expected a multiple" in of["heads"] and "hidden units of a CMS level" in of["hidden"]
    assert "other weights" in of["weights"] and "is wrapped, hooked" in of["hooked"]
    assert "key-value heads" in of["kv"]


def test_processes_that_part_ways_are_told(found):
    of = found["apart"]
    for name in ("tokens", "options", "weights"):
        assert "would not do the same" in of[name]
    assert "share of" in of["saved"] and "load_session" in of["given"]
    for name in ("wavefront", "consolidate", "save_pretrained"):
        assert "not supported" in of[name]
    for name in ("joined", "kept", "stopped"):
        assert "would not do the same" in of[f"replay {name}"]


def measure(rank, world) -> dict:
    found = {}
    for kind in MODELS:
        found[f"train {kind}"] = train(kind)
        found[f"read {kind}"] = read(kind)
        found[f"session {kind}"] = session(kind)
    found["replay"] = replay()
    found["commit"] = max(commit(kind) for kind in ("bare", "zero"))  # Muon, and relative rates
    found["cpp"] = cpp()
    found["counts"] = counts()
    found["backends"] = backends()
    found["refused"] = refused(rank, world)
    found["apart"] = parted(rank)
    return found


def folder() -> Path:
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    return Path(name[0])


def train(kind) -> dict:
    import torch.distributed.checkpoint as dcp

    single, model = made(kind), tensor_parallel(made(kind))
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (single, model)]
    worst, norms = 0.0, []
    for step in range(2):
        tokens, losses = ids(2, 14, step), []
        for m, optimizer in zip((single, model), optimizers):
            logits, state = m(tokens[:, :6], learn="next_token")
            more, _ = m(tokens[:, 6:], state)
            logits = torch.cat([logits, more], 1)[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            if m is single:
                norms.append(torch.nn.utils.clip_grad_norm_(m.parameters(), 0.3))
            else:
                norms.append(clip_grad_norm_(m, 0.3))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        worst = max(worst, apart(losses[1], losses[0]))
    other, path = whole_model(model), folder()
    weights = max(apart(p, q) for p, q in zip(other.parameters(), single.parameters()))
    dcp.save(model.state_dict(), checkpoint_id=path)
    plain = made(kind, seed=9)
    held = plain.state_dict()
    dcp.load(held, checkpoint_id=path)
    plain.load_state_dict(held)
    checkpoint = max(apart(p, q) for p, q in zip(plain.parameters(), other.parameters()))
    again = tensor_parallel(made(kind, seed=9))
    held = again.state_dict()
    dcp.load(held, checkpoint_id=path)
    again.load_state_dict(held)
    whole = tensor_parallel(made(kind, seed=9))
    whole.load_state_dict(plain.state_dict())
    got = [whole_model(m).parameters() for m in (again, whole)]
    loaded = max(apart(p, q) for of in got for p, q in zip(of, plain.parameters()))
    with torch.no_grad():
        mark = str(checksum(model)) == str(checksum(plain)) == str(checksum(again))
    norm = max(apart(norms[i + 1], norms[i]) for i in (0, 2))
    return {"loss": worst, "weights": weights, "norm": norm, "checkpoint": checkpoint, "loaded": loaded,
            "mark": mark}


def read(kind) -> dict:
    single, model = made(kind), tensor_parallel(made(kind))
    tokens, learned, at = ids(2, 30), 0.0, 0
    found = {}
    with torch.no_grad():
        frozen = single(tokens)[0]
        found["off"] = apart(model(tokens)[0], frozen)
        states = [m.init_state(2) for m in (single, model)]
        for n in (1, 7, 9, 5):
            part = tokens[:, at : at + n]
            want, got = [m(part, s, learn="next_token")[0] for m, s in zip((single, model), states)]
            learned, at = max(learned, apart(got, want)), at + n
        found["moved"] = apart(want, frozen[:, at - n : at])
        counts = [m.flush(s) for m, s in zip((single, model), states)]
        assert counts[0] == counts[1] and any(counts[0])
        want, got = [m(tokens[:, at:], s)[0] for m, s in zip((single, model), states)]
        found |= {"learned": learned, "flushed": apart(got, want)}
        lengths = [13, 9]
        want, got = [m(tokens[:, :13], lengths=lengths, learn="next_token")[0] for m in (single, model)]
        found["rows"] = apart(got, want)
        options = dict(max_new_tokens=6, lengths=lengths, temperature=0.8, seed=3)
        want, got = [m.generate(tokens[:, :13], **options) for m in (single, model)]
        same = want.state.rollbacks == got.state.rollbacks
        found["generated"] = same and torch.equal(want.tokens, got.tokens)
    return found


def counts() -> dict:
    """Collectives by name."""
    model, found = tensor_parallel(made("self-modifying")), {}

    def count(call):
        seen = Counter()
        places = {"all_reduce": (dist, "all_reduce"), "all_gather": (across, "_all_gather"),
                  "reduce_scatter": (across, "_reduce_scatter")}
        own = {name: getattr(*place) for name, place in places.items()}
        for name, place in places.items():
            def counted(*args, name=name, **kwargs):
                seen[name] += 1
                return own[name](*args, **kwargs)

            setattr(*place, counted)
        try:
            return call(), dict(seen)
        finally:
            for name, place in places.items():
                setattr(*place, own[name])

    with torch.no_grad():
        found["off"] = count(lambda: model(ids(1, 5)))[1]
        found["learning"] = count(lambda: model(ids(1, 5), learn="next_token"))[1]
    loss = model(ids(1, 5))[0].square().mean()
    found["backward"] = count(loss.backward)[1]
    return found


def commit(kind) -> float:
    single, model = made(kind), tensor_parallel(made(kind))
    plain, divided, own = single.blocks[0].cms, model.blocks[0].cms, model.parallel.across.own
    torch.manual_seed(5)
    grads = [{n: torch.randn(2, *level[n].shape, dtype=torch.float64) for n in matrices(plain.config)}
             for level in plain.levels]
    parts = [{n: own(g, hidden_dim(n)) for n, g in level.items()} for level in grads]
    rows, found = [True, False], []
    for layer, of in ((plain, grads), (divided, parts)):
        state = layer.accumulate(layer.init_state(2), of, rows)
        found.append(layer.commit(state, rows, [4, 4]).weights[0])
    want, got = found
    return max(apart(got[n], own(w, hidden_dim(n))) for n, w in want.items())


def replay() -> float:
    single, model = made("self-modifying"), tensor_parallel(made("self-modifying"))
    logits = []
    for m in (single, model):
        found = m.read(ids(2, 40), replay=4, passes=2, seed=1, guard=False)
        with torch.no_grad():
            logits.append(m(ids(2, 5, 7), found.state)[0])
    return apart(logits[1], logits[0])


def session(kind) -> dict:
    single, model = made(kind), tensor_parallel(made(kind))
    path, tokens = folder() / "session", ids(2, 24)
    with torch.no_grad():
        states = [m(tokens[:, :19], learn="next_token", guard=True)[1] for m in (single, model)]
        save_session(model, states[1], path, note={"a": 1})
        loaded = load_state(path)
        mark = loaded.fingerprint == str(states[0].fingerprint)
        want = single(tokens[:, 19:], states[0], learn="next_token")[0]
        plain = apart(made(kind)(tokens[:, 19:], loaded, learn="next_token")[0], want)
        models = [model]
        if dist.get_world_size() == 4:  # a session of four processes, read by two
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
            models.append(tensor_parallel(made(kind), mesh["parts"]))
        again = [m(tokens[:, 19:], load_session(m, path), learn="next_token")[0] for m in models]
    return {"mark": mark, "plain": plain, "again": max(apart(y, want) for y in again)}


def cpp() -> dict:
    def of(dtype):
        torch.manual_seed(0)
        config = HopeConfig(32, 32, 2, titans=TitansConfig(32, H, chunk_memory=8, chunk_other=4),
                            cms=CMSConfig(32, (8, 16), lr=0.02))
        return HopeForCausalLM(config, dtype=torch.float64).to(dtype).eval()

    from hope_kernels import available_backends
    from hope_kernels.ops.titans.backends import resolve

    single, model, exact = of(torch.float32), tensor_parallel(of(torch.float32)), of(torch.float64)
    with torch.no_grad():
        want, one, ours = [m(ids(2, 60), learn="next_token")[0].double() for m in (exact, single, model)]
        used = resolve(model.config.titans, torch.float32, torch.device("cpu")).__module__
    usable = available_backends()["cpp"] is None
    return {"single": apart(one, want), "ours": apart(ours, want), "backend": used.endswith("cpp") == usable}


def backends() -> dict:
    from hope_kernels import available_backends

    single, model, found = made("self-modifying"), tensor_parallel(made("self-modifying")), {}
    with torch.no_grad():
        wanted = single(ids(1, 9))[0]
        found["reference"] = apart(model(ids(1, 9), backend="reference")[0], wanted)
        if available_backends().get("triton", "none") is None:
            torch.manual_seed(0)
            n = dist.get_world_size()
            config = HopeConfig(32, 32 * n, 1, titans=TitansConfig(32 * n, n, chunk_memory=16, chunk_other=16))
            single = HopeForCausalLM(config)
            wanted = single(ids(1, 18))[0]
            found["triton"] = apart(tensor_parallel(single)(ids(1, 18), backend="triton")[0], wanted)
    return found


def refused(rank, world) -> dict:
    found = {}
    many = {"precondition": dict(precondition=0.1), "rank": dict(rank=4),
            "hidden": dict(intermediate_size=2 * world + 1), "learned": dict(lr="learned")}
    four = TitansConfig(8, 4, chunk_memory=4, chunk_other=2)
    for name, options in many.items():
        torch.manual_seed(0)
        levels = CMSConfig(8, (4, 8), **{"expansion": 2.0, "lr": 0.02, **options})
        model = HopeForCausalLM(HopeConfig(32, 8, 1, titans=four, cms=levels))
        found[name] = refusal(lambda model=model: tensor_parallel(model))
    one = HopeForCausalLM(HopeConfig(32, 8, 1, titans=TitansConfig(8, 1)))
    found["heads"] = refusal(lambda: tensor_parallel(one))
    kv = HopeForCausalLM(HopeConfig(32, 8, 1, mixer="attention", num_heads=4, num_kv_heads=1))
    found["kv"] = refusal(lambda: tensor_parallel(kv))
    found["weights"] = refusal(lambda: tensor_parallel(made("self-modifying", seed=rank)))
    hooked = made("self-modifying")
    hooked.blocks[0].mixer.register_forward_hook(lambda *_: None)
    found["hooked"] = refusal(lambda: tensor_parallel(hooked))
    return found


def parted(rank) -> dict:
    model, tokens, found = tensor_parallel(made("self-modifying")), ids(1, 9), {}
    with torch.no_grad():
        _, state = model(tokens)
        found["tokens"] = refusal(lambda: model(ids(1, 9, seed=rank)))
        found["options"] = refusal(lambda: model(tokens, learn="next_token" if rank else "off"))
        found["wavefront"] = refusal(lambda: model(tokens, wavefront=4))
        found["consolidate"] = refusal(lambda: model.consolidate(state))
        found["save_pretrained"] = refusal(lambda: model.save_pretrained("nowhere"))
        found["saved"] = refusal(lambda: state.save("nowhere"))
        found["given"] = refusal(lambda: model(tokens, made("self-modifying").init_state(1)))
        for name in ("joined", "kept", "stopped"):
            slept = model.read(ids(1, 17), replay=2 + (name == "kept") * rank, guard=False).state
            options = {"joined": {"joined": 1.0 - rank}, "stopped": {"should_stop": lambda: rank == 1}}.get(name, {})
            found[f"replay {name}"] = refusal(lambda: model.replay(slept, dreams=0, **options))  # noqa: B023
        model.norm.weight.mul_(1 + rank)
        found["weights"] = refusal(lambda: model(tokens))
    return found


if __name__ == "__main__":
    processes.main(measure)
