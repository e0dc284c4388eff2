"""Every method on every task class: what is saved answers as what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import METHODS, batch

from hf_ptune import PTunePreTrainedModel
from hf_ptune.backbone import TASKS
from hf_ptune.modeling_ptune import CLASSES

Wrap = Callable[..., PTunePreTrainedModel]
FAMILY = {"CAUSAL_LM": "gpt2", "SEQ_2_SEQ_LM": "bart"}


def answers(model: Any, task: str) -> list[torch.Tensor]:
    family = FAMILY.get(task, "bert")
    ids = batch(family, rows=4)["input_ids"]
    inputs = {"input_ids": ids.view(2, 2, 7) if task == "MULTIPLE_CHOICE" else ids}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ids[:, :3]
    with torch.no_grad():
        output = model(**inputs)
    return [output[k] for k in ("logits", "start_logits", "end_logits", "last_hidden_state") if k in output]


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flatten", [True, False])
def test_native(method: str, task: str, flatten: bool, wrap: Wrap, tmp_path: Path) -> None:
    model = wrap(FAMILY.get(task, "bert"), method, task)
    expected = answers(model, task)
    model.save_pretrained(tmp_path, flatten=flatten)
    for cls in (TASKS[task], CLASSES[task]):
        found = answers(cls.from_pretrained(tmp_path), task)
        assert len(found) == len(expected) > 0
        for ours, before in zip(found, expected, strict=True):
            assert torch.allclose(ours, before, atol=1e-10)
