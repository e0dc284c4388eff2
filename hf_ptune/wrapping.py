"""From a loaded transformers model to a wrapped one, tried before it is handed over."""

import difflib
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_ptune import prompt_start
from hf_ptune.backbone import POOLER, anchored, has_fresh_pooler, keep_pooler, task_of
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import BackboneError, ConfigError, shorten
from hf_ptune.injection import complaint, embeddings_agree, prompts_agree
from hf_ptune.methods import PromptKind, get_method
from hf_ptune.modeling_ptune import CLASSES, PTunePreTrainedModel
from hf_ptune.pinning import UNPINNED, find_commit
from hf_ptune.position_tables import positions_of_prompt, token_room
from hf_ptune.renamed_bodies import check_read
from hf_ptune.restoring import CHANGED
from hf_ptune.sharding import running
from hf_ptune.templates import name_virtual_tokens

logger = logging.get_logger(__name__)
_PREFIXES = "Methods that work there: p_tuning_v2, prefix_tuning, bitfit."


def get_ptune_model(backbone: PreTrainedModel, config: PTuneConfig, tokenizer: Any = None) -> PTunePreTrainedModel:
    """Wrap a loaded transformers model; the task is inferred from its class.

    Args:
        backbone: the whole task model; it is frozen, and changed only by hooks until `unwrap()`.
        config: method and options; a copy is kept.
        tokenizer: reads the text of prompt_tuning_init "TEXT" and "CLASS_LABELS"; the base's own when unset. Tells
            "SAMPLE_VOCAB", the start in decoders, which tokens stand for no words; unset, they are drawn too. Where a
            template places virtual tokens, they are added to it, as special tokens.

    Returns:
        The model of the task, with its prompt initialised.

    Raises:
        BackboneError: the backbone cannot take the method.
        ConfigError: options that contradict each other or the backbone.
    """
    if isinstance(backbone, PTunePreTrainedModel):
        raise ConfigError("the model is wrapped already; pass its backbone, or continue training it as it is.")
    if not isinstance(backbone, PreTrainedModel):
        raise BackboneError(f"expected a transformers PreTrainedModel, found {type(backbone).__name__}.")
    if getattr(backbone, "_hf_peft_config_loaded", False):
        raise BackboneError(
            f"{type(backbone).__name__} has an adapter of PEFT inside, which a prompt's folder would not keep. Merge "
            "it, save the merged model, and load that."
        )
    if changed := backbone.__dict__.get(CHANGED):
        logger.warning(
            f"{', '.join(sorted(changed)[:5])} of the base were trained by an earlier adapter: what is trained now "
            "answers otherwise on the base as it is loaded. Load the base anew."
        )
    check_read(backbone)
    _check_names(config, backbone)
    settings = {k: v for k, v in config.to_dict().items() if k not in ("base_config", "geometry", "model_type")}
    config = PTuneConfig.from_dict(settings)
    config.task = task_of(backbone)
    config.base_class = type(backbone).__name__
    config.set_base(backbone.config, backbone.dtype)
    saved = config.train_backbone or POOLER in (config.modules_to_save or [])
    if not saved and has_fresh_pooler(backbone, config.task):
        keep_pooler(config, backbone, backbone.name_or_path)
    name = config.base_model_name_or_path or backbone.name_or_path or None
    config.base_model_name_or_path = None if name is None else anchored(name)
    config.name_or_path = backbone.name_or_path  # scripts load what a model came from, as its own reference, by that
    revision = config.base_model_revision
    found = find_commit(backbone, name, revision)
    config.base_model_revision = found or revision
    if config.places_tokens and (tokenizer is not None or config.virtual_token_ids is None):
        tokenizer = tokenizer if tokenizer is not None else prompt_start.base_tokenizer(config)
        name_virtual_tokens(config, tokenizer)
    with running(backbone):
        model = _wrap(backbone, config, tokenizer)
    model.__dict__[UNPINNED] = found == ""
    if short := {p.dtype for p in model.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}:
        logger.warning(
            f"what is trained of the base (its head, biases or weights) is in {short.pop()}, in which small steps are "
            "lost. Load the base without a dtype (a recipe: leave base_options.dtype out) and set bf16=True in the "
            "Trainer's arguments (training.bf16: true), to train it in full precision."
        )
    parts = () if model.prompt is None else model.prompt.modules()
    drops = {rate for part in parts for rate in (vars(part).get("p"), vars(part).get("dropout"))}
    if config.encoder_dropout and config.encoder_dropout not in drops:
        logger.warning(
            f"encoder_dropout={config.encoder_dropout} changes nothing: it is for the MLP of prefix_tuning, and for an "
            "LSTM of several layers in p_tuning. Leave it out, or take prefix_dropout, on the prompt itself."
        )
    if get_method(config.method).kind is PromptKind.PREFIX and config.geometry["skipped"]:
        logger.warning(f"layers without attention take no prefix: {', '.join(config.geometry['skipped'])}")
    return model


def _check_names(config: PTuneConfig, backbone: PreTrainedModel) -> None:
    """Refuse options that nothing reads: a configuration takes any name, since those of its base stand there too."""
    valid = PTuneConfig.__annotations__
    known = {*valid, *vars(PreTrainedConfig()), *vars(backbone.config)}
    for name in (n for n in vars(config) if n not in known and not n.startswith("_")):
        if near := difflib.get_close_matches(name, valid, 1, 0.7):
            raise ConfigError(f"PTuneConfig has no option {name!r}; did you mean {near[0]!r}?")
        logger.warning(f"PTuneConfig has no option {name!r}: it changes nothing.")


def _wrap(backbone: PreTrainedModel, config: PTuneConfig, tokenizer: Any) -> PTunePreTrainedModel:
    """Wrap, and let the backbone run: to see whether it shares a prompt rightly, and to start the prompt from it."""
    model = CLASSES[task_of(backbone)](config, backbone)
    try:
        _try_prompt(model)
        prompt_start.initialise(model, tokenizer)
    except BaseException:
        model.unwrap()
        raise
    return model


def _try_prompt(model: PTunePreTrainedModel) -> None:
    injector, config, name = model._injector, model.config, type(model.backbone).__name__
    if injector is None:
        return
    if (room := token_room(model)) is not None and room < 1:
        raise ConfigError(
            f"num_virtual_tokens={config.num_virtual_tokens}, but {name} has {room + positions_of_prompt(model)} "
            "positions in all, which leaves none for a text; take fewer."
        )
    places = injector.placeholders
    if places is not None and not places.agrees(injector.body, config.num_virtual_tokens):
        raise BackboneError(
            f"{name} reads token ids in more places than its word embeddings, so that a template cannot place virtual "
            "tokens there. A template of words and fields alone works, with any method."
        )
    shared = injector.kind is PromptKind.EMBEDDINGS and injector.in_attention
    if shared and not prompts_agree(injector):
        raise BackboneError(
            f"{name} carries more from token to token than keys and values, counts positions that cannot be moved, or "
            f"reads token ids beside embeddings, so that {config.method} cannot share its prompt over a batch there. "
            f"{_PREFIXES}"
        )
    if injector.inputs is not None and (said := complaint(injector.body)) is not None:
        raise BackboneError(f"{name} cannot run with a prompt among its inputs ({shorten(said)}). {_PREFIXES}")
    if injector.inputs is not None and not embeddings_agree(injector):
        raise BackboneError(
            f"{name} answers otherwise to the embeddings of a text than to its ids, so that {config.method}, which "
            f"puts a prompt among embeddings, would change the text too. {_PREFIXES}"
        )
