"""Metrics: values by hand, without network."""

import math
import random
import re
import string
from collections import Counter

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_ptune.errors import PTuneError
from hf_ptune.metrics import Accuracy, Bleu, MacroF1, RougeL, Seqeval, SpanMatch
from hf_ptune.metrics.tags import spell_tags
from hf_ptune.metrics.texts import rouge_words
from hf_ptune.tasks import IGNORED
from hf_ptune.tasks.causal_lm import CausalLM, token_metrics
from hf_ptune.tasks.sequence_classification import SequenceClassification
from hf_ptune.tasks.token_classification import TokenClassification


def test_values_by_hand() -> None:
    pairs = {"predictions": [0, 0, 1, 2], "references": [0, 1, 1, 1]}
    assert Accuracy(keep_in_memory=True).compute(**pairs) == {"accuracy": 0.5}
    # F1: class 0 2/3, class 1 1/2, class 2 0
    assert MacroF1(keep_in_memory=True).compute(**pairs)["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 3)
    found = Seqeval(keep_in_memory=True).compute(
        predictions=[["B-X", "I-X", "O"], ["B-Y", "O"]], references=[["B-X", "I-X", "O"], ["B-X", "O"]]
    )
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": pytest.approx(4 / 5)}


def write_tags(spans: list[tuple[int, int, str]], length: int, scheme: str) -> list[str]:
    """Tags of entities that stand in words from a first to a last one."""
    letters = {
        "IOB2": ("B", "I", "I", "B"),
        "IOBES": ("B", "I", "E", "S"),
        "BILOU": ("B", "I", "L", "U"),
        "BMES": ("B", "M", "E", "S"),
        "BMEWO": ("B", "M", "E", "W"),
    }
    tags = ["O"] * length
    for first, last, kind in spans:
        for n in range(first, last + 1):
            if scheme in ("plain", "unlike"):
                tags[n] = kind
            elif scheme == "alone":
                tags[n] = "B" if n == first else "I"
            else:
                begin, inside, end, single = letters[scheme.partition(" ")[0]]
                letter = single if first == last else begin if n == first else end if n == last else inside
                tags[n] = f"{kind}-{letter}" if scheme.endswith("behind") else f"{letter}-{kind}"
    return [tag[0].lower() + tag[1:] for tag in tags] if scheme.endswith("small") else tags


def draw_spans(generator: random.Random, length: int, kinds: list[str], apart: bool) -> list[tuple[int, int, str]]:
    spans: list[tuple[int, int, str]] = []
    place = 0
    while (first := place + generator.randint(0, 2)) < length:
        last = min(length - 1, first + generator.randint(0, 3))
        spans.append((first, last, generator.choice(kinds)))
        place = last + 1 + apart  # equal plain tags side by side are one entity
    return spans


@pytest.mark.parametrize(
    "scheme",
    ["IOB2", "IOBES", "BILOU", "BMES", "BMEWO", "plain", "unlike", "alone"]
    + ["IOB2 behind", "BILOU behind", "IOB2 small", "BILOU small"],
)
def test_entities_are_those_that_the_tags_spell(scheme: str) -> None:
    generator = random.Random(0)
    # of the plain ones some begin like a prefix
    kinds = {"plain": ["PER", "ORG", "BOOK", "I", "LOC"], "unlike": ["E-mail", "S-Bahn", "phone"], "alone": ["_"]}
    wanted, found = (
        [draw_spans(generator, 12, kinds.get(scheme, ["PER", "ORG", "O-X"]), scheme in kinds) for _ in range(60)]
        for _ in range(2)
    )
    for n in range(0, 60, 2):
        found[n] = [span for span in wanted[n] if generator.random() < 0.7]
    written = {
        "predictions": [write_tags(spans, 12, scheme) for spans in found],
        "references": [write_tags(spans, 12, scheme) for spans in wanted],
    }
    right = sum(len(set(a) & set(b)) for a, b in zip(found, wanted, strict=True))
    precision, recall = right / sum(map(len, found)), right / sum(map(len, wanted))
    alike = [a == b for role in zip(*written.values(), strict=True) for a, b in zip(*role, strict=True)]
    assert Seqeval(keep_in_memory=True).compute(**written) == pytest.approx(
        {
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "accuracy": sum(alike) / len(alike),
        }
    )


def test_a_plain_class_that_was_missed_is_missed() -> None:
    found = Seqeval(keep_in_memory=True).compute(predictions=[["PER", "O", "O"]], references=[["PER", "ORG", "O"]])
    assert found["recall"] == 0.5 and found["precision"] == 1.0
    found = Seqeval(keep_in_memory=True).compute(
        predictions=[["B_PER", "I_PER", "B_X-Y"]], references=[["B_PER", "I_PER", "B_X-Y"]]
    )
    assert found["f1"] == 1.0


@pytest.mark.parametrize(("unscored", "right"), [([], 1 / 2), (["phone"], 1.0)])
def test_a_task_reads_tags_by_all_of_its_labels(unscored: list[str], right: float) -> None:
    labels, task = ["E-mail", "O", "phone"], TokenClassification(unscored=unscored)
    row = {"tokens": list("abc"), "tags": ["E-mail", "E-mail", "O"]}
    rest = {"tokens": list("a"), "tags": ["O"]}
    features = [
        {"row": row, "words": {1: 0, 2: 1, 3: 2}},
        {"row": rest, "words": {1: 0}},
    ]
    chosen = np.array([[0, 0, 0, 1], [0, 2, 0, 0]])
    found = task.compute_metrics(EvalPrediction(chosen, chosen), features, labels)
    assert found["precision"] == right and found["recall"] == 1.0


def test_tags_in_small_letters_are_told_from_classes() -> None:
    rows = {
        "predictions": [["o", "o", "o", "b-per"], ["o", "o"]],
        "references": [["o", "o", "b-per", "o"], ["o", "o"]],
    }
    assert Seqeval(keep_in_memory=True).compute(**rows)["f1"] == 0.0
    assert spell_tags(["o", "B-PER", "i-PER"]) == {"O": "O", "o": "O", "B-PER": "B-PER", "i-PER": "I-PER"}
    for classes in (["o", "e-mail", "s-bahn"], ["o", "b-per", "loc"]):
        assert spell_tags(classes) == {"O": "O"} | {tag: f"I-{tag}" for tag in classes}


def test_they_are_metrics_of_evaluate() -> None:
    both = evaluate.combine([Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)])
    assert both.compute(predictions=[0, 1], references=[0, 1]) == {"accuracy": 1.0, "f1_macro": 1.0}


def test_answers_are_compared_with_the_token_before() -> None:
    labels = np.array([[IGNORED, IGNORED, 5, 6], [IGNORED, 7, 8, IGNORED]])
    chosen = np.array([[0, 5, 6, 0], [7, 0, 0, 0]])
    found = CausalLM().compute_metrics(EvalPrediction(chosen, labels), [], [])
    assert found == {"accuracy": 0.75, "exact_match": 0.5}


def test_logits_become_classes() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    task = SequenceClassification()
    assert task.preprocess_logits((logits, logits), logits).tolist() == [1, 0]
    prediction = EvalPrediction(np.array([1, 0]), np.array([1, 1]))
    assert task.compute_metrics(prediction, [], ["a", "b"])["accuracy"] == 0.5


def squad_scores(prediction: str, references: list[str]) -> tuple[float, float]:
    """Exact match and F1 of one answer, step by step."""

    def words(text: str) -> list[str]:
        text = text.lower()
        for mark in string.punctuation:
            text = text.replace(mark, "")
        return [w for w in re.sub(r"\b(a|an|the)\b", " ", text).split()]

    exact, f1 = 0.0, 0.0
    for reference in references or [""]:
        found, wanted = words(prediction), words(reference)
        exact = max(exact, float(" ".join(found) == " ".join(wanted)))
        pool, same = list(wanted), 0
        for word in found:
            if word in pool:
                pool.remove(word)
                same += 1
        if not found or not wanted:
            f1 = max(f1, float(found == wanted))
        elif same:
            precision, recall = same / len(found), same / len(wanted)
            f1 = max(f1, 2 * precision * recall / (precision + recall))
    return exact, f1


def test_answers_are_scored_as_squad_scores_them() -> None:
    generator = random.Random(0)
    words = ["the", "A", "cat", "Cat,", "(dog)", "an", "theme", "it's", "2.5", "—", "dogs"]
    predictions = [" ".join(generator.choices(words, k=generator.randint(0, 4))) for _ in range(200)]
    references = [
        [
            " ".join(generator.choices(["cat", "dog", "the", "2.5", "its"], k=3)) + "s"
            for _ in range(generator.randint(0, 3))
        ]
        for _ in predictions
    ]
    scores = np.array([squad_scores(p, r) for p, r in zip(predictions, references, strict=True)])
    found = SpanMatch(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert (found["exact_match"], found["f1"]) == (
        pytest.approx(scores[:, 0].mean()),
        pytest.approx(scores[:, 1].mean()),
    )
    answered = np.array([bool(r) for r in references])
    assert found["HasAns_f1"] == pytest.approx(scores[answered, 1].mean())
    assert found["NoAns_exact"] == pytest.approx(scores[~answered, 0].mean())
    # known values: articles and case do not count; 2 words of 3 and 2
    pairs = {"predictions": ["The Cat.", "black cat sat"], "references": [["a cat"], ["cat", "black cat"]]}
    assert SpanMatch(keep_in_memory=True).compute(**pairs) == {"exact_match": 0.5, "f1": pytest.approx((1 + 0.8) / 2)}


def test_chinese_answers_are_compared_by_character() -> None:
    pairs = {"predictions": ["铁木真。"], "references": [["铁木"]]}
    assert SpanMatch(keep_in_memory=True).compute(**pairs)["f1"] == 0.0
    assert SpanMatch(characters=True, keep_in_memory=True).compute(**pairs)["f1"] == pytest.approx(0.8)


def bleu(predictions: list[list[str]], references: list[list[list[str]]]) -> float:
    """Corpus BLEU of words: clipped n-gram precisions, times the penalty of the closest reference lengths."""
    logs, length, closest = 0.0, sum(map(len, predictions)), 0
    for p, rs in zip(predictions, references, strict=True):
        closest += min((abs(len(r) - len(p)), len(r)) for r in rs)[1]
    for n in range(1, 5):
        right = total = 0
        for p, rs in zip(predictions, references, strict=True):
            grams = [Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in (p, *rs)]
            most = Counter[tuple[str, ...]]()
            for counts in grams[1:]:
                most |= counts
            right += sum((grams[0] & most).values())
            total += sum(grams[0].values())
        logs += math.log(right / total) / 4
    return 100 * min(1.0, math.exp(1 - closest / length)) * math.exp(logs)


def written_texts(count: int = 30) -> tuple[list[str], list[list[str]]]:
    generator = random.Random(1)
    words = ["there", "is", "a", "cheap", "pub", "near", "the", "river", "which", "serves", "food"]
    references = [
        [" ".join(generator.choices(words, k=generator.randint(6, 14))) for _ in range(generator.randint(1, 4))]
        for _ in range(count)
    ]
    predictions = [" ".join([*generator.choice(r).split()[:-2], *generator.choices(words, k=2)]) for r in references]
    return predictions, references


def test_bleu_of_a_corpus_with_several_references() -> None:
    pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")
    predictions, references = written_texts()
    expected = bleu([p.split() for p in predictions], [[r.split() for r in rs] for rs in references])
    found = Bleu(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert found["bleu"] == pytest.approx(expected)
    chinese = {"predictions": ["我们今天去公园"], "references": [["我们今天去公园"]]}
    assert Bleu("zh", keep_in_memory=True).compute(**chinese)["bleu"] == pytest.approx(100)


def test_rouge_of_longest_common_subsequences() -> None:
    def longest(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + longest(a[1:], b[1:])
        return max(longest(a[1:], b), longest(a, b[1:]))

    predictions, references = ["A b, c d e", "x y"], [["a c b e", "d a"], ["z"]]
    common = [longest(list("abcde"), list(r)) for r in ("aceb", "acbe", "da")]
    assert common == [3, 3, 1]
    found = RougeL(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert found == {"rougeL": pytest.approx((2 * 3 / (5 + 4) + 0) / 2)}
    chinese = {"predictions": ["今天去公园"], "references": [["今天公园"]]}
    assert RougeL(keep_in_memory=True).compute(**chinese) == {"rougeL": pytest.approx(2 * 4 / (5 + 4))}


def test_rouge_equals_the_package_s() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="compares with rouge_score")
    predictions, references = written_texts()
    other = scorer.RougeScorer(["rougeL"])
    expected = np.mean(
        [max(other.score(r, p)["rougeL"].fmeasure for r in rs) for p, rs in zip(predictions, references, strict=True)]
    )
    found = RougeL(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert found["rougeL"] == pytest.approx(expected)


def test_rouge_of_ascii_has_the_words_of_the_package() -> None:
    generator, signs = random.Random(0), string.ascii_letters + string.digits + string.punctuation + " \n\t"
    for _ in range(300):
        text = "".join(generator.choices(signs, k=40))
        assert rouge_words(text) == re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("नमस्ते, दुनिया!", ["नमस्ते", "दुनिया"]),  # Hindi: vowel signs and virama belong to their letters
        ("क्\u200dष है", ["क्\u200dष", "है"]),  # a joiner too
        ("مَرْحَبًا بِالعالَم", ["مَرْحَبًا", "بِالعالَم"]),
        ("cafe\u0301 noir", ["cafe\u0301", "noir"]),
        ("สวัสดีครับ", ["ส", "วั", "ส", "ดี", "ค", "รั", "บ"]),  # no spaces: a letter with its signs is a word
        ("ភាសា", ["ភា", "សា"]),
        ("今天 café 第3章", ["今", "天", "café", "第", "3", "章"]),
        ("葛\U000e0100城 か\u3099", ["葛", "城", "か", "\u3099"]),
        ("I ❤\ufe0f u_2", ["i", "u", "2"]),
    ],
)
def test_marks_are_of_their_words(text: str, words: list[str]) -> None:
    assert rouge_words(text) == words


def test_rouge_of_words_with_marks() -> None:
    found = RougeL(keep_in_memory=True).compute(predictions=["नमस्ते दुनिया"], references=[["नमस्ते"]])
    assert found == {"rougeL": pytest.approx(2 / 3)}


@pytest.mark.parametrize("metric", [Accuracy, Bleu, MacroF1, RougeL, Seqeval, SpanMatch])
def test_nothing_is_no_input_of_a_metric(metric: type) -> None:
    with pytest.raises(PTuneError, match=f"{metric.__name__} was given no predictions"):
        metric(keep_in_memory=True).compute(predictions=[], references=[])


def test_sentences_without_a_tag_are_no_input_of_seqeval() -> None:
    with pytest.raises(PTuneError, match="Seqeval was given 2 sentences without a tag; expected"):
        Seqeval(keep_in_memory=True).compute(predictions=[[], []], references=[[], []])
    found = Seqeval(keep_in_memory=True).compute(predictions=[[], ["B-X"]], references=[[], ["B-X"]])
    assert found["f1"] == found["accuracy"] == 1.0


@pytest.mark.parametrize("metric", [Bleu, RougeL])
def test_a_text_without_a_reference_is_named(metric: type) -> None:
    with pytest.raises(PTuneError, match="prediction 1 has no reference"):
        metric(keep_in_memory=True).compute(predictions=["a", "b"], references=[["a"], []])


def test_nothing_is_known_of_rows_without_a_label() -> None:
    ids = np.ones((2, 3), dtype=int)
    assert all(math.isnan(value) for value in token_metrics(ids, ids, ids == 0).values())
