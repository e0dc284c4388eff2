"""Conversations as a tokenizer's chat template writes them, and which tokens of the text are answers."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_ptune.errors import RecipeError, shorten

Message = dict[str, Any]
Part = tuple[str, bool]
_ANSWERING = "assistant"
_CURE = 'expected [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'


def check_messages(messages: Any, where: str) -> list[Message]:
    """Check a conversation: messages with role and text, of which the last is the answer.

    Args:
        messages: what a row holds.
        where: the row's place, for messages of errors.

    Raises:
        RecipeError: it is something else.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RecipeError(f"{where}: messages holds {shorten(messages, 60)}; {_CURE}.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise RecipeError(
                f"{where}: message {number} is {shorten(message, 60)}, without text under role and content; {_CURE}."
            )
    last = messages[-1]
    if last["role"] != _ANSWERING or not last["content"].strip():
        said = f"of {last['role']!r}" if last["role"] != _ANSWERING else "empty"
        raise RecipeError(
            f"{where}: the last message is {said}; expected an answer, with role {_ANSWERING!r}. Take the message, or "
            "the row, out."
        )
    if len(messages) == 1:
        raise RecipeError(f"{where}: messages holds an answer, and nothing that it answers; {_CURE}.")
    return [dict(message) for message in messages]


def question_and_answer(question: str, answer: str) -> list[Message]:
    """The conversation of one instruction."""
    return [{"role": "user", "content": question}, {"role": _ANSWERING, "content": answer}]


def asked(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes before the last message, where the model is to answer."""
    return _written(messages[:-1], tokenizer, add_generation_prompt=True)


def spoken(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[list[Part]]:
    """A conversation's text in parts, and which of them the model says: its answers, with what ends them.

    Where the template writes earlier answers otherwise once more has been said (without their thoughts), the
    conversation is told again for each of them, so that every answer is learned where it would be given.

    Args:
        messages: as `check_messages` returns them.
        tokenizer: has a chat template.

    Returns:
        Texts, the whole conversation as the last one; of each its parts in order, the last one an answer.

    Raises:
        RecipeError: the template refuses the messages, or writes something else before an answer than where it asks
            for one.
    """
    texts: list[list[Part]] = []
    parts: list[Part] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != _ANSWERING or place == 0:
            continue
        until = messages[: place + 1]
        before = asked(until, tokenizer)
        whole = _written(until, tokenizer)
        if not before.startswith(done):
            texts.append(parts)
            parts, done = [], ""
        if not whole.startswith(before):
            raise RecipeError(
                "the tokenizer's chat template writes something else before an answer than where it asks for one; "
                "set task_options.template for instructions, or join a system message to the first of the user."
            )
        answer = whole[len(before) :].rstrip("\n")
        parts = [*parts, (before[len(done) :], False), (answer, True)]
        done = before + answer
    return [*texts, parts]


def tokens_of(parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of a text that is told in parts, and the number of the part that each is of.

    The text is read as a whole, where the tokenizer tells the places of its tokens: some begin every text that they
    read with a space of their own.

    Args:
        parts: as `spoken` returns them.
        tokenizer: reads them without special tokens.
    """
    texts = [text for text, _ in parts]
    if not tokenizer.is_fast:
        told = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [i for ids in told for i in ids], [n for n, ids in enumerate(told) for _ in ids]
    read = tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True)
    begins = [0, *accumulate(len(text) for text in texts)][:-1]
    return read["input_ids"], [bisect_right(begins, begin) - 1 for begin, _ in read["offset_mapping"]]


def _written(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """Messages as text.

    Raises:
        RecipeError: the template refuses them.
    """
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # templates raise whatever they like
        raise RecipeError(
            f"the tokenizer's chat template refuses the messages ({shorten(error)}); bring them into the order that it "
            "takes, or take the row out."
        ) from error
    return text
