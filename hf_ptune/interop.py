"""Adapters of other libraries: PEFT's folders both ways, THUDM's checkpoints, soft prompts for servers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from hf_ptune.adapter_file import HUB_KEYS, check_tensors
from hf_ptune.backbone import head_names, load_backbone, resolve, task_of
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import AdapterFileError, BackboneError, ConfigError
from hf_ptune.injection import Injector, body_of, cache_name, device_of, probing, trying
from hf_ptune.injection.positions import learned_table
from hf_ptune.injection.probe import close, vocabulary_of
from hf_ptune.methods import PromptKind, get_method
from hf_ptune.methods.base import flatten, split_prefix
from hf_ptune.modeling_ptune import PTunePreTrainedModel
from hf_ptune.peft_files import (
    NO_PREFIX,
    PEFT_CONFIG_NAME,
    PEFT_PICKLE_NAME,
    PEFT_TASKS,
    PEFT_TYPES,
    PEFT_WEIGHTS_NAME,
    check_finite,
    find_file,
    method_of,
    pop_prompt,
    read_file,
    read_settings,
)
from hf_ptune.peft_words import settle, shared_names
from hf_ptune.wrapping import get_ptune_model

FilePath = str | os.PathLike[str]
_WORDS = "word_embeddings.weight"  # PEFT's own name for the base's table, copied where modules_to_save has it
_NO_PROMPT = "PEFT puts it before the first token, where the head pools; here it stands behind that. A prefix could be."


def load_peft(source: FilePath, backbone: PreTrainedModel | None = None, **kwargs: Any) -> PTunePreTrainedModel:
    """Load a prompt that PEFT saved.

    With a prefix of a bidirectional encoder PEFT counts positions from P on, and so does the adapter here
    (`position_shift`). Inputs longer than the table of positions less P have no equal there; here they go on at the
    table's start. Nor has a prefix in layers with a sliding window once a text outgrows the window: there it falls
    out, here it stays.

    Args:
        source: folder or Hub id.
        backbone: the base, where it is in memory already; what the adapter keeps of it is written into it.
        kwargs: `revision` and `subfolder` are the adapter's; `cache_dir`, `token`, `local_files_only` serve both;
            dtype, device_map, attn_implementation and the like go to the base, whose own code is run only
            where `trust_remote_code` is true.

    Returns:
        The model of the task, in eval mode, with outputs equal to PEFT's.

    Raises:
        AdapterFileError: files are missing or damaged, or tensors are not those of the configuration.
        BackboneError: the base cannot be loaded, or not take the prompt.
        ConfigError: no prompt, or one whose outputs could not be equal.
    """
    hub = {k: kwargs.pop(k) for k in HUB_KEYS if k in kwargs}
    own = hub | {k: kwargs.pop(k) for k in ("revision", "subfolder") if k in kwargs}
    name = os.fspath(source)
    settings = read_settings(name, own)
    method = method_of(settings, name)
    path = find_file(name, PEFT_WEIGHTS_NAME, own) or find_file(name, PEFT_PICKLE_NAME, own)
    if path is None:
        raise AdapterFileError(f"{name} has neither {PEFT_WEIGHTS_NAME} nor {PEFT_PICKLE_NAME}.")
    tensors = read_file(path)
    prompt = pop_prompt(tensors, settings, name)
    looked_up = tensors.pop(_WORDS, None)
    kept = {n.removeprefix("base_model."): t for n, t in tensors.items()}
    if backbone is None:
        backbone = _load_base(settings, kept, name, hub | kwargs)
    task = task_of(backbone)
    if settings["task_type"] not in (task, None):
        raise ConfigError(
            f"{name} was trained for {settings['task_type']}, but the backbone, a {type(backbone).__name__}, does "
            f"{task}. Pass the base as a model of that task, or leave backbone out."
        )
    inputs = get_method(method).kind is PromptKind.EMBEDDINGS
    kept = settle(kept, backbone, settings.get("modules_to_save") or (), inputs, name, looked_up)
    config = PTuneConfig(
        method=method,
        num_virtual_tokens=settings["num_virtual_tokens"],
        prompt_tuning_init="ZERO",
        flattened=get_method(method).reparameterised,
        modules_to_save=sorted({n.rpartition(".")[0] for n in set(kept) - head_names(backbone, task)}) or None,
        base_model_name_or_path=backbone.name_or_path or settings.get("base_model_name_or_path"),
        base_model_revision=settings.get("revision"),
        position_shift=_shift_of(backbone, method),
        pooling="cls",
    )
    return _fill(get_ptune_model(backbone, config), {"weight": prompt}, kept, name)


def save_peft(model: PTunePreTrainedModel, folder: FilePath) -> None:
    """Write a prompt as a folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    The prompt is written without its reparameterisation. With a prefix of a bidirectional encoder whose positions do
    not shift, the base's table of positions is written too, moved by P, since PEFT counts positions from P on. Trained
    weights that the base ties, and the words beside a prompt among the inputs, are written so that PEFT puts them in
    the place of the base's own, as it does with resized ones: a copy of them would not be read everywhere.

    Args:
        model: a wrapped model of one of PEFT's tasks.
        folder: made where it is missing; not one that `save_pretrained` has written to.

    Raises:
        ConfigError: PEFT has no such thing, or its outputs could not be equal.
    """
    target = Path(folder)
    if (target / "config.json").exists():
        raise ConfigError(f"{target} holds a config.json; transformers would hand it to PEFT. Choose another folder.")
    injector = _exportable(model)
    _check_same(model)
    names = sorted(n.removeprefix("backbone.") for n in model.adapter_parameter_names() if n.startswith("backbone."))
    tensors = {n: model.backbone.get_parameter(n) for n in names}
    assert model.prompt is not None
    prompt = flatten(model.prompt).weight
    if _moves_table(injector):
        name, table, first = _positions(model.backbone)
        tensors[f"{name}.weight"] = _moved(table.weight, first, model.config.num_virtual_tokens)
    shared = shared_names(model.backbone, injector.kind is PromptKind.EMBEDDINGS)
    in_place = {n: tensors[names[0]].clone() for names in shared if names[0] in tensors for n in names}
    tensors |= in_place
    written: dict[str, Tensor] = {f"base_model.{n}": t for n, t in tensors.items()} | {"prompt_embeddings": prompt}
    heads = head_names(model.backbone, model.task)  # kept as wholes there
    modules = sorted({n.split(".")[0] if n in heads else n.rpartition(".")[0] for n in tensors if n not in in_place})
    settings = _peft_settings(model, injector, modules)
    target.mkdir(parents=True, exist_ok=True)
    (target / PEFT_CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    plain = {n: t.detach().cpu().contiguous() for n, t in written.items()}
    save_file(plain, target / PEFT_WEIGHTS_NAME, metadata={"format": "pt"})


def load_thudm(checkpoint: FilePath | Mapping[str, Tensor], backbone: PreTrainedModel) -> PTunePreTrainedModel:
    """Load a prefix that THUDM's P-tuning-v2 trained, its projection included where it has one.

    Its encoders count positions from P on; so does the adapter here (`position_shift`).

    Args:
        checkpoint: its state dict, or the file that holds it (safetensors, or a pickle of tensors alone).
        backbone: the base, with a head for the checkpoint's labels; the checkpoint's head is written into it.

    Returns:
        The model of the task, in eval mode, with outputs equal to the checkpoint's.

    Raises:
        AdapterFileError: no prefix, or tensors of another shape.
        BackboneError: the checkpoint's frozen weights are not the backbone's.
        ConfigError: outputs could not be equal.
    """
    name = "the checkpoint" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    tensors = check_finite(checkpoint, name) if isinstance(checkpoint, Mapping) else read_file(name)
    prefix = {n.removeprefix("prefix_encoder."): t for n, t in tensors.items() if n.startswith("prefix_encoder.")}
    if "embedding.weight" not in prefix:
        raise AdapterFileError(f"{name} has no prefix_encoder.embedding.weight; expected a prefix of P-tuning-v2.")
    _check_base(tensors, backbone, name)
    projected = "trans.0.weight" in prefix
    config = PTuneConfig(
        method="prefix_tuning" if projected else "p_tuning_v2",
        num_virtual_tokens=prefix["embedding.weight"].shape[0],
        encoder_hidden_size=prefix["trans.0.weight"].shape[0] if projected else None,
        prompt_tuning_init="ZERO",
        prefix_dropout=float(getattr(backbone.config, "hidden_dropout_prob", 0.0)),
        position_shift=_shift_of(backbone, "p_tuning_v2"),
    )
    model = get_ptune_model(backbone, config)
    if projected:
        prompt = {n.replace("trans.0.", "mlp.0.").replace("trans.2.", "mlp.3."): t for n, t in prefix.items()}
        prompt["offset"] = torch.zeros(config.num_virtual_tokens, prefix["trans.2.weight"].shape[0])
    else:
        prompt = {n.removeprefix("embedding."): t for n, t in prefix.items()}
    return _fill(model, prompt, _thudm_head(tensors, backbone), name)


def prompt_embeds(model: PTunePreTrainedModel) -> Tensor:
    """Return the soft prompt `[P, H]` that a server puts before the embeddings of a text.

    Args:
        model: of `prompt_tuning` or `p_tuning`.

    Returns:
        A copy, without the reparameterisation.

    Raises:
        ConfigError: the method has no prompt among the inputs.
    """
    if model.config.places_tokens:
        raise ConfigError(f"the prompt stands among the tokens ({model.config.template!r}), not before them.")
    if model.config.pooling == "mean":
        raise ConfigError(
            "the head reads the mean of the own tokens, which is more than prompt embeddings by themselves; train with "
            "pooling='cls'."
        )
    if model.config.head_states == "mix":
        raise ConfigError(
            "the head reads a mix of all layers, which is more than prompt embeddings by themselves; train with "
            "head_states='last'."
        )
    if model.config.head_window == "neighbours":
        raise ConfigError(
            "the head reads a token's neighbours, which is more than prompt embeddings by themselves; train with "
            "head_window='token'."
        )
    if get_method(model.config.method).kind is not PromptKind.EMBEDDINGS or model.prompt is None:
        raise ConfigError(
            f"{model.config.method} puts nothing among the inputs, so that it has no prompt embeddings. "
            "Methods that have: prompt_tuning, p_tuning."
        )
    return flatten(model.prompt).weight.detach()


def save_prompt_embeds(model: PTunePreTrainedModel, path: FilePath) -> None:
    """Write the soft prompt `[P, H]` as one tensor.

    Args:
        model: of `prompt_tuning` or `p_tuning`.
        path: the file; `torch.load` reads it.

    Raises:
        ConfigError: the method has no prompt among the inputs.
    """
    torch.save(prompt_embeds(model).cpu(), path)


def _fill(
    model: PTunePreTrainedModel, prompt: dict[str, Tensor], kept: dict[str, Tensor], source: str
) -> PTunePreTrainedModel:
    """Write a prompt and what is kept of the base; nothing of the base changes where outputs could not be equal."""
    try:
        injector = model._injector
        assert injector is not None
        tensors = {f"prompt.{n}": t for n, t in prompt.items()} | {f"backbone.{n}": t for n, t in kept.items()}
        expected = model.adapter_state_dict()
        check_tensors(tensors, expected, source)
        model.load_adapter_state_dict(expected | {f"prompt.{n}": t for n, t in prompt.items()})
        _check_same(model.eval())
        model.load_adapter_state_dict(tensors)
    except BaseException:
        model.unwrap()
        raise
    return model


def _check_same(model: PTunePreTrainedModel) -> None:
    """Refuse a prompt that answers otherwise in PEFT's places: in the cache, or before the input embeddings."""
    injector, name = model._injector, type(model.backbone).__name__
    assert injector is not None
    seq2seq, prefixed = injector.body.config.is_encoder_decoder, injector.kind is PromptKind.PREFIX
    if seq2seq and prefixed:
        raise ConfigError(f"a prefix of {name} cannot be converted to equal outputs: {NO_PREFIX}")
    if injector.inputs is not None and not seq2seq:
        raise ConfigError(f"the prompt of {name} cannot be converted to equal outputs: {_NO_PROMPT}")
    if prefixed and cache_name(injector.body) is None:
        raise ConfigError(
            f"{name} takes no cache (past_key_values), the way by which PEFT and THUDM bring a prefix in."
        )
    ids = torch.tensor([[11, 18, 25]], device=device_of(injector.body)) % vocabulary_of(injector.body)
    further = {"decoder_input_ids": ids} if seq2seq else {}
    same = False  # where a family takes neither embeddings nor a filled cache
    with trying(), probing(model), torch.no_grad():
        found = injector.body(input_ids=ids, attention_mask=torch.ones_like(ids), **further)[0].float()
        with model.disable_adapter():
            expected = _states_as_peft(injector, ids, further)
        same = close(found, expected, model.backbone.dtype)
    if not same:
        raise ConfigError(
            f"{name} answers otherwise with the prompt {'in a cache' if prefixed else 'before the tokens'}, where PEFT "
            "puts it: positions, scales or sliding windows differ there, so that outputs could not be equal."
        )


def _states_as_peft(injector: Injector, ids: Tensor, further: dict[str, Tensor]) -> Tensor:
    """Hidden states `[1, S, H]` of the body with the prompt where PEFT puts it."""
    body, encoded, tokens = injector.body, injector.encode(), injector.num_virtual_tokens
    mask = ids.new_ones(1, tokens + ids.shape[1])
    if injector.kind is PromptKind.EMBEDDINGS:
        words = injector.words()(ids)
        embeds = torch.cat([encoded[None].to(words), words], dim=1)
        states: Tensor = body(inputs_embeds=embeds, attention_mask=mask, **further)[0]
        return states[:, -ids.shape[1] :].float()
    pairs = split_prefix(encoded, [s.shape for s in injector.sites])
    for number, (site, pair) in enumerate(zip(injector.sites, pairs, strict=True)):
        device = device_of(body.get_submodule(site.name))
        pairs[number] = pair[0][None].to(device, body.dtype), pair[1][None].to(device, body.dtype)
    if _moves_table(injector):
        first = _positions(injector.backbone)[2]
        further = further | {"position_ids": first + torch.arange(ids.shape[1], device=ids.device)[None]}
    cache: dict[str, Any] = {str(cache_name(body)): DynamicCache(pairs)}
    states = body(input_ids=ids, attention_mask=mask, **cache, **further)[0]
    return states.float()


def _moves_table(injector: Injector) -> bool:
    """Whether PEFT counts positions from P on where the prompt here leaves them alone."""
    bidirectional = not injector.causal and not injector.body.config.is_encoder_decoder
    return injector.kind is PromptKind.PREFIX and bidirectional and not injector.shift


def _shift_of(backbone: PreTrainedModel, method: str) -> bool | None:
    """The `position_shift` of an adapter whose encoder counts positions from P on; unset elsewhere."""
    if get_method(method).kind is not PromptKind.PREFIX or learned_table(body_of(backbone)) is None:
        return None
    return True


def _positions(backbone: PreTrainedModel) -> tuple[str, nn.Embedding, int]:
    """Name and module of an encoder's table of positions, and its row for the first token; pads come before."""
    found = learned_table(body_of(backbone))
    if found is None:
        raise ConfigError(
            f"{type(backbone).__name__} has no table of positions that could be moved by the length of the prefix, as "
            "PEFT and THUDM count them. Convertible encoders are those of the BERT and RoBERTa kin."
        )
    return next(n for n, m in backbone.named_modules() if m is found[0]), *found


def _moved(weight: Tensor, first: int, by: int) -> Tensor:
    """Rows `[N, H]` of own tokens moved, round the end."""
    return torch.cat([weight[:first], weight[first:].roll(by, dims=0)])


def _load_base(settings: dict[str, Any], kept: dict[str, Tensor], source: str, kwargs: Any) -> PreTrainedModel:
    name, task = settings.get("base_model_name_or_path"), settings["task_type"]
    if not isinstance(name, str) or not name or ".." in Path(name).parts or task is None:
        raise ConfigError(f"{source}: base {name!r} and task {task!r} name nothing to load; pass backbone=.")
    revision = settings.get("revision") or "main"
    trust = {"trust_remote_code": bool(kwargs.get("trust_remote_code"))}  # unless it is told, transformers asks
    try:
        hub = {k: v for k, v in kwargs.items() if k in HUB_KEYS}
        config = AutoConfig.from_pretrained(resolve(name), revision=revision, **trust, **hub)
        heads = sorted(n for n, t in kept.items() if n.split(".")[0] in ("classifier", "score") and t.dim() == 2)
        if heads:  # the output layer comes last in every head: dense, out_proj
            config.num_labels = kept[heads[-1]].shape[0]
        backbone, absent = load_backbone(task, name, config, revision=revision, **kwargs | trust)
    except (OSError, ValueError) as error:
        raise BackboneError(f"the base {name!r} of {source} cannot be loaded ({error}); pass backbone=.") from error
    if unknown := sorted(absent - set(kept)):
        raise BackboneError(f"the base {name!r} of {source} has no weights for {unknown[:5]}.")
    return backbone.eval()


def _exportable(model: PTunePreTrainedModel) -> Injector:
    """The injector of a model whose method, task and places PEFT has too."""
    config, injector = model.config, model._injector
    if config.method not in PEFT_TYPES:
        raise ConfigError(f"PEFT has no {config.method}; it has {', '.join(PEFT_TYPES)}.")
    if config.places_tokens or config.train_backbone:
        raise ConfigError("PEFT puts a prompt before the text, beside a base that has not changed; this is neither.")
    if model.task not in PEFT_TASKS:
        raise ConfigError(f"PEFT has no prompts for {model.task}; it has them for {', '.join(PEFT_TASKS)}.")
    if injector is None:
        raise ConfigError("this wrapper no longer holds its backbone: it was unwrapped, or wrapped anew.")
    if config.head_states == "mix":
        raise ConfigError("PEFT has no head_states='mix'; train with head_states='last' what is to go there.")
    if config.head_window == "neighbours":
        raise ConfigError("PEFT has no head_window='neighbours'; train with head_window='token' what is to go there.")
    if injector.kind is PromptKind.PREFIX:
        if config.pooling == "mean":
            raise ConfigError("PEFT has no pooling='mean'; train with pooling='cls' what is to go there.")
        shapes = {s.shape for s in injector.sites}
        if config.layers is not None or config.sites is not None or config.geometry["skipped"]:
            raise ConfigError("PEFT puts a prefix into every layer; this one is in some alone.")
        if len(shapes) > 1 or any(s.key_dim != s.value_dim for s in shapes):
            raise ConfigError(f"PEFT has one shape for all keys and values; found {list(shapes)}.")
    return injector


def _peft_settings(model: PTunePreTrainedModel, injector: Injector, modules: list[str]) -> dict[str, Any]:
    config, shape = model.config, injector.sites[0].shape
    settings: dict[str, Any] = {
        "base_model_name_or_path": config.base_model_name_or_path,
        "inference_mode": True,
        "modules_to_save": modules or None,
        "num_attention_heads": shape.heads,
        "num_layers": len(injector.sites),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.num_virtual_tokens,
        "peft_type": PEFT_TYPES[config.method],
        "revision": config.base_model_revision,
        "task_type": model.task,
        "token_dim": config.geometry["embedding_dim"],
    }
    if injector.kind is PromptKind.PREFIX:  # a projection has run already
        settings |= {"token_dim": shape.heads * shape.key_dim, "prefix_projection": False}
    return settings


def _check_base(tensors: dict[str, Tensor], backbone: PreTrainedModel, source: str) -> None:
    """Compare the frozen weights that a checkpoint holds beside its prefix with the backbone's."""
    body = backbone.base_model_prefix + "."
    for name, own in backbone.state_dict().items():
        found = tensors.get(name)
        if found is None or not name.startswith(body) or not own.is_floating_point():
            continue
        own = own.to(found)
        if found.shape != own.shape or (found - own).abs().max() > 1e-2 * own.abs().max():
            raise BackboneError(f"{source} was trained on another base: its {name} is not the backbone's.")


def _thudm_head(tensors: dict[str, Tensor], backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The head by the backbone's names; its own where the checkpoint has none."""
    body, names = backbone.base_model_prefix, head_names(backbone, task_of(backbone))
    found = {n: t for n, t in tensors.items() if not n.startswith((body + ".", "prefix_encoder."))}
    if "classifier.dense.weight" in names and "classifier.weight" in found:
        # a pooler and one layer there are one head of two layers here
        pooler = f"{body}.pooler.dense."
        found = {f"classifier.out_proj.{n.removeprefix('classifier.')}": t for n, t in found.items()}
        found |= {f"classifier.dense.{n.removeprefix(pooler)}": t for n, t in tensors.items() if n.startswith(pooler)}
    return found or {n: backbone.get_parameter(n).detach() for n in names}


# adapters of PEFT load by our own classes too
PTunePreTrainedModel.load_foreign = staticmethod(load_peft)
