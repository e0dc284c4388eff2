"""MASKED_LM: tokens behind masks, drawn at random in a text, or the object of a fact."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from hf_ptune.cross_entropy import IGNORED
from hf_ptune.errors import RecipeError
from hf_ptune.tasks.base import (
    Answer,
    Collator,
    Feature,
    Row,
    Task,
    kept_pairs,
    make_collator,
    need_fast,
    pad_behind,
    run_model,
)
from hf_ptune.tasks.causal_lm import token_metrics
from hf_ptune.tasks.registry import register_task

_SUBJECT, _OBJECT = "[X]", "[Y]"
_PLACES = re.compile(r"(\[X\]|\[Y\])")


@register_task
@dataclass(frozen=True)
class MaskedLM(Task):
    """Tell masked tokens.

    Roles: `text`, of which tokens are masked as Devlin et al. 2019, BERT, section 3.1, has it: anew whenever a
    training row is seen, always the same in held-out rows. Or a fact as Petroni et al. 2019, Language Models as
    Knowledge Bases, section 4, asks for it: `sub_label`, `obj_label` and `template` ("[X] is in [Y] ."), where the
    object is masked, a mask for each of its tokens.

    Args:
        mask_probability: part of a text's tokens that is asked for.
    """

    mask_probability: float = 0.15

    name = "MASKED_LM"
    model_task = "MASKED_LM"
    forms = (("text",), ("sub_label", "obj_label", "template"))
    main_metric = "accuracy"

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability < 1:
            raise RecipeError(f"task_options.mask_probability is {self.mask_probability}; expected between 0 and 1.")

    def check_row(self, row: Row, where: str) -> Row:
        for place in () if "text" in row else (_SUBJECT, _OBJECT):
            if not str(row["obj_label"]).strip():
                raise RecipeError(f"{where}: obj_label is empty; fill it, or take the row out.")
            if not isinstance(row["template"], str) or row["template"].count(place) != 1:
                raise RecipeError(f"{where}: the template is {row['template']!r}; expected {place} in it once.")
        return row

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], held_out: bool = False
    ) -> list[Feature]:
        """Features with labels are masked already; the collator masks the others."""
        if tokenizer.mask_token_id is None:
            raise RecipeError(f"{type(tokenizer).__name__} has no mask token; MASKED_LM needs a base that has one.")
        masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=self.mask_probability)
        masking.generator = torch.Generator().manual_seed(0)
        features = []
        for row in rows:
            if "text" not in row:
                features.append(self._encode_fact(row, tokenizer))
                continue
            feature = dict(
                tokenizer(
                    str(row["text"]), truncation=True, max_length=self.max_length, return_special_tokens_mask=True
                )
            )
            features.append(_mask(feature, masking) if held_out else feature)
        return features

    def _encode_fact(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Feature:
        need_fast(tokenizer, "character")
        known = {_SUBJECT: str(row["sub_label"]), _OBJECT: str(row["obj_label"])}
        text, begin = "", 0
        for part in _PLACES.split(row["template"]):
            begin = len(text) if part == _OBJECT else begin
            text += known.get(part, part)
        end = begin + len(known[_OBJECT])
        feature = dict(tokenizer(text, truncation=True, max_length=self.max_length, return_offsets_mapping=True))
        asked = _overlap(feature.pop("offset_mapping"), begin, end)
        of_all = asked
        if len(asked) >= self.max_length:  # something may be cut
            uncut = tokenizer(text, return_offsets_mapping=True, verbose=False)
            of_all = _overlap(uncut["offset_mapping"], begin, end)
        if sum(asked) < max(1, sum(of_all)):
            raise RecipeError(
                f"the object of {text!r} is beyond {self.max_length} tokens, in whole or in part; raise "
                "data.max_length."
            )
        ids = feature["input_ids"]
        labels = [token if hidden else IGNORED for token, hidden in zip(ids, asked, strict=True)]
        masked = [tokenizer.mask_token_id if hidden else token for token, hidden in zip(ids, asked, strict=True)]
        return feature | {"input_ids": masked, "labels": labels}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=self.mask_probability)
        inner = pad_behind(tokenizer)

        def pad(features: list[Feature]) -> Any:
            return inner([f if "labels" in f else _mask(f, masking) for f in features])

        return make_collator(tokenizer, pad)

    def compute_metrics(
        self, prediction: EvalPrediction, features: Sequence[Feature], labels: Sequence[str]
    ) -> dict[str, float]:
        """Accuracy of masked tokens, and the part of rows of which every one is right (exact_match, LAMA's P@1)."""
        return token_metrics(*kept_pairs(prediction))

    def ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Answer]:
        answers = []
        for feature in self.encode(rows, tokenizer, [], held_out=True):
            chosen = run_model(self, model, tokenizer, [feature]).logits[0].argmax(-1).tolist()
            places = [n for n, label in enumerate(feature["labels"]) if label != IGNORED]
            said, truth = (tokenizer.decode([ids[n] for n in places]) for ids in (chosen, feature["labels"]))
            answers.append(Answer(tokenizer.decode(feature["input_ids"]), said, truth))
        return answers


def _overlap(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> list[bool]:
    """Which tokens are of the characters from `begin` up to `end`, `[S]`."""
    return [first < end and last > begin for first, last in offsets]


def _mask(feature: Feature, masking: DataCollatorForLanguageModeling) -> Feature:
    """The feature with some tokens hidden, and labels where they are."""
    hidden = masking.tokenizer.get_special_tokens_mask(feature["input_ids"], already_has_special_tokens=True)
    special = torch.tensor([hidden])
    ids, labels = masking.torch_mask_tokens(torch.tensor([feature["input_ids"]]), special)
    free = (special[0] == 0).nonzero()[:, 0]
    if bool((labels == IGNORED).all()) and len(free):  # a batch without a label would have no loss
        drawn = free[torch.randint(len(free), (1,), generator=masking.generator)]
        labels[0, drawn] = ids[0, drawn]
        ids[0, drawn] = masking.tokenizer.mask_token_id
    return feature | {"input_ids": ids[0].tolist(), "labels": labels[0].tolist()}
