"""What users mistake often: each is one message that says what was expected, and no step is trained."""

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from test_train import write_base, write_recipe

from hf_ptune import PTuneConfig
from hf_ptune.cli import main
from hf_ptune.errors import BackboneError, RecipeError
from hf_ptune.fresh_base import load_base, load_tokenizer
from hf_ptune.sources import read_hub


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A recipe that would train."""
    content = write_recipe(tmp_path, "SEQ_CLS", write_base(tmp_path / "base", "bert", "SEQ_CLS"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["--base=./nothing"], ["the base './nothing' cannot be loaded", "expected a folder"]),
        (["--base=nope/nothing"], ["the base 'nope/nothing' cannot be loaded"]),
        (["--training.max_steps=0"], ["expected a step at least"]),
        (["--training.num_train_epochs=0"], ["expected a step at least"]),
        (["--training.batch_eval_metrics=true"], ["training.batch_eval_metrics is true", "leave it out"]),
        (["--training.do_train=false"], ["training.do_train is false", "leave it out"]),
        (["--training.do_predict=true"], ["training.do_predict is true", "leave it out"]),
        (["--training.prediction_loss_only=true"], ["training.prediction_loss_only is true", "leave it out"]),
        (["--training.bf16_full_eval=true"], ["it casts the model for good", "bf16: true evaluates", "leave it out"]),
        (["--training.fp16_full_eval=true"], ["training.fp16_full_eval is true", "bf16: true evaluates"]),
        (
            ["--training.dataloader_drop_last=true", "--training.per_device_train_batch_size=31"],
            ["30 rows to train on fill no batch of 31", "leave dataloader_drop_last out"],
        ),
        (
            [f"--training.{k}" for k in ("dataloader_drop_last=true", "per_device_train_batch_size=31", "max_steps=3")],
            ["30 rows to train on fill no batch of 31"],
        ),
        (["--training.metric_for_best_model=acc"], ["'acc', which is not measured", "of accuracy, f1_macro, loss."]),
        (
            ["--options.prompt_tuning_init=ADAPTER", "--options.prompt_tuning_init_adapter=out/nope"],
            ["prompt_tuning_init_adapter='out/nope' cannot be read"],
        ),
    ],
)
def test_mistakes_are_messages(
    overrides: list[str],
    messages: list[str],
    path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["train", path, *overrides]) == 2
    said = capsys.readouterr().err
    assert "\nerror: " in f"\n{said}" and all(message in said for message in messages)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("family", "task", "able"),
    [
        ("gpt2", "SEQ_2_SEQ_LM", "CAUSAL_LM"),
        ("t5", "CAUSAL_LM", "SEQ_2_SEQ_LM"),
        ("gpt2", "MASKED_LM", "CAUSAL_LM"),
        ("llama", "MULTIPLE_CHOICE", "CAUSAL_LM"),
    ],
)
def test_a_base_of_another_family(family: str, task: str, able: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family, able)
    with pytest.raises(BackboneError, match=f"is a {family}, which has no model for {task}; it has one for .*{able}"):
        load_base(base, task)


@pytest.mark.parametrize("base", ["../models/bert", "./bert", "a/b/c"])
def test_a_relative_folder_that_is_not_there(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for load in (load_tokenizer, lambda name: load_base(name, "SEQ_CLS")):
        with pytest.raises(BackboneError, match=re.escape(f"{base!r} cannot be loaded (there is no folder {tmp_path}")):
            load(base)


def test_files_of_the_hub_that_cannot_be_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from TypeError("no float: 'x'")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(RecipeError, match="hub:user/rows .*cannot be loaded: no float: 'x'. It needs"):
        read_hub("user/rows", None, "train")


def test_every_option_of_a_configuration_is_described() -> None:
    described = re.findall(r"^        (\w+): ", PTuneConfig.__doc__ or "", re.M)
    options = [name for name in PTuneConfig.__annotations__ if name not in ("model_type", "sub_configs")]
    assert sorted(described) == sorted(options)
