import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from families import build
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a saved tiny base, written once."""
    written: dict[Any, Path] = {}

    def folder(family: str, task: str | None = None) -> Path:
        if (family, task) not in written:
            path = tmp_path_factory.mktemp(f"{family}-{task}")
            build(family, task).save_pretrained(path)
            written[family, task] = path
        return written[family, task]

    return folder


@pytest.fixture
def wrap(base_folder: Callable[..., Path]) -> Callable[..., PTunePreTrainedModel]:
    """A freshly loaded base of a family with a prompt strong enough to be seen."""

    def make(family: str, method: str, task: str | None = None, strong: bool = True, **options: Any) -> Any:
        model_class = type(build(family, task))
        backbone: PreTrainedModel = model_class.from_pretrained(base_folder(family, task)).double().eval()
        settings: dict[str, Any] = {"num_virtual_tokens": 4} | options
        torch.manual_seed(2)
        model = get_ptune_model(backbone, PTuneConfig(method=method, **settings))
        if strong and model.prompt is not None:
            with torch.no_grad():
                for parameter in model.prompt.parameters():
                    parameter.normal_(0, 0.5)
        return model.eval()

    return make
