"""A forked process goes on where its parent was: it inherits the pool of threads without the threads."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
import torch
from hope_kernels import Decoder, HopeForCausalLM

torch.set_num_threads(2)
model = HopeForCausalLM.from_pretrained("hope-byte")
ids = torch.arange(512).remainder(256).view(4, 128)
state = model.init_state(4)
with torch.no_grad():
    model(ids, state)
    decoder = Decoder(model, state.clone())
    decoder.step(ids[:, :1])
    child = os.fork()
    logits = model(ids, state)[0], decoder.step(ids[:, 1:2])
    if child == 0:
        torch.save(logits, {path!r})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
for mine, childs in zip(logits, torch.load({path!r})):
    assert torch.equal(mine, childs)
assert torch.get_num_threads() == 2
"""
WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset
from hope_kernels import SelfModifyingTitans, TitansConfig

torch.set_num_threads(2)
layer, x = SelfModifyingTitans(TitansConfig(256, 4)), torch.randn(4, 200, 256)


class Read(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        with torch.no_grad():
            return layer(x[i : i + 1])[0][0], torch.get_num_threads()


with torch.no_grad():
    whole, _ = layer(x)  # with both threads, before anything is forked
y, threads = zip(*DataLoader(Read(), batch_size=1, num_workers=2, multiprocessing_context="fork"))
assert torch.equal(torch.cat(y), whole) and [int(n) for n in threads] == [1] * 4
with torch.no_grad():
    assert torch.equal(layer(x)[0], whole) and torch.get_num_threads() == 2
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_layers_work_in_the_workers_of_a_data_loader():
    subprocess.run([sys.executable, "-c", WORKERS], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_reads_on_with_the_same_bits(tmp_path):
    script = SCRIPT.format(path=str(tmp_path / "logits.pt"))
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
