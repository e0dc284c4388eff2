"""The tasks: rows of a folder of JSON lines, encoded for a model, and the scores of what it predicts."""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

IGNORED = -100
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Args:
        folder: its folder under the data.
        kind: SEQ_CLS, TOKEN_CLS, QUESTION_ANS or CAUSAL_LM.
        fields: names of the columns that are read, in the order that the kind's encoder wants.
        train: rows to train on, from the top of the file, which is shuffled.
        held_out: rows of validation and test at most.
        epochs: passes over the training rows, the same for every column.
        batch: rows a step.
        max_length: tokens a row is cut to.
        metric: name of the score.
        labels: key in labels.json, where it holds several lists.
        marks: words before and behind the predicate of a sentence.
        unscored: a type that the score takes for O, as it is given: the predicate itself.
        virtual: numbers of virtual tokens to choose from; the first is the usual one.
        base: "minilm" or "smollm2".
        budget: "short" (minutes on a CPU), "fresh" (the same, tested on more rows), "long" (on a GPU: nearly all
            rows, more epochs) or "decoder" (on a GPU: SmolLM2 beneath heads).
        fresh: test on the rows of the training file behind those that are trained on.
    """

    folder: str
    kind: str
    fields: tuple[str, ...]
    train: int
    held_out: int = 1000
    epochs: int = 8
    batch: int = 16
    max_length: int = 128
    metric: str = "accuracy"
    labels: str | None = None
    marks: tuple[str, ...] = ()
    unscored: str = ""
    virtual: tuple[int, ...] = (20,)
    base: str = "minilm"
    budget: str = "short"
    fresh: bool = False


_SHORT: dict[str, Task] = {
    "trec": Task("trec", "SEQ_CLS", ("text", "coarse_label"), 1000, epochs=5, labels="coarse_label"),
    "btc": Task("btc", "TOKEN_CLS", ("tokens", "ner_tags"), 1200, epochs=3, metric="F1"),
    "cb": Task("cb_fewglue", "SEQ_CLS", ("premise", "hypothesis", "label"), 32, epochs=20, batch=8),
    "sst2": Task("sst2", "SEQ_CLS", ("sentence", "label"), 1500, epochs=2),
    "qasrl": Task("qasrl_gs", "QUESTION_ANS", ("tokens", "question", "answers"), 1200, epochs=2, metric="F1"),
    "banking77": Task("banking77", "SEQ_CLS", ("text", "label"), 3000, epochs=3),
    "srl": Task(
        "srl_up_ewt", "TOKEN_CLS", ("tokens", "srl_tags", "predicate_index"), 1500, epochs=2, metric="F1",
        marks=("*", "*"), unscored="V",
    ),
    "wikigold": Task("wikigold", "TOKEN_CLS", ("tokens", "ner_tags"), 994, epochs=3, metric="F1"),
    "rte": Task("rte", "SEQ_CLS", ("sentence1", "sentence2", "label"), 800, epochs=3, max_length=128),
    "boolq": Task("boolq", "SEQ_CLS", ("question", "passage", "label"), 600, epochs=3, max_length=128),
    "ag_news": Task("ag_news", "SEQ_CLS", ("text", "label"), 800, epochs=3, max_length=64),
    "clinc150": Task("clinc150", "SEQ_CLS", ("text", "intent"), 3000, epochs=4),
    "squad": Task(
        "squad", "QUESTION_ANS", ("context", "question", "answers"), 400, 200, epochs=3, max_length=192, metric="F1"
    ),
    "e2e": Task(
        "e2e_nlg", "CAUSAL_LM", ("meaning_representation", "human_reference"), 160, 32, epochs=1, batch=8,
        metric="-loss", base="smollm2",
    ),
    "alpaca_zh": Task(
        "alpaca_zh", "CAUSAL_LM", ("instruction", "input", "output"), 120, 40, epochs=1, batch=8, max_length=192,
        metric="-loss", base="smollm2",
    ),
}  # fmt: skip


def _long(name: str, train: int, epochs: int, **changes: Any) -> Task:
    settings = {"batch": 32, "budget": "long"} | changes
    return replace(_SHORT[name], train=train, epochs=epochs, **settings)


_LONG: dict[str, Task] = {
    "trec-long": _long("trec", 4000, 5),
    "sst2-long": _long("sst2", 5000, 4),
    "ag_news-long": _long("ag_news", 4000, 4),
    "banking77-long": _long("banking77", 5000, 6),
    "clinc150-long": _long("clinc150", 4599, 6),
    "cb-long": _long("cb", 32, 40, batch=8),
    "rte-long": _long("rte", 1950, 10),
    "boolq-long": _long("boolq", 2000, 8, max_length=256),
    "btc-long": _long("btc", 3500, 8),
    "wikigold-long": _long("wikigold", 994, 20),
    "srl-long": _long("srl", 2999, 10),
    "srl_unmarked-long": _long("srl", 2999, 10, marks=(), unscored=""),
    "qasrl-long": _long("qasrl", 2500, 10),
    "squad-long": _long("squad", 2500, 10, held_out=800, max_length=384),
    "e2e-long": _long("e2e", 4672, 1, batch=16, held_out=200),
    "alpaca_zh-long": _long("alpaca_zh", 1500, 2, batch=16, held_out=200, max_length=384),
}
_DECODER: dict[str, Task] = {
    f"{name}-smollm2": _long(name, train, epochs, base="smollm2", budget="decoder", **changes)
    for name, train, epochs, changes in (
        ("trec", 4000, 3, {}),
        ("sst2", 3000, 2, {}),
        ("ag_news", 2000, 2, {}),
        ("banking77", 3000, 4, {}),
        ("clinc150", 3000, 4, {}),
        ("rte", 1950, 3, {}),
        ("boolq", 2000, 3, {"max_length": 192}),
        ("btc", 2000, 3, {}),
        ("wikigold", 994, 8, {"batch": 16}),
        ("srl", 2999, 3, {}),
        ("qasrl", 2500, 3, {}),
    )
}
# the test files of the others hold 56 to 1,000 rows
_FRESH: dict[str, Task] = {
    f"{name}-fresh": replace(_SHORT[name], held_out=4000, budget="fresh", fresh=True)
    for name in ("trec", "sst2", "ag_news", "banking77", "clinc150", "rte", "boolq", "btc", "srl", "qasrl")
}
TASKS: dict[str, Task] = _SHORT | _FRESH | _LONG | _DECODER


@dataclass(frozen=True)
class Data:
    """Encoded rows of the three splits, and the names of the labels."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: list[str]


def load(task: Task, root: Path, tokenizer: Any) -> Data:
    """Read and encode a task's rows.

    Args:
        task: names the folder and columns.
        root: the folder of all data, which is read and never written.
        tokenizer: the base's.
    """
    folder = root / task.folder
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there; give the folder of the data by --data or PTUNE_DATA.")
    labels: Any = json.loads((folder / "labels.json").read_text()) if (folder / "labels.json").exists() else []
    if isinstance(labels, dict):
        labels = labels[task.labels or task.fields[1]]
    encode = {
        "SEQ_CLS": _encode_text,
        "TOKEN_CLS": _encode_words,
        "QUESTION_ANS": _encode_question,
        "CAUSAL_LM": _encode_answer,
    }[task.kind]
    parts = {
        "train": ("train", 0, task.train),
        "validation": ("validation", 0, min(task.held_out, 400)),
        "test": ("train", task.train, task.held_out) if task.fresh else ("test", 0, task.held_out),
    }
    splits = {}
    for split, (file, begin, count) in parts.items():
        lines = (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()[begin : begin + count]
        splits[split] = [encode(json.loads(line), task, tokenizer) for line in lines]
    return Data(**splits, labels=labels)


def _encode_text(row: Row, task: Task, tokenizer: Any) -> Row:
    *texts, label = (row[name] for name in task.fields)
    if task.base == "smollm2":
        texts = ["\n".join(texts)]  # its tokenizer puts nothing between two texts
    return dict(tokenizer(*texts, truncation=True, max_length=task.max_length)) | {"labels": label}


def _encode_words(row: Row, task: Task, tokenizer: Any) -> Row:
    """Tags of words go to their first tokens; a predicate is told as a second segment (Shi and Lin 2019) and marked.

    A decoder has read a word at its last token, and is told the predicate before the sentence.
    """
    words, tags = row[task.fields[0]], row[task.fields[1]]
    pair = [[words[row[name]]] for name in task.fields[2:]]
    for name in task.fields[2:] if task.marks else ():
        n = row[name]
        words = [*words[:n], task.marks[0], words[n], task.marks[1], *words[n + 1 :]]
        tags = [*tags[:n], IGNORED, tags[n], IGNORED, *tags[n + 1 :]]
    if task.base == "smollm2":
        first = [w for words_of_it in pair for w in (*words_of_it, ":")]
        return _encode_for_decoder([*first, *words], [IGNORED] * len(first) + tags, task, tokenizer)
    encoded = tokenizer(words, *pair, is_split_into_words=True, truncation=True, max_length=task.max_length)
    numbers, sequences = encoded.word_ids(), encoded.sequence_ids()
    labels = [
        tags[word] if sequence == 0 and word != previous else IGNORED
        for word, sequence, previous in zip(numbers, sequences, [None, *numbers], strict=False)
    ]
    return dict(encoded) | {"labels": labels}


def _encode_for_decoder(words: Sequence[str], tags: Sequence[int], task: Task, tokenizer: Any) -> Row:
    """Words behind blanks, each with its tag at its last token."""
    ids: list[int] = []
    labels: list[int] = []
    for word, tag in zip(words, tags, strict=True):
        made = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        ids += made
        labels += [IGNORED] * (len(made) - 1) + [tag]
    cut = slice(task.max_length)
    return {"input_ids": ids[cut], "attention_mask": [1] * len(ids[cut]), "labels": labels[cut]}


def _encode_question(row: Row, task: Task, tokenizer: Any) -> Row:
    """The first answer's span in tokens; a row whose answer was cut off points at [CLS]."""
    context, question, answers = (row[name] for name in task.fields)
    if isinstance(context, list):
        first, last = row["answer_ranges"][0]
        lengths = [len(word) + 1 for word in context]
        start, end = sum(lengths[:first]), sum(lengths[:last]) - 1  # ranges leave their end out
        context = " ".join(context)
    else:
        start = answers["answer_start"][0]
        end, answers = start + len(answers["text"][0]), answers["text"]
    if task.base == "smollm2":  # its tokenizer puts nothing between two texts
        before = len(question) + 1
        encoded = tokenizer(
            f"{question}\n{context}", truncation=True, max_length=task.max_length, return_offsets_mapping=True
        )
        offsets = [(max(first - before, 0), last - before) for first, last in encoded.pop("offset_mapping")]
        sequences = [int(last > 0) for _, last in offsets]
    else:
        encoded = tokenizer(
            question, context, truncation="only_second", max_length=task.max_length, return_offsets_mapping=True
        )
        offsets, sequences = encoded.pop("offset_mapping"), encoded.sequence_ids()
    inside = [n for n, s in enumerate(sequences) if s == 1 and offsets[n][0] < end and offsets[n][1] > start]
    whole = bool(inside) and offsets[inside[-1]][1] >= end
    places = {"start_positions": inside[0] if whole else 0, "end_positions": inside[-1] if whole else 0}
    spans = [o if s == 1 else None for o, s in zip(offsets, sequences, strict=True)]
    return dict(encoded) | places | {"truth": {"context": context, "spans": spans, "answers": answers}}


def _encode_answer(row: Row, task: Task, tokenizer: Any) -> Row:
    """Prompt and answer, of which the answer's tokens alone count."""
    *asked, answer = task.fields
    references = row.get("human_references") or [row[answer]]
    question = "\n".join(row[name] for name in asked if row[name]) + "\n"
    prompt = tokenizer(question, add_special_tokens=False)["input_ids"][: task.max_length // 2]
    written = [*tokenizer(references[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = (prompt + written)[: task.max_length]
    labels = ([IGNORED] * len(prompt) + written)[: task.max_length]
    truth = {"prompt": prompt, "references": references}
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "truth": truth}


def score(task: Task, rows: Sequence[Row], predictions: Sequence[Any], labels: Sequence[str]) -> float:
    """The task's own figure, higher is better, 0 to 1 (the negative loss of language models aside).

    Args:
        task: names the metric.
        rows: encoded rows.
        predictions: one for each row: a class, tags of every token, a span of tokens, or sum and count of losses.
        labels: names of the classes.
    """
    scores: dict[str, Callable[[Sequence[Row], Sequence[Any], Sequence[str]], float]] = {
        "SEQ_CLS": _accuracy,
        "TOKEN_CLS": partial(_entities, unscored=task.unscored),
        "QUESTION_ANS": _answers,
        "CAUSAL_LM": _loss,
    }
    return scores[task.kind](rows, predictions, labels)


def _accuracy(rows: Sequence[Row], predictions: Sequence[int], labels: Sequence[str]) -> float:
    return sum(p == r["labels"] for p, r in zip(predictions, rows, strict=True)) / len(rows)


def _entities(
    rows: Sequence[Row], predictions: Sequence[Sequence[int]], labels: Sequence[str], unscored: str = ""
) -> float:
    from seqeval.metrics import f1_score

    kept = [[n for n, label in enumerate(r["labels"]) if label != IGNORED] for r in rows]
    names = ["O" if unscored and name.endswith(f"-{unscored}") else name for name in labels]
    true = [[names[r["labels"][n]] for n in places] for r, places in zip(rows, kept, strict=True)]
    found = [[names[p[n]] for n in places] for p, places in zip(predictions, kept, strict=True)]
    return float(f1_score(true, found, zero_division=0))


def _answers(rows: Sequence[Row], predictions: Sequence[tuple[int, int]], labels: Sequence[str]) -> float:
    """Mean overlap of words with the nearest reference (SQuAD's F1)."""
    total = 0.0
    for row, (start, end) in zip(rows, predictions, strict=True):
        truth = row["truth"]
        text = truth["context"][truth["spans"][start][0] : truth["spans"][end][1]]
        total += max(_overlap(_plain(text), _plain(answer)) for answer in truth["answers"])
    return total / len(rows)


def _plain(text: str) -> list[str]:
    lowered = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", lowered).split()


def _overlap(found: list[str], wanted: list[str]) -> float:
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else float(found == wanted)


def _loss(rows: Sequence[Row], predictions: Sequence[tuple[float, int]], labels: Sequence[str]) -> float:
    return -sum(p[0] for p in predictions) / sum(p[1] for p in predictions)


def bleu(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of up to four words with several references, 0 to 100, on lower-cased words and signs.

    Papineni et al. 2002, without smoothing; the reference nearest in length counts for brevity.
    """
    hits, possible = [0] * 4, [0] * 4
    length = nearest = 0
    for text, others in zip(written, references, strict=True):
        words = _words(text)
        lists = [_words(other) for other in others]
        length += len(words)
        nearest += min((len(x) for x in lists), key=lambda n: (abs(n - len(words)), n))
        for n in range(1, 5):
            grams = _grams(words, n)
            best: Counter[tuple[str, ...]] = Counter()
            for other in lists:
                best |= _grams(other, n)
            hits[n - 1] += sum((grams & best).values())
            possible[n - 1] += sum(grams.values())
    if min(hits) == 0:
        return 0.0
    brevity = min(0.0, 1 - nearest / length)
    return 100 * math.exp(brevity + sum(math.log(h / p) for h, p in zip(hits, possible, strict=True)) / 4)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _grams(words: Sequence[str], n: int) -> "Counter[tuple[str, ...]]":
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
