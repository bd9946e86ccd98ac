"""python -m hope_kernels generate | demo | doctor"""

import sys

from .cli.generate import process

if __name__ == "__main__":
    sys.exit(process())
