"""A model that is read in milliseconds, as a folder."""

from pathlib import Path

import torch

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig


def saved(folder: Path) -> Path:
    """``folder`` with a byte model of 16 channels whose two CMS levels learn."""
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig(256, 16, 1, titans=TitansConfig(16, 1), cms=CMSConfig(16, (8, 32), expansion=2.0, lr=(0.1, 0.05))))
    model.save_pretrained(folder)
    return folder
