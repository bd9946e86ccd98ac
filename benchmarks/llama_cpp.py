"""A Llama of any size with random weights, written as a GGUF file and run by llama.cpp (the wheel xllamacpp): what
the same number of weights costs there.

Its vocabulary are the 256 bytes. Weights are fp32, as those that it is compared with.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from hope_kernels import HopeForCausalLM

CONTEXT = 4096


def absent() -> str | None:
    """Why llama.cpp cannot be asked here, or None."""
    try:
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def feed_forward(weights: int, d: int, layers: int) -> int:
    """Hidden units with which a Llama of width d has about so many weights: a multiple of 32."""
    rest = weights - 256 * d - layers * 4 * d * d
    return max(round(rest / (layers * 3 * d) / 32) * 32, 32)


def write(path: Path, weights: int, d: int, heads: int, layers: int) -> int:
    """Writes the model; its number of weights."""
    import gguf

    hidden, draw, total = feed_forward(weights, d, layers), np.random.default_rng(0), 0
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(d)
    out.add_block_count(layers)
    out.add_feed_forward_length(hidden)
    out.add_head_count(heads)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_dimension_count(d // heads)
    out.add_vocab_size(256)
    out.add_tokenizer_model("llama")
    out.add_token_list([f"<0x{i:02X}>" for i in range(256)])
    out.add_token_scores([0.0] * 256)
    out.add_token_types([gguf.TokenType.BYTE] * 256)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    shapes = {"token_embd": (256, d)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{n}": (d, d) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{n}": (d, hidden) if n == "down" else (hidden, d) for n in ("gate", "up", "down")}
    for name, (rows, columns) in shapes.items():
        out.add_tensor(f"{name}.weight", draw.normal(0, columns**-0.5, (rows, columns)).astype(np.float32))
        total += rows * columns
    for name in ("output_norm", *(f"blk.{i}.{n}_norm" for i in range(layers) for n in ("attn", "ffn"))):
        out.add_tensor(f"{name}.weight", np.ones(d, np.float32))
        total += d
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return total


class Llama:
    """llama.cpp with one model, in this process."""

    def __init__(self, path: Path, threads: int):
        import xllamacpp as xlc

        params = xlc.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = CONTEXT, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xlc.Server(params)

    def per_token(self, prompt: list[int], tokens: int) -> float:
        """Microseconds of a greedy token after the prompt, by its own clock: sampling included, no Python."""
        return self._timings(prompt, tokens)["predicted_per_token_ms"] * 1e3

    def per_read_token(self, prompt: list[int]) -> float:
        """Microseconds of a token of the prompt, by its own clock."""
        return self._timings(prompt, 1)["prompt_per_token_ms"] * 1e3

    def _timings(self, prompt: list[int], tokens: int) -> dict[str, float]:
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
        answer = self.server.handle_completions(asked)
        return (json.loads(answer) if isinstance(answer, (str, bytes)) else answer)["timings"]


def like(model: HopeForCausalLM, threads: int) -> Llama:
    """A random one with about as many weights as ``model``, as wide and as deep."""
    c, weights = model.config, sum(p.numel() for p in model.parameters())
    assert c.titans is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        write(path, weights, c.d_model, c.titans.num_heads, c.num_layers)
        return Llama(path, threads)
