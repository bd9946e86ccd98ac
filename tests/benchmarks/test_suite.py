"""Layers, models and peers under measurement, and the door of pytest-benchmark: what is counted, what is
refused, what is reported."""

import json
from dataclasses import replace

import pytest
import small_model
import torch

from benchmarks import bench_cms, bench_layers, bench_model, bench_titans, peers
from benchmarks import measure as m
from benchmarks.bench_layers import Case
from hope_kernels import HopeForCausalLM, TitansConfig

SMALL = Case("layer", C=8, D=8, N=16, H=2, B=2, T=30, dtype="fp32", backend="chunked")
KINDS = ("layer", "attention", "block titans", "block attention")


def of(kind: str, **more) -> Case:
    return replace(SMALL, kind=kind, **({"backend": None} if "attention" in kind else {}) | more)


def run(case: Case, measure=bench_layers.prefill, **options) -> dict:
    return measure(case, "cpu", {"copy": 1.0, "matmul fp32": 1.0}, seconds=0.01, quick=True, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a model of 16 channels."""
    return str(small_model.saved(tmp_path_factory.mktemp("small")))


def test_ceilings_beside_a_case_are_looked_for_twice_and_the_better_counts(monkeypatch):
    copies, loops = iter([1.0, 2.0]), iter([1e12, 3e12])  # ms and FLOP/s, before and after
    monkeypatch.setattr(m, "turns", lambda *_, **__: {"copy": m.stats([next(copies)])})
    monkeypatch.setattr(m, "fma_rate", lambda threads: next(loops))
    found = m.Beside(quick=True)
    assert dict(found) == {"copy": 8 * 2**20 / 1e6, "fma fp32": 1.0}
    assert found.get("fma fp32") == 3.0 and found.get("copy") == 8 * 2**20 / 1e6 and found.get("matmul bf16") is None


def test_without_a_compiler_there_is_no_loop_of_multiply_adds(monkeypatch):
    def absent(threads):
        raise FileNotFoundError

    monkeypatch.setattr(m, "fma_rate", absent)
    found = m.Beside(quick=True)
    record = m.rates({"ms": {"median": 2.0}}, found, "fp32", 4e9, 8e6)
    assert "fma fp32" not in found and record["TFLOP/s"] == 2.0 and record["of_copy"] > 0
    assert record.get("of_fma") is record.get("of_matmul") is None


# -- layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_blocks_pass_and_a_wrong_one_gets_no_time(kind):
    record = run(of(kind))
    assert record["check"]["ok"] and record["ms"]["median"] > 0 and record["of_copy"] == record["GB/s"]

    def late(module, x, backend):  # right on the piece that is compared in full, wrong after it
        found = bench_layers.read(module, x, backend)
        return (
            found | {"o": found["o"].clone().index_fill_(1, torch.tensor(x.shape[1] - 1), float("nan"))}
            if x.shape[1] == 30 else found
        )

    def other_state(module, x, backend):
        found = bench_layers.read(module, x, backend)
        name = [n for n in found if n != "o"][0]
        return found | {name: 1.001 * found[name]}

    for harm, reason in ((late, "unwritten"), (other_state, "differs")):
        refused = run(of(kind), op=harm)
        assert refused["status"] == "refused" and reason in refused["reason"] and "ms" not in refused


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_counted_apart_where_a_chunk_closes(kind):
    record = run(of(f"{kind} step", T=5 if "attention" in kind else 1), bench_layers.step)
    closes = 0 if "attention" in kind else 2
    assert record["check"]["ok"] and record["plain"]["ms"]["n"] == 16 - closes
    assert ("commit" in record) == bool(closes) and (not closes or record["commit"]["ms"]["n"] == 2)


def test_work_of_a_layer_is_the_hand_counted_one():
    d = 16
    assert bench_layers.flops_of(of("attention"), 3) == 3 * 8 * d * d + 4 * d * (1 + 2 + 3)
    assert bench_layers.flops_of(of("attention step"), 1, before=9) == 8 * d * d + 4 * d * 10
    assert bench_layers.flops_of(of("layer"), 5) == 5 * (8 * d * d + m.flops_per_token(TitansConfig(
        d, 2, 2, chunk_memory=8, chunk_other=8)) + 16 * d)
    assert bench_layers.flops_of(
        of("block attention"), 5
    ) - bench_layers.flops_of(of("attention"), 5) == 5 * 2 * 2 * 8 * d * d
    module = bench_layers.module_of(of("attention"), "cpu")
    assert bench_layers.bytes_of(of("attention"), module, 3) == 4 * (4 * d * d + 2 * 2 * 3 * d + 2 * 2 * 3 * d)
    layer = bench_layers.module_of(of("layer"), "cpu")
    assert bench_layers.static_weights(of("layer")) == sum(p.weight.numel() for p in layer.children())
    block = bench_layers.module_of(of("block titans"), "cpu")
    matrices = sum(p.numel() for n, p in block.named_parameters() if n.endswith(("proj.weight", "up", "down")))
    assert bench_layers.static_weights(of("block titans")) == matrices
    state = sum(t.numel() for t in layer.init_state(2).deviation)
    params = sum(p.numel() for p in layer.parameters())
    assert bench_layers.bytes_of(of("layer"), layer, 5) == 4 * (params + 2 * 2 * 5 * d + 2 * state)


def test_every_plan_names_its_cases_once():
    for module in (bench_layers, bench_model, bench_titans):
        for device in ("cpu", "cuda"):
            for quick in (False, True):
                names = [name for name, _, _ in module.items(device, quick)]
                assert len(set(names)) == len(names) >= 4
    names = {c.name for c in bench_layers.GPU_CASES}
    assert {"layer C64 D64 N256 H32 B1 T32768 bf16 cuda", "fla layer C64 D64 N256 H32 B1 T32768 bf16 fla"} <= names


# -- models --------------------------------------------------------------------------------------------------


def model(kind: str, name: str, T: int = 0, **more) -> bench_model.Case:
    return bench_model.Case(kind, name, T=T, **more)


def measured(case: bench_model.Case, **options) -> dict:
    return bench_model.measured(case, "cpu", {}, seconds=0.01, quick=True, **options)


def test_reading_and_decoding_a_model(small):
    record = measured(model("prefill", small, 40))
    assert record["on_per_off"] == pytest.approx(record["tokens/s"] / record["off_tokens/s"])
    net = HopeForCausalLM.from_pretrained(small)
    block = 3 * 16 * 16 + 4 * 16 + 2 * 2 * 16 * 32  # one head: no in_proj; convolution; two levels
    assert bench_model.flops_per_token(net) == 2 * (block + 256 * 16) + m.flops_per_token(net.config.titans)
    assert record["off"]["flops"] == 40 * bench_model.flops_per_token(net)
    decoded = measured(model("decode", small, 20))
    assert decoded["context"] == 20 and not decoded["captured"] and decoded["ms"]["n"] == 128
    assert decoded["on_per_off"] == pytest.approx(decoded["tokens/s"] / decoded["off_tokens/s"])
    assert decoded["next_token"]["bytes"] > bench_model.weight_bytes(net)


@torch.no_grad()
def test_a_model_that_reads_or_decodes_something_else_is_refused(small):
    case = model("decode", small, 20)
    net = bench_model.model_of(case, "cpu")
    ids = bench_model.prose(case, 21, "cpu")
    for op in (bench_model.whole, bench_model.stepwise):
        assert bench_model.checked(net, case, ids, op)["ok"]
        assert not bench_model.checked(net, case, ids, lambda net, ids, backend,
                                       op=op: 1.001 * op(net, ids, backend)
                                       if net.embed.weight.dtype == torch.float32 else op(net, ids, backend))["ok"]
    forgetful = lambda net, ids, backend: net(ids, learn="off", backend=backend)[0]
    assert not bench_model.checked(net, case, ids, forgetful)["ok"]


def test_state_bytes_and_a_long_run(small):
    found = measured(model("state", small, B=2))
    n = 2 * 16 * 32
    assert [v["formula"] for v in found["levels"]] == [4 * n, 8 * n]
    assert [v["measured"] for v in found["levels"]] == [v["layer_says"] for v in found["levels"]] == [4 * n, 8 * n]
    assert found["state_bytes_per_row"] >= found["fresh_bytes_per_row"] + 8 * n
    record = measured(model("long", small, 320))
    assert record["complete"] and record["tokens"] == 320 and len(record["parts"]) == 10
    assert record["read_seconds"] == sum(part["seconds"] for part in record["parts"])
    assert [d["after"] for d in record["decode_ms"]] == [32, 320] and record["decode_ms"][0]["n"] == 16
    cut = measured(model("long", small, 320), limit=-1.0)
    assert not cut["complete"] and cut["tokens"] < 320 and cut["read_seconds"] is None


def test_the_large_model_has_the_size_its_name_says():
    with torch.device("meta"):
        net = HopeForCausalLM(bench_model.random_config("1.3B"))
    assert 1.25e9 < sum(p.numel() for p in net.parameters()) < 1.35e9


# -- peers ---------------------------------------------------------------------------------------------------


def test_torch_s_attention_is_checked_before_it_is_timed(monkeypatch):
    case = bench_titans.Case("prefill", D=8, H=2, B=3, T=40, dtype="fp32")
    record = peers.sdpa(case, "cpu", {}, 0.01)
    assert record["error"] < 1e-6 and record["version"] == torch.__version__ and "unknown" not in record["backend"]
    right = peers.attended
    monkeypatch.setattr(peers, "attended", lambda q, k, v: right(q, k, v) * 1.01)
    refused = peers.sdpa(case, "cpu", {}, 0.01)
    assert refused["status"] == "refused" and "ms" not in refused


def test_the_written_ttt_linear_is_gradient_descent_by_mini_batches():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 12, 2, 4, dtype=torch.float64)
    w, b = torch.randn(2, 2, 4, dtype=torch.float64)
    eta, scale, chunk = 0.05, 0.5, 4
    S, s = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.randn(2, 2, 1, 4, dtype=torch.float64)
    o = peers.ttt_linear(q, k, v, w, b, S, s, eta, scale, chunk)
    norm = lambda t: torch.nn.functional.layer_norm(t, (4,), eps=1e-6)
    for row in range(2):
        for h in range(2):
            W, bias = S[row, h], s[row, h, 0]
            for start in range(0, 12, chunk):
                grads = []
                # every token's own gradient, at the weights the mini-batch starts with
                for t in range(start, start + chunk):
                    leaves = [W.clone().requires_grad_(), bias.clone().requires_grad_()]
                    target = v[row, t, h] - k[row, t, h]
                    loss = (norm(k[row, t, h] @ leaves[0] + leaves[1]) * w[h] + b[h] - target).square().sum() / 2
                    grads.append(torch.autograd.grad(loss, leaves))
                    Wt, bt = (p - eta * sum(g[i] for g in grads) for i, p in enumerate((W, bias)))
                    z = scale * q[row, t, h] @ Wt + bt
                    assert torch.allclose(o[row, t, h], z + norm(z) * w[h] + b[h], rtol=1e-9, atol=1e-12)
                W, bias = Wt, bt


def test_peers_that_are_not_installed_are_said_to_be_missing():
    case = peers.QUICK_CPU()
    for distribution, peer in (("titans-pytorch", peers.titans_pytorch), ("flash-linear-attention", peers.ttt)):
        try:
            peers.installed(distribution)
        except ImportError:
            with pytest.raises(ImportError, match=f"{distribution}.* is not installed"):
                peer(case, "cpu", {}, 0.01)


# -- pytest-benchmark ----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="cases of a machine without a CUDA device")
def test_pytest_benchmark_gets_the_times_of_the_records_and_fails_wrong_results(tmp_path, monkeypatch, capsys):
    out, case = tmp_path / "out.json", str(m.ROOT / "benchmarks" / "bench_suite.py") + "::test_case[{}]"
    right, wrong = "cms: newton d32 C64 B2 fp32 muon", "cms: refresh d32 C16 B1 fp32 gd chunked"
    monkeypatch.setattr(bench_cms, "cms_refresh_", lambda *args, **kw: None)
    options = ("--rootdir", str(m.ROOT), "-p", "no:cacheprovider", "--quick", "--benchmark-only")
    code = pytest.main([*options, f"--benchmark-json={out}", case.format(right), case.format(wrong)])
    shown = capsys.readouterr().out
    assert code == 1 and "1 failed, 1 passed" in shown and "differs from fp64" in shown, shown
    (found,) = json.loads(out.read_text())["benchmarks"]
    info, stats = found["extra_info"], found["stats"]
    assert found["group"] == "cms" and right in found["name"]
    assert stats["rounds"] == info["ms"]["n"] and stats["median"] == pytest.approx(info["ms"]["median"] / 1e3)
    assert stats["min"] == pytest.approx(info["ms"]["min"] / 1e3) and info["check"]["ok"] and info["of_fma"] > 0
    assert info["of_fma"] == pytest.approx(info["TFLOP/s"] / info["ceilings"]["fma fp32"])
