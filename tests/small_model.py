"""Models that are read in milliseconds."""

from pathlib import Path

import torch

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig

V = 32  # token ids of a ``tiny`` model


def saved(folder: Path) -> Path:
    """``folder`` with a byte model of 16 channels whose two CMS levels learn."""
    torch.manual_seed(0)
    model = HopeForCausalLM(
        HopeConfig(256, 16, 1, titans=TitansConfig(16, 1),
            cms=CMSConfig(16, (8, 32), expansion=2.0, lr=(0.1, 0.05)))
    )
    model.save_pretrained(folder)
    return folder


def tiny(mixer="self_modifying", seed=0, cms=None, layers=2, **options) -> HopeForCausalLM:
    """A model in fp64 with every weight moved off its initial value."""
    torch.manual_seed(seed)
    cms = cms or CMSConfig(8, (4, 8, 16), expansion=2.0, lr=0.02)
    if mixer == "attention":
        options = {"num_heads": 2, "num_kv_heads": 1, **options}
    else:
        preset, other = ("titans", 4) if mixer == "titans" else ("default", 2)
        titans = TitansConfig.preset(preset, d_model=8, num_heads=2, chunk_memory=4, chunk_other=other)
        options.setdefault("titans", titans)
    model = HopeForCausalLM(HopeConfig(V, 8, layers, mixer=mixer, cms=cms, **options), dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (batch, tokens), generator=torch.Generator().manual_seed(seed))
