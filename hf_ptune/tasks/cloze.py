"""CLOZE_MASKED_LM and CLOZE_CAUSAL_LM: a template with a gap, and the word that fills it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_ptune.cloze import ClozeCollator, Verbalizer, Vocabulary, classify, last_labels, predict_words
from hf_ptune.endings import closing_ids
from hf_ptune.errors import ConfigError, RecipeError, TemplateError
from hf_ptune.metrics import Accuracy, MacroF1
from hf_ptune.tasks.base import Answer, Collator, Feature, Row, Task, make_collator
from hf_ptune.tasks.registry import register_task
from hf_ptune.templates import Template

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Cloze(Task):
    """Fill the gap of a template (P-Tuning, Liu et al. 2021, section 3).

    With a verbalizer the words of the labels compete, and rows have a label; without one the whole vocabulary does,
    as in LAMA, and rows have an answer, one word.

    Args:
        template: of PTuneConfig, with `[MASK]`; its fields are roles of the rows.
        verbalizer: label to its word or words.
        average_tokens: whether words of several tokens are taken, at the mean of their tokens' scores.
        drop_long_answers: whether rows are left out whose answer is more than one token of the base's vocabulary, as
            LAMA does; else they are refused.
    """

    template: str = ""
    verbalizer: dict[str, Any] = field(default_factory=dict)
    average_tokens: bool = False
    drop_long_answers: bool = False

    def __post_init__(self) -> None:
        try:
            read = Template.parse(self.template)
            if self.model_task == "CAUSAL_LM":
                read.check_causal()
        except ConfigError as error:
            raise RecipeError(f"task_options.template: {error}") from error
        if not read.has_mask or not read.fields:
            raise RecipeError(
                f"task_options.template is {self.template!r}; expected a text with [MASK] and at least one {{field}}."
            )
        words = [w for v in self.verbalizer.values() for w in (v if isinstance(v, list) else [v])]
        if wrong := [w for w in words if not isinstance(w, str)]:
            raise RecipeError(
                f"task_options.verbalizer has the word {wrong[0]!r}; expected text. YAML takes yes, no, on and off for "
                'true and false: write "yes".'
            )
        if self.average_tokens and not self.verbalizer:
            raise RecipeError("task_options.average_tokens is of words of a verbalizer; add one, or leave it out.")
        if self.drop_long_answers and self.verbalizer:
            raise RecipeError("task_options.drop_long_answers is of answers, and a verbalizer of labels; leave it out.")
        if self._answer_role in read.fields:
            raise RecipeError(
                f"the template {self.template!r} has the field {self._answer_role!r}, which is to be told."
            )

    @property
    def _answer_role(self) -> str:
        return "label" if self.verbalizer else "answer"

    @property
    def forms(self) -> tuple[tuple[str, ...], ...]:  # type: ignore[override]
        return ((*Template.parse(self.template).fields, self._answer_role),)

    @property
    def label_role(self) -> str | None:  # type: ignore[override]
        return "label" if self.verbalizer else None

    @property
    def group_role(self) -> str | None:  # type: ignore[override]
        return self.label_role

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "accuracy" if self.verbalizer else "p_at_1"

    @property
    def _causal(self) -> bool:
        return self.model_task == "CAUSAL_LM"

    def config_options(self) -> dict[str, Any]:
        words = {label: [w] if isinstance(w, str) else list(w) for label, w in self.verbalizer.items()}
        return {"template": self.template} | ({"verbalizer": words} if words else {})

    def known_labels(self) -> list[str]:
        return list(self.verbalizer)

    def check_labels(self, labels: Sequence[str]) -> None:
        if self.verbalizer and (differ := set(labels) - set(self.verbalizer)):
            raise RecipeError(
                f"task_options.verbalizer has words for {', '.join(self.verbalizer)}, but rows have the labels "
                f"{sorted(differ)}; give each a word."
            )

    def scorer(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> Verbalizer | Vocabulary:
        read = Template.parse(self.template)
        if not self.verbalizer:
            return Vocabulary(tokenizer, read.spaced, read.behind)
        order = [*labels, *(k for k in self.verbalizer if k not in labels)]  # few rows may not have every label
        return Verbalizer(self.verbalizer, tokenizer, read.spaced, self.average_tokens, order, read.behind)

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        read, scorer = Template.parse(self.template), self.scorer(tokenizer, labels)
        features, closing = [], closing_ids(tokenizer)
        for row in rows:
            if (number := self._number(row, scorer)) is None:
                continue
            encoded = read.encode(tokenizer, row, self.max_length, self._causal, closing)
            features.append(encoded.inputs | {"labels": number})
        if len(features) < len(rows):
            logger.warning(
                f"{len(rows) - len(features)} of {len(rows)} rows are left out: their answer is more than one token."
            )
        if not features:
            raise RecipeError("no row has an answer of one token; take other rows, or another base.")
        return features

    def _number(self, row: Row, scorer: Verbalizer | Vocabulary) -> int | None:
        """The class of a row's answer; `None` where the row is left out."""
        answer = str(row[self._answer_role])
        if isinstance(scorer, Verbalizer):
            return scorer.labels.index(answer)
        try:
            return scorer.number(answer)
        except TemplateError as error:
            if self.drop_long_answers:
                return None
            raise RecipeError(f"{error} Or set task_options.drop_long_answers: true, as LAMA does.") from error

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        return make_collator(tokenizer, ClozeCollator(tokenizer, self._causal))

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Accuracy and the F1 of every class averaged (f1_macro); without a verbalizer P@1, the part of right words."""
        pairs = {
            "predictions": np.asarray(prediction.predictions),
            "references": last_labels(np.asarray(prediction.label_ids)),
        }
        results: dict[str, float] = Accuracy(keep_in_memory=True).compute(**pairs)
        if not self.verbalizer:
            return {"p_at_1": results["accuracy"]}
        return results | MacroF1(keep_in_memory=True).compute(**pairs)

    def example(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        return {name: str(row[name]) for name in Template.parse(self.template).fields}

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        read = Template.parse(self.template)
        if self.verbalizer:
            found = classify(model, tokenizer, rows, average=self.average_tokens, max_length=self.max_length)
        else:
            found = predict_words(model, tokenizer, rows, max_length=self.max_length)
        return [
            Answer(_question(read, row), f"{c.label} ({c.probabilities[c.label]:.2f})", str(row[self._answer_role]))
            for c, row in zip(found, rows, strict=True)
        ]


def _question(template: Template, row: Mapping[str, Any]) -> str:
    return " | ".join(str(row[name]) for name in template.fields)


@register_task
@dataclass(frozen=True)
class ClozeMaskedLM(_Cloze):
    """Fill the gap by a masked language model, wherever it stands."""

    name = "CLOZE_MASKED_LM"
    model_task = "MASKED_LM"


@register_task
@dataclass(frozen=True)
class ClozeCausalLM(_Cloze):
    """Fill the gap at the end by a causal language model."""

    name = "CLOZE_CAUSAL_LM"
    model_task = "CAUSAL_LM"
