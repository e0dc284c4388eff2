"""The configuration of an adapter: the method, its options, and the base it belongs to."""

import copy
import functools
import os
from dataclasses import field
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from hf_ptune.adapter_file import MODEL_TYPE
from hf_ptune.base_settings import Live, tell, tell_labels
from hf_ptune.config_checks import check_counts, without
from hf_ptune.errors import AdapterFileError, ConfigError, PTuneError, shorten
from hf_ptune.methods import PromptKind, get_method
from hf_ptune.methods.base import EncoderSpec, PromptEncoder, SiteShape, direct_prompt
from hf_ptune.option_checks import check_options
from hf_ptune.templates import Template

# what an adapter's tensors, and what they do to outputs, follow from; kept beside the tensors too
STRUCTURE = (
    "method",
    "num_virtual_tokens",
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
    "layers",
    "sites",
    "flattened",
    "task",
    "modules_to_save",
    "train_backbone",
    "template",
    "virtual_token_ids",
    "position_shift",
    "pooling",
    "head_states",
    "head_window",
)
# how a base is run, and by whose code, is up to whoever loads it
_UP_TO_THE_LOADER = {
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
}
_INNER = ("_base", "_live")
_NOT_OF_A_BASE = _UP_TO_THE_LOADER | {"auto_map", "custom_pipelines", "quantization_config", "transformers_weights"}
# answered by the base's own configuration, so that scripts and pipelines see what they would see there
_FROM_BASE = (
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "output_hidden_states",
    "return_dict",
)


def _in_our_words(made: type["PTuneConfig"]) -> type["PTuneConfig"]:
    """Let the constructor raise an error of this package for fields of a wrong type, which `strict` checks."""
    init = made.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ConfigError(shorten(error)) from error

    made.__init__ = __init__  # type: ignore[method-assign]
    return made


@_in_our_words
@strict(accept_kwargs=True)
class PTuneConfig(PreTrainedConfig):
    """Describe an adapter: method, options, and the base it was trained on.

    Args:
        method: "prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2" or "bitfit".
        num_virtual_tokens: P, number of virtual tokens, at least 1; BitFit ignores it, and a template that places
            them sets it.
        template: text that a row is read through, e.g. "[P3] {sentence} [P3] [MASK] [P2]": `[Pn]` places n of the
            virtual tokens of prompt_tuning and p_tuning (P-Tuning, Liu et al. 2021, section 3.1), `{field}` a field
            of the row, `[MASK]` the word to predict. One without `[Pn]` is words alone, for every method.
        verbalizer: label to the word, or words, that stand for it at the mask.
        prompt_tuning_init: "RANDOM" (with the deviation of the backbone's own embeddings, or with deviation 1 where
            the module that holds these normalises them, as in BERT and its kin; prefixes with mean and deviation of
            each channel of its own keys and values; behind the networks of P-Tuning and Prefix Tuning as these
            initialise themselves), "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS", "ZERO" or "ADAPTER" (where another adapter
            of the same base ended; Vu et al. 2022, SPoT). A prefix takes the backbone's keys and values of the named
            tokens. "AUTO": sampled words in decoders, where what is drawn at random, many layers deep, drowns the
            text; at random elsewhere, and behind the networks of P-Tuning. `get_ptune_model` makes it one of the
            others.
        prompt_tuning_init_text: the text of "TEXT".
        prompt_tuning_init_adapter: folder or Hub id of "ADAPTER"; read once, when the base is wrapped.
        prompt_tuning_init_head: whether "ADAPTER" brings its head and other modules too; the labels must be the same.
        encoder_reparameterization_type: "MLP" or "LSTM"; P-Tuning only.
        encoder_hidden_size: width inside the reparameterisation; the embedding width when unset.
        encoder_num_layers: LSTM layers; P-Tuning only.
        encoder_dropout: dropout inside the MLP of Prefix Tuning, or between the layers of P-Tuning's LSTM; nothing
            else reads it. 0 or more, less than 1.
        prefix_dropout: dropout on the encoded prompt while training; 0 or more, less than 1.
        layers: numbers of the layers that take a prefix, counted over those that have attention, for each kind of
            site by itself; negative ones from the end of the kind that has most. All when unset.
        sites: attention sites of an encoder-decoder that take a prefix, of "encoder", "decoder", "cross"; all when
            unset.
        position_shift: whether own tokens stand after the virtual ones in the position count. Unset: yes in
            causal models that take `position_ids`, no in encoders, so that their full length stays usable.
        pooling: what an encoder's head reads in classification and multiple choice: "cls", what it reads by itself,
            the state of the first token as a rule; "mean", the mean of the row's own tokens in its place. "auto": the
            mean in encoders that normalise their embeddings, as BERT and its kin do. Unset: "auto" for prompts among
            the inputs, "cls" beside a prefix. "auto" and unset: what an adapter has that brings its head.
            `get_ptune_model` makes it one of the first two. The papers read the first token.
        head_states: what heads over the tokens of an encoder (tagging, extractive QA) read, and what `pooling="mean"`
            takes its mean of: "last", its last states; "mix", a trained mix of the states of all its layers (Peters et
            al. 2018, section 3.2), which becomes part of the adapter. "auto": the mix for tagging with encoders whose
            layers have states of like size, as where each is normalised (BERT and its kin). "auto_pairs": the same,
            and there under the mean too, for rows of two texts. Unset: "last", as in the papers. An adapter that brings
            its head brings this too. `get_ptune_model` makes it one of the first two.
        head_window: what such a head reads of a row, in encoders and decoders: "token", the state of the token alone;
            "neighbours", those of the tokens before and after it too (window approach, Collobert et al. 2011, section
            3.3.1), by weights that start from zero and become part of the adapter. "auto": the neighbours where the
            head is one linear layer over each token. Unset: "token", as in the papers. An adapter that brings its
            head brings this too. `get_ptune_model` makes it one of the first two.
        backbone_dropout: whether a frozen backbone keeps its dropout while the prompt trains, as in the papers'
            scripts; heads keep theirs, and so does a backbone that trains along. Recipes of up to five epochs
            take it out: a prompt moves faster without it, and later fits its rows too well.
        loss_at_labels: whether language models compute logits only where a label counts while they train; loss
            and gradients stay the same. Logits that somebody asks for all the same cost a second forward pass.
        modules_to_save: further modules of the backbone that are trained and saved; a task's head always is.
        train_backbone: whether the whole backbone trains along, as in the paper's SuperGLUE runs (P-Tuning, Liu et
            al. 2021, section 4.2). It is part of the adapter then, and saved with it.
        flattened: whether the reparameterisation has been folded into the prompt.
        virtual_token_ids: ids of the template's virtual tokens in the tokenizer; `get_ptune_model` sets them.
        task: what the base does, a key of `hf_ptune.backbone.TASKS`; `get_ptune_model` sets it.
        base_model_name_or_path: id on the Hub, local folder, or `package:<module>/<folder>` of the base, which
            `from_pretrained` loads; what the wrapped base was loaded from when unset.
        base_model_revision: commit or branch of a base on the Hub; the commit that has the wrapped base's weights when
            unset.
        base_class: name of the base's class, which may be another one than the Auto class of its task makes;
            `get_ptune_model` sets it.
        base_config: the base's own configuration, as a dictionary; `get_ptune_model` sets it.
        geometry: where and how the base attends, as `find_geometry` saw it; set when a base is wrapped or loaded.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {}

    method: str = "p_tuning_v2"
    num_virtual_tokens: int = 20
    prompt_tuning_init: str = "AUTO"
    prompt_tuning_init_text: str | None = None
    prompt_tuning_init_adapter: str | None = None
    prompt_tuning_init_head: bool = False
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    prefix_dropout: float = 0.0
    layers: list[int] | None = None
    sites: list[str] | None = None
    position_shift: bool | None = None
    pooling: str | None = None
    head_states: str | None = None
    head_window: str | None = None
    backbone_dropout: bool = True
    loss_at_labels: bool = True
    modules_to_save: list[str] | None = None
    train_backbone: bool = False
    template: str | None = None
    verbalizer: dict[str, Any] | None = None
    virtual_token_ids: list[int] | None = None
    flattened: bool = False
    task: str | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_class: str | None = None
    base_config: dict[str, Any] = field(default_factory=dict)
    geometry: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.prompt_tuning_init = str(self.prompt_tuning_init).upper()
        self.encoder_reparameterization_type = str(self.encoder_reparameterization_type).upper()
        if self.verbalizer is not None:
            self.verbalizer = {k: [v] if isinstance(v, str) else v for k, v in self.verbalizer.items()}
        if self.places_tokens and self.num_virtual_tokens == type(self).num_virtual_tokens:
            self.num_virtual_tokens = Template.parse(str(self.template)).num_virtual_tokens
        check_options(self)
        self._mirror_base(as_named=True)

    @property
    def places_tokens(self) -> bool:
        """Whether virtual tokens stand where the template has them."""
        return self.template is not None and Template.parse(self.template).num_virtual_tokens > 0

    @property
    def over_decoder(self) -> bool:
        """Whether the base, once it has been wrapped, is a decoder: its tokens attend to none behind them."""
        return bool(self.geometry.get("causal")) and not self.is_encoder_decoder

    def _mirror_base(self, as_named: bool = False) -> None:
        # the base's own object, made anew from its dictionary: sharing a live one unsets its attention
        if not self.base_config:
            object.__setattr__(self, "_base", None)
            return
        settings = without(self.base_config, _NOT_OF_A_BASE)
        model_type = settings.pop("model_type", "")
        if model_type == self.model_type or model_type not in CONFIG_MAPPING:
            raise ConfigError(
                f"base_config has model_type={model_type!r}, which this version of transformers does not know; "
                "install the version the adapter was trained with."
            )
        base = CONFIG_MAPPING[model_type].from_dict(settings)
        if as_named:
            tell_labels(base, self, self.task)
        object.__setattr__(self, "_base", base)
        for name in _FROM_BASE:
            setattr(self, name, getattr(base, name))
        # a wrapper ties nothing by itself; scripts ask it what its base ties, and some bases do not say
        self.tie_word_embeddings = getattr(base, "tie_word_embeddings", False)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            kwargs: options of loading.

        Returns:
            What the file says, and the options that were not used.

        Raises:
            AdapterFileError: a folder without a config.json that can be read.
            ConfigError: it describes something else.
        """
        source = os.fspath(pretrained_model_name_or_path)
        try:
            settings, rest = super().get_config_dict(source, **kwargs)
        except Exception as error:  # whatever the reader raises, the cure is the same
            if not os.path.isdir(source):
                raise  # the Hub's own errors tell more
            raise AdapterFileError(
                f"{source} has no config.json that can be read ({shorten(error)}); expected an adapter that "
                "save_pretrained wrote."
            ) from error
        if not settings:
            raise AdapterFileError(
                f"{source} has no config.json, or an empty one; expected what save_pretrained wrote."
            )
        if not isinstance(settings, dict) or settings.get("model_type") != cls.model_type:
            found = settings.get("model_type") if isinstance(settings, dict) else type(settings).__name__
            raise ConfigError(
                f"config.json of {source} has model_type={found!r}, expected {cls.model_type!r}: it describes no "
                "adapter of this package. Load it by an Auto class of transformers."
            )
        return settings, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of what config.json says.

        Args:
            config_dict: its fields.
            kwargs: options of whoever loads it, which come first.

        Raises:
            ConfigError: fields of a wrong type or out of range, or a base that is not known.
        """
        try:
            settings = without(config_dict, _UP_TO_THE_LOADER)
            check_counts(settings)
            return super().from_dict(settings, **kwargs)
        except Exception as error:  # whatever a field raises that holds something else
            if isinstance(error, PTuneError) and not isinstance(error.__cause__, StrictDataclassError):
                raise
            names = sorted({*kwargs} - {"return_unused_kwargs", "name_or_path"})
            given = f", or correct what was given besides: {', '.join(names)}" if names else ""
            raise ConfigError(
                f"the configuration describes no adapter ({shorten(error)}); restore config.json, or save anew{given}."
            ) from error

    def structure(self) -> dict[str, Any]:
        """The fields that the adapter's tensors, and what they do to outputs, follow from."""
        return {name: getattr(self, name) for name in STRUCTURE}

    def with_structure(self, structure: dict[str, Any]) -> "PTuneConfig":
        """The same configuration with the structure of given tensors.

        Args:
            structure: what is kept beside them; names that are not known are ignored.

        Raises:
            ConfigError: values of a wrong type or out of range.
        """
        differ = {n: structure[n] for n in STRUCTURE if n in structure and structure[n] != getattr(self, n)}
        if not differ:
            return self
        settled = copy.deepcopy(self)
        try:
            for name, value in differ.items():
                setattr(settled, name, value)
        except Exception as error:  # the strict fields' own, of several kinds
            raise ConfigError(
                f"the weights' metadata describes no adapter ({shorten(error)}); fetch them again."
            ) from error
        check_options(settled)
        return settled

    def make_encoder(self, chosen: list[dict[str, Any]]) -> PromptEncoder:
        """Build the prompt that this configuration describes, flattened or as its method has it.

        Args:
            chosen: the sites of the geometry that take a prompt.
        """
        method = get_method(self.method)
        assert method.kind is not None and method.build is not None
        spec = EncoderSpec(
            num_virtual_tokens=self.num_virtual_tokens,
            embedding_dim=self.geometry["embedding_dim"],
            prefix_width=sum(SiteShape(s["heads"], s["key_dim"], s["value_dim"]).width for s in chosen),
            encoder_hidden_size=self.encoder_hidden_size,
            encoder_reparameterization_type=self.encoder_reparameterization_type,
            encoder_num_layers=self.encoder_num_layers,
            encoder_dropout=self.encoder_dropout,
        )
        if not self.flattened:
            return method.build(spec)
        width = spec.embedding_dim if method.kind is PromptKind.EMBEDDINGS else spec.prefix_width
        return direct_prompt(method.kind, spec.num_virtual_tokens, width)

    def set_base(self, base: PreTrainedConfig, dtype: torch.dtype | None = None) -> None:
        """Take over the configuration of a loaded base, with the precision that its weights have by now."""
        self.base_config = base.to_dict()
        # how a base is loaded is up to whoever loads it
        quantized = self.base_config.pop("quantization_config", None) is not None
        if dtype is not None and not quantized:
            self.base_config["dtype"] = str(dtype).removeprefix("torch.")
        self._mirror_base()

    def follow(self, backbone: Any) -> None:
        """Let a wrapped backbone's configuration have what is written here from now on, as scripts and trainers do."""
        object.__setattr__(self, "_live", Live(backbone))

    def __copy__(self) -> "PTuneConfig":
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        if (base := self.__dict__.get("_base")) is not None:
            made.__dict__["_base"] = copy.copy(base)  # it is written with the configuration
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        live: Live | None = self.__dict__.get("_live")
        # the copy too: a base is loaded as it says
        for base in (None if live is None else live.config, self.__dict__.get("_base")):
            tell(base, name, value, set(PTuneConfig.__annotations__))

    @property
    def base(self) -> PreTrainedConfig:
        """The base's configuration, a copy of the one its model holds."""
        base: PreTrainedConfig | None = self.__dict__.get("_base")
        if base is None:
            raise ConfigError("this configuration names no base yet; get_ptune_model(backbone, config) sets it.")
        return base

    @property
    def label_names(self) -> list[str]:
        """Names of the labels in order of their numbers, which is not the order that a file has them in."""
        return [name for _, name in sorted((self.id2label or {}).items())]

    def _known_base(self) -> PreTrainedConfig | None:
        """The configuration of the wrapped backbone, which scripts may change; else the copy of it, if there is one."""
        live: Live | None = self.__dict__.get("_live")
        found = None if live is None else live.config
        return self.__dict__.get("_base") if found is None else found

    def __getattr__(self, name: str) -> Any:
        base = self._known_base()
        if name == "auto_map":
            return {}  # no code of its own, as loaders ask
        if base is None or name.startswith("_") or name in _NOT_OF_A_BASE or name == "tokenizer_class":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            return getattr(base, name)
        except RuntimeError as error:  # differs by layer, so that the base has no one answer either
            raise AttributeError(str(error)) from error

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        base = self._known_base()
        return self if base is None else base.get_text_config(decoder=decoder, encoder=encoder)

    # the base's own checks ran when its configuration was made
    def validate_output_attentions(self) -> None: ...

    def validate_architecture(self) -> None: ...

    def validate_token_ids(self) -> None: ...

    def validate_layer_type(self) -> None: ...

    def _get_generation_parameters(self) -> dict[str, Any]:
        # the base's are its generation config's business, and would be refused here
        return {}

    def to_dict(self) -> dict[str, Any]:
        settings: dict[str, Any] = super().to_dict()
        if (base := self.__dict__.get("_base")) is not None:
            settings["base_config"] |= {n: v for n, v in base.to_dict().items() if n in settings["base_config"]}
        return {k: v for k, v in settings.items() if k not in _INNER}

    def to_diff_dict(self) -> dict[str, Any]:
        settings: dict[str, Any] = super().to_diff_dict()
        return {k: v for k, v in settings.items() if k not in _INNER}


AutoConfig.register(PTuneConfig.model_type, PTuneConfig, exist_ok=True)
