from importlib.util import find_spec

# Files that import what may be absent: the docstring search must not trip over them. Those of assets are read by
# transformers alone.
collect_ignore_glob = ["hope_kernels/assets/*"]
if not find_spec("triton"):
    collect_ignore_glob += ["hope_kernels/*triton*.py", "tests/failing_kernels.py"]
if not find_spec("transformers"):
    collect_ignore_glob += ["hope_kernels/hf/*"]
