"""The base under an adapter: what it is, how it is loaded, and what of it belongs to the adapter."""

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import GatedRepoError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from hf_ptune.adapter_file import MODEL_TYPE
from hf_ptune.errors import DEVICE_FAILURES, AdapterFileError, BackboneError, PTuneError, shorten
from hf_ptune.methods import get_method
from hf_ptune.renamed_bodies import mapping_of

logger = hf_logging.get_logger(__name__)
# task -> Auto class that loads the base, names of the classes that do the task, whether a fresh head comes with it
_TABLE: dict[str, tuple[Any, str, bool]] = {
    "SEQ_CLS": (AutoModelForSequenceClassification, "SEQUENCE_CLASSIFICATION", True),
    "TOKEN_CLS": (AutoModelForTokenClassification, "TOKEN_CLASSIFICATION", True),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "QUESTION_ANSWERING", True),
    "MULTIPLE_CHOICE": (AutoModelForMultipleChoice, "MULTIPLE_CHOICE", True),
    "SEQ_2_SEQ_LM": (AutoModelForSeq2SeqLM, "SEQ_TO_SEQ_CAUSAL_LM", False),
    "CAUSAL_LM": (AutoModelForCausalLM, "CAUSAL_LM", False),
    "MASKED_LM": (AutoModelForMaskedLM, "MASKED_LM", False),
    "FEATURE_EXTRACTION": (AutoModel, "", False),
}
TASKS: dict[str, Any] = {task: row[0] for task, row in _TABLE.items()}
_PACKAGE = "package:"
_TEKKEN = "tekken.json"  # Mistral's
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
POOLER = "pooler"  # part of some bases, which those made by masked language modelling alone lack
_HEAD_NAMES = ("classifier", "score", "qa_outputs", "classification_head", "head", POOLER, "sequence_summary")


def task_of(backbone: PreTrainedModel) -> str:
    """Infer the task from a backbone's class.

    Raises:
        BackboneError: the class does none of the known tasks.
    """
    name = type(backbone).__name__
    found = task_of_class(name, backbone.config.is_encoder_decoder)
    if found is None:
        raise BackboneError(
            f"the task of {name} is not known. Load the backbone by an AutoModelFor… class of "
            "sequence or token classification, question answering, multiple choice, masked, causal or seq2seq LM."
        )
    return found


def task_of_class(name: str, is_encoder_decoder: bool) -> str | None:
    """The task of a class of transformers, or `None` where it does none of the known ones.

    Args:
        name: of the class.
        is_encoder_decoder: as its configuration says.
    """
    found = []
    for task, (_, mapping, _) in _TABLE.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        if name in {n for value in names.values() for n in (value if isinstance(value, (list, tuple)) else [value])}:
            found.append(task)
    # some classes are listed as both
    other = "CAUSAL_LM" if is_encoder_decoder else "SEQ_2_SEQ_LM"
    found = [task for task in found if task != other] or found
    if found:
        return found[0]
    suffixes = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForMultipleChoice": "MULTIPLE_CHOICE",
        "ForMaskedLM": "MASKED_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "Model": "FEATURE_EXTRACTION",
    }
    return next((task for suffix, task in suffixes.items() if name.endswith(suffix)), None)


def resolve(base: str) -> str:
    """Find the folder of a base named `package:<module>/<folder>`; other names pass through.

    Raises:
        BackboneError: no package is named, it is not installed, or it has no such folder.
    """
    if not base.startswith(_PACKAGE):
        return base
    module, _, folder = base.removeprefix(_PACKAGE).partition("/")
    if not module.isidentifier():  # finding a module inside another runs the outer one
        raise BackboneError(f"the base {base!r} names no package; expected package:<module>/<folder>.")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(f"the base {base!r} is in the package {module}, which is not installed; install it.")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / folder).resolve()
    if not path.is_relative_to(root) or not path.is_dir():
        raise BackboneError(f"the package {module} has no folder {folder!r}; found {sorted(_folders(root))}.")
    return str(path)


_A_BASE = "; expected a folder with a model and its tokenizer, an id on the Hub, or package:<module>/<folder>."


@contextmanager
def blaming(base: str, cure: str = _A_BASE) -> Iterator[None]:
    """Say of a failure which base it was about; errors of ours, of imports and of the device tell more as they are.

    Args:
        base: its name.
        cure: what the message ends with, unless the Hub wants access to be asked for.

    Raises:
        BackboneError: anything else failed.
    """
    try:
        yield
    except (PTuneError, ImportError):
        raise
    except DEVICE_FAILURES:
        raise
    except Exception as error:  # whatever a family or a file raises, the cure is the same
        if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
            cure = ". Ask for access on its page of the Hub, and log in (hf auth login) or pass token=."
        said = f"{type(error).__name__}: {shorten(error, 600)}"
        if not is_hub_id(base) and not base.startswith(_PACKAGE) and not Path(base).exists():
            said = f"there is no folder {Path(base).absolute()}"
        raise BackboneError(f"the base {base!r} cannot be loaded ({said}){cure}") from error


def check_family(task: str, base: str, config: PreTrainedConfig) -> None:
    """Refuse a base of a family that has no model for a task.

    Args:
        task: a key of `TASKS`.
        base: its name, for messages.
        config: its configuration.

    Raises:
        BackboneError: there is none; it says for which tasks there is one.
    """
    # AutoModel takes every family
    able = [t for t, auto in TASKS.items() if type(config) in auto._model_mapping and t != "FEATURE_EXTRACTION"]
    if task in TASKS and type(config) not in TASKS[task]._model_mapping:
        raise BackboneError(
            f"the base {base!r} is a {config.model_type}, which has no model for {task}; it has one for "
            f"{', '.join(able) or 'no task'}. Name a base of another family, or another task."
        )


def anchored(base: str) -> str:
    """The absolute path of a base that is a local folder; other names pass through.

    A relative one means nothing, or the Hub's model of that name, to whoever loads an adapter elsewhere.
    """
    return str(Path(base).absolute()) if Path(base).is_dir() else base


def place_of(base: str) -> str:
    """One spelling for all names of a base that is on this machine."""
    try:
        path = Path(resolve(base)).expanduser()
    except BackboneError:
        return base  # in a package that is not installed
    return str(path.resolve()) if path.exists() else base


def check_target(folder: str | os.PathLike[str], base: str | None) -> None:
    """Refuse to write an adapter over its own base.

    Args:
        folder: where it is to be written.
        base: folder, id or `package:` name of the base.

    Raises:
        AdapterFileError: it is the base's folder.
    """
    if base is None or place_of(base) != str(Path(folder).resolve()):
        return
    try:  # an output folder may be spelt like a base on the Hub
        found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return
    if found != MODEL_TYPE:
        raise AdapterFileError(
            f"{os.fspath(folder)} is the folder of the base, whose configuration and weights an adapter would "
            "replace. Name another folder."
        )


def _folders(root: Path) -> list[str]:
    return [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("_")]


def is_hub_id(base: str | None) -> bool:
    """Whether a name could be a repository's on the Hub."""
    return base is not None and _HUB_ID.fullmatch(base) is not None and not base.startswith(".")


def read_tokenizer(source: str, revision: str | None = None, **hub: Any) -> Any:
    """The tokenizer beside a base or an adapter.

    Args:
        source: id on the Hub, local folder, or `package:` name.
        revision: a commit or branch of what is on the Hub; the main branch when unset.
        hub: cache_dir, token, local_files_only, subfolder.

    Raises:
        OSError: there is none; transformers makes one without words of a configuration alone.
    """
    folder, hub = resolve(source), {"revision": revision or "main"} | hub
    tokenizer = AutoTokenizer.from_pretrained(folder, **hub)
    # some know their bytes without a file
    if vocabulary := getattr(tokenizer, "vocab_files_names", {}):
        names = list(dict.fromkeys((FULL_TOKENIZER_FILE, *vocabulary.values(), _TEKKEN)))
        if not any(cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **hub) for name in names):
            raise OSError(f"{source} has no vocabulary: none of {', '.join(names)}")
    return tokenizer


def makes(task: str, config: PreTrainedConfig, base_class: str | None) -> bool:
    """Whether the Auto class of a task makes bases of a class.

    Args:
        task: a key of `TASKS`.
        config: the base's configuration.
        base_class: name of the class.
    """
    made = TASKS[task]._model_mapping.get(type(config), ())
    return base_class in {c.__name__ for c in (made if isinstance(made, tuple) else (made,))}


def loader_of(task: str, config: PreTrainedConfig, base_class: str | None = None) -> Any:
    """What makes a base: the Auto class of its task, or its own class of transformers, where that is another one.

    Auto classes know one model of a family for a task, so that an encoder alone, or one that sees, may be none of them.

    Args:
        task: a key of `TASKS`.
        config: the base's configuration.
        base_class: name of its class; what the Auto class makes when unset.
    """
    auto = TASKS[task]
    if base_class is None or makes(task, config, base_class):
        return auto
    own = getattr(transformers, base_class, None)
    fits = (
        isinstance(own, type)
        and issubclass(own, PreTrainedModel)
        and getattr(own, "config_class", None) is type(config)
    )
    return own if fits else auto


def make_backbone(task: str, config: PreTrainedConfig, base_class: str | None = None) -> PreTrainedModel:
    """A base with fresh weights; arguments are those of `loader_of`."""
    loader = loader_of(task, config, base_class)
    made: PreTrainedModel = (loader.from_config if loader is TASKS[task] else loader._from_config)(config)
    return made


def load_backbone(
    task: str, base: str, config: PreTrainedConfig, base_class: str | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, set[str]]:
    """Load the base of an adapter.

    Args:
        task: a key of `TASKS`.
        base: id on the Hub, local folder, or `package:` name.
        config: the base's configuration, labels already set.
        base_class: name of its class; what the Auto class of the task makes when unset.
        kwargs: what `from_pretrained` takes (dtype, device_map, attn_implementation, …).

    Returns:
        The backbone, and the names of its parameters that the checkpoint does not hold, or in another size.
    """
    # a head of another number of labels is no fault: the adapter brings its own
    kwargs.setdefault("ignore_mismatched_sizes", _TABLE[task][2])
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # that a head is new is expected, and the caller is told what is absent
    try:
        loader = loader_of(task, config, base_class)
        kwargs |= {"config": config, "output_loading_info": True}
        backbone, info = loader.from_pretrained(resolve(base), **kwargs)
        if "key_mapping" not in kwargs and (mapping := mapping_of(backbone, info)) is not None:
            del backbone  # two of them may be more than there is room for
            backbone, info = loader.from_pretrained(resolve(base), key_mapping=mapping, **kwargs)
    finally:
        hf_logging.set_verbosity(level)
    other = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    return backbone, set(info["missing_keys"]) | other


def has_head(task: str) -> bool:
    """Whether models of a task have a head of their own, which a fresh base lacks."""
    return bool(_TABLE[task][2])


def head_names(backbone: PreTrainedModel, task: str, further: list[str] | None = None) -> set[str]:
    """Names of the backbone's parameters that an adapter trains and keeps: its task head, and more.

    Args:
        backbone: the task model.
        task: a key of `TASKS`; language models have no head of their own.
        further: names of further modules, as `modules_to_save`.

    Raises:
        BackboneError: a further module is not in the backbone.
    """
    names = {n for n, p in backbone.named_parameters()}
    chosen: set[str] = set()
    if _TABLE[task][2]:
        outside = _outside_the_body(backbone, names)
        tied = set(getattr(backbone, "all_tied_weights_keys", {}) or {})
        chosen = outside - tied or {n for n in names if n.split(".")[0] in _HEAD_NAMES}
    for module in further or []:
        found = {n for n in names if n.startswith(module + ".") or f".{module}." in n}
        if not found:
            raise BackboneError(f"modules_to_save names {module!r}, which {type(backbone).__name__} does not have.")
        chosen |= found
    return chosen


def _outside_the_body(backbone: PreTrainedModel, names: set[str]) -> set[str]:
    prefix = backbone.base_model_prefix + "."
    return {n for n in names if not n.startswith(prefix)} if backbone.base_model is not backbone else set()


def keep_pooler(config: Any, backbone: PreTrainedModel, base: str) -> None:
    """Let an adapter train and save a pooler that its base's checkpoint lacks.

    Args:
        config: of the adapter.
        backbone: the task model, with a fresh pooler.
        base: its name, for the message.
    """
    config.modules_to_save = [*(config.modules_to_save or []), POOLER]
    logger.warning(
        f"the checkpoint of {base} has no pooler, through which a {type(backbone).__name__} reads it: a fresh one is "
        "trained, and saved with the adapter (modules_to_save)."
    )


def has_fresh_pooler(backbone: PreTrainedModel, task: str) -> bool:
    """Whether a loaded backbone reads rows through a pooler that its checkpoint lacked, and that is no part of a head.

    Args:
        backbone: the task model; of one that was made from a configuration nothing is known.
        task: a key of `TASKS`.
    """
    loaded = {n for n, p in backbone.named_parameters() if getattr(p, "_is_hf_initialized", False)}
    parts = {n for n, _ in backbone.named_parameters() if f".{POOLER}." in f".{n}"} - head_names(backbone, task)
    return bool(loaded) and bool(parts) and not parts & loaded


def adapter_names(
    backbone: PreTrainedModel, method: str, task: str, further: list[str] | None = None, whole: bool = False
) -> set[str]:
    """The one predicate: names under the backbone that are trained, counted, saved and reported.

    Args:
        backbone: the task model.
        method: name of the method, which may train parameters of the backbone.
        task: a key of `TASKS`.
        further: names of further modules.
        whole: whether the backbone trains as a whole, as `train_backbone`.

    Raises:
        BackboneError: a further module is not in the backbone, or nothing outside its head of what the method trains.
    """
    chosen = head_names(backbone, task, further)
    if whole:
        chosen |= {n for n, p in backbone.named_parameters() if p.is_floating_point()}
    if (of_base := get_method(method).of_base) is not None:
        named = of_base(backbone)
        # with the head's alone it would be a linear probe
        if not named - _outside_the_body(backbone, named) - head_names(backbone, task):
            raise BackboneError(
                f"{type(backbone).__name__} has nothing outside its head for {method} to train (for bitfit: no bias "
                "terms). Methods that work there: p_tuning_v2, prefix_tuning, p_tuning, prompt_tuning."
            )
        chosen |= named
    return chosen


def count_parameter(parameter: nn.Parameter) -> int:
    """Number of values in a parameter, also where it is partitioned (ZeRO-3) or packed (4 bit)."""
    count = parameter.numel() or int(getattr(parameter, "ds_numel", 0))
    if type(parameter).__name__ == "Params4bit":
        return count * 2 * parameter.element_size()
    return count


def describe(geometry: dict[str, Any]) -> str:
    """Name a geometry's attention in one phrase, for messages."""
    sites = geometry["sites"]
    if not sites:
        return "no attention"
    shapes = sorted({(s["heads"], s["key_dim"], s["value_dim"]) for s in sites})
    return f"{len(sites)} attention layers of (heads, key, value) {shapes}"
