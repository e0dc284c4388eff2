"""From an adapter's file and configuration to its base, with everything refused that does not fit."""

import copy
import re
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_ptune.adapter_file import HUB_KEYS, check_tensors, digest_of, find_weights, read_header
from hf_ptune.backbone import POOLER, TASKS, blaming, load_backbone, makes, resolve
from hf_ptune.base_settings import are_named, tell
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import BackboneError, ConfigError, TaskError, shorten
from hf_ptune.injection import body_of, find_geometry, word_embeddings
from hf_ptune.methods import get_method
from hf_ptune.option_checks import READINGS
from hf_ptune.placement import choose_sites

logger = logging.get_logger(__name__)
_BODY = "FEATURE_EXTRACTION"
_SIZES = re.compile("size|dim|layer|head|expert|embd|width|depth|inner|rank|state|kernel|proj|ff|position")
_NO_SIZES = ("chunk_size_feed_forward", "id2label", "label2id", "task_specific_params", "vocab_size")


def find_adapter(
    source: str, config: PTuneConfig, **hub: Any
) -> tuple[str, dict[str, Tensor], dict[str, Any], PTuneConfig]:
    """Find an adapter's weights, and let what is kept beside them settle its configuration.

    Args:
        source: folder or Hub id.
        config: what its config.json says.
        hub: revision, token, cache_dir and the like.

    Returns:
        Path of the weights, their tensors by name without memory, their structure, and the configuration with it.

    Raises:
        AdapterFileError: there are no weights, or damaged ones.
        ConfigError: the structure describes no adapter.
    """
    path = find_weights(source, **hub)
    found, structure = read_header(path)
    settled = config.with_structure(structure)
    if settled is not config:
        before, after = config.structure(), settled.structure()
        told = [f"{name}={before[name]!r} (it is {value!r})" for name, value in after.items() if before[name] != value]
        logger.warning(
            f"{source}: an option or config.json says {shorten(', '.join(told))}. The adapter's weights tell what it "
            'is, and that is taken; a prompt of another shape can start from it by prompt_tuning_init="ADAPTER".'
        )
    return path, found, structure, settled


def settle_task(config: PTuneConfig, task: str, source: str) -> tuple[PTuneConfig, str | None]:
    """Let the configuration of an adapter be that of another task, where the base serves both.

    Bases of two tasks may be of one class, as BART's for masked language modelling and for texts made of texts; and
    hidden states are those of any base, whose head is left out.

    Args:
        config: of the adapter.
        task: of the class that loads it.
        source: where it is from.

    Returns:
        The configuration, and the task whose head is left out, if one is.

    Raises:
        TaskError: it is an adapter of another task.
    """
    own = config.task
    if own in (task, None):
        return config, None
    alike = all(t in TASKS and makes(t, config.base, config.base_class) for t in (own, task))
    if not alike and not (own in TASKS and task == _BODY and _enters_alike(config, str(own), task)):
        base = "" if config.base_class is None else f" on a {config.base_class}"
        raise TaskError(f"{source} was trained for {own!r}{base}, not {task}: load it by {_loader_name(own)}.")
    config = copy.copy(config)  # whoever has read it may load it for its own task yet
    config.task = task
    if alike:
        return config, None
    config.base_class = None
    for name, (published, _) in READINGS.items():
        setattr(config, name, published)
    logger.warning(
        f"{source} was trained for {own!r}; its head is left out: what comes are the hidden states that its prompt "
        f"makes of the base. {_loader_name(own)} loads all of it."
    )
    return config, own


def _loader_name(task: str | None) -> str:
    return getattr(TASKS.get(str(task)), "__name__", "another Auto class")


def _enters_alike(config: PTuneConfig, own: str, other: str) -> bool:
    """Whether a prompt enters the same attention in two tasks."""
    kind = get_method(config.method).kind
    if kind is None or not config.geometry:
        return True
    return choose_sites(config, kind, own) == choose_sites(config, kind, other)


def leave_out_head(
    config: PTuneConfig, task: str, found: Iterable[str], body: PreTrainedModel, absent: set[str], source: str
) -> dict[str, str]:
    """Leave out of an adapter what the body of its base does not have.

    Args:
        config: of the adapter, as `settle_task` gave it; gets the body's class, and the modules that are saved of it.
        task: that it was trained for.
        found: names of the tensors in the file.
        body: what `AutoModel` makes of the base.
        absent: names of its parameters that the base's checkpoint does not hold.
        source: where the adapter is from.

    Returns:
        Names in the file by those in the body's wrapper.

    Raises:
        BackboneError: the body was given, and is another one.
        TaskError: the body attends elsewhere than the adapter's own base does.
    """
    if not makes(_BODY, config.base, type(body).__name__):
        raise BackboneError(
            f"the backbone is a {type(body).__name__}, but hidden states of {source} come from its base without a "
            "head. Pass the base as AutoModel loads it, or leave backbone out. "
            f"{_loader_name(task)} loads the adapter with its head."
        )
    # of a decoder alone AutoModel makes an encoder too
    further = body_of(body) is not body and getattr(body, "encoder", None) is not None
    if further or (config.geometry and find_geometry(body) != config.geometry):
        raise TaskError(
            f"{source} was trained on another model than {type(body).__name__}, which AutoModel makes of its base: "
            f"load it by {_loader_name(task)}."
        )
    names = [n for n, _ in body.named_parameters()]
    config.base_class = type(body).__name__
    kept = [m for m in config.modules_to_save or () if any(f".{m}." in f".{n}" for n in names)]
    config.modules_to_save = kept or None
    if POOLER not in kept and any(POOLER in n.split(".") for n in absent):
        config.modules_to_save = [*kept, POOLER]
        logger.warning(
            f"neither {source} nor the checkpoint of {config.base_model_name_or_path} has a pooler: that of "
            f"{type(body).__name__} is drawn anew and untrained, so that pooler_output tells nothing. It is saved with "
            "what is loaded here (modules_to_save)."
        )
    there, stored = set(found), {n: n for n in found if n.startswith("prompt.")}
    for name in names:  # a base without a model inside has its parameters by the same names
        for place in (f"backbone.{name}", f"backbone.{body.base_model_prefix}.{name}"):
            stored |= {f"backbone.{name}": place} if place in there else {}
    return stored


def check_prompt(config: PTuneConfig, task: str, found: dict[str, Tensor], source: str) -> None:
    """Compare the prompt in a file with the configuration, without a base and without memory for either.

    Args:
        config: of the adapter.
        task: of the class that loads it.
        found: tensors of the file by name, without memory.
        source: where they are from.

    Raises:
        AdapterFileError: they are not what the configuration describes.
        ConfigError: it describes an adapter that its base cannot take.
    """
    kind, geometry = get_method(config.method).kind, config.geometry
    if kind is not None and not geometry:
        return  # told when the base has been watched
    expected: dict[str, Tensor] = {}
    if kind is not None:
        with torch.device("meta"):
            encoder = config.make_encoder(choose_sites(config, kind, task))
        expected = {f"prompt.{n}": t for n, t in encoder.state_dict().items()}
    check_tensors({n: t for n, t in found.items() if n.startswith("prompt.")}, expected, source)


def settle_geometry(config: PTuneConfig, backbone: PreTrainedModel, digest: str | None) -> None:
    """Refuse a geometry that is not the base's; where the weights do not vouch for it, the base is watched anew.

    Args:
        config: of the adapter; gets the geometry.
        backbone: the base.
        digest: of the geometry, as it is kept beside the weights.

    Raises:
        BackboneError: the geometry is that of another base.
    """
    said = config.geometry
    if said and digest == digest_of(said):
        missing = {s["name"] for s in said["sites"]} - {n for n, _ in body_of(backbone).named_modules()}
        if missing:
            raise BackboneError(
                f"the base {config.base_model_name_or_path!r} has no {sorted(missing)[:5]}, where the adapter puts its "
                "prompt: it is not the base that the adapter was trained on."
            )
        return
    seen = find_geometry(backbone)
    if said and said != seen:
        sites = [a for a, b in zip_longest(said["sites"], seen["sites"]) if a != b]
        raise BackboneError(
            f"geometry in config.json is not that of {config.base_model_name_or_path!r}: it says "
            f"{shorten(sites[0] if sites else {n: said[n] for n in seen if n != 'sites'})}, and differs in "
            f"{len(sites)} of {len(seen['sites'])} sites. Name the base that the adapter was trained on, or restore "
            "config.json."
        )
    config.geometry = seen


def load_base(task: str, config: PTuneConfig, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, set[str]]:
    """Load the base that an adapter names, as the adapter left it.

    Args:
        task: of the class that loads it.
        config: of the adapter.
        kwargs: what `from_pretrained` takes.

    Returns:
        The backbone, and the names of its parameters that the checkpoint does not hold.

    Raises:
        BackboneError: it cannot be loaded, or is not the one that the configuration describes.
        ConfigError: no base is named.
    """
    name, revision = config.base_model_name_or_path, config.base_model_revision or "main"
    given = sorted({*kwargs} - {*HUB_KEYS, "revision", "trust_remote_code"})
    if not name:
        raise ConfigError("config.json names no base_model_name_or_path; set it to the base's folder or id.")
    base = type(config.base).from_dict(config.base.to_dict())
    attention = kwargs.pop("attn_implementation", None) or config._attn_implementation
    if attention is not None:
        kwargs["attn_implementation"] = attention
    hub = {k: v for k, v in kwargs.items() if k in HUB_KEYS}
    kwargs = kwargs | {"revision": revision, "trust_remote_code": False}
    cure = (
        ". Set base_model_name_or_path in config.json to the folder or id of the base that the adapter was trained on"
        + (f", or correct what was given for it: {', '.join(given)}." if given else ".")
    )
    with blaming(name, cure):
        whole = AutoConfig.from_pretrained(resolve(name), revision=revision, trust_remote_code=False, **hub)
        if (stored := getattr(whole, "quantization_config", None)) is not None:
            base.quantization_config = stored  # how its weights are stored is no choice of who loads them
        own = whole.get_text_config()
        text = base.get_text_config()
        wanted, present = getattr(text, "vocab_size", None), getattr(own, "vocab_size", None)
        _check_sizes(text, own, name)
        if wanted == present:
            return load_backbone(task, name, base, config.base_class, **kwargs)
        # the vocabulary was resized after the base had been loaded: its checkpoint has to be met as it is
        text.vocab_size = present
        backbone, absent = load_backbone(task, name, base, config.base_class, **kwargs)
    backbone.resize_token_embeddings(wanted)
    logger.warning(
        f"the vocabulary was resized from {present} to {wanted} tokens; embeddings of new tokens are drawn anew "
        "unless modules_to_save names the embeddings."
    )
    return backbone, absent


def lost_embeddings(model: Any) -> str | None:
    """What to say where the vocabulary of a base has grown by tokens whose embeddings are no part of the adapter.

    Args:
        model: the wrapper.

    Returns:
        What is lost, and the cure; `None` where nothing is, or where the base's own configuration is not at hand.
    """
    config, backbone = model.config, model.backbone
    name = config.base_model_name_or_path
    if name is None:
        return None
    try:
        # told not to trust, transformers asks nobody
        where = {"revision": config.base_model_revision or "main", "local_files_only": True}
        own = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False, **where).get_text_config()
    except Exception:  # whatever a base that is not at hand, of its own code or damaged raises: this is advice
        return None
    wanted, present = (getattr(c, "vocab_size", None) or 0 for c in (backbone.config.get_text_config(), own))
    if not 0 < present < wanted:
        return None
    both = (word_embeddings(backbone), backbone.get_output_embeddings())
    weights = {id(p) for m in both if m is not None for p in m.parameters() if p.dim() == 2}
    names = [n for n, p in model.named_parameters() if id(p) in weights]
    lost = [n for n in names if n not in model.adapter_parameter_names()]
    if not lost:
        return None
    modules = {n: n.split(".")[-2] for n in names}
    return (
        f"the vocabulary has {wanted} tokens, that of the base {name!r} {present}: of the new ones "
        f"{', '.join(modules[n] for n in lost)} would not be saved with the adapter, and are drawn anew wherever it is "
        f"loaded. Wrap the base with modules_to_save={[*modules.values()]}, or save the resized base, and wrap what is "
        "loaded from there."
    )


def tell_settings(backbone: PreTrainedModel, config: PTuneConfig) -> None:
    """Let a base that is in memory have the labels and special tokens that were saved with an adapter.

    Args:
        backbone: the base.
        config: of the adapter.
    """
    said: dict[str, Any] = config.base.to_dict()
    names = [n for n in said if n.endswith("_token_id")]
    if config.num_labels == backbone.config.num_labels and are_named(config.id2label):
        names += ["id2label", "label2id"]
    for name in [*names, "problem_type"]:
        if (value := getattr(config.base, name)) is not None:
            tell(backbone.config, name, value, set())


def read_generation(source: str, backbone: PreTrainedModel, own: dict[str, Any]) -> GenerationConfig:
    """How an adapter generates, as it was saved; as its base does, where nothing was.

    Args:
        source: adapter folder or Hub id.
        backbone: the base.
        own: options of reading it from the Hub.
    """
    try:
        return GenerationConfig.from_pretrained(source, **own)
    except OSError:  # there is no such file
        kept: GenerationConfig = backbone.generation_config
        return kept


def _check_sizes(said: PreTrainedConfig, own: PreTrainedConfig, base: str) -> None:
    """Refuse a configuration of a base that says more than the base's own: it would be made before its weights are met.

    Less than that is a base that was cut short on purpose.
    """
    if said.model_type != own.model_type:
        raise BackboneError(f"the base {base!r} is a {own.model_type}, but the adapter was made for {said.model_type}.")
    ours, theirs = _sizes(said.to_dict()), _sizes(own.to_dict())
    learned = getattr(own, "rope_parameters", None) is None
    wrong = [
        f"{n}={size} instead of {theirs.get(n)}"
        for n, size in ours.items()
        if size > theirs.get(n, 2**16) and (learned or "position" not in n)
    ]
    wanted, present = getattr(said, "vocab_size", 0) or 0, getattr(own, "vocab_size", 0) or 0
    if wanted > 2 * present + 2**16:
        wrong.append(f"vocab_size={wanted} instead of {present}")
    if wrong:
        raise BackboneError(
            f"base_config in config.json is not that of the base {base!r}: {', '.join(wrong[:5])}. Name the base that "
            "the adapter was trained on, restore config.json, or correct what was given besides."
        )


def _sizes(settings: dict[str, Any], path: str = "") -> dict[str, int]:
    """The largest number under every name that says how large something is."""
    found: dict[str, int] = {}
    for name, value in settings.items():
        if name in _NO_SIZES:
            continue
        if isinstance(value, dict):
            found |= _sizes(value, f"{path}{name}.")
        elif _SIZES.search(name):
            numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
            found |= {path + name: max(numbers)} if numbers else {}
    return found
