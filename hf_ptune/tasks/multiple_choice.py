"""MULTIPLE_CHOICE: which of several texts goes on from a first one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_ptune.errors import RecipeError
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

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@register_task
@dataclass(frozen=True)
class MultipleChoice(Task):
    """Choose among texts; every one is read behind the same first text.

    Roles: `text` (premise or passage), `choices` (a list; name several columns as a list), `label` (number from 0,
    the choice itself, or a letter from A), and `question`, which follows the text where a row has it.

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
        choices = row["choices"]
        if not isinstance(choices, (list, tuple)) or len(choices) < 2:
            raise RecipeError(f"{where}: choices are {choices!r}; expected a list of two or more texts.")
        if any(missing(choice) or choice == "" for choice in choices):
            raise RecipeError(f"{where}: choices are {choices!r}, of which one is empty; fill it.")
        choices = [str(choice) for choice in choices]
        label, number = row["label"], whole(row["label"])
        # text is looked up first, a number counts first
        if str(label) in choices and (isinstance(label, str) or number is None or not 0 <= number < len(choices)):
            number = choices.index(str(label))
        elif number is None:
            number = _LETTERS.find(label) if isinstance(label, str) and len(label) == 1 else -1
        if not 0 <= number < len(choices):
            raise RecipeError(
                f"{where}: the label is {label!r}; expected a number from 0 to {len(choices) - 1}, a letter from A, "
                "or one of the choices."
            )
        return row | {"choices": choices, "label": number}

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        """Ids are `[C, T]`, a row of them for every choice."""
        counts = {len(row["choices"]) for row in rows}
        if len(counts) > 1:
            raise RecipeError(f"rows have {sorted(counts)} choices; expected as many in every row.")
        return [self._encode_one(row, tokenizer) for row in rows]

    def _encode_one(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Feature:
        first = [self._first(row)] * len(row["choices"])
        encoded = tokenizer(first, row["choices"], truncation=True, max_length=self.max_length)
        return dict(encoded) | {"labels": row["label"]}

    def _first(self, row: Row) -> str:
        question = str(row.get("question", ""))
        return f"{row['text']} {self.joiners.get(question, question)}".strip()

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Pads to `[B, C, T]`."""
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
