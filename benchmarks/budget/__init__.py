"""What the kernels cost by count: instructions, bytes and passes of memory, and what these bound.

Nothing here is measured on a GPU. The kernels run as PTX on the machine of tools/ptx, launched by the package's
own host code, which counts every instruction; bounds.py makes bounds and predictions of the counts, and says on
which assumptions.
"""
