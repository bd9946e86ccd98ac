"""A model sharded block by block equals a single process: training, reading, learning, generation,
sessions."""

import tempfile
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from processes import apart, refusal
from small_model import ids, tiny

from hope_kernels import CMSConfig, load_state
from hope_kernels.identity import checksum
from hope_kernels.parallel import fully_shard_hope, load_session, save_session, whole_model

pytestmark = pytest.mark.skipif(processes.WHY_NOT is not None, reason=str(processes.WHY_NOT))
MIXERS = ("self_modifying", "attention")
WORLDS = (2, pytest.param(4, marks=pytest.mark.slow))
B = 4  # rows of all processes together


@pytest.fixture(params=WORLDS, ids=["2", "4"])
def found(request) -> dict:
    return processes.report(__file__, request.param)


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_equals_a_single_process(found, mixer):
    """Two steps of SGD, and then a checkpoint that a plain model reads."""
    of = found[f"train {mixer}"]
    assert of["loss"] < 1e-12 and of["weights"] < 1e-12
    assert of["checkpoint"] == 0 and of["whole"] == 0 and of["mark"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_reading_and_learning_equal_a_single_process(found, mixer):
    """Split over several calls, across boundaries of all levels, then flushed and read on."""
    of = found[f"read {mixer}"]
    assert of["off"] < 1e-12 and of["learned"] < 1e-12 and of["flushed"] < 1e-12 and of["moved"] > 1e-3


def test_learning_between_forward_and_step_leaves_training_as_it_is(found):
    """A reading that learns, between two training steps and inside a graph, reads the weights of now."""
    of = found["between"]
    assert of["logits"] < 1e-12 and of["in a graph"] < 1e-12 and of["gradients"] < 1e-12


@pytest.mark.parametrize("mixer", MIXERS)
def test_generation_equals_a_single_process(found, mixer):
    assert found[f"generate {mixer}"]


@pytest.mark.parametrize("kind", ["momentum", "muon", "adam", "learned", "precondition", "rank", "independent"])
def test_every_way_of_learning(found, kind):
    assert found[f"learn {kind}"] < 1e-11


def test_sessions_are_files_of_plain_models(found):
    of = found["sessions"]
    assert of["mark"] and of["rows"] < 1e-12 and of["again"] < 1e-12 and of["order"] == 0
    assert "belongs to weights" in of["other weights"] and "multiple of the" in of["rows uneven"]
    assert "could not write" in of["no folder"] and "not JSON serializable" in of["no JSON"]


def test_what_a_sharded_model_cannot_do_is_refused(found):
    of = found["refused"]
    assert "guard" in of["guard"] and "generate" not in of["guard"]
    assert "wavefront" in of["wavefront"]
    assert "replay is not supported" in of["replay"]
    assert "consolidate is not supported" in of["consolidate"]
    assert "save_pretrained is not supported" in of["save_pretrained"]
    assert "divided over processes" in of["decoder"] and "divided over processes already" in of["twice"]
    assert "inference mode" in of["inference mode"] and "leave the others waiting" in of["stops"]
    assert "retain_to" in of["retain_to"] and "other weights" in of["weights"]
    assert "would leave gathered weights" in of["reshard"]
    for text in (of["lengths"], of["places"]):
        assert "their collectives would not meet" in text
    assert of["afterwards"] < 1e-12


def test_a_single_process_needs_none_of_this():
    with pytest.raises(ValueError, match="not divided over processes"):
        save_session(tiny(), tiny().init_state(1), "nowhere")


def mine(rank, world, tokens):
    n = len(tokens) // world
    return tokens[rank * n : rank * n + n]


def whole(t):
    """Rows of all processes."""
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)


def measure(rank, world) -> dict:
    found = {}
    part = partial(mine, rank, world)
    for mixer in MIXERS:
        found[f"train {mixer}"] = train(mixer, part)
        found[f"read {mixer}"] = read(mixer, part)
        single, model = tiny(mixer), fully_shard_hope(tiny(mixer))
        options = dict(max_new_tokens=9, guard=False, temperature=0.0)
        want = single.generate(ids(B, 7), **options)
        got = model.generate(part(ids(B, 7)), **options)
        found[f"generate {mixer}"] = bool(torch.equal(whole(got.tokens), want.tokens))
    found["between"] = between(part)
    kinds = {
        "momentum": dict(optimizer="momentum", lr=0.02), "muon": dict(optimizer="muon", lr=0.02),
        "adam": dict(), "learned": dict(lr="learned"),
        "precondition": dict(lr=0.02, precondition=0.1), "rank": dict(lr=0.02, rank=4),
        "independent": dict(lr=0.02, variant="independent", norm="layernorm", bias=True),
    }
    for kind, options in kinds.items():
        cms = CMSConfig(8, (4, 8), expansion=2.0, **options)
        single, model = tiny(cms=cms), fully_shard_hope(tiny(cms=cms))
        with torch.no_grad():
            got = model(part(ids(B, 21)), learn="next_token")[0]
            found[f"learn {kind}"] = apart(whole(got), single(ids(B, 21), learn="next_token")[0])
    found["sessions"] = sessions(rank, world, part)
    found["refused"] = refused(rank, part)
    return found


def train(mixer, part) -> dict:
    import torch.distributed.checkpoint as dcp

    single, model = tiny(mixer), fully_shard_hope(tiny(mixer))
    worst = 0.0
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (single, model)]
    for step in range(2):
        every = ids(B, 14, step)
        for m, optimizer, tokens in zip((single, model), optimizers, (every, part(every))):
            logits = m(tokens)[0][:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if m is single:
                wanted = loss.detach()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        worst = max(worst, apart(mean / dist.get_world_size(), wanted))
    weights = max(apart(p.full_tensor(), q) for p, q in zip(model.parameters(), single.parameters()))
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    dcp.save(model.state_dict(), checkpoint_id=name[0])
    plain = tiny(mixer, seed=9)
    held = plain.state_dict()
    dcp.load(held, checkpoint_id=name[0])
    plain.load_state_dict(held)
    checkpoint = max(apart(p, q.full_tensor()) for p, q in zip(plain.parameters(), model.parameters()))
    other = whole_model(model)
    training = checksum(model)
    with torch.no_grad():
        mark = training is None and str(checksum(model)) == str(checksum(other))
    return {"loss": worst, "weights": weights, "checkpoint": checkpoint, "mark": mark,
            "whole": max(apart(p, q) for p, q in zip(other.parameters(), plain.parameters()))}


def read(mixer, part) -> dict:
    single, model = tiny(mixer), fully_shard_hope(tiny(mixer))
    tokens, off, learned, states = ids(B, 43), 0.0, 0.0, []
    with torch.no_grad():
        frozen = single(tokens)[0]
        off = apart(whole(model(part(tokens))[0]), frozen)
        states, at, moved = [single.init_state(B), model.init_state(len(part(tokens)))], 0, 0.0
        for n in (1, 7, 8, 9, 5):
            want = single(tokens[:, at : at + n], states[0], learn="next_token")[0]
            got = model(part(tokens[:, at : at + n]), states[1], learn="next_token")[0]
            learned = max(learned, apart(whole(got), want))
            moved, at = apart(want, frozen[:, at : at + n]), at + n
        counts = single.flush(states[0]), model.flush(states[1])
        assert counts[1] == part(counts[0]) and any(counts[1])
        end = tokens[:, at:]
        rest = [m(t, s)[0] for m, t, s in zip((single, model), (end, part(end)), states)]
    return {"off": off, "learned": learned, "moved": moved, "flushed": apart(whole(rest[1]), rest[0])}


def between(part) -> dict:
    single, model = tiny(), fully_shard_hope(tiny())
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (single, model)]
    tokens, logits, found = ids(B, 18), [], {}
    for m, optimizer, of in zip((single, model), optimizers, (tokens, part(tokens))):
        m(of)[0].square().mean().backward()
        with torch.no_grad():
            first = m(of, learn="next_token")[0]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            second = m(of, learn="next_token")[0]
        y = m(of, learn="next_token")[0]
        y.square().mean().backward()
        logits.append((first, second, y.detach()))
    found["logits"] = max(apart(whole(a), b) for a, b in zip(logits[1][:2], logits[0][:2]))
    found["in a graph"] = apart(whole(logits[1][2]), logits[0][2])
    pairs = [(p.grad.full_tensor(), q.grad) for p, q in zip(model.parameters(), single.parameters())]
    found["gradients"] = max(apart(a, b) for a, b in pairs)
    return found


def sessions(rank, world, part) -> dict:
    single, model = tiny(), fully_shard_hope(tiny())
    name = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(name)
    path, tokens = Path(name[0]) / "session", ids(B, 30)
    with torch.no_grad():
        _, state = model(part(tokens)[:, :19], learn="next_token")
        save_session(model, state, path)
        loaded, fresh = load_state(path), tiny()
        mark = str(fresh(tokens[:, :1])[1].fingerprint) == loaded.fingerprint
        want = single(tokens[:, 19:], single(tokens[:, :19], learn="next_token")[1], learn="next_token")[0]
        rows = apart(fresh(tokens[:, 19:], loaded, learn="next_token")[0], want)
        again = load_session(model, path)
        order = apart(whole(again.mixers[0].delta2), load_state(path).mixers[0].delta2)
        found = {"mark": mark, "rows": rows, "order": order,
                 "again": apart(whole(model(part(tokens)[:, 19:], again, learn="next_token")[0]), want)}
        found["other weights"] = refusal(lambda: load_session(fully_shard_hope(tiny(seed=3)), path))
        lone = single.init_state(world + 1)
        if rank == 0:
            lone.save(path)
        dist.barrier()
        found["rows uneven"] = refusal(lambda: load_session(model, path))
        found["no JSON"] = refusal(lambda: save_session(model, state, path, note={"a": object()}))
        found["no folder"] = refusal(lambda: save_session(model, state, path / "no" / "folder"))
    return found


def refused(rank, part) -> dict:
    from hope_kernels import TitansConfig
    from hope_kernels.engine.decoder import Decoder

    model, tokens = fully_shard_hope(tiny()), part(ids(B, 12))
    found = {}
    with torch.no_grad():
        _, state = model(tokens, learn="next_token")
        found["guard"] = refusal(lambda: model.generate(tokens, 2))
        found["stops"] = refusal(lambda: model.generate(tokens, 2, guard=False, eos_token_id=[1, 2]))
        found["wavefront"] = refusal(lambda: model(tokens, wavefront=4))
        found["replay"] = refusal(lambda: model.replay(state))
        found["consolidate"] = refusal(lambda: model.consolidate(state))
        found["save_pretrained"] = refusal(lambda: model.save_pretrained("nowhere"))
        found["decoder"] = refusal(lambda: Decoder(model, state))
        found["twice"] = refusal(lambda: fully_shard_hope(model))
        lengths = [12 - rank] * len(tokens)
        found["lengths"] = refusal(lambda: model(tokens, lengths=lengths, learn="next_token"))
        found["places"] = refusal(lambda: model.flush(state) if rank else model(tokens[:, :1], state))
    found["weights"] = refusal(lambda: fully_shard_hope(tiny(seed=rank)))
    found["reshard"] = refusal(lambda: fully_shard_hope(tiny(), reshard_after_forward=False))
    with torch.inference_mode():
        found["inference mode"] = refusal(lambda: model(tokens))
    zero = TitansConfig(8, 2, chunk_memory=4, chunk_other=2, retain_to="zero")
    found["retain_to"] = refusal(lambda: fully_shard_hope(tiny(titans=zero)))
    with torch.no_grad():
        wanted = tiny()(tokens, learn="next_token")[0]
        found["afterwards"] = apart(model(tokens, learn="next_token")[0], wanted)
    return found


if __name__ == "__main__":
    processes.main(measure)
