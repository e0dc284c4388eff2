"""Whether a model can read the rows of a task, and what is lost of those that are longer than it lets them be."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_ptune.callbacks.guard import check_positions
from hf_ptune.errors import RecipeError
from hf_ptune.modeling_ptune import PTunePreTrainedModel
from hf_ptune.tasks import Feature, Task
from hf_ptune.tasks.causal_lm import CausalLM
from hf_ptune.tasks.generation import GenerationTask

logger = logging.get_logger(__name__)


def check_features(
    model: PTunePreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[Feature],
    held_out: bool = False,
) -> None:
    """Refuse features that the model could not read, whichever batch they will be in, or could not answer.

    Raises:
        RecipeError: a row has no tokens, or a held-out one no prompt to write behind.
        GuardError: one has more than the base has positions, or what is written behind it has.
    """
    if empty := sum(not _count(f["input_ids"], min) for f in features):
        raise RecipeError(
            f"{empty} rows have no tokens for {type(tokenizer).__name__}; fill their texts, or drop them."
        )
    check_lengths(task, tokenizer, features, "held-out" if held_out else "training")
    writes = held_out and isinstance(task, GenerationTask)
    if blank := [n for n, f in enumerate(features, 1) if writes and not f["source_ids"]]:
        raise RecipeError(
            f"held-out row {blank[0]} of {len(features)} has an empty prompt, and {type(tokenizer).__name__} begins no "
            f"text with a token of its own, so that nothing is there to write behind; fill it, or drop the row "
            f"({len(blank)} in all)."
        )
    for name in ("input_ids", "labels"):
        counts = [_count(f[name], max) if isinstance(f.get(name), list) else 0 for f in features]
        with torch.random.fork_rng(devices=[]):  # collators may mask at random
            longest = task.collator(tokenizer)([features[counts.index(max(counts))]])
        check_positions(model, longest)
    if held_out and isinstance(task, GenerationTask) and task.generate:
        width = max(len(f["source_ids"]) for f in features)
        check_answers(task, tokenizer, features)
        # the last token that is written is not read
        check_positions(model, {"input_ids": torch.zeros(1, width)}, further=task.max_new_tokens - 1)


def _count(ids: Sequence[Any], of: Callable[[Sequence[int]], int]) -> int:
    """Tokens of a feature; of several choices, of the shortest or longest."""
    return of([len(one) for one in ids]) if len(ids) and isinstance(ids[0], list) else len(ids)


def check_lengths(task: Task, tokenizer: PreTrainedTokenizerBase, features: Sequence[Feature], what: str) -> None:
    """Log how many rows have no text, and how many reach the length at which they are cut.

    Tasks with windows (`stride`) lose nothing there, and CAUSAL_LM counts its rows itself.

    Args:
        task: whose `max_length` it is.
        tokenizer: the base's.
        features: of the task.
        what: which rows they are, for messages.

    Raises:
        RecipeError: nothing but special tokens is left of one.
    """
    if hasattr(task, "stride") or isinstance(task, CausalLM):
        return
    # what stands for text is a special token too
    framing = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id, tokenizer.mask_token_id}
    short = [(n, _texts(f)) for n, f in enumerate(features, 1) if max(map(len, _texts(f))) < task.max_length]
    if blank := [n for n, texts in short if all(framing.issuperset(ids) for ids in texts)]:
        logger.warning(
            f"{len(blank)} of {len(features)} {what} rows have no text (row {blank[0]} of those that were drawn is the "
            "first), and teach nothing but how frequent their labels are; fill them, or take them out."
        )
    full = [f for f in features if max(map(len, _texts(f))) >= task.max_length]
    whole = [ids for f in full for ids in _texts(f) if len(ids) >= task.max_length]
    # tokenizers cut nothing where not even special tokens have room
    if any(len(ids) > task.max_length or set(ids) <= framing for ids in whole):
        raise RecipeError(
            f"data.max_length={task.max_length} leaves nothing but special tokens of a row; raise data.max_length."
        )
    _tell(len(full), len(features), f"{what} rows", f"data.max_length={task.max_length}")
    if (most := getattr(task, "max_target_length", None)) is not None:
        targets = sum(len(f["labels"]) >= most for f in features)
        _tell(targets, len(features), f"{what} targets", f"task_options.max_target_length={most}")


def check_answers(task: GenerationTask, tokenizer: PreTrainedTokenizerBase, features: Sequence[Feature]) -> None:
    """Log how many answers could not be written whole, which bounds BLEU and ROUGE-L.

    Args:
        task: whose `max_new_tokens` bounds them.
        tokenizer: the base's.
        features: held-out ones, with references.
    """

    def length(reference: str) -> int:
        return len(tokenizer(reference, add_special_tokens=False)["input_ids"])

    if cut := sum(min(map(length, f["references"])) > task.max_new_tokens for f in features):
        logger.warning(
            f"{cut} of {len(features)} held-out rows have no reference of at most task_options.max_new_tokens="
            f"{task.max_new_tokens} tokens: what is written ends there, and BLEU and ROUGE-L count the rest as "
            "missing; raise max_new_tokens."
        )


def _tell(reach: int, count: int, what: str, limit: str) -> None:
    if reach:
        name = limit.partition("=")[0]
        logger.warning(f"{reach} of {count} {what} reach {limit}: what is longer was cut there; raise {name}.")


def _texts(feature: Feature) -> list[list[int]]:
    """Ids of a feature, or of its choices."""
    ids = feature["input_ids"]
    return list(ids) if len(ids) and isinstance(ids[0], list) else [ids]
