"""CAUSAL_LM: an answer after a prompt; the loss is on the answer's tokens alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerBase, pipeline

from hf_ptune.metrics import Accuracy
from hf_ptune.tasks.base import IGNORED, Answer, Feature, Row, Task, kept_pairs
from hf_ptune.tasks.registry import register_task

_ANSWER_TOKENS = 32


@register_task
@dataclass(frozen=True)
class CausalLM(Task):
    """Go on after a prompt."""

    name = "CAUSAL_LM"
    model_task = "CAUSAL_LM"
    forms = (("prompt", "answer"),)
    metric = "accuracy"

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        return [self._encode_one(row, tokenizer) for row in rows]

    def _encode_one(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Feature:
        # without its closing special tokens, so that the answer follows as it will when generating
        prompt: list[int] = tokenizer(str(row["prompt"]))["input_ids"]
        while prompt and tokenizer.eos_token_id is not None and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
        answer: list[int] = tokenizer(str(row["answer"]), add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            answer = [*answer, tokenizer.eos_token_id]
        answer = answer[: self.max_length]
        prompt = prompt[max(0, len(prompt) + len(answer) - self.max_length) :]  # the end of a long prompt is kept
        ids = prompt + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + answer}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Feature]], Any]:
        pad: Callable[[list[Feature]], Any] = DataCollatorForSeq2Seq(tokenizer)
        return pad

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Accuracy of the answers' tokens, and the part of answers of which every token is right (exact_match).

        The latter is what greedy decoding would give.
        """
        found, wanted, kept = kept_pairs(prediction)
        # the logits at a position are of the next token
        found, wanted, kept = found[:, :-1], wanted[:, 1:], kept[:, 1:]
        result: dict[str, float] = Accuracy(keep_in_memory=True).compute(
            predictions=found[kept], references=wanted[kept]
        )
        return result | {"exact_match": float(np.mean(((found == wanted) | ~kept).all(axis=1)))}

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        answers = []
        for row in rows:
            prompt = str(row["prompt"])
            written = pipe(prompt, return_full_text=False, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
            answers.append(Answer(prompt, written[0]["generated_text"].strip(), str(row["answer"])))
        return answers
