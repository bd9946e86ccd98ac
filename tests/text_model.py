"""A tiny model for text: a BPE of a few hundred tokens and a random Llama, as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch

CORPUS = ["In the beginning was the Word, and the Word was with God, and the Word was God.\n",
          "The same was in the beginning with God. All things were made by him;\n\n",
          "and without him was not any thing made that was made.  In him was life;\n",
          "    def read(text):\n        return text\n", "naïve café, über, 日本語 😀\n"] * 3
SPECIAL = ["<|end|>", "<|start|>", "<|stop|>"]
TEMPLATE = """{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|start|>system
Help.<|end|>
{% endif %}{{ '<|start|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>' + '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""


def library_tokenizer(metaspace: bool = False):
    """A tokenizer of the library tokenizers: byte-level as GPT-2's, or as SentencePiece's with bytes for what
    it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if not metaspace:
        found = Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        found.train_from_iterator(CORPUS, trainer)
        found.post_processor = processors.ByteLevel(trim_offsets=True)
        return found
    found = Tokenizer(models.BPE(byte_fallback=True, unk_token="<|stop|>", fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    found.train_from_iterator([c.replace("日本語 😀", "") for c in CORPUS], trainer)
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    start = found.token_to_id("<|start|>")
    found.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", start)]
    )
    return found


def source(folder: Path, seed: int = 0, **options) -> Path:
    """``folder`` as transformers saves a Llama and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=library_tokenizer(), eos_token="<|end|>", bos_token="<|start|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "initializer_range": 0.3, "vocab_size": len(tokenizer),
              "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    model = LlamaForCausalLM(LlamaConfig(**config | options))
    model.generation_config.eos_token_id = [0, 2]
    model.save_pretrained(folder)
    return folder
