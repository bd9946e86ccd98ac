"""Losses, gradients, checkpoints, the Trainer, hidden states."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hf_model import LEARN, MIXERS, pair, ragged, text

both = pytest.mark.parametrize("mixer", MIXERS)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@both
@pytest.mark.parametrize("learn", LEARN)
def test_loss_and_gradients_are_ours(mixer, learn):
    ours, theirs = pair(mixer)
    ids = text(2, 31)
    theirs(ids, labels=ids, learn=learn).loss.backward()
    found = gradients(ours)
    ours.zero_grad()
    logits, _ = ours(ids, learn=learn)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = gradients(ours)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part_in_logits_and_loss(mixer, side):
    ours, theirs = pair(mixer)
    rows, ids, mask = ragged([9, 26, 17], side)
    labels = ids.masked_fill(mask == 0, -100)
    out = theirs(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    nats = 0.0
    for b, row in enumerate(rows):
        logits, _ = ours(row[None])
        place = mask[b].bool()
        torch.testing.assert_close(out.logits[b][place], logits[0], rtol=1e-4, atol=1e-5)
        assert not out.logits[b][~place].any() and not out.hidden_states[1][b][~place].any()
        nats = nats + F.cross_entropy(logits[0, :-1], row[1:], reduction="sum")
    torch.testing.assert_close(out.loss, nats / sum(len(row) - 1 for row in rows), rtol=1e-5, atol=1e-5)


@both
def test_hidden_states_and_vectors_in_place_of_ids(mixer):
    ours, theirs = pair(mixer)
    ids = text(2, 27)
    out = theirs(ids, output_hidden_states=True)
    assert len(out.hidden_states) == len(ours.blocks) + 1
    assert torch.equal(out.hidden_states[0], ours.embed(ids))
    head = ours.embed.weight if ours.head is None else ours.head.weight
    assert torch.equal(out.hidden_states[-1] @ head.mT, out.logits)
    vectors = theirs.get_input_embeddings()(ids).detach().requires_grad_()
    assert torch.equal(theirs(inputs_embeds=vectors).logits, out.logits)
    theirs(inputs_embeds=vectors, labels=ids).loss.backward()
    assert vectors.grad is not None and vectors.grad.abs().sum() > 0
    expected = theirs.generate(ids, max_new_tokens=6, do_sample=False)[:, 27:]
    found = theirs.generate(inputs_embeds=vectors.detach(), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)


@both
def test_logits_to_keep_and_tuples(mixer):
    _, theirs = pair(mixer)
    ids = text(2, 22)
    with torch.no_grad():
        whole = theirs(ids).logits
        for keep in (1, 5, torch.tensor([3, 20])):
            part = theirs(ids, logits_to_keep=keep, use_cache=False, return_dict=False)
            expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
            assert len(part) == 1
            torch.testing.assert_close(part[0], expected)


@both
def test_checkpointed_blocks_have_the_same_gradients(mixer, monkeypatch):
    ours, theirs = pair(mixer)
    theirs.train()
    ids, calls, block = text(2, 29), [], type(ours.blocks[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, *args: (calls.append(self), forward(self, *args))[1])
    found = []
    for every in (0, 1, 2):
        if every:
            theirs.activation_checkpointing_enable(every_n_layers=every)
        theirs.zero_grad()
        calls.clear()
        theirs(ids, labels=ids).loss.backward()
        found.append((gradients(theirs), len(calls)))
        assert theirs.is_activation_checkpointing == bool(every)
    theirs.activation_checkpointing_disable()
    assert not theirs.is_activation_checkpointing
    assert [n for _, n in found] == [2, 4, 3]  # of two blocks: none, both, the first is read again
    for other, _ in found[1:]:
        assert other.keys() == found[0][0].keys()
        for n, g in other.items():
            torch.testing.assert_close(g, found[0][0][n], rtol=1e-5, atol=1e-7)
    copy.deepcopy(theirs)
    assert ours.checkpoint is None


def trainer(folder, steps, checkpointing=False, **options):
    from transformers import Trainer, TrainingArguments

    _, model = pair()
    data = [{"input_ids": row, "labels": row} for row in text(24, 20, 5)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=3, logging_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        gradient_checkpointing=checkpointing, lr_scheduler_type="constant", **options
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])


def test_the_trainer_resumes_where_it_was(tmp_path):
    whole, half = trainer(tmp_path / "a", 6), trainer(tmp_path / "b", 3)
    whole.train()
    half.train()
    rest = trainer(tmp_path / "b", 6)
    rest.train(resume_from_checkpoint=True)
    left, right = whole.model.state_dict(), rest.model.state_dict()
    assert rest.state.global_step == 6 and all(torch.equal(left[n], right[n]) for n in left)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, rest)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    found = whole.evaluate()["eval_loss"]
    with torch.no_grad():
        ids = text(24, 20, 5)[:4]
        logits, _ = whole.model.model.eval()(ids)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(found - float(expected)) < 1e-5


def test_the_trainer_with_checkpoints_and_bf16(tmp_path):
    plain, checkpointed = trainer(tmp_path / "a", 2), trainer(tmp_path / "b", 2, checkpointing=True)
    for t in (plain, checkpointed):
        t.train()
    for a, b in zip(plain.model.parameters(), checkpointed.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    mixed = trainer(tmp_path / "c", 2, bf16=True)
    mixed.train()
    losses = [log["loss"] for log in mixed.state.log_history if "loss" in log]
    expected = [log["loss"] for log in plain.state.log_history if "loss" in log]
    assert losses == pytest.approx(expected, rel=2e-2)
