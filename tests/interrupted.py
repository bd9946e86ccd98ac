"""Something that happens in the middle of a command."""

import hope_kernels as hk


def at_call(monkeypatch, n: int, act) -> None:
    """``act`` is done as the model's n-th call begins: the first reads the prompt, call n + 1 reads new token n."""
    forward, calls = hk.HopeForCausalLM.forward, []

    def counted(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == n:
            act()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(hk.HopeForCausalLM, "forward", counted)
