"""``generate`` of transformers: the tokens are those of ours."""

import copy

import pytest
import torch
from hf_model import LEARN, MIXERS, pair, ragged, text

both = pytest.mark.parametrize("mixer", MIXERS)
modes = pytest.mark.parametrize("learn", LEARN)


def greedy(model, ids, n, **options):
    return model.generate(ids, max_new_tokens=n, do_sample=False, **options)


@both
@modes
def test_greedy_tokens_are_ours(mixer, learn):
    ours, theirs = pair(mixer)
    ids = text(2, 37)
    expected = ours.generate(ids, 25, learn=learn).tokens
    for n, options in ((25, {}), (9, {"attention_mask": torch.ones_like(ids)}), (4, {"use_cache": False})):
        assert torch.equal(greedy(theirs, ids, n, learn=learn, **options)[:, 37:], expected[:, :n]), options


@both
def test_learning_changes_tokens_and_is_the_configurations_by_default(mixer):
    ours, theirs = pair(mixer)
    ids = text(1, 64)
    off, on = (ours.generate(ids, 30, learn=learn).tokens for learn in LEARN)
    assert not torch.equal(off, on)
    assert torch.equal(greedy(theirs, ids, 30)[:, 64:], off)
    theirs.config.learn = "next_token"
    assert torch.equal(greedy(theirs, ids, 30)[:, 64:], on)


@both
@modes
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_alone(mixer, learn, side):
    ours, theirs = pair(mixer)
    rows, ids, mask = ragged([23, 5, 40], side)
    found = greedy(theirs, ids, 20, attention_mask=mask, learn=learn)
    for b, row in enumerate(rows):
        alone = ours.generate(row[None], 20, learn=learn).tokens[0]
        assert torch.equal(found[b, 40:], alone), b


@both
@modes
def test_several_sequences_of_a_prompt_and_beams(mixer, learn):
    ours, theirs = pair(mixer)
    ids = text(2, 21)
    torch.manual_seed(0)
    sampled = theirs.generate(ids, max_new_tokens=12, do_sample=True, num_return_sequences=3, learn=learn)
    assert torch.equal(sampled[:, :21], ids.repeat_interleave(3, 0)) and len(sampled[:, 21:].unique(dim=0)) == 6
    beams = greedy(theirs, ids, 12, num_beams=4, num_return_sequences=2, learn=learn, return_dict_in_generate=True,
                   output_scores=True, length_penalty=0.0)
    with torch.no_grad():  # each beam's score is what our model says of its tokens
        logits, _ = ours(beams.sequences, learn=learn)
    nats = logits[:, 20:-1].float().log_softmax(-1).gather(-1, beams.sequences[:, 21:, None]).sum((1, 2))
    torch.testing.assert_close(beams.sequences_scores, nats, rtol=1e-4, atol=1e-4)
    if mixer == "attention":  # nothing depends on whether states are selected or prompts read again
        again = greedy(theirs, ids, 12, num_beams=4, num_return_sequences=2, learn=learn, length_penalty=0.0,
                       use_cache=False)
        assert torch.equal(again, beams.sequences)


@modes
def test_samples_are_draws_from_our_logits(learn):
    ours, theirs = pair()
    ids = text(2, 18)
    torch.manual_seed(7)
    found = theirs.generate(ids, max_new_tokens=15, do_sample=True, temperature=0.8, top_k=5, learn=learn)
    torch.manual_seed(7)
    with torch.no_grad():
        logits, state = ours(ids, learn=learn, guard=learn == "next_token" or None)
        for n in range(15):
            scores = logits[:, -1] / 0.8
            scores = scores.masked_fill(scores < scores.topk(5).values[:, -1:], -torch.inf)
            token = torch.multinomial(scores.softmax(-1), 1)
            assert torch.equal(token[:, 0], found[:, 18 + n]), n
            logits, state = ours(token, state, learn=learn)


@both
@modes
def test_goes_on_from_a_returned_or_saved_cache(mixer, learn, tmp_path):
    from hope_kernels.hf import HopeCache

    ours, theirs = pair(mixer)
    _, ids, mask = ragged([17, 30])
    first = greedy(theirs, ids, 11, attention_mask=mask, learn=learn, return_dict_in_generate=True)
    assert first.cache.get_seq_length() == 40  # padding counts, the last token is unread
    more = torch.cat([first.sequences, text(2, 9, 5)], 1)
    full = torch.cat([mask, mask.new_ones(2, 20)], 1)
    whole = greedy(theirs, more, 10, attention_mask=full, learn=learn)
    first.cache.save(tmp_path / "cache.safetensors")
    kept = copy.deepcopy(first.cache)
    for cache in (first.cache, kept, HopeCache.load(tmp_path / "cache.safetensors")):
        assert torch.equal(greedy(theirs, more, 10, attention_mask=full, learn=learn, cache=cache), whole)
        assert cache.get_seq_length() == 59


@modes
def test_goes_on_with_a_session_of_ours_and_back(learn, tmp_path):
    from hope_kernels.hf import HopeCache

    ours, theirs = pair()
    ids, more = text(1, 26), text(1, 8, 3)
    session = ours.generate(ids, 6, learn=learn)
    session.state.save(tmp_path / "session.safetensors")
    cache = HopeCache.load(tmp_path / "session.safetensors")
    written = torch.cat([ids, session.tokens, more], 1)
    found = greedy(theirs, written, 12, cache=cache, learn=learn)[:, -12:]
    expected = ours.generate(more, 12, session.state, learn=learn, unread="before")
    assert torch.equal(found, expected.tokens)
    # and back: the state has read all but the last token
    after = ours.generate(found[:, -1:], 7, cache.state, learn=learn, unread="included")
    assert torch.equal(after.tokens, ours.generate(None, 7, expected.state, learn=learn).tokens)


def test_many_answers_to_one_cached_prompt():
    ours, theirs = pair()
    ids = text(1, 33)
    with torch.no_grad():
        cache = theirs(ids, use_cache=True, learn="next_token").cache
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.batch_size == 2
    ends = text(2, 4, 9)
    whole = torch.cat([ids.expand(2, -1), ends], 1)
    found = greedy(theirs, whole, 8, cache=cache, learn="next_token")
    for b in range(2):
        assert torch.equal(found[b, 37:], ours.generate(whole[b : b + 1], 8).tokens[0])


def test_a_row_ends_at_its_end():
    ours, theirs = pair()
    ids = text(2, 20)
    free = ours.generate(ids, 30, learn="off").tokens
    end = int(free[0, 8])
    mask = torch.ones_like(ids)
    found = greedy(theirs, ids, 30, attention_mask=mask, eos_token_id=end, pad_token_id=0)[:, 20:]
    for b in range(2):
        n = (free[b] == end).nonzero().flatten().tolist()
        n = n[0] + 1 if n else 30
        assert torch.equal(found[b, :n], free[b, :n]) and not found[b, n:].any()


def test_what_is_refused():
    _, theirs = pair()
    ids = text(1, 12)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        theirs.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        theirs.generate(ids, max_new_tokens=4, assistant_model=pair()[1])
    with torch.no_grad():
        cache = theirs(ids).cache
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove is -1, expected 0"):
        cache.crop(-1)
    assert not cache.is_croppable and not cache.is_compileable
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="argument cache is a DynamicCache, expected a HopeCache"):
        theirs(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match="position_ids goes back"):
        theirs(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]]))
    with pytest.raises(ValueError, match="argument token_type_ids means nothing here"):
        theirs(ids, token_type_ids=ids)
    with pytest.raises(ValueError, match="embeds is given, expected None with learn='next_token'"):
        theirs(inputs_embeds=theirs.get_input_embeddings()(ids), learn="next_token")
