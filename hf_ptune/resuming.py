"""What a checkpoint and a run that goes on from it have to share."""

from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from hf_ptune.backbone import place_of
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import RecipeError
from hf_ptune.methods import get_method
from hf_ptune.placement import settled_reading

# options on which names and shapes of an adapter's tensors depend
_SHAPING: tuple[str, ...] = ("num_virtual_tokens", "encoder_reparameterization_type", "encoder_hidden_size")
_SHAPING += ("encoder_num_layers", "layers", "sites")
# and what they mean
_CHOOSING: tuple[str, ...] = ("modules_to_save", "train_backbone", "template")


def check_checkpoint(model: Any, checkpoint: str) -> None:
    """Refuse a checkpoint of a run with another base, method or labels, or with other sizes of the prompt.

    Args:
        model: about to train: a wrapped model, or one of several tasks.
        checkpoint: folder of a Trainer's checkpoint.

    Raises:
        RecipeError: something differs; it says what.
        ConfigError: the checkpoint's configuration describes no adapter.
    """
    parts = {Path(checkpoint): model}
    if hasattr(model, "model_of"):
        parts = {Path(checkpoint) / task: model.model_of(task) for task in model.tasks}
    for folder, part in parts.items():
        if not (folder / CONFIG_NAME).is_file():
            continue
        if differ := _differences(PTuneConfig.from_pretrained(folder), part.config):
            raise RecipeError(
                f"{folder} is of another run: {'; '.join(differ)}. Give the old values to go on with it, or another "
                "output_dir to train anew."
            )


def _differences(there: PTuneConfig, here: PTuneConfig) -> list[str]:
    told: list[tuple[str, Any, Any]] = [("method", there.method, here.method)]
    if there.method == here.method:  # options of the one may mean nothing to the other
        names = _CHOOSING if get_method(here.method).kind is None else _SHAPING + _CHOOSING
        told += [(f"options.{name}", getattr(there, name), getattr(here, name)) for name in names]
        reading = settled_reading(there), settled_reading(here)
        told += [(f"options.{name}", value, reading[1][name]) for name, value in reading[0].items()]
    labels = [list((config.id2label or {}).values()) for config in (there, here)]
    told.append(("labels", labels[0], labels[1]))
    bases = there.base_model_name_or_path, here.base_model_name_or_path
    if all(bases) and place_of(str(bases[0])) != place_of(str(bases[1])):
        told.insert(0, ("base", *bases))
    commits = there.base_model_revision, here.base_model_revision
    if all(commits):
        told.append(("commit of the base", *commits))
    return [f"{name} is {old!r} there and {new!r} here" for name, old, new in told if old != new]
