"""Small language models with random weights and a tokenizer of words, or for Qwen of letters, in a folder."""

from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz.Ġ"
WORDS = [
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "toy",
    "story",
    "heat",
    "comedy",
    "the",
    "a",
    "long",
    "film",
    "of",
    ".",
]


def save_tokenizer(folder: Path, ends: str = "<s> $A </s>", pad: str | None = "<pad>") -> None:
    """One token per word; `ends` says what stands around a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    special = [(word, WORDS.index(word)) for word in ("<s>", "</s>") if word in ends]
    tokenizer.post_processor = TemplateProcessing(single=ends, special_tokens=special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    ).save_pretrained(folder)


def save_letters(folder: Path) -> None:
    """Qwen's own tokenizer, whose class transformers takes for its models; as in its embedding models
    every text ends with a token that says so."""
    from tokenizers.processors import TemplateProcessing
    from transformers import Qwen2Tokenizer

    end = "<|endoftext|>"
    tokenizer = Qwen2Tokenizer(vocab={letter: k for k, letter in enumerate(LETTERS)} | {end: len(LETTERS)})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, len(LETTERS))]
    )
    tokenizer.save_pretrained(folder)


def token_ids(kind: str, text: str) -> list[int]:
    """What the tokenizer of this kind should make of a text in small letters."""
    if kind.startswith("qwen"):
        return [LETTERS.index(letter) for letter in text.replace(" ", "Ġ")] + [len(LETTERS)]
    words = [WORDS.index(word) for word in text.split()]
    return [WORDS.index("<s>"), *words, *([WORDS.index("</s>")] if kind != "llama" else [])]


def save_model(folder: Path, kind: str, seed: int = 0, **others: Any) -> str:
    """bert, t5, qwen2, qwen3 or llama, which has no padding token. Returns the folder's name."""
    import transformers as hf

    torch.manual_seed(seed)
    decoder = {"num_key_value_heads": 1, "max_position_embeddings": 64}
    common = {"vocab_size": len(LETTERS) + 1, "hidden_size": 16, "intermediate_size": 16,
              "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    if kind == "bert":
        model = hf.BertModel(hf.BertConfig(**common, **{"max_position_embeddings": 64, **others}))
    elif kind == "t5":
        config = hf.T5Config(
            vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, **others
        )
        model = hf.T5ForConditionalGeneration(config)
    elif kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**common, **decoder, **others))
    elif kind == "qwen2":
        model = hf.Qwen2Model(hf.Qwen2Config(**common, **decoder, **others))
    else:
        model = hf.Qwen3Model(hf.Qwen3Config(**common, **decoder, head_dim=8, **others))
    with torch.no_grad():  # the usual small values make all texts nearly alike
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    if kind.startswith("qwen"):
        save_letters(folder)
    elif kind == "llama":
        save_tokenizer(folder, "<s> $A", pad=None)
    else:
        save_tokenizer(folder)
    return str(folder)
