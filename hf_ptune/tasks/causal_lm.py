"""CAUSAL_LM: an answer after a prompt or an instruction; the loss is on the answer's tokens alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_ptune.cross_entropy import IGNORED
from hf_ptune.endings import closing_ids, end_ids, without_closing
from hf_ptune.errors import RecipeError, shorten
from hf_ptune.metrics import Accuracy
from hf_ptune.tasks.base import Answer, Collator, Feature, Row, kept_pairs, make_collator
from hf_ptune.tasks.chats import Message, Told, asked, check_messages, question_and_answer, spoken, tell
from hf_ptune.tasks.generation import GenerationTask
from hf_ptune.tasks.registry import register_task

logger = logging.get_logger(__name__)
_USER = "{instruction}"


@register_task
@dataclass(frozen=True)
class CausalLM(GenerationTask):
    """Go on after a prompt, or follow an instruction.

    Roles: `prompt` and `answer` or `references`; a prompt that is a list, or a list of lists (triples of a table),
    becomes one line. Or `instruction`, `output` and perhaps `input`, which follows the instruction on a new line. Or
    `messages` of a conversation (`role` and `content` each), written by the tokenizer's chat template: all answers of
    its assistant are learned, and the last one is what is asked for.

    Args:
        separator: stands before every answer and is learned with it; " " for tokenizers that keep the space
            before a word in the word's token. Not for what a chat template writes, which brings its own.
        template: of instructions, with `{instruction}` where the text goes. Where unset, the tokenizer's chat
            template is taken if it has one, else "Human: {instruction}\\n\\nAssistant: ".
    """

    separator: str = ""
    template: str | None = None

    name = "CAUSAL_LM"
    model_task = "CAUSAL_LM"
    forms = (("prompt", "answer"), ("prompt", "references"), ("instruction", "output"), ("messages",))
    possible = ("input",)
    lists = (*GenerationTask.lists, "messages")
    objects = ("messages",)
    depths: ClassVar[Mapping[str, int]] = {"prompt": 3, "answer": 1, "output": 1}
    target_role = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None and _USER not in self.template:
            raise RecipeError(f"task_options.template is {self.template!r}; expected a text with {_USER}.")

    def check_row(self, row: Row, where: str) -> Row:
        if "prompt" in row:
            row = row | {"prompt": one_line(row["prompt"])}
        elif "messages" in row:
            messages = check_messages(row["messages"], where)
            if self.template is not None or self.separator:
                raise RecipeError(
                    f"{where}: messages are written by the tokenizer's chat template; leave task_options.template and "
                    "separator out, which are for instructions and prompts."
                )
            row = row | {"messages": messages, "answer": messages[-1]["content"]}
        else:
            texts = [str(row[role]).strip() for role in ("instruction", "input") if role in row]
            row = row | {"instruction": "\n".join(filter(None, texts)), "answer": row["output"]}
        return super().check_row(row, where)

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        pairs = self.pairs(rows, held_out)
        closing, end = closing_ids(tokenizer), end_ids(tokenizer)
        if not end and not held_out:
            logger.warning(
                f"{type(tokenizer).__name__} has no token that ends texts, so no end of an answer is learned: what is "
                "written goes on to its greatest length. Name one as its eos_token."
            )
        encoded = []
        for row, target in pairs:
            told = self._tell(row, target, tokenizer, closing, end)
            if held_out:  # is asked for the last answer alone
                told = [Told(ids, [IGNORED] * len(ids), answer) for ids, _, answer in told[-1:]]
            encoded += [self._feature(row, one, tokenizer) for one in told]
        if cut := sum(was_cut for _, was_cut in encoded):
            logger.warning(
                f"{cut} of {len(encoded)} rows are longer than data.max_length={self.max_length}: of their prompts "
                "the end is kept, and of their answers the beginning."
            )
        return [feature for feature, _ in encoded]

    def _tell(
        self, row: Row, target: str, tokenizer: PreTrainedTokenizerBase, closing: list[int], end: list[int]
    ) -> list[Told]:
        """What is learned of a row; several where a conversation is told anew."""
        if not self._chats(row, tokenizer):
            # without its closing special tokens, so that the answer follows as it will when generating
            prompt: list[int] = tokenizer(self._prompt(row, tokenizer))["input_ids"]
            prompt = without_closing(prompt, closing)
            answer = [*tokenizer(self.separator + target, add_special_tokens=False)["input_ids"], *end]
            return [Told(prompt, [IGNORED] * len(prompt), answer)]
        if self.separator:
            raise RecipeError(
                "instructions are written by the tokenizer's chat template; leave task_options.separator out, which is "
                "for prompts, or name a task_options.template."
            )
        messages = self._conversation(row, target, tokenizer)
        try:
            texts = spoken(messages, tokenizer)
        except RecipeError as error:
            raise RecipeError(f"the row {shorten(messages)}: {error}") from error
        return [told for parts in texts for told in tell(parts, tokenizer, end)]

    def _feature(self, row: Row, told: Told, tokenizer: PreTrainedTokenizerBase) -> tuple[Feature, bool]:
        """The feature of what is told, and whether it was cut."""
        prompt, learned, answer = told
        # of what is too long, the end of the prompt and the beginning of the answer are kept
        whole = len(prompt) + len(answer)
        answer = answer[: self.max_length - min(len(prompt), self.max_length // 2)]
        kept = _places(prompt, self.max_length - len(answer), tokenizer)
        ids = [prompt[n] for n in kept] + answer
        feature = {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [learned[n] for n in kept] + answer,
            "source_ids": [prompt[n] for n in _places(prompt, self.max_length, tokenizer)],
            "references": row["references"],
        }
        return feature, len(ids) < whole

    def _chats(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> bool:
        if "messages" in row:
            return True
        return "instruction" in row and self.template is None and bool(getattr(tokenizer, "chat_template", None))

    @staticmethod
    def _conversation(row: Row, target: str, tokenizer: PreTrainedTokenizerBase) -> list[Message]:
        if "messages" not in row:
            return question_and_answer(row["instruction"], target)
        if not getattr(tokenizer, "chat_template", None):
            raise RecipeError(
                f"rows hold messages, but {type(tokenizer).__name__} has no chat template to write them by; take a "
                "base that was made to chat, or rows of instruction and output."
            )
        messages: list[Message] = row["messages"]
        return messages

    def _prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text before the answer."""
        if "prompt" in row:
            return str(row["prompt"])
        if self._chats(row, tokenizer):
            return asked(self._conversation(row, "", tokenizer), tokenizer)
        return (self.template or "Human: {instruction}\n\nAssistant: ").replace(_USER, row["instruction"])

    def example(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]]:
        """The text before the answer, as the model has learnt to read it; of a conversation the messages."""
        if not self._chats(row, tokenizer):
            return self._prompt(row, tokenizer)
        # the pipeline writes them by the template, whose special tokens a text would get twice
        before = self._conversation(row, "", tokenizer)[:-1]
        return [{key: message[key] for key in ("role", "content")} for message in before]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        return make_collator(tokenizer, DataCollatorForSeq2Seq(tokenizer))

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Accuracy of the answers' tokens, and the part of answers of which every token is right (exact_match).

        The latter is what greedy decoding would give.
        """
        found, wanted, kept = kept_pairs(prediction)
        # the logits at a position are of the next token
        return token_metrics(found[:, :-1], wanted[:, 1:], kept[:, 1:])

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        features = self.encode(rows, tokenizer, [], held_out=True)
        written = self.write(model, tokenizer, [f["source_ids"] for f in features], len(features))
        return [
            Answer(self._prompt(row, tokenizer), text, row["references"][0])
            for row, text in zip(rows, written, strict=True)
        ]


def _places(ids: list[int], room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Places of what is kept of a prompt: its end, behind the special token that it begins with."""
    if len(ids) <= room:
        return list(range(len(ids)))
    first = min(room, int(ids[0] in tokenizer.all_special_ids))
    return [*range(first), *range(len(ids) - room + first, len(ids))]


def token_metrics(found: Any, wanted: Any, kept: Any) -> dict[str, float]:
    """Accuracy of tokens, and the part of rows of which every token is right (exact_match).

    Args:
        found: ids `[N, S]`.
        wanted: ids `[N, S]`.
        kept: which of them count, `[N, S]`; where none does, nothing is known (NaN).
    """
    if not kept.any():
        return {"accuracy": math.nan, "exact_match": math.nan}
    result: dict[str, float] = Accuracy(keep_in_memory=True).compute(predictions=found[kept], references=wanted[kept])
    right = ((found == wanted) | ~kept).all(axis=1)[kept.any(axis=1)]
    return result | {"exact_match": float(np.mean(right))}


def one_line(value: Any) -> str:
    """A text as it is; a list joined by " : ", a list of lists by " | ", as Li and Liang 2021 write tables."""
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(v, (list, tuple)) for v in value)
        return (" | " if nested else " : ").join(map(one_line, value))
    return str(value)
