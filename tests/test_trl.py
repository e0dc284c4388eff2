"""TRL's trainers over our models: they put their own loss behind the last states, and a reference beside the policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import build
from huggingface_hub import ModelCard
from test_data import words_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model

trl = pytest.importorskip("trl", reason="TRL's trainers are not installed")
METHODS = ["prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2"]
PAIRS = [{"prompt": "a b", "chosen": " c d", "rejected": " e f"}] * 4
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = words_tokenizer()
    found.eos_token = found.sep_token
    return found


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl") / "base"
    build("llama", vocab_size=len(tokenizer)).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapt(base: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], PTunePreTrainedModel]:
    def make(method: str) -> PTunePreTrainedModel:
        backbone = AutoModelForCausalLM.from_pretrained(base)
        return get_ptune_model(backbone, PTuneConfig(method=method, num_virtual_tokens=3), tokenizer)

    return make


def train(trainer: Any) -> list[float]:
    """Losses by step; only the adapter may have moved."""
    model = trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and moved <= set(model.adapter_parameter_names())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_sft_trains_on_the_model_s_own_loss(
    method: str, adapt: Callable[[str], PTunePreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = adapt(method)
    rows = Dataset.from_list([{"prompt": "a b", "completion": " c d"}] * 4)
    args = trl.SFTConfig(str(tmp_path), per_device_train_batch_size=2, **SETTINGS)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    with torch.no_grad():
        wanted = float(model.eval()(**{k: inputs[k] for k in ("input_ids", "attention_mask", "labels")}).loss)
    assert train(trainer)[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_packed_rows_do_not_see_each_other(
    method: str, adapt: Callable[[str], PTunePreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = ["a b c d", "e f", "c c a b e", "d a"]
    args = trl.SFTConfig(str(tmp_path), packing=True, max_length=64, **SETTINGS)
    model = adapt(method)
    rows = Dataset.from_list([{"text": text} for text in texts])
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    assert len(trainer.train_dataset) == 1
    packed = trainer.data_collator([trainer.train_dataset[0]])
    apart, tokens = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"]])
            loss = model.eval()(input_ids=ids, labels=ids).loss
            apart, tokens = apart + float(loss) * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
    assert int((packed["labels"][:, 1:] != -100).sum()) == tokens
    assert train(trainer)[0] == pytest.approx(apart / tokens, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_dpo_compares_with_the_base(
    method: str, adapt: Callable[[str], PTunePreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    args = trl.DPOConfig(str(tmp_path), per_device_train_batch_size=2, **SETTINGS)
    trainer = trl.DPOTrainer(
        model=adapt(method), args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    assert not isinstance(trainer.ref_model, PTunePreTrainedModel)
    for name, tensor in trainer.ref_model.state_dict().items():
        assert torch.equal(tensor, trainer.model.backbone.state_dict()[name])
    train(trainer)


def test_dpo_of_a_saved_adapter_compares_with_it(
    adapt: Callable[[str], PTunePreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    adapt("p_tuning_v2").save_pretrained(tmp_path / "adapter")
    args = trl.DPOConfig(str(tmp_path / "out"), per_device_train_batch_size=2, **SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    trainer = trl.DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    assert torch.equal(trainer.ref_model.prompt.weight, model.prompt.weight)
    train(trainer)


def test_grpo_writes_with_the_prompt(
    adapt: Callable[[str], PTunePreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    settings = SETTINGS | {"num_generations": 4, "max_completion_length": 4, "per_device_train_batch_size": 4}
    trainer = trl.GRPOTrainer(
        model=adapt("p_tuning_v2"),
        args=trl.GRPOConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_list([{"prompt": "a b"}] * 4),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    )
    train(trainer)


def test_a_push_has_our_card_and_a_checkpoint_none(
    adapt: Callable[[str], PTunePreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    args = trl.SFTConfig(str(tmp_path), **SETTINGS | {"save_strategy": "steps", "save_steps": 1})
    rows = Dataset.from_list([{"text": "a b c"}] * 16)
    trainer = trl.SFTTrainer(model=adapt("p_tuning_v2"), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    trainer.create_model_card(dataset_name="user/chats", tags="small")
    card = ModelCard.load(tmp_path / "README.md")
    assert "P-Tuning v2" in card.text and card.data.datasets == ["user/chats"]
    assert {"trl", "sft", "small"} <= set(card.data.tags)
