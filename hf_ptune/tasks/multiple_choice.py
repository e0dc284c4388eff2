"""MULTIPLE_CHOICE: which of several texts goes on from a first one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_ptune.cells import read_cell
from hf_ptune.errors import RecipeError, shorten
from hf_ptune.metrics import Accuracy
from hf_ptune.tasks.base import (
    Answer,
    Collator,
    Feature,
    Row,
    Task,
    make_collator,
    missing,
    pad_behind,
    run_model,
    whole,
)
from hf_ptune.tasks.registry import register_task

logger = logging.get_logger(__name__)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@register_task
@dataclass(frozen=True)
class MultipleChoice(Task):
    """Choose among texts; every one is read behind the same first text.

    Roles: `text` (premise or passage), `choices` (a list; name several columns as a list), `label` (number from 0,
    the choice itself, or a letter from A), and `question`, which follows the text where a row has it. Where a row is
    too long its text is cut, and question and choice stay whole, as long as the choice leaves room for both.

    Args:
        joiners: what stands for a question, by question; COPA's rows ask for "cause" or "effect".
    """

    joiners: dict[str, str] = field(default_factory=lambda: {"cause": "because", "effect": "so"})

    name = "MULTIPLE_CHOICE"
    model_task = "MULTIPLE_CHOICE"
    forms = (("text", "choices", "label"),)
    possible = ("question",)
    lists = ("choices",)
    main_metric = "accuracy"

    def check_row(self, row: Row, where: str) -> Row:
        return self.check_rows([row], [where])[0]

    def check_rows(self, rows: Sequence[Row], places: Sequence[str]) -> list[Row]:
        """Labels of all rows are read as the first kind that fits them all, since a number may be a choice too.

        Text is a choice, a number or a letter; a number counts the choices, or is one.
        """
        rows = [_with_choices(row, where) for row, where in zip(rows, places, strict=True)]
        readings = [_read_label(row, where) for row, where in zip(rows, places, strict=True)]
        kinds = [kind for kind in dict.fromkeys(k for r in readings for k in r) if all(kind in r for r in readings)]
        if kinds:
            _tell_kind(kinds, readings)
            return [row | {"label": found[kinds[0]]} for row, found in zip(rows, readings, strict=True)]
        for row, found, where in zip(rows, readings, places, strict=True):
            if len(numbers := sorted(set(found.values()))) > 1:
                either = " or ".join(repr(row["choices"][n]) for n in numbers)
                raise RecipeError(
                    f"{where}: the label is {row['label']!r}, which may be choice {either}; labels of other rows do "
                    "not tell, as they are of several kinds. Write all labels as choices, as numbers from 0, or as "
                    "letters."
                )
        return [row | {"label": next(iter(found.values()))} for row, found in zip(rows, readings, strict=True)]

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        """Ids are `[C, S]`, a row of them for every choice."""
        counts = Counter(len(row["choices"]) for row in rows)
        if len(counts) > 1:
            most = counts.most_common(1)[0][0]
            other = next(row for row in rows if len(row["choices"]) != most)
            raise RecipeError(
                f"{counts.total() - counts[most]} of {len(rows)} rows have not {most} choices, as the one with the "
                f"text {shorten(other['text'], 60)} ({len(other['choices'])}); expected as many in every row. Take "
                "them out, or add choices that nobody would take."
            )
        return [self._encode_one(row, tokenizer) for row in rows]

    def _encode_one(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Feature:
        first, choices = self._first(row), row["choices"]
        firsts = [first] * len(choices)
        if not tokenizer.is_fast:  # does not tell which tokens are the passage's
            cut = tokenizer(firsts, choices, truncation=True, max_length=self.max_length)
            return dict(cut) | {"labels": row["label"]}
        passage = len(first) - len(self._question(row))
        encoded = tokenizer(firsts, choices, return_offsets_mapping=True, verbose=False)
        feature: Feature = {name: [] for name in encoded if name != "offset_mapping"}
        for n, choice in enumerate(choices):
            kept = self._kept(encoded["offset_mapping"][n], encoded.sequence_ids(n), passage, tokenizer.truncation_side)
            one = (
                {name: [encoded[name][n][place] for place in kept] for name in feature}
                if kept is not None
                else tokenizer(first, choice, truncation=True, max_length=self.max_length)
            )
            for name, values in feature.items():
                values.append(one[name])
        return feature | {"labels": row["label"]}

    def _kept(
        self, offsets: Sequence[tuple[int, int]], segments: Sequence[int | None], end: int, side: str
    ) -> list[int] | None:
        """Which tokens of a text and its choice are kept; `None` where the question alone is too long.

        Args:
            offsets: characters that tokens are of, `[S]`.
            segments: 0 of passage and question, 1 of the choice, `[S]`.
            end: of the passage in the text.
            side: where the passage is cut.
        """
        passage = [n for n, segment in enumerate(segments) if segment == 0 and offsets[n][1] <= end]
        choice = [n for n, segment in enumerate(segments) if segment == 1]
        room = self.max_length - (len(segments) - len(passage) - len(choice))
        if len(passage) + len(choice) <= room:
            return list(range(len(segments)))
        if room < 2:
            return None
        # a choice as long as all the room leaves the passage half of it
        most = room - len(choice) if len(choice) < room else min(len(passage), room // 2)
        cut = {*(passage[: len(passage) - most] if side == "left" else passage[most:]), *choice[room - most :]}
        return [n for n in range(len(segments)) if n not in cut]

    def _question(self, row: Row) -> str:
        question = str(row.get("question", ""))
        return self.joiners.get(question, question).strip()

    def _first(self, row: Row) -> str:
        return f"{row['text']} {self._question(row)}".strip()

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Pads to `[B, C, S]`."""
        inner = pad_behind(tokenizer)

        def pad(features: list[Feature]) -> Any:
            labels = [f["labels"] for f in features]
            names = [name for name in features[0] if name != "labels"]
            choices = len(features[0]["input_ids"])
            flat = inner([{name: f[name][n] for name in names} for f in features for n in range(choices)])
            batch = {name: ids.view(len(features), choices, -1) for name, ids in flat.items()}
            return batch | {"labels": torch.tensor(labels)}

        return make_collator(tokenizer, pad)

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Accuracy."""
        result: dict[str, float] = Accuracy(keep_in_memory=True).compute(
            predictions=np.asarray(prediction.predictions), references=np.asarray(prediction.label_ids)
        )
        return result

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        answers = []
        for row in rows:
            logits = run_model(self, model, tokenizer, self.encode([row], tokenizer, [])).logits[0]  # [C]
            score, best = logits.float().softmax(-1).max(-1)
            answer = f"{row['choices'][int(best)]} ({score:.2f})"
            answers.append(Answer(self._first(row), answer, row["choices"][row["label"]]))
        return answers


def _with_choices(row: Row, where: str) -> Row:
    """The row with its choices as a list of texts."""
    choices = read_cell(row["choices"], False, f"{where}: choices")
    if not isinstance(choices, (list, tuple)) or len(choices) < 2:
        raise RecipeError(f"{where}: choices are {choices!r}; expected a list of two or more texts.")
    if any(missing(choice) or choice == "" for choice in choices):
        raise RecipeError(f"{where}: choices are {choices!r}, of which one is empty; fill it.")
    return row | {"choices": [str(choice) for choice in choices]}


def _read_label(row: Row, where: str) -> dict[str, int]:
    """Which choice a label is, by the kinds of label that it may be; the likeliest is first."""
    label, count = row["label"], len(row["choices"])
    told, choices = str(label).strip(), [choice.strip() for choice in row["choices"]]
    found = {"numbers from 0": number} if (number := whole(label)) is not None and 0 <= number < count else {}
    if told in choices:
        # text is looked up first, a number counts first
        chosen = {"choices": choices.index(told)}
        found = chosen | found if isinstance(label, str) else found | chosen
    if len(told) == 1 and told in _LETTERS[:count]:
        found["letters"] = _LETTERS.index(told)
    if not found:
        raise RecipeError(
            f"{where}: the label is {label!r}; expected a number from 0 to {count - 1}, a letter from A, or one of the "
            "choices."
        )
    return found


def _tell_kind(kinds: Sequence[str], readings: Sequence[Mapping[str, int]]) -> None:
    """Say as what labels are read where another kind would fit them all and choose otherwise."""
    chosen, *others = kinds
    for other in others:
        if any(found[chosen] != found[other] for found in readings):
            logger.warning_once(
                f"The labels of choices are taken as {chosen}, though all of them could be {other}. If they are, write "
                "the choices themselves in their place."
            )
