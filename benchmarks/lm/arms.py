"""Language models of one size: HOPE, Titans, attention, and HOPE without one of its parts."""

from __future__ import annotations

from benchmarks.convolved import convolved
from benchmarks.synthetic.arms import as_large_as_hope
from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig

VOCABULARY, HEAD = 256, 32  # bytes; the width of a head
TAPS = 4  # of a convolution, as TitansConfig.conv_window
PERIODS = (64, 256)  # of the CMS, in tokens
ARMS = {
    "hope": "HOPE",
    "titans": "Titans without momentum, with the CMS",
    "attention": "attention with MLPs",
    "attention_cms": "attention with the CMS",
    "attention_conv": "attention with MLPs and a convolution",
    "attention_cms_conv": "attention with the CMS and a convolution",
}
CONVOLVED = {name + "_conv": name for name in ("attention", "attention_cms")}
# of HOPE: its name in the table, and what differs in its memories
ABLATIONS: dict[str, tuple[str, dict]] = {
    "no_dgd": ("HOPE without DGD", {"dgd": False}),
    "no_retention": ("HOPE without retention", {"retention": False}),
    "no_cms": ("HOPE with MLPs for the CMS", {}),
    "no_own_values": ("HOPE without own values", {"own_values": False}),
    "no_conv": ("HOPE without convolution", {"conv_window": None}),
    "momentum": ("HOPE with momentum", {"momentum": "learned"}),
}
TITLES = ARMS | {name: title for name, (title, _) in ABLATIONS.items()}


def configuration(arm: str, d: int, layers: int, hidden: int) -> HopeConfig:
    """hidden: units of every level of the CMS, or half of those of the one MLP that stands in its place."""
    heads = max(1, d // HEAD)
    if arm in ("attention", "no_cms"):
        cms = CMSConfig(d, (1 << 20,), intermediate_size=len(PERIODS) * hidden, lr=0.0)
    else:
        cms = CMSConfig(d, PERIODS, intermediate_size=hidden)
    if arm in ("attention", "attention_cms"):
        return HopeConfig(VOCABULARY, d, layers, mixer="attention", num_heads=heads, cms=cms)
    if arm == "titans":
        # with its momentum this memory grows without bound within some thousand bytes of text, at rates of 4e-3 and
        # above, even with targets of norm 1 and steps of at most 0.02
        titans = TitansConfig.preset("titans", d_model=d, num_heads=heads, momentum=None, target_norm=True)
        return HopeConfig(VOCABULARY, d, layers, mixer="titans", titans=titans, cms=cms)
    changed = ABLATIONS[arm][1] if arm in ABLATIONS else {}
    return HopeConfig(VOCABULARY, d, layers, titans=TitansConfig(d, heads, **changed), cms=cms)


def build(arm: str, seed: int, d: int, layers: int) -> HopeForCausalLM:
    """A new model of the arm, of as many parameters as HOPE with levels of 2 d units."""
    like = CONVOLVED.get(arm, arm)
    model = as_large_as_hope(like, seed, d, lambda arm, hidden: configuration(arm, d, layers, hidden))
    return convolved(model, TAPS) if arm in CONVOLVED else model
