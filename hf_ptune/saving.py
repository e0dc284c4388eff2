"""An adapter on the disk and the Hub: written, pushed, and loaded with the base that it names."""

import os
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_ptune.adapter_file import HUB_KEYS, check_tensors, digest_of, is_foreign, read_tensors, staged, write_tensors
from hf_ptune.adapter_tensors import AdapterTensors
from hf_ptune.backbone import POOLER, anchored, check_target, head_names
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import AdapterFileError, BackboneError, ConfigError
from hf_ptune.facts import SOURCE
from hf_ptune.loading import (
    check_prompt,
    find_adapter,
    leave_out_head,
    load_base,
    lost_embeddings,
    read_generation,
    settle_geometry,
    settle_task,
    tell_settings,
)
from hf_ptune.methods.base import flatten as fold
from hf_ptune.placement import check_base, choose_sites, settled_reading
from hf_ptune.publishing import publish
from hf_ptune.renamed_bodies import check_read
from hf_ptune.sharding import running

logger = logging.get_logger(__name__)
_PARTS = re.compile(r"^\.parametrizations\.|^\.[^.]+_(g|v|orig)$")  # what torch makes a parameter of
_OF_OTHER_LABELS = (
    "are of other labels than those asked for, and stay as the base has them, drawn anew if it has none; the prompt is "
    "the adapter's. Train it before use."
)
# what a repository of ours may run says nothing of what its base may; the others are said of our own files
_NOT_FOR_THE_BASE = (
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
    "_from_auto",
    "_commit_hash",
    "adapter_kwargs",
)


class SavedAdapter(AdapterTensors):
    """What a wrapped model saves, pushes and loads: the adapter alone, never its base."""

    # reads what another library saved; set by the room that knows its format
    load_foreign: ClassVar[Callable[..., Any] | None] = None

    @property
    def architecture(self) -> str:
        """Name of the class that loads it."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        flatten: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write configuration and adapter, never the backbone; whoever is killed meanwhile keeps the old ones.

        Args:
            save_directory: the folder; made where it is missing.
            is_main_process: whether this rank writes.
            state_dict: a gathered state dict of the whole wrapper.
            push_to_hub: also upload the folder.
            flatten: fold the reparameterisation into the written prompt; it cannot be trained further then.

        Raises:
            AdapterFileError: the folder is that of the base, which would be lost; or a parameter is made of others,
                as `torch.nn.utils.parametrize` has it, which nobody could load.
        """
        check_target(save_directory, self.config.base_model_name_or_path)
        _check_plain(self)
        tensors = self.adapter_state_dict(state_dict)
        config = self.config
        config.set_base(self.backbone.config, self.backbone.dtype)  # which may have changed since
        if flatten and self.prompt is not None and not config.flattened:
            tensors = self._folded(tensors)
            config = type(config).from_dict(config.to_dict() | {"flattened": True})
        if is_main_process:
            if (lost := lost_embeddings(self)) is not None:
                logger.warning_once(lost)
            config.architectures = [self.architecture]
            type(config)._auto_class = None  # loaded by a repository's shim, transformers would copy our source
            with staged(save_directory) as aside:
                config.save_pretrained(aside)
                if self.can_generate():
                    self.generation_config.save_pretrained(aside)
                structure = config.structure() | {"geometry": digest_of(config.geometry)}
                write_tensors(aside, tensors, structure)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.fspath(save_directory))), **kwargs)

    def _folded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors with the prompt encoded once, on the CPU: the model's own encoder may be in parts."""
        assert self.prompt is not None
        prompt = {n.removeprefix("prompt."): t.cpu() for n, t in tensors.items() if n.startswith("prompt.")}
        with torch.random.fork_rng(devices=[]):
            encoder = self.config.make_encoder(choose_sites(self.config, self.prompt.kind, type(self).task))
        encoder.to(next(iter(prompt.values())).dtype).load_state_dict(prompt)
        rest = {n: t for n, t in tensors.items() if not n.startswith("prompt.")}
        return rest | {"prompt.weight": fold(encoder).weight}

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tokenizer: Any = None,
        keep_encoder: bool = False,
        **ignored: Any,
    ) -> str | None:
        """Push adapter, tokenizer and card in one commit; of several ranks, the first does.

        Args:
            repo_id: `user/name`.
            commit_message: first line of the commit.
            commit_description: the rest of it.
            private: of a repository that is made here.
            token: a write token; the saved one when unset.
            revision: a branch.
            create_pr: open a pull request instead.
            tokenizer: the base's own when unset.
            keep_encoder: keep the reparameterisation, so that others can train on; else the prompt is flattened.
            ignored: what pushing whole models takes (max_shard_size, tags).

        Returns:
            The address of the repository; `None` on other ranks.

        Raises:
            HubError: the push failed; says where the finished folder is and how to push it again.
        """
        return publish(
            self,
            repo_id,
            tokenizer=tokenizer,
            keep_encoder=keep_encoder,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        backbone: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the base that the adapter names, then the adapter.

        Args:
            pretrained_model_name_or_path: adapter folder or Hub id.
            config: its configuration, where it has been read already.
            backbone: the base, where it is in memory already; it is not loaded then, and what the adapter keeps of
                it (a head, biases) is written into it.
            kwargs: `revision` is the adapter's; `cache_dir`, `token`, `local_files_only` serve both; dtype,
                device_map, attn_implementation, quantization_config and the like go to the base. With
                `ignore_mismatched_sizes=True` a head of another number of labels starts anew, beside the adapter's
                prompt.

        Raises:
            AdapterFileError: the folder does not hold what its configuration describes.
            BackboneError: the base cannot be loaded, lacks weights or has another geometry or class.
            ConfigError: the configuration describes no adapter.
            TaskError: it describes one of another task.
        """
        source = os.fspath(pretrained_model_name_or_path)
        given = kwargs.pop("state_dict", None)
        with_info = kwargs.pop("output_loading_info", False)
        for name in _NOT_FOR_THE_BASE:
            kwargs.pop(name, None)
        info: dict[str, Any] = {f"{kind}_keys": set() for kind in ("missing", "unexpected", "mismatched")}
        info["error_msgs"] = []
        if config is None and cls.load_foreign is not None and is_foreign(source, kwargs):
            foreign = cls.load_foreign(source, backbone=backbone, **kwargs)
            if not isinstance(foreign, cls):
                raise ConfigError(f"{source} holds a {type(foreign).__name__}, not a {cls.__name__}.")
            return (foreign, info) if with_info else foreign
        hub = {k: kwargs.pop(k) for k in HUB_KEYS if k in kwargs}
        own = hub | {k: kwargs.pop(k) for k in ("revision", "subfolder") if k in kwargs}
        if not isinstance(config, PTuneConfig):
            config, rest = PTuneConfig.from_pretrained(source, return_unused_kwargs=True, **own, **kwargs)
            kwargs = {k: v for k, v in kwargs.items() if k in rest or k not in config.__dict__ or k == "dtype"}
        if not config.base_config:
            raise ConfigError(
                f"config.json of {source} has no base_config, the configuration of the base; restore the file, or put "
                "the content of the base's own config.json there."
            )
        path, found, structure, config = find_adapter(source, config, **own)
        config, headless = settle_task(config, cls.task, source)
        for name, value in settled_reading(config).items():
            setattr(config, name, value)
        check_prompt(config, cls.task, found, source)
        prompt = read_tensors(path, [n for n in found if n.startswith("prompt.")])
        backbone, absent = _base_of(cls.task, config, backbone, hub | kwargs)
        stored = {n: n for n in found}
        with running(backbone):
            if headless:
                stored = leave_out_head(config, headless, found, backbone, absent, source)
            settle_geometry(config, backbone, structure.get("geometry"))
        found = {n: found[name] for n, name in stored.items()}
        check_prompt(config, cls.task, found, source)
        model: Any = cls(config, backbone)
        try:
            expected = model.adapter_state_dict()
            fresh = _other_head(found, expected, model) if kwargs.get("ignore_mismatched_sizes") else {}
            kept = {n: t for n, t in found.items() if n not in fresh}
            unmet = _unmet_pooler(found, expected) if headless else {}
            check_tensors(kept, {n: t for n, t in expected.items() if n not in fresh | unmet}, source)
            if unknown := sorted(n for n in absent if f"backbone.{n}" not in expected):
                base = config.base_model_name_or_path
                raise BackboneError(f"the base {base!r} has no weights for {unknown[:5]}: it is not the adapter's own.")
            places = {n: stored[n] for n in kept.keys() - prompt.keys()}
            rest = read_tensors(path, places.values())
            model.load_adapter_state_dict(prompt | {n: rest[at] for n, at in places.items()} | fresh | unmet)
            if fresh:
                info["mismatched_keys"] = {(n, found[n].shape, t.shape) for n, t in fresh.items()}
                logger.warning(f"{source}: {', '.join(sorted(fresh))} {_OF_OTHER_LABELS}")
            if given is not None:
                model.load_adapter_state_dict(model.adapter_state_dict(given))
        except BaseException:
            model.unwrap()
            raise
        # a token is no business of copies and pickles
        model.__dict__[SOURCE] = anchored(source), {k: v for k, v in own.items() if k != "token"}
        model.eval()
        if model.can_generate():
            model.generation_config = backbone.generation_config = read_generation(source, backbone, own)
        return (model, info) if with_info else model


def _base_of(
    task: str, config: PTuneConfig, given: PreTrainedModel | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    """The base of an adapter, which may be in memory, and the names of its parameters that its checkpoint lacks."""
    if given is None:
        return load_base(task, config, options)
    check_base(given, config)
    check_read(given)
    tell_settings(given, config)
    return given, set()


def _check_plain(model: Any) -> None:
    """Refuse to write parameters whose names a model that is loaded does not have."""
    modules = model.own_parts() | {"backbone": model.backbone}
    names = model.adapter_parameter_names()
    for place, part in modules.items():
        for path, module in part.named_modules(prefix=place):
            kinds = _made_of_others(module)
            if kinds and any(n.startswith(f"{path}.") and _PARTS.search(n[len(path) :]) for n in names):
                raise AdapterFileError(
                    f"{path} has parameters that are made of others ({', '.join(kinds)}); a model that is loaded has "
                    "plain ones. Make them plain before saving, for which torch.nn.utils has "
                    "parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm and prune.remove."
                )


def _made_of_others(module: nn.Module) -> list[str]:
    """What makes parameters of a module of others, by name: parametrizations, and hooks of torch before these."""
    if is_parametrized(module):
        return sorted(f"parametrization of {n}" for n in module.parametrizations)  # type: ignore[union-attr, arg-type]
    hooks = (type(h) for h in module._forward_pre_hooks.values())
    return sorted(kind.__name__ for kind in hooks if kind.__module__.startswith("torch.nn.utils."))


def _other_head(found: dict[str, Tensor], expected: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Tensors of a model's head that a file has in another shape, as the model has them."""
    head = {f"backbone.{n}" for n in head_names(model.backbone, model.task)} | {"window.weight"}
    return {n: t for n, t in expected.items() if n in head and n in found and found[n].shape != t.shape}


def _unmet_pooler(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a body's pooler that a file lacks, as the body has them: models of its task may have no pooler."""
    return {n: t for n, t in expected.items() if n not in found and POOLER in n.split(".")}
