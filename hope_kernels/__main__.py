"""python -m hope_kernels generate | chat | read | convert | demo | doctor"""

import sys

from .cli.main import process

if __name__ == "__main__":
    sys.exit(process())
