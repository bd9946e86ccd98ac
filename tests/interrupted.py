"""Something that happens in the middle of a command."""

import hope_kernels as hk


def at_call(monkeypatch, n: int, act) -> None:
    """``act`` is done as the model's n-th call begins: the first reads the prompt, call n + 1 reads new token n; a
    step of a decoder is a call as well."""
    calls = []

    def counted(function):
        def call(self, *args, **kwargs):
            calls.append(0)
            if len(calls) == n:
                act()
            return function(self, *args, **kwargs)

        return call

    for owner, name in ((hk.HopeForCausalLM, "forward"), (hk.Decoder, "step")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
