"""What a task is: the rows it needs, what the model gets of them, what is measured, and how it is asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from hf_ptune.cloze import Scorer
from hf_ptune.cross_entropy import IGNORED
from hf_ptune.errors import RecipeError
from hf_ptune.injection import device_of

Row = dict[str, Any]
Feature = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """Hold what a model said to a held-out row."""

    question: str
    answer: str
    truth: str


@dataclass(frozen=True)
class Collator:
    """Pad features to a batch, without what only the metrics want to know.

    Args:
        names: what of a feature is kept, where it has it.
        pad: makes a batch of features.
    """

    names: tuple[str, ...]
    pad: Callable[[list[Feature]], Any]

    def __call__(self, features: Sequence[Feature]) -> Any:
        return self.pad([{name: f[name] for name in self.names if name in f} for f in features])


@dataclass(frozen=True)
class Task:
    """Describe one task; a subclass overrides what differs, and its fields are the recipe's `task_options`.

    A row is a dict by role. A feature is a dict of what the model's forward takes, and of whatever else
    `compute_metrics` wants to know of it: the collator leaves that out.

    Args:
        max_length: tokens that a feature has at most; the recipe's `data.max_length`.

    Attributes:
        name: the recipe's `task`.
        model_task: key of `backbone.TASKS` by which the base is loaded.
        forms: sets of roles, any one of which a row must have whole.
        possible: roles that a row may have besides.
        everywhere: those of them that all rows have, or none: they change what is asked.
        pair_role: the one of these that is a second text to be compared with the first; `None` where there is none.
        lists: roles that hold lists, which a cell of CSV may tell as JSON.
        blanks: role to what an empty cell of it means, where it means something.
        objects: roles that hold objects, likewise.
        depths: how deep lists may be in roles that hold text as a rule; in those of `lists` they are plain.
        label_role: role that holds names of labels, one or a list; `None` where the head has no names.
        group_role: role by which rows are split in strata, and by which unlike rows are asked.
        main_metric: name of the number that tells how good a model is; greater is better.
        percent: metrics that go up to 100, as all others go up to 1.
    """

    max_length: int = 128

    name: ClassVar[str]
    model_task: ClassVar[str]
    forms: ClassVar[tuple[tuple[str, ...], ...]]
    possible: ClassVar[tuple[str, ...]] = ()
    everywhere: ClassVar[tuple[str, ...]] = ()
    pair_role: ClassVar[str | None] = None
    lists: ClassVar[tuple[str, ...]] = ()
    objects: ClassVar[tuple[str, ...]] = ()
    blanks: ClassVar[Mapping[str, Any]] = {}
    depths: ClassVar[Mapping[str, int]] = {}
    label_role: ClassVar[str | None] = None
    group_role: ClassVar[str | None] = None
    main_metric: ClassVar[str]
    percent: ClassVar[tuple[str, ...]] = ()

    @property
    def metric(self) -> str:
        """Name of the number to show before and after training, as the options have it."""
        return self.main_metric

    def roles(self) -> list[str]:
        """All roles, in order."""
        return list(dict.fromkeys([role for form in self.forms for role in form] + list(self.possible)))

    def config_options(self) -> dict[str, Any]:
        """Fields of PTuneConfig that the task decides, such as a template."""
        return {}

    def check_row(self, row: Row, where: str) -> Row:
        """Check one row and bring it in order; `where` names its place for messages.

        Raises:
            RecipeError: the row's values do not fit each other.
        """
        return row

    def check_rows(self, rows: Sequence[Row], places: Sequence[str]) -> list[Row]:
        """Check the rows of all sources, where what a value means may be decided for all of them alike.

        Args:
            rows: by role.
            places: of each, for messages.

        Raises:
            RecipeError: a row's values do not fit each other, or those of other rows.
        """
        return [self.check_row(row, where) for row, where in zip(rows, places, strict=True)]

    def label_names(self, rows: Sequence[Row]) -> list[str]:
        """Names of the labels in rows, sorted, as numbers where all are; none where the head has no names."""
        if self.label_role is None:
            return []
        names = {str(name) for row in rows for name in _as_list(row[self.label_role])}
        # "1" and "01" are names of their own, whose order no hash may tell: ranks differ in it
        return sorted(names, key=(lambda name: (int(name), name)) if all(n.isdecimal() for n in names) else None)

    def known_labels(self) -> list[str]:
        """Names of labels that the options tell; none where only rows do."""
        return []

    def check_labels(self, labels: Sequence[str]) -> None:
        """Check the names of the labels that the training rows have.

        Raises:
            RecipeError: they leave nothing to learn.
        """

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        """Turn rows into features: one or more of each; a task that leaves rows out makes one of each other.

        Args:
            rows: as `check_row` returns them.
            tokenizer: the base's.
            labels: names of the labels, in order of their numbers.
            held_out: whether the rows are measured, not trained on.

        Returns:
            Features with ids `[S]`, S at most `max_length`, and labels.

        Raises:
            RecipeError: the tokenizer cannot do what the task needs.
        """
        raise NotImplementedError

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """What pads features to a batch `[B, S]`."""
        return make_collator(tokenizer, pad_behind(tokenizer))

    def scorer(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> Scorer | None:
        """What makes loss and classes of the logits, where it is not the model itself.

        Args:
            tokenizer: the base's.
            labels: names of the labels.
        """
        return None

    def preprocess_logits(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Any:
        """What is kept of the logits of a held-out batch: the best class, `[B]` or `[B, S]`."""
        first = logits[0] if isinstance(logits, tuple) else logits
        return first.argmax(dim=-1)

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Measure predictions.

        Args:
            prediction: what `preprocess_logits` kept and the labels, a row of either for every feature.
            features: what was predicted, in the same order.
            labels: names of the labels.
        """
        raise NotImplementedError

    def measure_further(self, trainer: Any, features: Sequence[Feature]) -> dict[str, float]:
        """Measure what logits do not tell, such as generated text; called by every rank.

        Args:
            trainer: holds model, tokenizer (`processing_class`) and accelerator.
            features: held-out ones.
        """
        return {}

    def example(
        self, row: Row, tokenizer: PreTrainedTokenizerBase
    ) -> str | dict[str, str] | list[dict[str, str]] | None:
        """A row as a card shows it to whoever asks the model; `None` where it has no text of its own.

        Args:
            row: a held-out one.
            tokenizer: of the base.
        """
        text = next((row[role] for role in ("text", "prompt", "question") if role in row), None)
        return None if text is None else str(text)

    def limits(self, row: Row) -> list[str]:
        """Tell what a card says of how the model wants to be asked, where its snippet cannot show that.

        Args:
            row: a held-out one.

        Returns:
            Sentences.
        """
        return []

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        """Let a trained model answer rows.

        Args:
            model: of the task, in eval mode.
            tokenizer: its own.
            rows: held-out ones.
        """
        raise NotImplementedError


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def need_fast(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Refuse a tokenizer that does not know where its tokens come from.

    Raises:
        RecipeError: it is no fast tokenizer.
    """
    if not tokenizer.is_fast:
        raise RecipeError(f"{type(tokenizer).__name__} does not tell which {what} a token is of; use a fast one.")


def make_collator(
    tokenizer: PreTrainedTokenizerBase, pad: Callable[[list[Feature]], Any], labels: tuple[str, ...] = ("labels",)
) -> Collator:
    """A collator that keeps what the tokenizer makes, and the labels."""
    return Collator((*tokenizer.model_input_names, *labels), pad)


def pad_behind(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Feature]], Any]:
    """What pads behind the tokens whatever the tokenizer's side, so that a feature's places are the batch's.

    Labels are one of a feature, or a list, of its tokens or of a target's; lists are padded to the longest.
    """

    def pad(features: list[Feature]) -> Any:
        inputs = [{name: value for name, value in f.items() if name != "labels"} for f in features]
        batch = pad_without_fast_tokenizer_warning(tokenizer, inputs, padding_side="right", return_tensors="pt")
        if "labels" in features[0]:
            labels = [f["labels"] for f in features]
            if isinstance(labels[0], list):
                longest = max(map(len, labels))
                labels = [one + [IGNORED] * (longest - len(one)) for one in labels]
            batch["labels"] = torch.tensor(labels)  # [B], [B, S], or of targets [B, N]
        return batch

    return pad


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, or what pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def whole(value: Any) -> int | None:
    """The whole number that a cell tells, as 2, 2.0 or "2"; `None` where it tells none."""
    if isinstance(value, str):
        text = value.strip().removesuffix(".0")
        return int(text) if text.removeprefix("-").isdecimal() else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        return None
    return int(value)


def run_model(task: Task, model: Any, tokenizer: PreTrainedTokenizerBase, features: Sequence[Feature]) -> Any:
    """Output of a model in eval mode for a few features, as one batch."""
    batch = task.collator(tokenizer)(list(features))
    device = device_of(model)
    with torch.no_grad():
        return model(**{name: value.to(device) for name, value in batch.items()})


def kept_pairs(prediction: EvalPrediction) -> tuple[Any, Any, Any]:
    """Predictions, labels and which labels count, as arrays `[N]` or `[N, S]`."""
    wanted = np.asarray(prediction.label_ids)
    return np.asarray(prediction.predictions), wanted, wanted != IGNORED
