"""Two processes: a model sharded block by block, and one under DistributedDataParallel, equal a single process.

One fresh interpreter forks both ranks (importing torch twice would cost more than all of the work) and
reports as JSON.
"""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
from small_model import ids, tiny

from hope_kernels import TitansConfig

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")),
                                reason="needs gloo and fork")
MIXERS = ("self_modifying", "attention")
TOKENS = ids(4, 14)


@cache
def report() -> dict:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("calls", ["one", "late"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_sharded_blocks_equal_a_single_process(mixer, calls):
    """late: the loss is of the second of two calls, and reaches the first through the state alone."""
    found = report()[f"sharded {mixer} {calls}"]
    assert found["logits"] == 0 and found["gradients"] < 1e-12 and found["without"] == []


def test_what_a_sharded_model_cannot_do_is_refused():
    found = report()
    assert "the parameters of FSDPHopeBlock are sharded outside its call" in found["sharded learning"]
    assert 'retain_to="zero"' in found["sharded retain_to"]
    # mixed precision casts what a block is given, what a sequence has learned in fp32 too
    assert "has dtype torch.bfloat16, expected torch.float32" in found["sharded and rounded"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_sharded_as_one_unit_learns(mixer):
    assert report()[f"one unit {mixer}"] == 0


@pytest.mark.parametrize("mixer", MIXERS)
def test_data_parallel_inside_one_chunk(mixer):
    """Three steps of three tokens, which close no chunk: some parameters have no part in the loss."""
    found = report()[f"data parallel {mixer}"]
    assert found["gradients"] < 1e-12 and found["without"] == []


def loss_of(model, tokens, calls):
    if calls == "one":
        y = model(tokens)[0]
        return y, y.square().mean()
    _, state = model(tokens[:, :9])
    z, _ = model(tokens[:, 9:], state)
    return z, z.square().mean()


def compared(named, wanted) -> dict:
    """Gradients, whole, against those of a single process."""
    worst, without = 0.0, []
    for (name, p), other in zip(named, wanted):
        if p.grad is None:
            without.append(name)
            continue
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        worst = max(worst, float((grad - other.grad).abs().max() / other.grad.abs().max().clamp_min(1e-30)))
    return {"gradients": worst, "without": without}


def refusal(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def measure(rank: int) -> dict:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def sharded(model, **options):
        for block in model.blocks:
            fully_shard(block, **options)
        return fully_shard(model, **options)

    found, mine = {}, TOKENS[2 * rank : 2 * rank + 2]
    for mixer in MIXERS:
        for calls in ("one", "late"):
            single, model = tiny(mixer), sharded(tiny(mixer))
            loss_of(single, TOKENS, calls)[1].backward()
            logits, loss = loss_of(model, mine, calls)
            loss.backward()
            found[f"sharded {mixer} {calls}"] = compared(model.named_parameters(), single.parameters()) | {
                "logits": float((logits - loss_of(single, mine, calls)[0]).abs().max())}
        single, model = tiny(mixer), fully_shard(tiny(mixer))
        with torch.no_grad():
            found[f"one unit {mixer}"] = float(
                (model(mine, learn="next_token")[0] - single(mine, learn="next_token")[0]).abs().max()
            )
        single, model = tiny(mixer), DistributedDataParallel(tiny(mixer))
        for step in range(3):
            part = slice(3 * step, 3 * step + 3)
            for net, tokens in ((single, TOKENS), (model, mine)):
                net.zero_grad()
                net(tokens[:, part])[0].square().mean().backward()
        found[f"data parallel {mixer}"] = compared(model.module.named_parameters(), single.parameters())
    model = sharded(tiny())
    with torch.no_grad():
        found["sharded learning"] = refusal(lambda: model(mine, learn="next_token"))
    half = sharded(tiny().float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found["sharded and rounded"] = refusal(lambda: half(mine))
    zero = TitansConfig(8, 2, chunk_memory=4, chunk_other=2, retain_to="zero")
    found["sharded retain_to"] = refusal(lambda: sharded(tiny(titans=zero))(mine))
    return found


def main() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    child = os.fork()
    rank = 0 if child else 1
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found = measure(rank)
    dist.destroy_process_group()
    if not child:
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(json.dumps(found))
    sys.exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
