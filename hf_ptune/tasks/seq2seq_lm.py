"""SEQ_2_SEQ_LM: a text made of another one, by an encoder-decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_ptune.errors import RecipeError
from hf_ptune.tasks.base import Answer, Feature, Row, kept_pairs
from hf_ptune.tasks.causal_lm import one_line, token_metrics
from hf_ptune.tasks.generation import GenerationTask
from hf_ptune.tasks.registry import register_task


@register_task
@dataclass(frozen=True)
class Seq2SeqLM(GenerationTask):
    """Turn a text into another one.

    Roles: `text`, and `target` or `references`; a text that is a list, or a list of lists, becomes one line.

    Args:
        prefix: stands before every text, such as "summarize: " for T5.
        max_target_length: tokens that a target is cut to.
    """

    prefix: str = ""
    max_target_length: int = 128

    name = "SEQ_2_SEQ_LM"
    model_task = "SEQ_2_SEQ_LM"
    forms = (("text", "target"), ("text", "references"))
    depths: ClassVar[Mapping[str, int]] = {"text": 3, "target": 1}
    target_role = "target"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_target_length < 1:
            raise RecipeError(f"task_options.max_target_length is {self.max_target_length}; expected 1 or more.")

    def check_row(self, row: Row, where: str) -> Row:
        return super().check_row(row | {"text": one_line(row["text"])}, where)

    def example(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text with the prefix that stands before every one."""
        return self.prefix + str(row["text"])

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        if self.max_target_length <= tokenizer.num_special_tokens_to_add():
            raise RecipeError(
                f"task_options.max_target_length={self.max_target_length} leaves nothing but special tokens of "
                "targets; raise it."
            )
        features = []
        for row, target in self.pairs(rows, held_out):
            encoded = dict(tokenizer(self.example(row, tokenizer), truncation=True, max_length=self.max_length))
            wanted = tokenizer(text_target=target, truncation=True, max_length=self.max_target_length)["input_ids"]
            known = {"labels": wanted, "source_ids": encoded["input_ids"], "references": row["references"]}
            features.append(encoded | known)
        return features

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Accuracy of the targets' tokens behind the true ones before, and of whole targets (exact_match)."""
        return token_metrics(*kept_pairs(prediction))

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        features = self.encode(rows, tokenizer, [], held_out=True)
        written = self.write(model, tokenizer, [f["source_ids"] for f in features], len(features))
        return [Answer(row["text"], text, row["references"][0]) for row, text in zip(rows, written, strict=True)]
