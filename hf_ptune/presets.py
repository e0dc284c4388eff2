"""The named settings that the papers' authors published."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_ptune.defaults import list_defaults
from hf_ptune.errors import RecipeError
from hf_ptune.templates import Template


@dataclass(frozen=True)
class Preset:
    """Hold a setting that a paper's authors published.

    Args:
        name: method, task and model, as in `p_tuning_v2/rte/roberta-large`.
        method: a method of PTuneConfig.
        base: the base's id on the Hub.
        options: fields of PTuneConfig.
        training: fields of TrainingArguments.
        source: the file or paper it was read in.
        max_length: tokens that a row is cut to; `None` where the source does not say.
        backbone_learning_rate: of a base that is trained too.
        learning_rate_decay: factor by which the rate falls with every epoch.
        note: what of the source cannot be said here.
    """

    name: str
    method: str
    base: str
    options: dict[str, Any]
    training: dict[str, Any]
    source: str
    max_length: int | None = None
    backbone_learning_rate: float | None = None
    learning_rate_decay: float | None = None
    note: str = ""

    def line(self) -> str:
        """The preset on one line."""
        training = self.training
        length = training["max_steps"] if "max_steps" in training else training["num_train_epochs"]
        unit = "steps" if "max_steps" in training else "epochs"
        batch = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
        base = self.backbone_learning_rate
        decay = self.learning_rate_decay
        trained = "" if base is None else f"the base is trained too, at {base:g}"
        falls = "" if decay is None else f"times {decay:g} after every epoch"
        notes = "; ".join(filter(None, (trained, falls, self.note)))
        note = f" ({notes})" if notes else ""
        return (
            f"{self.name:42} learning rate {training['learning_rate']:<7g} tokens "
            f"{self.options['num_virtual_tokens']:<4} batch {batch:<3} {unit} {length:<6g} {self.source}{note}"
        )


_ADAMW: dict[str, Any] = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0}

_P_TUNING_V2 = "THUDM/P-tuning-v2, run_script"
_MODELS = {"bert-large": "bert-large-cased"}  # others have the Hub's own name
_AS_PUBLISHED = {"pooling": "cls", "head_states": "last", "head_window": "token", "backbone_dropout": True}
_TAGS = ("conll03", "conll04", "ontonotes", "conll05", "conll12", "squad", "squad_v2")  # and answers
# task, model -> learning rate, tokens, batch, epochs, dropout, max_length, note
_P_TUNING_V2_RUNS: dict[tuple[str, str], tuple[float, int, int, int, float, int, str]] = {
    ("boolq", "bert-large"): (5e-3, 40, 32, 100, 0.1, 128, ""),
    ("boolq", "roberta-large"): (7e-3, 8, 32, 100, 0.1, 128, ""),
    ("copa", "bert-large"): (1e-2, 16, 16, 80, 0.1, 128, ""),
    ("copa", "roberta-large"): (9e-3, 8, 16, 120, 0.1, 128, ""),
    ("rte", "bert-large"): (1e-2, 20, 32, 60, 0.1, 128, ""),
    ("rte", "roberta-large"): (5e-3, 128, 32, 100, 0.1, 128, ""),
    ("wic", "bert-large"): (1e-4, 20, 16, 80, 0.1, 128, "behind an MLP; the source's template 1"),
    ("wic", "roberta-large"): (1e-2, 8, 32, 50, 0.1, 128, ""),
    ("wsc", "bert-large"): (5e-3, 20, 16, 80, 0.1, 128, ""),
    ("wsc", "roberta-large"): (1e-2, 8, 16, 10, 0.1, 128, ""),
    ("conll03", "roberta-large"): (3e-2, 11, 16, 30, 0.1, 152, ""),
    ("conll04", "bert-large-uncased"): (2e-2, 128, 32, 40, 0.2, 128, ""),
    ("conll04", "roberta-large"): (6e-2, 144, 32, 80, 0.1, 128, ""),
    ("ontonotes", "bert-large-uncased"): (1e-2, 16, 16, 30, 0.1, 128, ""),
    ("ontonotes", "roberta-large"): (7e-3, 48, 16, 60, 0.1, 128, ""),
    ("conll05", "roberta-large"): (6e-3, 224, 16, 15, 0.1, 128, ""),
    ("conll12", "roberta-large"): (5e-3, 64, 32, 45, 0.1, 128, ""),
    ("squad", "roberta-large"): (5e-3, 16, 8, 30, 0.2, 384, "stride 128"),
    ("squad_v2", "roberta-large"): (5e-3, 8, 8, 10, 0.2, 384, "stride 128"),
}
# task, model -> base, learning rate, tokens, batch, accumulation, epochs, width of the MLP
_PREFIX_RUNS: dict[tuple[str, str], tuple[str, float, int, int, int, int, int]] = {
    ("e2e", "gpt2-medium"): ("gpt2-medium", 5e-5, 10, 10, 1, 5, 512),
    ("dart", "gpt2-medium"): ("gpt2-medium", 5e-5, 10, 10, 1, 5, 512),
    ("webnlg", "gpt2-medium"): ("gpt2-medium", 5e-5, 5, 5, 1, 5, 512),
    ("xsum", "bart-large"): ("facebook/bart-large", 5e-5, 200, 16, 3, 30, 800),
}
# task -> learning rate of the prompt, steps, warm-up steps, batch, max_length
_FEW_SHOT_RUNS: dict[str, tuple[float, int, int, int, int]] = {
    "boolq": (1e-4, 250, 0, 2, 256),
    "cb": (1e-5, 250, 0, 2, 256),
    "copa": (1e-5, 3500, 0, 16, 96),
    "multirc": (1e-4, 250, 0, 2, 512),
    "rte": (1e-4, 3500, 150, 2, 256),
    "wic": (1e-5, 3500, 0, 2, 256),
    "wsc": (1e-4, 3500, 0, 16, 128),
}
_T5_SIZES = ("small", "base", "large", "xl", "xxl")


def _p_tuning_v2() -> list[Preset]:
    presets = []
    for (task, model), (rate, tokens, batch, epochs, dropout, length, note) in _P_TUNING_V2_RUNS.items():
        behind_mlp = (task, model) == ("wic", "bert-large")
        options = {
            "num_virtual_tokens": tokens,
            "prompt_tuning_init": "RANDOM",
            "prefix_dropout": dropout,
        } | _AS_PUBLISHED
        training = {"learning_rate": rate, "per_device_train_batch_size": batch, "num_train_epochs": float(epochs)}
        falls = task in _TAGS
        presets.append(
            Preset(
                f"p_tuning_v2/{task}/{model}",
                "prefix_tuning" if behind_mlp else "p_tuning_v2",
                _MODELS.get(model, model),
                options | ({"encoder_hidden_size": 512} if behind_mlp else {}),
                training | _ADAMW | ({"lr_scheduler_type": "constant"} if falls else {}),
                _P_TUNING_V2,
                length,
                learning_rate_decay=0.95 if falls else None,
                note=note,
            )
        )
    return presets


def _prefix_tuning() -> list[Preset]:
    presets = []
    for (task, model), (base, rate, tokens, batch, accumulation, epochs, width) in _PREFIX_RUNS.items():
        training = {
            "learning_rate": rate,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": float(epochs),
        }
        options = {"num_virtual_tokens": tokens, "prompt_tuning_init": "RANDOM", "encoder_hidden_size": width}
        options |= _AS_PUBLISHED
        source = "XiangLi1999/PrefixTuning, README and defaults of the training scripts"
        name = f"prefix_tuning/{task}/{model}"
        presets.append(Preset(name, "prefix_tuning", base, options, training | _ADAMW, source))
    return presets


def _prompt_tuning() -> list[Preset]:
    options = {"num_virtual_tokens": 100, "prompt_tuning_init": "SAMPLE_VOCAB"} | _AS_PUBLISHED
    training = {
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 1e-5,
        "optim": "adafactor",
        "per_device_train_batch_size": 32,
        "max_steps": 30_000,
    }
    source = "google-research/prompt-tuning, gin of t5_1_1; Lester et al. 2021, sections 3.1 and 3.2"
    return [
        Preset(
            f"prompt_tuning/superglue/t5-{size}",
            "prompt_tuning",
            f"google/t5-{size}-lm-adapt",
            options,
            training,
            source,
            note="starts from class labels there, which a text-to-text model has none of: here from sampled words",
        )
        for size in _T5_SIZES
    ]


def _p_tuning() -> list[Preset]:
    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2, "prompt_tuning_init": "RANDOM"}
    lstm |= _AS_PUBLISHED
    probing = {
        "learning_rate": 1e-5,
        "weight_decay": 5e-4,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 100.0,
    }
    presets = [
        Preset(
            f"p_tuning/lama/{base}",
            "p_tuning",
            base,
            lstm | {"num_virtual_tokens": 9},
            _ADAMW | probing,
            "THUDM/P-tuning, LAMA/cli.py",
            learning_rate_decay=0.98,
            note="template (3, 3, 3); stops after 20 epochs without gain",
        )
        for base in ("bert-base-cased", "bert-large-cased", "roberta-large")
    ]
    for task, (rate, steps, warmup, batch, length) in _FEW_SHOT_RUNS.items():
        training = {
            "learning_rate": rate,
            "weight_decay": 0.1,
            "warmup_steps": warmup,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 16 // batch,  # of 2 on each of 8 devices there
            "max_steps": steps,
        }
        presets.append(
            Preset(
                f"p_tuning/fewglue_{task}/albert-xxlarge",
                "p_tuning",
                "albert-xxlarge-v2",
                lstm
                | {
                    "num_virtual_tokens": 2 if task == "wsc" else 1,
                    "encoder_hidden_size": 128,
                    "train_backbone": True,
                },
                _ADAMW | training,
                "THUDM/P-tuning, PT-Fewshot/scripts",
                length,
                backbone_learning_rate=1e-5,
            )
        )
    return presets


_PRESETS = {p.name: p for p in (*_p_tuning_v2(), *_prefix_tuning(), *_prompt_tuning(), *_p_tuning())}


def preset(name: str) -> Preset:
    """Look a published setting up.

    Args:
        name: method, task and model, as in `p_tuning_v2/rte/roberta-large`; `preset_names` lists them.

    Raises:
        RecipeError: no such preset.
    """
    if name not in _PRESETS:
        near = difflib.get_close_matches(name, _PRESETS, 3, 0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "hf-ptune presets lists them."
        raise RecipeError(f"there is no preset {name!r}; {hint}")
    return _PRESETS[name]


def preset_names() -> list[str]:
    """Names of all presets."""
    return list(_PRESETS)


def _places_tokens(content: Mapping[str, Any]) -> bool:
    """Whether the template of a recipe says how many virtual tokens there are."""
    task_options = content.get("task_options")
    template = task_options.get("template") if isinstance(task_options, Mapping) else None
    return isinstance(template, str) and Template.parse(template).num_virtual_tokens > 0


def fill_from_preset(content: Mapping[str, Any], where: str = "recipe") -> dict[str, Any]:
    """Say what a preset says wherever a recipe is silent.

    Args:
        content: of a recipe file; its key `preset` names the preset.
        where: the file's name, for messages.

    Returns:
        A copy without `preset`, with method, base, options, training and data.max_length filled, with
        backbone_learning_rate where the backbone trains, and with learning_rate_decay where the preset's schedule is
        kept.

    Raises:
        RecipeError: no such preset, or one of another method.
    """
    filled = dict(content)
    name = filled.pop("preset", None)
    if name is None:
        return filled
    if not isinstance(name, str):
        raise RecipeError(f"{where}: preset is {name!r}; expected a name such as p_tuning_v2/rte/roberta-large.")
    found = preset(name)
    if filled.setdefault("method", found.method) != found.method:
        raise RecipeError(
            f"{where}: method is {filled['method']!r}, and the preset {name} is for {found.method}; leave one out."
        )
    filled.setdefault("base", found.base)
    sections: list[tuple[str, dict[str, Any]]] = [("options", found.options), ("training", found.training)]
    if found.max_length is not None:
        sections.append(("data", {"max_length": found.max_length}))
    for section, values in sections:
        own = filled.get(section, {})
        if isinstance(own, Mapping):  # what is no section is refused where sections are read
            # transformers would let a preset's max_steps win over a recipe's own epochs
            beaten = {"max_steps"} if "num_train_epochs" in own else set()
            beaten |= {"num_virtual_tokens"} if _places_tokens(filled) else set()
            filled[section] = {k: v for k, v in values.items() if k not in beaten} | dict(own)
    options = filled["options"]
    if found.backbone_learning_rate is not None and isinstance(options, Mapping) and options.get("train_backbone"):
        filled.setdefault("backbone_learning_rate", found.backbone_learning_rate)
    training = filled["training"]
    kept = isinstance(training, Mapping) and training.get("lr_scheduler_type") == found.training["lr_scheduler_type"]
    if found.learning_rate_decay is not None and kept:
        filled.setdefault("learning_rate_decay", found.learning_rate_decay)
    return filled


def list_presets() -> str:
    """All presets as a table, one line each, and the defaults of each method."""
    return "\n".join([*(p.line() for p in _PRESETS.values()), list_defaults()])
