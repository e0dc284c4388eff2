"""QUESTION_ANS: the span of a context that answers a question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_ptune.cells import read_cell
from hf_ptune.errors import RecipeError
from hf_ptune.metrics import SpanMatch
from hf_ptune.tasks.base import (
    Answer,
    Collator,
    Feature,
    Row,
    Task,
    make_collator,
    missing,
    need_fast,
    pad_behind,
    run_model,
    whole,
)
from hf_ptune.tasks.registry import register_task

logger = logging.get_logger(__name__)
Offsets = list[tuple[int, int] | None]


@register_task
@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Extract an answer, as Rajpurkar et al. 2016 and 2018 (SQuAD 1.1 and 2.0) ask for it.

    Roles: `context`, `question`, and `answers`: `{text: [...], answer_start: [...]}`, places counted in characters
    of the context; or one text and its place, as of two columns that `data.columns.answers` names as a list. A
    context of more than `max_length` tokens is cut into windows that overlap.

    Args:
        stride: tokens of the context that a window shares with the one before it.
        max_question_length: tokens that a question is cut to.
        n_best: starts, and ends, that are tried in a window.
        max_answer_length: tokens of the longest answer that is given.
        unanswerable: whether rows may have no answer, and the model may give none.
        null_threshold: how much better than the best answer none must score to be given.
        characters: whether the metrics count every Chinese or Japanese character as a word.
    """

    stride: int = 64
    max_question_length: int = 64
    n_best: int = 20
    max_answer_length: int = 30
    unanswerable: bool = False
    null_threshold: float = 0.0
    characters: bool = False

    name = "QUESTION_ANS"
    model_task = "QUESTION_ANS"
    forms = (("context", "question", "answers"),)
    lists = ("answers",)
    objects = ("answers",)
    blanks: ClassVar[Mapping[str, Any]] = {"answers": []}
    main_metric = "f1"

    def __post_init__(self) -> None:
        for option, least in (("stride", 0), ("max_question_length", 1), ("n_best", 1), ("max_answer_length", 1)):
            if getattr(self, option) < least:
                raise RecipeError(f"task_options.{option} is {getattr(self, option)}; expected {least} or more.")

    def check_row(self, row: Row, where: str) -> Row:
        context, (texts, starts) = str(row["context"]), _answers(row["answers"], where)
        if not texts and not self.unanswerable:
            raise RecipeError(f"{where}: has no answer; set task_options.unanswerable to true.")
        if len(texts) != len(starts):
            raise RecipeError(f"{where}: has {len(texts)} answers and {len(starts)} starts; expected as many.")
        found = [_placed(text, start, context, where) for text, start in zip(texts, starts, strict=True)]
        return row | {
            "answers": {"text": [text for text, _ in found], "answer_start": [start for _, start in found]},
            "context": context,
            "question": str(row["question"]).strip(),
        }

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        """A feature knows its `row`, and the characters of the context (`offsets`) that its tokens are of.

        A window without the answer points at its first special token, as one of a row without answer does.
        """
        need_fast(tokenizer, "character")
        features, out_of_reach, too_long = [], 0, 0
        for row in rows:
            answers = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
            answers = answers if held_out else answers[:1]  # any is right, and the first is learned
            windows, whole = self._windows(row, answers, tokenizer)
            out_of_reach += bool(answers) and not whole
            too_long += bool(whole) and min(whole) > self.max_answer_length
            features += [feature | {"row": row} for feature in windows]
        kind = f"of {len(rows)} {'held-out' if held_out else 'training'} rows"
        if out_of_reach:
            which = "any answer whole" if held_out else "the first answer whole, and none is learned"
            logger.warning(
                f"{out_of_reach} {kind}: no window of {self.max_length} tokens holds {which}. Raise "
                "task_options.stride, or data.max_length."
            )
        if too_long:
            logger.warning(
                f"{too_long} {kind}: {'every' if held_out else 'the first'} answer has more than "
                f"task_options.max_answer_length={self.max_answer_length} tokens, and is never given whole; raise it."
            )
        return features

    def _windows(
        self, row: Row, answers: Sequence[tuple[str, int]], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[Feature], list[int]]:
        """Features of a row's windows, and how many tokens each answer has that one of them holds whole."""
        question = self._cut_question(row["question"], tokenizer)
        asked = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        room = self.max_length - asked - tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            raise RecipeError(
                f"data.max_length={self.max_length} leaves no room for a context beside a question of {asked} tokens; "
                "raise it, or lower task_options.max_question_length."
            )
        encoded = tokenizer(
            question,
            row["context"],
            truncation="only_second",
            max_length=self.max_length,
            stride=min(self.stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows, whole = [], []
        for n in range(len(encoded["input_ids"])):
            feature = {name: list(encoded[name][n]) for name in tokenizer.model_input_names if name in encoded}
            offsets: Offsets = [
                tuple(place) if segment == 1 else None
                for place, segment in zip(encoded["offset_mapping"][n], encoded.sequence_ids(n), strict=True)
            ]
            null = _null_place(feature["input_ids"], tokenizer)
            spans = [_span(text, begin, offsets) for text, begin in answers]
            whole += [last - first + 1 for first, last in filter(None, spans)]
            start, end = next(iter(spans), None) or (null, null)
            windows.append(feature | {"start_positions": start, "end_positions": end, "offsets": offsets, "null": null})
        return windows, whole

    def _cut_question(self, question: str, tokenizer: PreTrainedTokenizerBase) -> str:
        places = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(places) <= self.max_question_length:
            return question
        return question[: places[self.max_question_length - 1][1]]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        return make_collator(tokenizer, pad_behind(tokenizer), ("start_positions", "end_positions"))

    def preprocess_logits(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Any:
        """Logits of starts and of ends, `[B, S]` each."""
        return logits[0].float(), logits[1].float()

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Exact match and F1 of the answers, as SQuAD's own script counts them, from 0 to 1."""
        starts, ends = prediction.predictions
        found = self.best_spans(starts, ends, features)
        result: dict[str, float] = SpanMatch(self.characters, keep_in_memory=True).compute(
            predictions=[text for _, text, _ in found], references=[row["answers"]["text"] for row, _, _ in found]
        )
        return result

    def best_spans(
        self, starts: Sequence[Any], ends: Sequence[Any], features: Sequence[Feature]
    ) -> list[tuple[Row, str, float]]:
        """The answer of every row over its windows.

        Args:
            starts: logits `[N, S]`; what is behind a feature's tokens is padding.
            ends: likewise.
            features: N, windows of a row one behind the other.

        Returns:
            Row, text ("" for none), and score.
        """
        found: list[tuple[Row, tuple[float, str], float]] = []
        for start, end, feature in zip(starts, ends, features, strict=True):
            start, end = np.asarray(start), np.asarray(end)
            best = self._best_span(start, end, feature)
            null = float(start[feature["null"]] + end[feature["null"]])
            if found and found[-1][0] is feature["row"]:
                best = max(found[-1][1], best, key=lambda pair: pair[0])
                null = min(found[-1][2], null)
                found.pop()
            found.append((feature["row"], best, null))
        if not self.unanswerable:
            return [(row, text, score) for row, (score, text), _ in found]
        return [
            (row, "", null) if null > score + self.null_threshold else (row, text, score)
            for row, (score, text), null in found
        ]

    def _best_span(self, start: Any, end: Any, feature: Feature) -> tuple[float, str]:
        offsets: Offsets = feature["offsets"]
        inside = np.array([place is not None for place in offsets])
        firsts, lasts = (
            np.argsort(np.where(inside, logits[: len(offsets)], -np.inf))[::-1][: self.n_best]
            for logits in (start, end)
        )
        best, text = -np.inf, ""
        for first in firsts:
            for last in lasts:
                if not inside[first] or not inside[last] or not first <= last < first + self.max_answer_length:
                    continue
                if start[first] + end[last] > best:
                    best = float(start[first] + end[last])
                    text = feature["row"]["context"][offsets[first][0] : offsets[last][1]]  # type: ignore[index]
        return best, text

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        answers = []
        for row in rows:
            features = self.encode([row], tokenizer, [], held_out=True)
            output = run_model(self, model, tokenizer, features)
            logits = (output.start_logits.float().cpu().numpy(), output.end_logits.float().cpu().numpy())
            _, text, score = self.best_spans(*logits, features)[0]
            truth = " | ".join(dict.fromkeys(row["answers"]["text"])) or "none"
            answers.append(Answer(row["question"], f"{text or 'none'} ({score:.2f})", truth))
        return answers


def _answers(value: Any, where: str) -> tuple[list[Any], list[Any]]:
    """Texts of a row's answers and where they start; none where all are empty."""
    answers = read_cell(value, True, f"{where}: answers")
    if missing(answers) or answers in ("", []):
        return [], []
    if isinstance(answers, (list, tuple)) and len(answers) == 2 and not isinstance(answers[0], (list, dict)):
        answers = {"text": answers[0], "answer_start": answers[1]}
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
        raise RecipeError(f"{where}: answers are {answers!r}; expected {{text: [...], answer_start: [...]}}.")
    texts, starts = (
        list(v) if isinstance(v, (list, tuple)) else [v] for v in (answers["text"], answers["answer_start"])
    )
    if texts and all(missing(text) or not str(text).strip() for text in texts):
        return [], []
    return texts, starts


def _placed(value: Any, told: Any, context: str, where: str) -> tuple[str, int]:
    """An answer without the spaces around it, and its first character's number; no token is of those spaces."""
    start = whole(told)
    if start is None or start < 0:
        raise RecipeError(f"{where}: answer_start is {told!r}; expected a character's number, from 0.")
    # files that lack some answers have whole numbers as 1990.0
    spellings = [str(value)] if isinstance(value, str) else [str(value), str(whole(value))]
    text = next((spelling for spelling in spellings if context.startswith(spelling, start)), spellings[0])
    there = context[start : start + len(text)]
    if not text.strip() or there != text:
        raise RecipeError(f"{where}: the answer {value!r} is not at character {start}; there is {there!r}.")
    return text.strip(), start + len(text) - len(text.lstrip())


def _null_place(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Where a window points that has no answer: at [CLS], or at its first token where there is none."""
    cls = tokenizer.cls_token_id
    return list(ids).index(cls) if cls in ids else 0


def _span(text: str, begin: int, offsets: Offsets) -> tuple[int, int] | None:
    """First and last token of an answer; `None` where the window lacks a part of it."""
    finish = begin + len(text)
    places = [(n, place) for n, place in enumerate(offsets) if place is not None and place[0] < place[1]]
    if not places or places[0][1][0] > begin or places[-1][1][1] < finish:
        return None
    touched = [n for n, (first, last) in places if first < finish and last > begin]
    return (touched[0], touched[-1]) if touched else None
