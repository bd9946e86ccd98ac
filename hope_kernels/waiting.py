"""How threads of a CPU wait for one another: briefly. Imported before PyTorch.

GNU's OpenMP, which PyTorch's CPU kernels and ours share, lets a thread that waits spin for milliseconds. On a machine
whose cores other processes want as well it spins away the time in which the thread it waits for could run: with two
threads, a model reads ten times slower than with one (benchmarks/bench_busy.py). A brief spin costs an idle machine
next to nothing. OpenMP asks the environment once, when PyTorch loads it: who imports PyTorch first, or has set
either variable, keeps what there is.
"""

import os
import sys

SPINS = "2000"

if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS
