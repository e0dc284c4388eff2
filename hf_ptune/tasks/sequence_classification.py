"""SEQ_CLS: a label for a sentence, or for a pair of sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase, pipeline

from hf_ptune.errors import RecipeError
from hf_ptune.metrics import Accuracy, MacroF1
from hf_ptune.tasks.base import Answer, Feature, Row, Task
from hf_ptune.tasks.registry import register_task


@register_task
@dataclass(frozen=True)
class SequenceClassification(Task):
    """Tell the label of a text, or of a text and its pair."""

    name = "SEQ_CLS"
    model_task = "SEQ_CLS"
    forms = (("text", "label"),)
    possible = ("text_pair",)
    everywhere = ("text_pair",)
    pair_role = "text_pair"
    depths: ClassVar[Mapping[str, int]] = {"label": 1}  # refused in its own words
    label_role = "label"
    group_role = "label"
    main_metric = "accuracy"

    def check_row(self, row: Row, where: str) -> Row:
        if isinstance(row["label"], (list, tuple)):
            raise RecipeError(
                f"{where}: the label is {row['label']!r}; expected one. Rows with several are no task here."
            )
        return row

    def check_labels(self, labels: Sequence[str]) -> None:
        if len(labels) < 2:
            raise RecipeError(
                f"the training rows have one label only, {labels[0]!r}; classification needs two or more."
            )

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        number = {name: n for n, name in enumerate(labels)}
        return [
            dict(tokenizer(**_inputs(row), truncation=True, max_length=self.max_length))
            | {"labels": number[str(row["label"])]}
            for row in rows
        ]

    def example(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str]:
        """The text, or text and pair, as a pipeline takes them."""
        inputs = _inputs(row)
        return inputs if "text_pair" in inputs else inputs["text"]

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Accuracy, and the F1 of every class averaged (f1_macro)."""
        pairs = {
            "predictions": np.asarray(prediction.predictions),
            "references": np.asarray(prediction.label_ids),
        }
        results: dict[str, float] = {}
        for metric in (Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)):
            results |= metric.compute(**pairs)
        return results

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
        answers = []
        for row in rows:
            inputs = _inputs(row)
            best = pipe([inputs], truncation=True, max_length=self.max_length)[0]
            answers.append(
                Answer(" | ".join(inputs.values()), f"{best['label']} ({best['score']:.2f})", str(row["label"]))
            )
        return answers


def _inputs(row: Row) -> dict[str, str]:
    """What a tokenizer, or a pipeline, is told of a row."""
    return {role: str(row[role]) for role in ("text", "text_pair") if role in row}
