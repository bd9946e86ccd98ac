"""``python -m hope_kernels serve``: sessions over HTTP, in the form of OpenAI's API. The extra ``serve``."""
