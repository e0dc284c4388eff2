"""Conversations as a tokenizer's chat template writes them, and which parts of the text are answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_ptune.adapter_file import shorten
from hf_ptune.errors import RecipeError

Message = dict[str, Any]
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
    return [dict(message) for message in messages]


def question_and_answer(question: str, answer: str) -> list[Message]:
    """The conversation of one instruction."""
    return [{"role": "user", "content": question}, {"role": _ANSWERING, "content": answer}]


def asked(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes before the last message, where the model is to answer."""
    text: str = tokenizer.apply_chat_template(list(messages[:-1]), tokenize=False, add_generation_prompt=True)
    return text


def spoken(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """A conversation's text in parts, and which of them the model says: its answers, with what ends them.

    Answers that the template writes otherwise, once more has been said, are read and not learned.

    Args:
        messages: as `check_messages` returns them.
        tokenizer: has a chat template.

    Returns:
        Parts in order; the last one is the last answer.

    Raises:
        RecipeError: the template writes something else before an answer than where one is asked for.
    """
    parts: list[tuple[str, bool]] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != _ANSWERING or place == 0:
            continue
        until = messages[: place + 1]
        before = asked(until, tokenizer)
        whole: str = tokenizer.apply_chat_template(list(until), tokenize=False)
        if not before.startswith(done):
            parts, done = [], ""
        if not whole.startswith(before):
            raise RecipeError(
                "the tokenizer's chat template writes something else before an answer than where it asks for one; "
                "set task_options.template."
            )
        answer = whole[len(before) :].rstrip("\n")
        parts += [(before[len(done) :], False), (answer, True)]
        done = before + answer
    return parts
