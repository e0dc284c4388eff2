"""TOKEN_CLS: a tag for every word; the roles of one predicate where a row names it."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_ptune.cells import read_cell
from hf_ptune.cross_entropy import IGNORED
from hf_ptune.errors import RecipeError, shorten
from hf_ptune.metrics import Seqeval
from hf_ptune.metrics.inputs import EAST_ASIAN
from hf_ptune.metrics.tags import spell_tags
from hf_ptune.tasks.base import (
    Answer,
    Feature,
    Row,
    Task,
    missing,
    need_fast,
    run_model,
    whole,
)
from hf_ptune.tasks.registry import register_task

_OUTSIDE = "O"
_INSIDE = {"B-": "I-", "b-": "i-"}
# Chinese, Japanese, Thai, Lao, Burmese, Khmer
_RUN_ON = re.compile(rf"[{EAST_ASIAN}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")


@register_task
@dataclass(frozen=True)
class TokenClassification(Task):
    """Tag every word of a sentence.

    A row with `predicate_index` asks for the semantic roles of that word, as Shi and Lin 2019, Simple BERT Models
    for Relation Extraction and Semantic Role Labeling, section 3: the predicate stands behind the sentence as its
    second segment. A word may occur twice, so it stands between two marks in the sentence, words that a frozen base
    knows, as Baldini Soares et al. 2019, Matching the Blanks, section 3.2, mark entities by new tokens, and its tokens
    get the second segment's type too, where the base has token types. Shi and Lin add an indicator behind the encoder
    instead, which no prompt could use.

    Sentences of more than `max_length` tokens are cut into windows; a word counts in the first that has it.

    Args:
        label_subwords: "first" lets a word's first token bear its tag alone, "all" every token in training, the
            later ones inside (I-) what the first begins. Words are always measured by their first token.
        stride: tokens that a window shares with the one before it.
        unscored: types of entity that the metrics take for O, such as V in semantic roles.
        predicate_marks: the words before and behind the predicate of a sentence; none leave it as it is.
    """

    label_subwords: Literal["first", "all"] = "first"
    stride: int = 16
    unscored: list[str] = field(default_factory=list)
    predicate_marks: list[str] = field(default_factory=lambda: ["*", "*"])

    name = "TOKEN_CLS"
    model_task = "TOKEN_CLS"
    forms = (("tokens", "tags"),)
    possible = ("predicate_index",)
    everywhere = ("predicate_index",)
    lists = ("tokens", "tags")
    label_role = "tags"
    main_metric = "f1"

    def __post_init__(self) -> None:
        if self.stride < 0:
            raise RecipeError(f"task_options.stride is {self.stride}; expected 0 or more.")
        if len(self.predicate_marks) not in (0, 2) or not all(self.predicate_marks):
            raise RecipeError(
                f"task_options.predicate_marks is {self.predicate_marks}; expected the word before the predicate and "
                "the one behind it, or none: []."
            )

    def check_row(self, row: Row, where: str) -> Row:
        row = row | {"tags": _listed(row["tags"], f"{where}: tags"), "tokens": _words(row, where)}
        for role in ("tokens", "tags"):
            if not isinstance(row[role], (list, tuple)) or any(missing(v) for v in row[role]):
                raise RecipeError(f"{where}: {role} are {row[role]!r}; expected a list without gaps.")
        if len(row["tokens"]) != len(row["tags"]):
            raise RecipeError(
                f"{where}: has {len(row['tokens'])} tokens and {len(row['tags'])} tags; expected as many."
            )
        if "predicate_index" in row:
            index, count = whole(row["predicate_index"]), len(row["tokens"])
            if index is None or not 0 <= index < count:
                raise RecipeError(
                    f"{where}: predicate_index is {row['predicate_index']!r}; expected a number from 0, of one of "
                    f"{count} tokens."
                )
            row = row | {"predicate_index": index}
        return row

    def check_labels(self, labels: Sequence[str]) -> None:
        if all(label.isdecimal() for label in labels):
            raise RecipeError(
                f"the tags are numbers ({', '.join(labels[:5])}), of which entities cannot be told; name them in order "
                "under data.labels, or in a labels.json beside the rows."
            )
        if not set(labels) - {_OUTSIDE, _OUTSIDE.lower()}:
            raise RecipeError(
                f"the training rows have no tag but {', '.join(map(repr, labels))}; there is nothing to learn."
            )

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        """A feature knows its `row`, and which `words` its labelled tokens are of."""
        need_fast(tokenizer, "word")
        kinds = sorted({tag.partition("-")[2] for tag in spell_tags(labels).values() if tag != _OUTSIDE})
        if unknown := [kind for kind in self.unscored if kind not in kinds]:
            raise RecipeError(
                f"task_options.unscored has {unknown[0]!r}, which is no type of entity here: the tags are of "
                f"{', '.join(kinds)}. Name one of them, or take it out."
            )
        number = {name: n for n, name in enumerate(labels)}
        everywhere = self.label_subwords == "all" and not held_out
        spaced = not _keeps_words_apart(tokenizer)
        return [
            feature | {"row": row}
            for row in rows
            for feature in self._windows(row, tokenizer, spaced, number, everywhere)
        ]

    def _windows(
        self,
        row: Row,
        tokenizer: PreTrainedTokenizerBase,
        spaced: bool,
        number: Mapping[str, int],
        everywhere: bool,
    ) -> list[Feature]:
        words = [str(word) for word in row["tokens"]]
        predicate = row.get("predicate_index")
        windows: list[Feature] = []
        seen: set[int] = set()
        given, numbers = self._marked(words, predicate)
        given = _with_spaces(given) if spaced else given
        second = None if predicate is None else words[predicate]
        for feature, places in self._encode_words(given, numbers, second, tokenizer):
            if predicate is not None and "token_type_ids" in feature:
                types = feature["token_type_ids"]
                feature["token_type_ids"] = [
                    max(types) if word == predicate else kind for word, kind in zip(places, types, strict=True)
                ]
            windows.append(feature | _labels(places, row["tags"], number, seen, everywhere))
        return windows

    def _marked(self, words: list[str], predicate: int | None) -> tuple[list[str], list[int | None]]:
        """Words with the marks around the predicate, and which word of the sentence each is; a mark is none."""
        numbers: list[int | None] = list(range(len(words)))
        if predicate is None or not self.predicate_marks:
            return words, numbers
        before, behind = self.predicate_marks
        head, tail = words[:predicate], words[predicate + 1 :]
        numbers[predicate : predicate + 1] = [None, predicate, None]
        return [*head, before, words[predicate], behind, *tail], numbers

    def _encode_words(
        self, words: list[str], numbers: list[int | None], second: str | None, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[tuple[Feature, list[int | None]]]:
        """Inputs of every window, and of which word of the sentence each of its tokens is, `[S]`.

        Args:
            words: of the sentence, and marks.
            numbers: which word of the sentence each is.
            second: the predicate.
            tokenizer: the base's.
        """
        told = 0 if second is None else len(tokenizer(second, add_special_tokens=False)["input_ids"]) + 1
        room = self.max_length - told - tokenizer.num_special_tokens_to_add(pair=second is not None)
        if room < 1:
            raise RecipeError(
                f"data.max_length={self.max_length} leaves no room for a sentence beside {second!r}; raise it."
            )
        encoded = tokenizer(
            words,
            None if second is None else [second],
            is_split_into_words=True,
            truncation="only_first",
            max_length=self.max_length,
            stride=max(0, min(self.stride, room // 2)),
            return_overflowing_tokens=True,
        )
        for n in range(len(encoded["input_ids"])):
            own = zip(encoded.word_ids(n), encoded.sequence_ids(n), strict=True)
            places = [numbers[word] if segment == 0 else None for word, segment in own]
            yield {name: list(encoded[name][n]) for name in tokenizer.model_input_names if name in encoded}, places

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Precision, recall and F1 of whole entities in whole sentences, and the accuracy of tags."""
        spelling = spell_tags(labels)  # of all labels, since few rows may lack those that tell the scheme
        found, wanted = [], []
        for row, tags in self._by_row(np.asarray(prediction.predictions), features, labels):
            found.append(self._scored(tags, spelling))
            wanted.append(self._scored(row["tags"], spelling))
        result: dict[str, float] = Seqeval(keep_in_memory=True).compute(predictions=found, references=wanted)
        return result

    def _by_row(self, chosen: Any, features: Sequence[Feature], labels: Sequence[str]) -> list[tuple[Row, list[str]]]:
        """Rows with the tags that were chosen; a word without tokens, or beyond the windows, is O."""
        rows: list[tuple[Row, list[str]]] = []
        for numbers, feature in zip(chosen, features, strict=True):
            if not rows or rows[-1][0] is not feature["row"]:
                rows.append((feature["row"], [_OUTSIDE] * len(feature["row"]["tokens"])))
            for place, word in feature["words"].items():
                rows[-1][1][word] = labels[numbers[place]]
        return rows

    def _scored(self, tags: Sequence[Any], spelling: Mapping[str, str]) -> list[str]:
        spelled = [spelling[str(tag)] for tag in tags]
        return [_OUTSIDE if tag.partition("-")[2] in self.unscored else tag for tag in spelled]

    def limits(self, row: Row) -> list[str]:
        """Say how a predicate is told; a pipeline cannot tell it."""
        if "predicate_index" not in row:
            return []
        between = " between the words `{}` and `{}`".format(*self.predicate_marks) if self.predicate_marks else ""
        return [
            f"It tags the roles of one predicate, which stands{between} in the sentence and once more behind it, as "
            "second segment; where the base has token types, the predicate in the sentence has that segment's too. "
            "A plain sentence, as in the snippet above, is not what it was trained on."
        ]

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        labels = [model.config.id2label[n] for n in range(model.config.num_labels)]
        spelling, answers = spell_tags(labels), []
        for row in rows:
            # as rows are measured; a pipeline would cut words and windows in its own way
            features = self.encode([row], tokenizer, labels, held_out=True)
            chosen = run_model(self, model, tokenizer, features).logits.argmax(-1).tolist()
            tags = self._by_row(chosen, features, labels)[0][1]
            words = [str(word) for word in row["tokens"]]
            said = [f"{word}: {tag}" for word, tag in zip(words, tags, strict=True) if spelling[tag] != _OUTSIDE]
            asked = [words[row["predicate_index"]]] if "predicate_index" in row else []
            question = " | ".join(["".join(_with_spaces(words)), *asked])
            answers.append(Answer(question, ", ".join(said) or "nothing", " ".join(map(str, row["tags"]))))
        return answers


def _listed(value: Any, where: str) -> Any:
    """The list that a text holds, or its words; what is a list already."""
    found = read_cell(value, False, where)
    return found.split() if isinstance(found, str) else found


def _words(row: Row, where: str) -> Any:
    """Tokens as a list; a text that looks like one is one where the tags are written so too, or only so many fit.

    Raises:
        RecipeError: it may be a list or words, as many of either as there are tags.
    """
    tokens, tags = row["tokens"], row["tags"]
    if not isinstance(tokens, str):
        return tokens
    written = isinstance(tags, str) and not isinstance(read_cell(tags, False, where), str)
    if written:
        return _listed(tokens, f"{where}: tokens")
    words, found = tokens.split(), None
    with contextlib.suppress(RecipeError):  # a sentence in brackets
        found = read_cell(tokens, False, where)
    count = len(tags.split() if isinstance(tags, str) else tags) if isinstance(tags, (str, list, tuple)) else 0
    if not isinstance(found, list) or len(found) != count:
        return words
    if len(words) == count:
        raise RecipeError(
            f"{where}: tokens are {shorten(tokens, 60)}, which may be a list or {count} words; write them as a list of "
            "JSON, not as text."
        )
    return found


def _with_spaces(words: Sequence[str]) -> list[str]:
    """Words as they stand in a text, with the space before them; texts in scripts without spaces have none.

    For tokenizers that keep a word's space in its token (RoBERTa, GPT-2): without it, words would become other tokens.
    """
    written = [any(c.isalnum() for c in word) for word in words]
    run_on = [_RUN_ON.search(word) is not None for word in words]
    if sum(run_on) > sum(written) / 2:
        return list(words)
    return [word if n == 0 or (run_on[n] and run_on[n - 1]) else f" {word}" for n, word in enumerate(words)]


def _keeps_words_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether words one by one become the tokens that they are in a text."""
    one_by_one = tokenizer(["x", "x"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return bool(one_by_one == tokenizer("x x", add_special_tokens=False)["input_ids"])


def _labels(
    places: Sequence[int | None], tags: Sequence[str], number: Mapping[str, int], seen: set[int], everywhere: bool
) -> Feature:
    """Labels `[S]` of a window, and its labelled words by place; words seen in an earlier window have none."""
    labels = [IGNORED] * len(places)
    words: dict[int, int] = {}
    own: set[int] = set()
    for place, word in enumerate(places):
        if word is None or word in seen:
            continue
        tag = str(tags[word])
        if word not in own:
            own.add(word)
            words[place] = word
            labels[place] = number[tag]
        elif everywhere:
            inside = _INSIDE[tag[:2]] + tag[2:] if tag[:2] in _INSIDE else tag
            labels[place] = number.get(inside, number[tag])
    seen |= own
    return {"labels": labels, "words": words}
