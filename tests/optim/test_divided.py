"""Parameters divided over processes (FSDP2, and by columns) have the steps of a single process."""

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn

from hope_kernels import optim

pytestmark = pytest.mark.skipif(processes.WHY_NOT is not None, reason=str(processes.WHY_NOT))
MAKE = {
    "M3": lambda p: optim.M3(p, lr=0.02, f=2, weight_decay=0.1),
    "M3 paper": lambda p: optim.M3(p, lr=0.002, f=2, accumulate="paper"),
    "delta": lambda p: optim.DeltaMomentum(p, lr=0.5),
    "delta orthogonal": lambda p: optim.DeltaMomentum(p, lr=0.02, orthogonalize=True),
    "deep": lambda p: optim.DeepMomentum(p, lr=0.02),
    "deep linear": lambda p: optim.DeepMomentum(p, lr=0.02, memory="linear"),
}


@pytest.fixture(scope="module")
def found() -> dict:
    return processes.report(__file__, 2)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("kind", MAKE)
def test_divided_parameters(found, kind, layout):
    """Five steps, saved and loaded into a new optimizer after three; 7 rows on 2 processes are uneven."""
    of = found[f"{kind} {layout}"]
    assert of["apart"] < 1e-12 and of["moved"] > 1e-3


def test_training_under_fsdp(found):
    assert found["trained"] < 1e-12


def test_dgd_refuses_them_by_name(found):
    assert "is divided over processes (DTensor)" in found["refused"]["divided"]
    assert "several processes train" in found["refused"]["processes"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def by_columns(model, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    for module in (model[0], model[2]):
        for name in ("weight", "bias"):
            p = getattr(module, name)
            placed = distribute_tensor(p.detach(), mesh, [Shard(p.ndim - 1)])
            setattr(module, name, nn.Parameter(placed))
    return model


def whole(p):
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def refusal(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def steps(model, kind):
    """Gradients are given, so that both see the same: what is tested is the step."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    optimizer = MAKE[kind](model.parameters())
    for step in range(5):
        if step == 3:
            saved, optimizer = optimizer.state_dict(), MAKE[kind](model.parameters())
            optimizer.load_state_dict(saved)
        for i, p in enumerate(model.parameters()):
            g = torch.Generator().manual_seed(10 * step + i)
            grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            divided = isinstance(p, DTensor)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if divided else grad
        optimizer.step()
    return model


def trained(mesh) -> float:
    """Forward, backward and steps of FSDP2 beside a single process, on the same data."""
    from torch.distributed.fsdp import fully_shard

    models = net(), fully_shard(net(), mesh=mesh)
    for model in models:
        optimizer = MAKE["M3"](model.parameters())
        for step in range(4):
            x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return max(float((whole(q) - p).abs().max()) for p, q in zip(*(m.parameters() for m in models)))


def measure(rank, world) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, found = init_device_mesh("cpu", (world,)), {}
    for kind in MAKE:
        single = steps(net(), kind)
        for layout in ("rows", "columns"):
            model = net()
            if layout == "rows":
                fully_shard(model, mesh=mesh)
            else:
                by_columns(model, mesh)
            steps(model, kind)
            pairs = list(zip(model.parameters(), single.parameters(), net().parameters()))
            found[f"{kind} {layout}"] = {
                "apart": max(float((whole(p) - q).abs().max()) for p, q, _ in pairs),
                "moved": min(float((q - s).abs().max()) for _, q, s in pairs),
            }
    found["trained"] = trained(mesh)
    model, plain = net(), net()
    fully_shard(model, mesh=mesh)
    optimizer = optim.DGD(plain, lr=0.1)
    plain(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    found["refused"] = {
        "divided": refusal(lambda: optim.DGD(model.parameters())), "processes": refusal(optimizer.step)
    }
    dist.barrier()
    return found


if __name__ == "__main__":
    processes.main(measure)
