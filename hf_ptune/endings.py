"""Tokens that end texts: those that a tokenizer puts behind what it reads, and the one that ends an answer."""

from transformers import PreTrainedTokenizerBase


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that a tokenizer puts behind every text."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    read: list[int] = tokenizer("a")["input_ids"]
    begins = [n for n in range(len(read)) if bare and read[n : n + len(bare)] == bare]
    return read[begins[0] + len(bare) :] if begins else []


def without_closing(ids: list[int], closing: list[int]) -> list[int]:
    """Ids of a text that goes on, without those that close it.

    Args:
        ids: of the text as the tokenizer reads it.
        closing: its `closing_ids`.
    """
    return ids[: -len(closing)] if closing and ids[-len(closing) :] == closing else ids


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id that ends an answer: the end token, or where a tokenizer names none, the last that closes its texts.

    Returns:
        One id; none where there is neither.
    """
    return closing_ids(tokenizer)[-1:] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def let_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer without an end token name the one that closes its texts, so that what is written ends there.

    Args:
        tokenizer: changed in place.
    """
    if tokenizer.eos_token is None and (found := end_ids(tokenizer)):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(found[0])
