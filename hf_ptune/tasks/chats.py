"""Conversations as a tokenizer's chat template writes them, and which tokens of the text are answers."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from hf_ptune.cross_entropy import IGNORED
from hf_ptune.errors import RecipeError, shorten

Message = dict[str, Any]
_ANSWERING = "assistant"
_CURE = 'expected [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'


class Part(NamedTuple):
    """A piece of a conversation's text.

    Args:
        text: what is written.
        said: whether the model says it: an answer, with what ends it.
        bare: whether the template writes nothing that ends the answer.
    """

    text: str
    said: bool = False
    bare: bool = False


class Told(NamedTuple):
    """Ids of a conversation up to an answer, what is learned of them, and the answer's own ids."""

    prompt: list[int]
    labels: list[int]
    answer: list[int]


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
        bare = answer.strip() == message["content"].strip()
        parts = [*parts, Part(before[len(done) :]), Part(answer, True, bare)]
        done = before + answer
    return [*texts, parts]


def tell(parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, end: Sequence[int]) -> list[Told]:
    """Ids of a text that is told in parts, every answer behind the very ids that the model will be asked with.

    A token may reach from the prompt into the answer where both are read at once, as " Paris" does behind "Answer: ".
    The answer is read by itself there, and the conversation is told again for those behind it, whose prompts read the
    whole.

    Args:
        parts: as `spoken` returns them.
        tokenizer: reads them without special tokens.
        end: ids behind the last answer of each, where the template writes nothing there.
    """
    told: list[Told] = []
    last, bare = Told([], [], []), False
    read = tokenizer(list(accumulate(part.text for part in parts)), add_special_tokens=False)["input_ids"]
    for part, ids in zip(parts, read, strict=True):
        if part.said:
            alone = not _begins(ids, last.prompt)
            answer = tokenizer(part.text, add_special_tokens=False)["input_ids"] if alone else ids[len(last.prompt) :]
            last, bare = last._replace(answer=answer), part.bare
            continue
        known = last.prompt + last.answer
        if _begins(ids, known):
            learned = last.labels + last.answer
        else:
            told.append(_ended(last, end, bare))
            learned = []
        last = Told(ids, learned + [IGNORED] * (len(ids) - len(learned)), [])
    return [*told, _ended(last, end, bare)]


def _begins(ids: list[int], first: list[int]) -> bool:
    return ids[: len(first)] == first


def _ended(told: Told, end: Sequence[int], bare: bool) -> Told:
    return told._replace(answer=[*told.answer, *end]) if bare else told


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
