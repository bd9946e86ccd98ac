"""A state that no call of its configuration produces is refused before anything is read or written, by every
call and by load_state."""

import threading

import pytest
import torch

import hope_kernels as hk
from hope_kernels import load_state
from hope_kernels.layers.attention import CausalAttention
from hope_kernels.model import ModelState
from hope_kernels.state import Counters, State

D, V = 16, 32
TITANS = hk.TitansConfig(D, 2, chunk_memory=4, chunk_other=4, momentum=0.5)
FAST = hk.TitansConfig(D, 2, chunk_memory=4, chunk_other=4)
CMS = hk.CMSConfig(D, (4, 8), lr=0.01, optimizer="momentum")


def read(kind: str, dtype=torch.float32):
    """(module, its input, a state that has read 9 and 5 tokens)."""
    torch.manual_seed(0)
    x, lengths = torch.randn(2, 9, D, dtype=dtype), [9, 5]
    with torch.no_grad():
        if kind == "titans":
            module = hk.SelfModifyingTitans(TITANS, dtype=dtype)
        elif kind == "fast":
            module = hk.SelfModifyingTitans(FAST, dtype=dtype)
        elif kind == "attention":
            module = CausalAttention(hk.HopeConfig(V, D, 1, "attention", num_heads=2, window=6), dtype=dtype)
        elif kind == "cms":
            module = hk.ContinuumMemory(CMS, dtype=dtype)
            state = module.init_state(2)
            for _ in range(2):
                y, state = module(x[:, :4], state)
                state = module.refresh(state, 0.1 * y)
            return module, x[:, :3], module(x[:, :1], state)[1]
        else:
            mixer = "attention" if kind == "attention model" else "self_modifying"
            config = hk.HopeConfig(
                V, D, 2, mixer, titans=None if mixer == "attention" else FAST, num_heads=2, cms=CMS
            )
            module, x = hk.HopeForCausalLM(config, dtype=dtype), torch.randint(0, V, (2, 9))
            return module, x[:, :3], module(x, module.init_state(2), lengths, learn="next_token")[1]
        return module, x[:, :3], module(x, module.init_state(2), lengths)[1]


def call(module, x, state):
    with torch.no_grad():
        return module(x, state, learn="next_token") if isinstance(module, hk.HopeForCausalLM) else module(x, state)


def put(path: str, value):
    """A function that sets state.<path>, as "mixers.0.pos", to ``value`` or value(old)."""
    def change(state):
        *way, last = path.split(".")
        for name in way:
            state = (
                state[int(name) if name.isdigit() else name] if isinstance(state, (list, dict))
                else getattr(state, name)
            )
        old = (
            state[int(last)] if isinstance(state, list) else state[last] if isinstance(state, dict)
            else getattr(state, last)
        )
        new = value(old) if callable(value) else value
        if isinstance(state, list):
            state[int(last)] = new
        elif isinstance(state, dict):
            state[last] = new
        else:
            setattr(state, last, new)
    return change


meta, double, integers = lambda t: t.to("meta"), lambda t: t.double(), lambda t: t.long()
wider, one = lambda t: torch.cat([t, t], min(1, t.dim() - 1)), lambda t: t.reshape(-1)[:1].view(1, 1, 1, 1)
fewer, gone = lambda t: t[:1], lambda t: None
counters = lambda *values: Counters(values)
BROKEN = [
    *[("titans", name, change) for name in ("delta2", "delta1", "delta1s", "s2", "s1", "s1s", "pending_k",
            "pending_v", "pending_eta",
                                            "pending_alpha", "pending_beta", "conv_tail", "count")
      for change in (meta, double, wider, fewer, gone)],
    *[("fast", name, change) for name, change in [
        ("s2", lambda _: torch.zeros(2, 2, 40, 8)), ("delta2", one), ("pending_k", one), ("delta2", "text"),
        ("config", hk.TitansConfig(D, 2)),
        ("pos", None), *[("pos", counters(*p)) for p in [(-5, 5), (9,), (9, 5.0), (9, 2**63), (9, True),
                (9, 6), (9,) * 64]],
    ]],
    *[("attention", name, change) for name in ("k", "v") for change in (meta, double, wider, fewer, gone,
            integers)],
    ("attention", "pos", counters(500, 5)), ("attention", "base", counters(-1, 0)),
    ("attention", "base", counters(9, 5)),
    ("attention", "base", counters(0)), ("attention", "pos", counters(3, 5)),
    *[("cms", f"{part}.0.up", change) for part in ("weights", "moments") for change in (meta, double, wider,
            fewer, gone)],
    *[("cms", path, change) for path, change in [
        ("weights.0", gone), ("grads.1.down", wider), ("weights.1", {}), ("weights", []), ("own.0", counters(2, 0)),
        ("rank.0", counters(1, 0)), ("seen", counters(9, 1)), ("seen", counters(2, 1)),
        ("delivered", counters(3, 0)),
        ("tainted", counters(2, 0)), ("inputs", gone), ("inputs", wider), ("inputs", double),
        ("pos", counters(-1, 9)), ("dirty.1", counters(7, 0)),
    ]],
    *[(kind, path, change) for kind in ("model", "attention model") for path, change in [
        ("pos", counters(-5, 5)), ("pos", counters(20, 5)), ("seen", counters(9, 1)),
        ("seen", counters(-1, -7)), ("seen", counters(3, 1)),
        ("seen", counters(0, 1, 1)), ("ids", wider), ("ids", meta), ("ids", lambda t: t.float()),
        ("ids", lambda t: t + V), ("ids", gone),
        ("mixers", []), ("mixers", lambda m: m[:1]), ("mixers.0", None), ("mixers.1.pos", counters(3, 5)),
        ("mixers.0", lambda m: m.to("meta")), ("cms.0", None), ("cms.1.pos", counters(0, 0)),
        ("cms.0", lambda c: c.to("meta")),
        ("cms.0", lambda c: c.select([0])), ("snapshot", []), ("snapshot.0.pos", counters(7, 4)),
        ("unread", lambda _: torch.zeros(2, 2, dtype=torch.long)), ("unread", lambda _: torch.full((2, 1), V)),
        ("unread", lambda _: torch.zeros(2, 1)), ("mixers.1", lambda m: m.to(torch.float64)),
        ("snapshot.1", lambda m: m.to("meta")),
    ]],
    ("model", "mixers.0.count", lambda t: t + 1), ("model", "mixers.0.delta2", one),
]


@pytest.mark.parametrize("kind", ["titans", "fast", "attention", "cms", "model", "attention model"])
def test_what_calls_produce_passes_and_what_they_do_not_is_refused(kind, tmp_path):
    module, x, state = read(kind)
    state.validate("here", values=True)
    cases = [(path, change) for of, path, change in BROKEN if of == kind]
    assert len(cases) > 9
    for path, change in cases:
        broken = state.clone()
        put(path, change)(broken)
        held = [(t, None if t.is_meta else t.clone()) for t in broken.tensors()]
        with pytest.raises(ValueError) as error:  # noqa: PT012
            call(module, x, broken)
            pytest.fail(f"{kind}: accepted {path}")
        assert len(str(error.value)) < 3000
        assert all(before is None or torch.equal(t, before) for t, before in held), path
        if path in ("ids", "unread"):
            continue  # not in every call: their values are looked at on the CPU
        with pytest.raises(ValueError):
            broken.validate("here")
            broken.validate("here", values=True)
    expected = call(module, x, state.clone())[0]
    assert torch.equal(call(module, x, state)[0], expected)


@pytest.mark.parametrize("kind", ["fast", "attention", "cms", "model", "attention model"])
def test_a_file_of_a_state_that_cannot_be_is_refused(kind, tmp_path, monkeypatch):
    _, _, state = read(kind)
    state.save(tmp_path / "good")
    load_state(tmp_path / "good").validate("here", values=True)
    monkeypatch.setattr(State, "synchronize", lambda self: self)  # it would put counters right
    monkeypatch.setattr(ModelState, "synchronize", lambda self: self)
    for of, path, change in BROKEN:
        if of != kind or path in (
            "mixers.0", "cms.0", "snapshot.1", "mixers.1", "config", "k", "v"
        ) or change in (meta, "text"):
            continue  # no file, or a sound one: of keys and values it has the slots that count
        broken = state.clone()
        try:
            put(path, change)(broken)
            broken.save(tmp_path / "broken")
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError):
            continue  # not even a file
        with pytest.raises(ValueError, match="is not a complete state file"):
            load_state(tmp_path / "broken")
            pytest.fail(f"{kind}: accepted {path}")


@pytest.mark.parametrize("kind", ["fast", "attention", "cms", "model", "attention model"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.float32, torch.float64)]
)
def test_a_state_of_another_dtype_is_refused(kind, dtypes):
    _, _, state = read(kind, dtypes[0])
    module, x, _ = read(kind, dtypes[1])
    state.owner = state.fingerprint = None
    if kind == "cms" and dtypes[1] == torch.bfloat16:
        state.inputs = state.errors = None  # masters alone are fp32 for both
        state.seen, state.tainted = Counters([0, 0]), Counters([1, 1])
        assert torch.isfinite(call(module, x, state)[0]).all()
        return
    with pytest.raises(ValueError, match=r"state.to\(...\) casts it"):
        call(module, x, state)
    assert torch.isfinite(call(module, x, state.to(dtypes[1]))[0]).all()


def test_two_tensors_in_one_memory_are_refused():
    module, x, state = read("titans")
    state.s2 = state.delta2
    with pytest.raises(ValueError, match="two tensors in the same memory"):
        call(module, x, state)
    module, x, state = read("model")
    state.mixers[1] = state.mixers[0]
    with pytest.raises(ValueError, match="two tensors in the same memory"):
        call(module, x, state)


@pytest.mark.parametrize("backend", ["chunked", "cpp"])
def test_any_strides_are_read_and_written(backend):
    if hk.available_backends()[backend] is not None:
        pytest.skip(hk.available_backends()[backend])
    torch.manual_seed(0)
    module, x = hk.SelfModifyingTitans(FAST), torch.randn(1, 9, D).expand(3, 9, D)
    with torch.no_grad():
        _, state = module(x, module.init_state(3), backend=backend)
        expected, after = module(x, state.clone(), backend=backend)
        for name in (
            "delta2", "delta1", "delta1s", "pending_k", "pending_v", "pending_eta", "pending_alpha", "conv_tail"
        ):
            t = getattr(state, name)
            for same in (
                t[:1].expand_as(t), t.transpose(0, -1).contiguous().transpose(0, -1),
                torch.cat([t, t], 1)[:, : t.shape[1]]
            ):
                strided = state.clone()
                setattr(strided, name, same)
                y, strided = module(x, strided, backend=backend)
                assert torch.equal(y, expected) and strided.pos == after.pos
                assert all(torch.equal(a, b) for a, b in zip(strided.tensors(), after.tensors())), name


def test_two_calls_at_once_do_not_advance_one_state():
    module, x, state = read("model")
    started, go = threading.Event(), threading.Event()

    def wait(*_):
        started.set()
        assert go.wait(30)

    handle = module.norm.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: call(module, x, state))
    thread.start()
    assert started.wait(30)
    handle.remove()
    try:
        with pytest.raises(ValueError, match="in use by another call"):
            call(module, x, state)
    finally:
        go.set()
        thread.join()
    assert state.pos == [12, 8]
    call(module, x, state)
    assert state.pos == [15, 11]


def test_a_decoder_does_not_share_its_state():
    module, _, state = read("model")
    decoder = hk.Decoder(module, state)
    with state.reading("elsewhere", module), pytest.raises(ValueError, match="in use by another call"):
        decoder.step(torch.zeros(2, 1, dtype=torch.long))
    decoder.step(torch.zeros(2, 1, dtype=torch.long))
    assert state.pos == [10, 6]


def test_reads_may_share_a_state_and_meet_no_advance():
    module, x, state = read("fast")
    with torch.no_grad():
        with state.reading("a", module, advances=False), state.reading("b", module, advances=False):
            module(x, state, update=False)
            with pytest.raises(ValueError, match="in use by another call"):
                module(x, state)
        module(x, state)
    assert state.pos == [12, 8]


@pytest.mark.parametrize("kind", ["fast", "attention", "cms", "model"])
def test_a_number_of_rows(kind):
    module, _, _ = read(kind)
    for wrong in (-1, 1.5, True, None, "2", [1]):
        with pytest.raises(ValueError, match="argument batch is"):
            module.init_state(wrong)
    assert module.init_state(0).batch == 0


@pytest.mark.parametrize("lengths", [[float("inf"), 1], [float("nan"), 1], [1 + 0j, 1], "12", {0: 1}, 5])
def test_lengths_that_are_none(lengths):
    module, x, state = read("fast")
    with pytest.raises(ValueError, match="argument lengths"):
        module(x, state, lengths)


@pytest.mark.parametrize("values", [{0, 1}, {0: 1, 1: 1}, b"ab", "ab", frozenset((0, 1))], ids=repr)
def test_rows_and_lengths_have_an_order(values):
    layer = hk.SelfModifyingTitans(hk.TitansConfig(8, 2))
    with pytest.raises(ValueError, match="rows"):
        layer.init_state(128).select(values)
    with pytest.raises(ValueError, match="lengths"):
        layer(torch.zeros(2, 3, 8), None, values)


def test_an_inner_state_without_counters_or_with_a_sparse_tensor_is_refused():
    model = hk.HopeForCausalLM(hk.HopeConfig(32, 8, 1, num_heads=2))
    ids = torch.zeros(1, 3, dtype=torch.long)
    for name, value in (("pos", None), ("count", torch.zeros(1, dtype=torch.long).to_sparse())):
        state = model.init_state(1)
        setattr(state.mixers[0], name, value)
        with pytest.raises(ValueError, match=name), torch.no_grad():
            model(ids, state)


def test_an_open_segment_lies_between_two_boundaries():
    model = hk.HopeForCausalLM(hk.HopeConfig(32, 8, 1, num_heads=2, cms=hk.CMSConfig(8, (4,))))
    with torch.no_grad():
        _, state = model(torch.zeros(1, 7, dtype=torch.long))
        state.seen[0] = 4  # three tokens after a boundary
        with pytest.raises(ValueError, match="seen is 4"):
            model(torch.zeros(1, 1, dtype=torch.long), state)


@pytest.mark.parametrize("config", [{}, {"retain_to": "zero"}], ids=["init", "zero"])
def test_shapes_on_the_meta_device(config):
    layer = hk.SelfModifyingTitans(hk.TitansConfig(8, 2, **config), device="meta")
    x = torch.zeros(2, 20, 8, device="meta")
    with torch.no_grad():
        _, state = layer(x)
        y, state = layer(x, state)
    assert y.shape == x.shape and y.device.type == "meta" and state.pos == [40, 40]


@pytest.mark.parametrize("field", ["step_clip", "in_proj", "gate"])
def test_switches_are_no_tensors_of_several(field):
    with pytest.raises(ValueError, match=field):
        hk.TitansConfig(8, **{field: torch.ones(2)})
