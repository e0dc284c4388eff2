"""Cloze prediction: a word at the mask answers, among a few that stand for labels, or among the vocabulary."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from hf_ptune.cross_entropy import IGNORED
from hf_ptune.endings import closing_ids
from hf_ptune.errors import ConfigError, TemplateError
from hf_ptune.injection import device_of, evaluating
from hf_ptune.position_tables import token_room
from hf_ptune.templates import Template


def word_ids(word: str, tokenizer: PreTrainedTokenizerBase, spaced: bool, behind: str = "") -> list[int]:
    """Token ids of a word as it would stand at the mask.

    Most tokenizers tell a word that follows a space from one that does not; the one that the template asks for is
    taken.

    Args:
        word: one word, or several.
        tokenizer: of the base.
        spaced: whether the mask follows a space (`Template.spaced`).
        behind: the character that it follows else (`Template.behind`), since some tokenizers take a word that follows
            none for one that follows a space.
    """
    alone: list[int] = tokenizer(word.strip(), add_special_tokens=False)["input_ids"]
    if not spaced and not behind:
        return alone
    first = "a" if spaced else behind
    before: list[int] = tokenizer(first, add_special_tokens=False)["input_ids"]
    both: list[int] = tokenizer(f"{first}{' ' * spaced}{word.strip()}", add_special_tokens=False)["input_ids"]
    return both[len(before) :] if both[: len(before)] == before else alone


def last_labels(labels: Any) -> Any:
    """Numbers of classes `[B]` of labels `[B, N]` or `[B]`, tensor or array."""
    return labels.reshape(len(labels), -1)[:, -1]


class Scorer:
    """Turn the logits at the mask into scores of classes, their loss, and the best class."""

    def scores(self, logits: Tensor) -> Tensor:
        """Scores `[B, C]` of logits `[B, V]` at the mask."""
        raise NotImplementedError

    def loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, smoothing: float = 0.0
    ) -> Tensor:
        """Cross entropy over the classes; a Trainer's `compute_loss_func`.

        Args:
            outputs: of a model that was called with `logits_at`.
            labels: numbers of classes, the last of each row of `[B, N]`, or `[B]`.
            num_items_in_batch: what to divide the sum by; B when unset.
            smoothing: the part of a label that all classes share.
        """
        scores = self.scores(outputs["logits"][:, 0].float())
        wanted = last_labels(labels).to(scores.device)
        total = F.cross_entropy(scores, wanted, reduction="sum", label_smoothing=smoothing)
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    def choose(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """The best class `[B]` of logits `[B, 1, V]`; a Trainer's `preprocess_logits_for_metrics`."""
        first = logits[0] if isinstance(logits, tuple) else logits
        return self.scores(first[:, 0]).argmax(-1)


class Vocabulary(Scorer):
    """Let all words of the vocabulary compete, as LAMA does (P-Tuning, Liu et al. 2021, section 4.1).

    Args:
        tokenizer: of the base.
        spaced: whether the mask follows a space.
        behind: what it follows else; see `word_ids`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spaced: bool, behind: str = "") -> None:
        self.tokenizer = tokenizer
        self.spaced = spaced
        self.behind = behind

    def scores(self, logits: Tensor) -> Tensor:
        return logits

    def number(self, word: str) -> int:
        """The class of a word: its token.

        Raises:
            TemplateError: it is not one token.
        """
        ids = word_ids(word, self.tokenizer, self.spaced, self.behind)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise TemplateError(
                f"{word!r} is {_spelled(ids, self.tokenizer)}, not one token; at the mask stands one. "
                "Take answers of one token."
            )
        return ids[0]


class Verbalizer(Scorer):
    """Let a few words compete, those that stand for labels (Schick and Schütze 2021, section 3.1).

    A label's score is the mean over its words; where `average` lets a word have several tokens, that word's is the
    mean over its tokens, all read at the one mask.

    Args:
        words: label to its word or words.
        tokenizer: of the base.
        spaced: whether the mask follows a space.
        average: whether words of several tokens are taken.
        labels: order of the labels, that of their numbers; the order of `words` when unset.
        behind: what the mask follows, if no space; see `word_ids`.

    Raises:
        ConfigError: labels without words, or two labels with the same ones.
        TemplateError: a word of several tokens without `average`, or of none.
    """

    def __init__(
        self,
        words: Mapping[str, str | Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        spaced: bool,
        average: bool = False,
        labels: Sequence[str] | None = None,
        behind: str = "",
    ) -> None:
        self.labels = list(words) if labels is None else list(labels)
        if missing := set(self.labels) ^ set(words):
            raise ConfigError(f"the verbalizer has words for {list(words)}, the labels are {self.labels}: {missing}.")
        rows: list[dict[int, float]] = []
        for label in self.labels:
            given = words[label]
            listed = [given] if isinstance(given, str) else list(given)
            if not listed:
                raise ConfigError(f"the verbalizer has no word for {label!r}; give it one.")
            row: dict[int, float] = {}
            for word in listed:
                ids = word_ids(word, tokenizer, spaced, behind)
                _check_word(word, label, ids, tokenizer, average)
                for i in ids:
                    row[i] = row.get(i, 0.0) + 1.0 / (len(ids) * len(listed))
            if row in rows:
                raise ConfigError(f"two labels have the words {listed}; give each its own.")
            rows.append(row)
        self.ids = sorted({i for row in rows for i in row})
        self.weights = torch.tensor([[row.get(i, 0.0) for row in rows] for i in self.ids])  # [N, C]

    def scores(self, logits: Tensor) -> Tensor:
        chosen = logits[:, torch.tensor(self.ids, device=logits.device)]
        return chosen @ self.weights.to(chosen)


def _check_word(word: str, label: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, average: bool) -> None:
    if not ids or tokenizer.unk_token_id in ids:
        raise TemplateError(f"the tokenizer does not know the word {word!r} of {label!r}; choose another.")
    if len(ids) > 1 and not average:
        raise TemplateError(
            f"the word {word!r} of {label!r} is {_spelled(ids, tokenizer)}, but at the mask stands one token. Choose a "
            "word of one token, or let the tokens' scores be averaged (average=True, in a recipe "
            "task_options.average_tokens)."
        )


def _spelled(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{len(ids)} tokens ({', '.join(map(repr, tokenizer.convert_ids_to_tokens(ids)))})"


class ClozeCollator:
    """Pad rows to `[B, S]`, and say at which position of each the answer is read (`logits_at` `[B]`).

    For a causal model labels become `[B, 2]`, an ignored one first: the Trainer counts all but the first of a row's
    labels there, since such models shift them, and divides the loss by that.

    Args:
        tokenizer: of the base.
        causal: whether the answer follows the last token, rather than standing at the mask token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, causal: bool) -> None:
        self.tokenizer = tokenizer
        self.mask = None if causal else tokenizer.mask_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        # behind the tokens, whatever the tokenizer's side: encoders count positions from the batch's first column
        padded = pad_without_fast_tokenizer_warning(self.tokenizer, features, padding_side="right", return_tensors="pt")
        batch: dict[str, Tensor] = dict(padded)
        if self.mask is None:
            real = batch["attention_mask"]
            at = real.shape[1] - 1 - real.flip(1).argmax(1)  # last of each row
        else:
            at = (batch["input_ids"] == self.mask).int().argmax(1)
        if self.mask is None and "labels" in batch:
            batch["labels"] = F.pad(batch["labels"][:, None], (1, 0), value=IGNORED)
        return batch | {"logits_at": at}


@dataclass(frozen=True)
class Choice:
    """Hold what a model answers to a row: the best label or word, and the probabilities of all or of the best few."""

    label: str
    probabilities: dict[str, float]


def classify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    verbalizer: Mapping[str, str | Sequence[str]] | None = None,
    average: bool = False,
    batch_size: int = 16,
    max_length: int | None = None,
) -> list[Choice]:
    """Let a masked or causal language model choose a label for each row, by the words that stand for the labels.

    Args:
        model: of `get_ptune_model`, or an adapter that has been loaded.
        tokenizer: its own, which knows the virtual tokens.
        rows: with the fields of the template.
        template: the model's own when unset.
        verbalizer: label to its word or words; the model's own when unset.
        average: see `Verbalizer`.
        batch_size: rows that run at once.
        max_length: tokens of a row at most; as many as the base has positions for when unset.

    Raises:
        ConfigError: neither model nor call has a template with a mask, or a verbalizer.
        TemplateError: rows that do not fit the template, or words that do not fit the tokenizer.
    """
    read = template_of(model, template)
    words = verbalizer if verbalizer is not None else model.config.verbalizer
    if not words:
        raise ConfigError("the model has no verbalizer; pass verbalizer={label: word}, or take predict_words.")
    scorer = Verbalizer(words, tokenizer, read.spaced, average, behind=read.behind)
    choices = []
    for logits in _answers(model, tokenizer, read, rows, batch_size, max_length):
        for row in scorer.scores(logits).softmax(-1).tolist():
            probabilities = dict(zip(scorer.labels, row, strict=True))
            choices.append(Choice(max(probabilities, key=probabilities.__getitem__), probabilities))
    return choices


def predict_words(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    top_k: int = 5,
    batch_size: int = 16,
    max_length: int | None = None,
) -> list[Choice]:
    """Let a masked or causal language model say which words are most probable at the mask, of all.

    Args:
        model: see `classify`.
        tokenizer: see `classify`.
        rows: see `classify`.
        template: see `classify`.
        top_k: number of words, of those that there are.
        batch_size: see `classify`.
        max_length: see `classify`.
    """
    choices = []
    for logits in _answers(model, tokenizer, template_of(model, template), rows, batch_size, max_length):
        best = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))
        for values, ids in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            probabilities: dict[str, float] = {}
            for i, value in zip(ids, values, strict=True):  # of tokens that are written alike, the likeliest counts
                probabilities.setdefault(tokenizer.decode([i]).strip(), value)
            choices.append(Choice(next(iter(probabilities)), probabilities))
    return choices


def template_of(model: Any, template: str | None = None) -> Template:
    """The template that a model reads rows through.

    Raises:
        ConfigError: there is none, or it has no mask.
    """
    text = template if template is not None else model.config.template
    if text is None or not Template.parse(text).has_mask:
        raise ConfigError(f"found the template {text!r}; expected one with [MASK], where the answer stands.")
    return Template.parse(text)


@torch.no_grad()
def _answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    max_length: int | None,
) -> Iterator[Tensor]:
    """Logits `[B, V]` at the mask, batch by batch."""
    causal = model.task == "CAUSAL_LM"
    collate = ClozeCollator(tokenizer, causal)
    device = device_of(model)
    if strange := [row for row in rows if not isinstance(row, Mapping)]:
        raise TemplateError(f"a row is {strange[0]!r}; expected the template's fields, as in {{'sentence': 'text'}}.")
    max_length = token_room(model) if max_length is None else max_length
    closing = closing_ids(tokenizer)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = collate([template.encode(tokenizer, row, max_length, causal, closing).inputs for row in part])
        with evaluating(model):
            logits: Tensor = model(**{k: v.to(device) for k, v in batch.items()}).logits
        yield logits[:, 0].float()
