"""The metrics of extracted answers: exact match and F1 of words."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import evaluate

from hf_ptune.metrics.inputs import EAST_ASIAN, Metric, texts_with_references

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_EAST_ASIAN = re.compile(f"([{EAST_ASIAN}])")
_PUNCTUATION = set(string.punctuation)


class SpanMatch(Metric):
    """Compare answers as SQuAD's own scripts do, but from 0 to 1: the best of several references counts.

    A row without references has no answer: "" is right there. Where there are such rows, rows with and without
    answers are also told apart (HasAns_f1, NoAns_f1, …), as SQuAD 2.0's script does.

    Args:
        characters: whether every Chinese or Japanese character is a word, and any script's punctuation is left out.
    """

    def __init__(self, characters: bool = False, **kwargs: Any) -> None:
        self.characters = characters
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        citation = "Rajpurkar et al. 2016, SQuAD: 100,000+ Questions for Machine Comprehension of Text"
        return texts_with_references("Exact match and F1 of extracted answers.", citation)

    def _score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        # a reference of articles and punctuation alone does not count
        wanted = [[r for r in rs if self._words(r)] or [""] for rs in references]
        pairs = list(zip(predictions, wanted, strict=True))
        exact = [max(float(self._words(p) == self._words(r)) for r in rs) for p, rs in pairs]
        f1 = [max(self._f1(p, r) for r in rs) for p, rs in pairs]
        results = {"exact_match": _mean(exact), "f1": _mean(f1)}
        answered = [bool(rs) for rs in references]
        if not all(answered):
            for name, values in (("exact", exact), ("f1", f1)):
                for part, with_answer in (("HasAns", True), ("NoAns", False)):
                    kept = [v for v, has in zip(values, answered, strict=True) if has == with_answer]
                    if kept:
                        results[f"{part}_{name}"] = _mean(kept)
        return results

    def _words(self, text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
        if self.characters:
            text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
            text = _EAST_ASIAN.sub(r" \1 ", text)
        return _ARTICLES.sub(" ", text).split()

    def _f1(self, prediction: str, reference: str) -> float:
        found, wanted = self._words(prediction), self._words(reference)
        if not found or not wanted:
            return float(found == wanted)
        same = sum((Counter(found) & Counter(wanted)).values())
        return 2 * same / (len(found) + len(wanted))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
