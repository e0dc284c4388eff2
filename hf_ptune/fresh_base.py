"""The base of a run that starts anew, its tokenizer beside it, and what refuses it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_ptune.backbone import (
    POOLER,
    blaming,
    check_family,
    head_names,
    is_hub_id,
    keep_pooler,
    load_backbone,
    read_tokenizer,
    resolve,
)
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import BackboneError, RecipeError
from hf_ptune.modeling_ptune import PTunePreTrainedModel
from hf_ptune.tasks import Task


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer; one without a padding token pads with its end token.

    Args:
        base: Hub id, local folder, or `package:` name.
        revision: a commit or branch of a base on the Hub; the main branch when unset.

    Raises:
        BackboneError: it has neither, or cannot be loaded; or a base that is no repository is to have a revision.
    """
    if revision is not None and (Path(base).exists() or not is_hub_id(base)):
        raise BackboneError(
            f"the base {base!r} is no repository of the Hub, so that it has no revision {revision!r}; leave that out."
        )
    with blaming(base):
        tokenizer: PreTrainedTokenizerBase = read_tokenizer(base, revision)
    let_pad(tokenizer, base)
    return tokenizer


def let_pad(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Let a tokenizer without a padding token pad with its end token.

    Args:
        tokenizer: changed in place.
        source: where it is from, for messages.

    Raises:
        BackboneError: it has neither.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BackboneError(f"the tokenizer of {source} has neither padding nor end token; give it one.")
        tokenizer.pad_token = tokenizer.eos_token


def load_base(
    base: str,
    task: str,
    labels: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: PTuneConfig | None = None,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a base for a task, with a fresh head where it has none.

    Args:
        base: Hub id, local folder, or `package:` name.
        task: a key of `backbone.TASKS`.
        labels: names of the head's labels.
        tokenizer: gives the padding id where the base has none.
        adapter: what will be trained; where the checkpoint lacks a pooler, that comes among its `modules_to_save`.
        options: of its `from_pretrained`: revision, dtype, attn_implementation, quantization_config.

    Raises:
        BackboneError: the base cannot be loaded, its family has no model for the task, or the checkpoint lacks weights
            that are not trained.
    """
    given = {k: v for k, v in (options or {}).items() if v is not None}
    named: dict[str, Any] = {k: v for k, v in given.items() if k == "revision"}
    if labels:
        named |= {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    with blaming(base):
        config = AutoConfig.from_pretrained(resolve(base), **named)
    check_family(task, base, config)
    text = config.get_text_config()
    if tokenizer is not None and text.pad_token_id is None:
        text.pad_token_id = tokenizer.pad_token_id
    with blaming(base):
        backbone, absent = load_backbone(task, base, config, **given)
    unknown = absent - head_names(backbone, task, None if adapter is None else adapter.modules_to_save)
    if adapter is not None and unknown and all(f".{POOLER}." in f".{name}" for name in unknown):
        keep_pooler(adapter, backbone, base)
    elif unknown:
        raise BackboneError(
            f"the checkpoint of {base} has no weights for {sorted(unknown)[:5]}; it does not fit {task}."
        )
    return backbone


def keep_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Let words that come one by one have the space before them, where a byte-level splitter would leave it out.

    Scripts ask for this by the base's family, which an adapter's folder does not tell them.

    Args:
        tokenizer: changed in place.

    Returns:
        Whether it was changed.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    splitter: Any = getattr(backend, "pre_tokenizer", None)
    if getattr(splitter, "add_prefix_space", True):
        return False
    splitter.add_prefix_space = True
    backend.pre_tokenizer = splitter
    # families with a class of their own split as their settings say
    tokenizer.add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = True
    return True


def check_direction(model: PTunePreTrainedModel, task: Task) -> None:
    """Refuse a model that reads the very tokens which it is to tell next.

    Raises:
        RecipeError: it is to go on after text, and its tokens read those behind them.
    """
    if task.model_task == "CAUSAL_LM" and not model.config.geometry["causal"]:
        raise RecipeError(
            f"task {task.name} asks for the next token, but every token of a {type(model.backbone).__name__} "
            f"(base {model.config.base_model_name_or_path}) reads those behind it, and so the answer; expected a "
            "causal model. Take a decoder such as gpt2 as base, or a masked task (MASKED_LM, CLOZE_MASKED_LM)."
        )
