"""Random problems for the memory's operator, and how the tests of its kernels run and compare them."""

import torch
from numerics import correlated, within_yardstick

from hope_kernels import TitansConfig
from hope_kernels.ops import TokenInputs, titans_chunk
from hope_kernels.ops.titans.state import FastWeights, Layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WRITTEN = (
    "delta2", "delta1", "delta1s", "s2", "s1", "s1s", "pending_k", "pending_v", "pending_eta",
    "pending_alpha", "pending_beta"
)


def problem(
    config: TitansConfig, rows: int, tokens: int, correlation: float = 0.0, seed: int = 0,
    alpha: torch.Tensor | None = None, beta: torch.Tensor | None = None,
):
    """Initial fast weights and inputs in fp64; ``alpha`` [T] for layers that are given theirs, ``beta`` [T]
    for those with momentum."""
    torch.manual_seed(seed)
    H, D = config.num_heads, config.head_dim
    shapes = Layout.of(config).shapes(H)
    w_init = FastWeights(
        *(None if s is None else torch.randn(s, dtype=torch.float64) / s[-1] ** 0.5 for s in shapes)
    )
    tokens_of = lambda: correlated(
        torch.randn(rows, tokens, H * D, dtype=torch.float64), correlation
    ).unflatten(-1, (H, D))
    unit = lambda t: t / t.norm(dim=-1, keepdim=True)
    q = None if config.adaptive_q else unit(tokens_of())
    if config.momentum is None:
        beta = None
    elif config.momentum != "learned":
        beta = torch.full((rows, tokens, H), config.momentum, dtype=torch.float64)
    elif beta is None:
        beta = torch.rand(rows, tokens, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    else:
        beta = beta.view(1, -1, 1).expand(rows, tokens, H)
    if config.self_modifying:
        bias = torch.linspace(-1, 3, H, dtype=torch.float64)
        return w_init, TokenInputs(q, x=tokens_of(), beta=beta, eta_bias=bias, alpha_bias=bias + 2)
    eta = 0.5 * torch.rand(rows, tokens, H, dtype=torch.float64)
    if alpha is None:
        alpha = torch.rand(rows, tokens, H, dtype=torch.float64)
    alpha = alpha.view(1, -1, 1).expand(rows, tokens, H) if alpha.dim() == 1 else alpha
    return w_init, TokenInputs(
        q, k=unit(tokens_of()), v=tokens_of(), eta=eta, alpha=alpha if config.retention else None, beta=beta
    )


def single(found):
    return type(found)(*(None if t is None else t.float() for t in found))


def noisy(found, seed: int = 1):
    """With noise of 4.5 eps, which is to fp32 what 1e-15 is to fp64."""
    generator = torch.Generator().manual_seed(seed)
    sign = lambda t: torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
    return type(found)(
        *(None if t is None else t * (1 + 4.5 * torch.finfo(torch.float32).eps * sign(t)) for t in found)
    )


def run(config, w_init, inputs, backend, lengths=None, state=None):
    with torch.no_grad():
        o, state = titans_chunk(config, w_init, inputs, state, lengths, backend=backend)
    return o, state


def results(o, state) -> dict[str, torch.Tensor]:
    return {"o": o} | {n: getattr(state, n) for n in WRITTEN if getattr(state, n) is not None}


def part(inputs: TokenInputs, a: int, b: int) -> TokenInputs:
    return TokenInputs(*(t if t is None or t.dim() == 1 else t[:, a:b] for t in inputs))


def rows_of(inputs: TokenInputs, index: list[int]) -> TokenInputs:
    return TokenInputs(*(t if t is None or t.dim() == 1 else t[index] for t in inputs))


def same(a, b) -> bool:
    equal = all(getattr(a, n) is None or torch.equal(getattr(a, n), getattr(b, n)) for n in (*WRITTEN, "count"))
    return equal and list(a.pos) == list(b.pos)


def cast(found, dtype, device=DEVICE):
    return type(found)(*(None if t is None else t.to(device, dtype) for t in found))


def meets_yardstick(config, w_init, inputs, dtype, lengths=None, backend="triton", device=DEVICE):
    """Whether a call with these fp64 arguments in ``dtype`` is as near to the exact one as PyTorch's is."""
    of = lambda name, kind: results(
        *run(config, cast(w_init, kind, device), cast(inputs, kind, device), name, lengths)
    )
    exact, peer, ours = of("chunked", torch.float64), of("chunked", dtype), of(backend, dtype)
    for name, t in ours.items():
        within_yardstick(t, peer[name], exact[name], name)
