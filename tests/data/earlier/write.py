"""Writes the files beside it, with the public API alone: run it with the code whose files are to load later.

    PYTHONPATH=CHECKOUT python tests/data/earlier/write.py FOLDER

For each kind: the weights, a state in the middle of a chunk or segment, the inputs that come next, and the
outputs that this code gives for them, in fp64 on the chunked backend.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hope_kernels import CMSConfig, ContinuumMemory, HopeConfig, HopeForCausalLM, SelfModifyingTitans, TitansConfig

TITANS = TitansConfig(8, 2, hidden_mult=2, chunk_memory=4, chunk_other=8, momentum="learned", scalar_skip=True)
CMS = CMSConfig(8, (4, 8), expansion=1.5, lr=0.05, optimizer="momentum")
MODEL = HopeConfig(
    32, 8, 2, titans=TitansConfig(8, 2, hidden_mult=1, chunk_memory=4, chunk_other=2),
    cms=CMSConfig(8, (4, 8), expansion=1.0, lr=0.05)
)


def moved(module):
    """Every weight moved off its initial value."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.eval()


@torch.no_grad()
def titans(folder: Path) -> None:
    layer, x = moved(SelfModifyingTitans(TITANS, dtype=torch.float64)), torch.randn(2, 30, 8, dtype=torch.float64)
    _, state = layer(x[:, :19], lengths=[19, 6], backend="chunked")
    state.save(folder / "titans-state.safetensors")
    y, state = layer(x[:, 19:], state, backend="chunked")
    weights = {f"weights.{n}": t for n, t in layer.state_dict().items()}
    save_file(weights | {"x": x[:, 19:].contiguous(), "y": y}, folder / "titans.safetensors")


@torch.no_grad()
def cms(folder: Path) -> None:
    layer = moved(ContinuumMemory(CMS, dtype=torch.float64))
    x, errors = (torch.randn(2, 20, 8, dtype=torch.float64) for _ in range(2))
    state = None
    for t in (0, 4, 8):
        _, state = layer(x[:, t : t + 4], state, backend="chunked")
        state = layer.refresh(state, errors[:, t : t + 4], backend="chunked")
    _, state = layer(x[:, 12:14], state, backend="chunked")
    state.save(folder / "cms-state.safetensors")
    y, state = layer(x[:, 14:16], state, backend="chunked")
    state = layer.refresh(state, errors[:, 12:16], backend="chunked")
    z, _ = layer(x[:, 16:], state, backend="chunked")
    given = {"x": x[:, 14:].contiguous(), "errors": errors[:, 12:16].contiguous(), "y": torch.cat([y, z], 1)}
    save_file({f"weights.{n}": t for n, t in layer.state_dict().items()} | given, folder / "cms.safetensors")


@torch.no_grad()
def model(folder: Path) -> None:
    made, ids = moved(HopeForCausalLM(MODEL, dtype=torch.float64)), torch.randint(0, 32, (2, 40))
    made.save_pretrained(folder / "model")
    _, state = made(ids[:, :23], lengths=[23, 17], learn="next_token", backend="chunked")
    state.save(folder / "model-state.safetensors")
    logits, _ = made(ids[:, 23:], state, learn="next_token", backend="chunked")
    save_file({"ids": ids[:, 23:].contiguous(), "logits": logits}, folder / "model.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    for write in (titans, cms, model):
        write(Path(sys.argv[1]))
