"""Tokenizers of every kind that tells spaces in its own way, trained on a handful of words."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "a b c it was good bad great , . ? x y z hello world yes no maybe terrible Paris Rome Berlin"
KINDS = ["wordpiece", "bytes", "metaspace"]


def tokenizer_of(kind: str, mask: bool = True, further: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary holds the words whole, and others in pieces.

    Args:
        kind: "wordpiece" (BERT), "bytes" (GPT-2, RoBERTa) or "metaspace" (ALBERT, Llama).
        further: words that "wordpiece" holds besides.
        mask: whether it has a mask token, and closing tokens, as those of encoders do.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "wordpiece":
        pieces = [*WORDS.replace("terrible", "").split(), *further.split(), "##s", "##o", "t", "##errible"]
        inner = Tokenizer(models.WordPiece({w: n for n, w in enumerate([*special, *pieces])}, unk_token="[UNK]"))
        inner.normalizer = normalizers.BertNormalizer(lowercase=False)
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
    elif kind == "bytes":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        text = " ".join([WORDS.replace("terrible", "")] * 4)
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator([text], trainer)
    else:
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
        words = WORDS.replace("terrible", "").split()
        scores = {w: 0.0 for w in special} | {f"▁{w}": -2.0 for w in words} | {w: -3.0 for w in words}
        scores |= {c: -9.0 for c in "▁terible"}
        inner.model = models.Unigram(list(scores.items()), unk_id=1)
    if mask:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    named = {"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} if mask else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", **named
    )
