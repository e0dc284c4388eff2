"""Start a prompt where another adapter's prompt ended."""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from hf_ptune.adapter_file import is_foreign, read_tensors
from hf_ptune.backbone import place_of
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import BackboneError, ConfigError, shorten
from hf_ptune.loading import check_prompt, find_adapter
from hf_ptune.methods import PromptKind, get_method
from hf_ptune.methods.base import PromptEncoder
from hf_ptune.placement import choose_sites, settled_reading

logger = logging.get_logger(__name__)
_PROMPT = "prompt."


def transfer(model: Any, source: str) -> None:
    """Let a freshly wrapped model start from the prompt of an adapter (Vu et al. 2022, SPoT, section 2.2).

    The paper copies directly trained prompts of the input; here prefixes are copied too. Where both adapters have the
    same reparameterisation its weights are copied, so that training goes on with it. Else the source's encoded prompt
    becomes the start: exactly, whatever the network of the new adapter gives at first.

    Args:
        model: a wrapped model; `prompt_tuning_init_head` of its configuration says whether a head comes along.
        source: adapter folder or Hub id. Its base is not loaded.

    Raises:
        AdapterFileError: the source does not hold what its configuration describes.
        BackboneError: it is an adapter of another base.
        ConfigError: there is no such adapter, or it has another kind of prompt, another length or other sites, or its
            head does not fit.
    """
    if is_foreign(source, {}):
        raise ConfigError(
            f"{source} was saved by another library; write it in our form first: hf-ptune convert {source} FOLDER."
        )
    try:
        told = PTuneConfig.from_pretrained(source)
    except OSError as error:
        raise ConfigError(
            f"prompt_tuning_init_adapter={source!r} cannot be read ({shorten(error)}); name the folder or Hub id of an "
            "adapter."
        ) from error
    path, found, _, config = find_adapter(source, told)
    if not config.geometry:
        config.geometry = model.config.geometry
    _check_same_base(config, model.config, source)
    chosen = _check_same_prompt(config, model, source)
    check_prompt(config, config.task or model.task, found, source)
    tensors = read_tensors(path)
    encoder = config.make_encoder(chosen).to(next(model.prompt.parameters()))
    encoder.load_state_dict({n.removeprefix(_PROMPT): t for n, t in tensors.items() if n.startswith(_PROMPT)})
    _start(model.prompt, encoder)
    if model.config.prompt_tuning_init_head:
        _copy_head(model, config, {n: t for n, t in tensors.items() if not n.startswith(_PROMPT)}, source)


def _check_same_base(source: PTuneConfig, target: PTuneConfig, where: str) -> None:
    if source.train_backbone and not (target.train_backbone and target.prompt_tuning_init_head):
        raise BackboneError(
            f"{where} was trained together with its base, whose weights are its own: a prompt means something to its "
            "own base alone. Go on with the whole adapter (from_pretrained), or take its base along: train_backbone="
            "True and prompt_tuning_init_head=True."
        )
    theirs, ours = source.base_model_name_or_path, target.base_model_name_or_path
    if theirs and ours and place_of(theirs) != place_of(ours):
        raise BackboneError(
            f"{where} was trained on the base {theirs!r}, and this one is {ours!r}: a prompt means something to its "
            "own base alone. Name an adapter of the same base; where both names are of the same weights, give "
            f"base_model_name_or_path={theirs!r} in the configuration."
        )
    kinds = source.base.get_text_config().model_type, target.base.get_text_config().model_type
    if kinds[0] != kinds[1]:
        raise BackboneError(f"{where} was trained on a {kinds[0]} ({theirs}), and this base is a {kinds[1]} ({ours}).")
    pinned = source.base_model_revision, target.base_model_revision
    if all(pinned) and pinned[0] != pinned[1]:
        logger.warning(f"{where} was trained on commit {pinned[0]} of {theirs}; the base here is at {pinned[1]}.")


def _check_same_prompt(source: PTuneConfig, model: Any, where: str) -> list[dict[str, Any]]:
    """The source's sites, once kind, length and sites are known to be those of the model."""
    target = model.config
    kind, wanted = get_method(source.method).kind, model.prompt.kind
    if kind is not wanted or kind is None:
        what = {
            None: "no prompt",
            PromptKind.EMBEDDINGS: "a prompt among the inputs",
            PromptKind.PREFIX: "keys and values of every layer",
        }
        raise ConfigError(
            f"{where} ({source.method}) trained {what[kind]}, and {target.method} takes {what[wanted]}. "
            "Start from an adapter of the same kind."
        )
    if source.num_virtual_tokens != target.num_virtual_tokens:
        raise ConfigError(
            f"{where} has {source.num_virtual_tokens} virtual tokens, and this configuration "
            f"{target.num_virtual_tokens}; set num_virtual_tokens={source.num_virtual_tokens}."
        )
    theirs, ours = (choose_sites(c, kind, t) for c, t in ((source, source.task or model.task), (target, model.task)))
    same_width = kind is PromptKind.PREFIX or source.geometry["embedding_dim"] == target.geometry["embedding_dim"]
    if (theirs != ours and kind is PromptKind.PREFIX) or not same_width:
        raise ConfigError(
            f"{where} put its prompt into {len(theirs)} attention sites (layers={source.layers}, "
            f"sites={source.sites}), and this configuration into {len(ours)} (layers={target.layers}, "
            f"sites={target.sites}), or their widths differ; give the same layers, sites and base."
        )
    return theirs


def _start(prompt: PromptEncoder, source: PromptEncoder) -> None:
    theirs, ours = source.state_dict(), prompt.state_dict()
    if type(source) is type(prompt) and {n: t.shape for n, t in theirs.items()} == {
        n: t.shape for n, t in ours.items()
    }:
        prompt.load_state_dict(theirs)
        return
    source.eval()  # without dropout inside the reparameterisation
    with torch.no_grad():
        prompt.start_from(source())


def _copy_head(model: Any, source: PTuneConfig, head: dict[str, Tensor], where: str) -> None:
    labels = [c.label_names for c in (source, model.config)]
    if labels[0] != labels[1]:
        raise ConfigError(
            f"the head of {where} has labels {labels[0][:10]}, this one {labels[1][:10]}. Leave "
            "prompt_tuning_init_head out, or load the base with the same labels."
        )
    theirs, ours = settled_reading(source), settled_reading(model.config)
    for option, cure in (("head_states", "head_states and pooling"), ("head_window", "head_window")):
        if theirs[option] != ours[option]:
            raise ConfigError(
                f"the head of {where} reads {option}={theirs[option]!r}, this one {ours[option]!r}. Leave {cure} out, "
                "or prompt_tuning_init_head."
            )
    own = {n: t for n, t in model.adapter_state_dict().items() if not n.startswith(_PROMPT)}
    shapes = [{n: tuple(t.shape) for n, t in part.items()} for part in (head, own)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"the head of {where} has tensors {shapes[0]}, this one {shapes[1]}. Leave prompt_tuning_init_head out, or "
            "load a base with the same head."
        )
    model.load_adapter_state_dict(model.adapter_state_dict() | head)
