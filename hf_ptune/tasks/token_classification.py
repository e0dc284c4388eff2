"""TOKEN_CLS: a tag for every word."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import (
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    pipeline,
)

from hf_ptune.errors import RecipeError
from hf_ptune.metrics import Seqeval
from hf_ptune.tasks.base import IGNORED, Answer, Feature, Row, Task, kept_pairs, need_fast
from hf_ptune.tasks.registry import register_task


@register_task
@dataclass(frozen=True)
class TokenClassification(Task):
    """Tag every word of a sentence."""

    name = "TOKEN_CLS"
    model_task = "TOKEN_CLS"
    forms = (("tokens", "tags"),)
    label_role = "tags"
    metric = "f1"

    def check_row(self, row: Row, where: str) -> Row:
        # CSV has no lists
        row = row | {role: row[role].split() for role in ("tokens", "tags") if isinstance(row[role], str)}
        if len(row["tokens"]) != len(row["tags"]):
            raise RecipeError(
                f"{where}: has {len(row['tokens'])} tokens and {len(row['tags'])} tags; expected as many."
            )
        return row

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        need_fast(tokenizer, "word")
        number = {name: n for n, name in enumerate(labels)}
        return [self._encode_one(row, tokenizer, number) for row in rows]

    def _encode_one(self, row: Row, tokenizer: PreTrainedTokenizerBase, number: Mapping[str, int]) -> Feature:
        encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=self.max_length)
        words = encoded.word_ids()
        # a word's first token bears its tag
        labels = [
            IGNORED if word is None or word == previous else number[str(row["tags"][word])]
            for word, previous in zip(words, [None, *words], strict=False)
        ]
        return dict(encoded) | {"labels": labels}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Feature]], Any]:
        pad: Callable[[list[Feature]], Any] = DataCollatorForTokenClassification(tokenizer)
        return pad

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Precision, recall and F1 of whole entities, and the accuracy of tags."""
        found, wanted, kept = kept_pairs(prediction)
        named = [
            [[labels[n] for n in row[keep]] for row, keep in zip(ids, kept, strict=True)] for ids in (found, wanted)
        ]
        result: dict[str, float] = Seqeval(keep_in_memory=True).compute(predictions=named[0], references=named[1])
        return result

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        pipe = pipeline("token-classification", model=model, tokenizer=tokenizer)
        answers = []
        for row in rows:
            text = " ".join(row["tokens"])
            found = ", ".join(f"{e['word']}: {e['entity_group']}" for e in pipe(text, aggregation_strategy="simple"))
            answers.append(Answer(text, found or "nothing", " ".join(map(str, row["tags"]))))
        return answers
