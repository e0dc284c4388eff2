"""A wrapped backbone as a transformers model: one class per task."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import _LazyModule

from hf_ptune.backbone import TASKS, adapter_names, make_backbone
from hf_ptune.backbone_dropout import BackboneDropout
from hf_ptune.batch_share import count_labels, with_share
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.cross_entropy import IGNORED
from hf_ptune.delegation import Delegating
from hf_ptune.errors import ConfigError, InjectionError, PTuneError
from hf_ptune.generation_checks import NOT_PAGED, check_generation, tokens_at_end
from hf_ptune.identity import Owner, blank, specialised
from hf_ptune.injection import (
    Injector,
    ScalarMix,
    bind,
    body_of,
    device_of,
    find_geometry,
    forget_captures,
    keep_unpacked,
    layers_of,
    make_window,
    restore_captures,
    word_embeddings,
)
from hf_ptune.logits_at import run_with_logits_at
from hf_ptune.loss_at_labels import LossAtLabels
from hf_ptune.methods import PromptKind, get_method
from hf_ptune.methods.base import PromptEncoder
from hf_ptune.methods.base import flatten as fold
from hf_ptune.patching import replaces
from hf_ptune.placement import (
    choose_head_states,
    choose_head_window,
    choose_pooling,
    choose_sites,
    choose_start,
    shifts_positions,
)
from hf_ptune.position_tables import row_length, telling_of_positions
from hf_ptune.restoring import Before
from hf_ptune.sharding import in_parts, units_of

_OWNER = "_ptune_owner"


class PTunePreTrainedModel(Delegating):
    """Hold a backbone, a prompt, and the injection between them; the backbone answers every call."""

    config_class = PTuneConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    task: ClassVar[str] = "FEATURE_EXTRACTION"

    def __init__(self, config: PTuneConfig, backbone: PreTrainedModel | None = None) -> None:
        if backbone is None:
            backbone = make_backbone(self.task, config.base, config.base_class)
        config._attn_implementation_internal = backbone.config._attn_implementation
        super().__init__(config)
        self.backbone = backbone
        if self.can_generate():
            self.generation_config = backbone.generation_config
        for name in ("accepts_loss_kwargs", "hf_device_map"):  # the Trainer asks the outermost model for them
            if hasattr(backbone, name):
                setattr(self, name, getattr(backbone, name))
        self.prompt = None
        self.mix = None
        self.window = None
        self._injector = None
        self._loss_at_labels: LossAtLabels | None = None
        self._dropout = BackboneDropout(body_of(backbone), config.backbone_dropout or config.train_backbone)
        # what needs no run of the backbone is refused before it is touched
        adapter_names(backbone, config.method, self.task, config.modules_to_save, whole=config.train_backbone)
        self._adopt(backbone)
        keep_unpacked(backbone)
        self._was_trainable = {n for n, p in backbone.named_parameters() if p.requires_grad}
        self._before = Before(backbone, config, self.task)
        try:
            self._settle(backbone, config)
        except BaseException:
            self._give_back(trained=False)
            raise
        self.__class__ = specialised(type(self), type(backbone))

    def _settle(self, backbone: PreTrainedModel, config: PTuneConfig) -> None:
        """Choose what the configuration leaves open, and put the hooks and the prompt on the backbone."""
        self._loss_at_labels = self._watched_head()
        method = get_method(config.method)
        if fresh := not config.geometry:
            config.geometry = find_geometry(backbone)
        config.prompt_tuning_init = choose_start(config)
        config.pooling = choose_pooling(config, backbone, self.task)
        config.head_states = choose_head_states(config, backbone, self.task, fresh)
        config.head_window = choose_head_window(config, backbone, self.task, fresh)
        if method.kind is not None:
            self._build_prompt(method.kind)
        self.post_init()
        config.follow(backbone)
        layers = getattr(self, "_no_split_modules", None) or ()
        self._no_split_modules = units_of(self, layers, word_embeddings(backbone))
        self.freeze_backbone()
        self._dropout.follow(backbone.training)
        self.training = backbone.training
        for part in self.own_parts().values():
            part.train(backbone.training)

    def init_weights(self) -> None:
        """Leave the loaded backbone alone: transformers would initialise layers that it did not load itself."""

    def _adopt(self, backbone: PreTrainedModel) -> None:
        owner = backbone.__dict__.get(_OWNER)
        previous = owner() if owner is not None else None
        if previous is not None and previous.backbone is backbone:
            if previous._injector is not None:
                warnings.warn(
                    "the backbone had a prompt already; the new one takes its place and the old wrapper stops working.",
                    stacklevel=4,
                )
            previous.unwrap()
        backbone.__dict__[_OWNER] = Owner(self)

    def _build_prompt(self, kind: PromptKind) -> None:
        config = self.config
        if config.places_tokens and config.virtual_token_ids is None:
            raise ConfigError(
                "the template places virtual tokens, but virtual_token_ids are not set; wrap the backbone by "
                "get_ptune_model(backbone, config, tokenizer)."
            )
        chosen = choose_sites(config, kind, self.task)
        embed = word_embeddings(self.backbone)
        device = device_of(self.backbone if embed is None else embed)
        # in full precision beside a half-precision base: updates would be lost below its resolution
        dtype = torch.float64 if self.backbone.dtype == torch.float64 else torch.float32
        self.prompt = config.make_encoder(chosen).to(device=device, dtype=dtype)
        if config.head_states == "mix":
            self.mix = ScalarMix(layers_of(body_of(self.backbone))).to(device=device, dtype=dtype)
        if config.head_window == "neighbours":
            self.window = make_window(self.backbone, self.task).to(dtype=dtype)
        self._injector = self._attached(self.prompt)

    def _attached(self, prompt: PromptEncoder) -> Injector:
        config = self.config
        return Injector(
            self.backbone,
            config.geometry,
            prompt,
            self._encode,
            config.num_virtual_tokens,
            choose_sites(config, prompt.kind, self.task),
            shifts_positions(self.backbone, config),
            config.virtual_token_ids,
            config.pooling == "mean",
            self.mix,
            self.window,
        )

    def _watched_head(self) -> LossAtLabels | None:
        return LossAtLabels(self, self.backbone, self.task) if self.config.loss_at_labels else None

    def _reattach(self) -> None:
        """Let go of embeddings and a projection that have been replaced, and hold those that have come."""
        before = self._injector
        if before is None and self.prompt is not None:
            return  # unwrapped
        self._release()
        self._dropout.follow(self.backbone.training)
        self._loss_at_labels = self._watched_head()
        if before is None or self.prompt is None:
            return
        self._injector = self._attached(self.prompt)
        self._injector.enabled = before.enabled

    def _encode(self) -> Tensor:
        assert self.prompt is not None
        # few rows, whose weights are in full precision on purpose; and no LSTM runs in bfloat16 on every device
        with torch.autocast(device_of(self.prompt).type, enabled=False):
            encoded: Tensor = self.prompt()
        if self.config.prefix_dropout and self.prompt.training:
            encoded = nn.functional.dropout(encoded, self.config.prefix_dropout)
        return encoded

    @property
    def architecture(self) -> str:
        """Name of the class that loads it, whatever it has been specialised to."""
        return CLASSES[self.task].__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        forget_captures(self.backbone)
        # its class was made for the backbone's, and stands in no module
        return blank, (type(self).__mro__[1], type(self.backbone)), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_modules" in vars(self.backbone):  # one that is copied by itself has its parts only later
            restore_captures(self.backbone)
        self.backbone.__dict__[_OWNER] = Owner(self)
        self.config.follow(self.backbone)

    def train(self, mode: bool = True) -> "PTunePreTrainedModel":
        if self._injector is not None:
            self._injector.kept.forget()  # engines write parameters unseen by torch's count of changes
        self._dropout.follow(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_is_replica", False):
            raise PTuneError("torch.nn.DataParallel is not supported; start one process per device: accelerate launch.")
        self._check_holding()
        self._check_tracing()
        items = kwargs.get("num_items_in_batch")
        count = None if items is None else count_labels(kwargs, self.task == "CAUSAL_LM")
        if isinstance(labels := kwargs.get("labels"), Tensor):
            kwargs["labels"] = self.labels_of_words(labels)
        with telling_of_positions(self, lambda: row_length(args, kwargs)):
            if count is None or items is None:
                return self._answer(args, kwargs)
            del kwargs["num_items_in_batch"]
            return with_share(self._answer(args, kwargs), count, items)

    def _check_holding(self) -> None:
        if self.prompt is not None and self._injector is None:
            raise PTuneError("this wrapper no longer holds its backbone: it was unwrapped, or wrapped anew.")

    def _check_tracing(self) -> None:
        if torch.jit.is_tracing() and self._injector is not None and self._injector.enabled:  # type: ignore[attr-defined]
            raise InjectionError(
                "torch.jit.trace cannot record a prompt, which meets each batch by the sizes of that batch; use "
                "torch.export.export, or trace without the prompt: with model.disable_adapter()."
            )

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (places := kwargs.pop("logits_at", None)) is not None:
            return run_with_logits_at(self.backbone, self.task, places, bind(self.backbone, args, kwargs))
        if self._loss_at_labels is not None and (output := self._loss_at_labels(args, kwargs)) is not None:
            return output
        return self.backbone(*args, **kwargs)

    def labels_of_words(self, labels: Tensor) -> Tensor:
        """Labels without the virtual tokens that a causal model's template placed: they are no words to be told."""
        if not self.config.places_tokens or self.task != "CAUSAL_LM":
            return labels
        placed = torch.tensor(self.config.virtual_token_ids, device=labels.device)
        return labels.masked_fill(torch.isin(labels, placed), IGNORED)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let the backbone answer as if it had no prompt; trained heads and biases stay.

        What heads read beside their own input (a mix of layers, neighbours) belongs to the prompt, and goes with it.
        """
        injector = self._injector
        if injector is None:
            yield
            return
        before, injector.enabled = injector.enabled, False
        try:
            yield
        finally:
            if self._injector is not None:  # another one where it was attached anew
                self._injector.enabled = before

    def unwrap(self) -> PreTrainedModel:
        """Give the backbone back as it was before it was wrapped, with the head that has been trained.

        BitFit's biases are those of before, too; what the head read beside its own input (a mix of layers, neighbours)
        it reads no more; modules of `modules_to_save`, and a base that was trained along, stay
        as they have been trained.
        """
        return self._give_back(trained=True)

    def _give_back(self, trained: bool) -> PreTrainedModel:
        owner = self.backbone.__dict__.get(_OWNER)
        if owner is None or owner() not in (self, None):  # None: the wrapper of a pickle, which knows no owner
            return self.backbone  # unwrapped already, or another wrapper's by now
        self._release()
        self._before.put_back(self.backbone, trained)
        forget_captures(self.backbone)
        self.backbone.__dict__.pop(_OWNER, None)
        for name, parameter in self.backbone.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name in self._was_trainable)
        return self.backbone

    def _release(self) -> None:
        """Take every hook off the backbone, and give it its dropout back."""
        self._dropout.follow(False)
        if self._injector is not None:
            self._injector.detach()
            self._injector = None
        if self._loss_at_labels is not None:
            self._loss_at_labels.detach()
            self._loss_at_labels = None

    def flatten(self) -> "PTunePreTrainedModel":
        """Fold the reparameterisation into the prompt, in place; outputs stay the same, training it does not."""
        if self.prompt is not None and not self.config.flattened:
            self._check_holding()
            self.prompt = fold(self.prompt).train(self.prompt.training)
            self.config.flattened = True
            self._reattach()
        return self


class _Generating(PTunePreTrainedModel, GenerationMixin):
    """Tasks that generate: the backbone does, with its own cache and inputs."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._check_holding()
        self.backbone.generation_config = self.generation_config
        check_generation(self, args, kwargs)
        if in_parts(self):
            kwargs["synced_gpus"] = True  # transformers sees ZeRO-3 and its own FSDP2, not accelerate's
        with telling_of_positions(self, lambda: tokens_at_end(self, args, kwargs)):
            return self.backbone.generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self.prompt is None:
            return self.backbone.init_continuous_batching(*args, **kwargs)
        raise InjectionError(f"{NOT_PAGED}.")

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.prepare_inputs_for_generation(*args, **kwargs)


class PTuneModel(PTunePreTrainedModel):
    """Return a prompted backbone's hidden states; of an adapter of another task, whose head is left out, too."""


class PTuneForCausalLM(_Generating, GenerationMixin):
    """Model text from left to right with a prompted decoder."""

    task = "CAUSAL_LM"


class PTuneForSeq2SeqLM(_Generating, GenerationMixin):
    """Turn text into text with a prompted encoder-decoder."""

    task = "SEQ_2_SEQ_LM"

    @property
    def prepare_decoder_input_ids_from_labels(self) -> Any:
        """The backbone's own, where it has one: collators make the decoder's inputs by it."""
        return self.backbone.prepare_decoder_input_ids_from_labels


class PTuneForMaskedLM(PTunePreTrainedModel):
    """Fill masks with a prompted encoder."""

    task = "MASKED_LM"


class PTuneForSequenceClassification(PTunePreTrainedModel):
    """Classify sequences with a prompted backbone and its head."""

    task = "SEQ_CLS"


class PTuneForTokenClassification(PTunePreTrainedModel):
    """Tag tokens with a prompted backbone and its head."""

    task = "TOKEN_CLS"


class PTuneForQuestionAnswering(PTunePreTrainedModel):
    """Extract answers with a prompted backbone and its head."""

    task = "QUESTION_ANS"


class PTuneForMultipleChoice(PTunePreTrainedModel):
    """Choose among answers with a prompted backbone and its head."""

    task = "MULTIPLE_CHOICE"


CLASSES: dict[str, type[PTunePreTrainedModel]] = {
    c.task: c
    for c in (
        PTuneModel,
        PTuneForCausalLM,
        PTuneForSeq2SeqLM,
        PTuneForMaskedLM,
        PTuneForSequenceClassification,
        PTuneForTokenClassification,
        PTuneForQuestionAnswering,
        PTuneForMultipleChoice,
    )
}
_NAMED = {c.__name__: c for c in CLASSES.values()}


# `transformers serve` and `chat` ask transformers for the class that config.json names under `architectures`; it is on
# their class that modules of that name meet, of which direct_transformers_import makes several
@replaces(_LazyModule, "__getattr__", when=lambda module: vars(module).get("__name__") == "transformers")
def _look_up(module: Any, original: Any, name: str) -> Any:
    return _NAMED[name] if name in _NAMED else original(name)


for _task, _auto_class in TASKS.items():
    _auto_class.register(PTuneConfig, CLASSES[_task], exist_ok=True)
# the Trainer shifts the labels that it smooths for classes of this list alone
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(PTuneConfig.model_type, PTuneForCausalLM.__name__)
