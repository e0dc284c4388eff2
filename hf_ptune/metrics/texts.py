"""The metrics of written text: BLEU and ROUGE-L, with several references."""

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import evaluate

from hf_ptune.errors import PTuneError
from hf_ptune.metrics.inputs import EAST_ASIAN, WrittenTextMetric, texts_with_references

_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
_LETTER = rf"[^\W_{EAST_ASIAN}{_UNSPACED}]"
_JOINERS = "\u200c\u200d"


class Bleu(WrittenTextMetric):
    """BLEU of a corpus as sacrebleu and mteval count it, from 0 to 100.

    Args:
        tokenize: sacrebleu's tokenizer: "13a" (mteval), "zh", "char", "intl", "none".
    """

    def __init__(self, tokenize: str = "13a", **kwargs: Any) -> None:
        self.tokenize = tokenize
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return texts_with_references(
            "BLEU of a corpus.", "Papineni et al. 2002, BLEU; Post 2018, A Call for Clarity in Reporting BLEU"
        )

    def _score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        try:
            from sacrebleu.metrics import BLEU
        except ImportError as error:
            raise PTuneError('BLEU needs sacrebleu: pip install "hf_ptune[metrics]".') from error
        most = max(map(len, references))
        # sacrebleu wants the first references of all texts, then the second ones, and so on
        streams = [[row[n] if n < len(row) else None for row in references] for n in range(most)]
        return {"bleu": float(BLEU(tokenize=self.tokenize).corpus_score(list(predictions), streams).score)}


def bleu_tokenizers() -> list[str]:
    """Names of the tokenizers that BLEU may take; none where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return []
    return [str(name) for name in BLEU.TOKENIZERS]


class RougeL(WrittenTextMetric):
    """ROUGE-L: F1 of the longest common subsequence of words, the best reference of each text, from 0 to 1.

    Words are lower-cased runs of letters and digits, as in the package rouge_score without its stemmer, which drops all
    but ASCII: here a letter has its combining marks, every Chinese or Japanese character is a word, and so is every
    letter of Thai, Lao, Burmese and Khmer, which have no spaces between words.
    """

    def _info(self) -> evaluate.MetricInfo:
        return texts_with_references(
            "F1 of longest common subsequences.", "Lin 2004, ROUGE: A Package for Automatic Evaluation"
        )

    def _score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        scores = [
            max(_subsequence_f1(rouge_words(p), rouge_words(r)) for r in rs)
            for p, rs in zip(predictions, references, strict=True)
        ]
        return {"rougeL": sum(scores) / len(scores)}


def rouge_words(text: str) -> list[str]:
    """The words of a text as ROUGE-L compares them."""
    return _pattern().findall(text.lower())


@cache
def _pattern() -> re.Pattern[str]:
    """A word; the module re has no name for combining marks."""
    marks = "".join(c for n in range(0x300, sys.maxunicode) if unicodedata.category(c := chr(n)).startswith("M"))
    ending = f"[{marks}{_JOINERS}]"
    return re.compile(rf"[{EAST_ASIAN}]|(?![\W_])[{_UNSPACED}]{ending}*|{_LETTER}(?:{_LETTER}|{ending})*")


def _subsequence_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    if not found or not wanted:
        return 0.0
    row = [0] * (len(wanted) + 1)  # longest common subsequence with each beginning of `wanted`
    for word in found:
        diagonal = 0
        for n, other in enumerate(wanted, 1):
            above = row[n]
            row[n] = diagonal + 1 if word == other else max(above, row[n - 1])
            diagonal = above
    return 2 * row[-1] / (len(found) + len(wanted))
