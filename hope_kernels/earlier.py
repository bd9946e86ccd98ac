"""Where pickles of earlier versions find classes that have moved since: states, and layers saved whole."""

import sys

from .ops.cms import state as cms_state
from .ops.titans import state as titans_state

MOVED = {"ops.titans.fast_weights": titans_state, "layers.cms_state": cms_state}

for _name, _module in MOVED.items():
    sys.modules.setdefault(f"{__package__}.{_name}", _module)
