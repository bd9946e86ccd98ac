"""Libraries on top of transformers."""

import pytest
import torch
from hf_model import MIXERS, pair, text

LINEARS = {"attention": ["q_proj", "v_proj", "o_proj"], "self_modifying": ["in_proj", "out_proj"]}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("what", ["projections", "cms"])
def test_adapters_of_peft(mixer, what, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    ours, theirs = pair(mixer)
    ids, before = text(2, 26), theirs(text(2, 26)).logits.detach()
    if what == "projections":
        targets = {"target_modules": LINEARS[mixer]}
    else:
        names = [n for n, _ in theirs.named_parameters() if n.endswith((".up", ".down"))]
        targets = {"target_modules": [], "target_parameters": names}
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **targets)
    adapted = peft.get_peft_model(theirs, config)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in n for n in trained)
    logits = adapted(input_ids=ids).logits.detach()
    assert (logits - before).abs().max() > 0.1
    tokens = adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False, learn="next_token")[:, 26:]
    adapted.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(pair(mixer)[1], tmp_path).eval()
    assert torch.equal(back(input_ids=ids).logits, logits)
    merged = back.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.model.generate(ids, 6).tokens, tokens)
    merged.save_pretrained(tmp_path / "merged")


def test_windows_of_lm_eval():
    """Its log-likelihoods are sums of our losses."""
    models = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm_eval")
    import os

    import hope_kernels as hk

    folder = os.path.join(hk.folders.ASSETS, "hope-byte")
    evaluated = models.HFLM(pretrained=folder, device="cpu", batch_size=2, trust_remote_code=True)
    from lm_eval.api.instance import Instance

    pairs = [("In the beginning was", " the Word"), ("And he said", " unto them, Go ye")]
    requests = [Instance("loglikelihood", {}, p, i) for i, p in enumerate(pairs)]
    found = evaluated.loglikelihood(requests, disable_tqdm=True)
    model = hk.HopeForCausalLM.from_pretrained("hope-byte")
    for (context, rest), (value, _) in zip(pairs, found):
        ids = torch.tensor([list((context + rest).encode())])
        with torch.no_grad():
            nats = model(ids, output="losses")[0].nats[0, len(context.encode()) - 1 : -1].sum()
        assert value == pytest.approx(-float(nats), rel=1e-4)
