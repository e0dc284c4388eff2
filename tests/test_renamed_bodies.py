"""Classes of Llama's kin that find answers call the body otherwise than checkpoints of language models do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch
from tokenizers_of import tokenizer_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
)

from hf_ptune import PTuneConfig, PTuneForQuestionAnswering, get_ptune_model
from hf_ptune.errors import BackboneError
from hf_ptune.recipe import make_recipe
from hf_ptune.renamed_bodies import check_read
from hf_ptune.train import run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    base.save_pretrained(tmp_path / "base")
    tokenizer_of("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def body_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n.partition(".")[2]: p for n, p in model.named_parameters() if n.startswith(("model.", "transformer."))}


def test_a_recipe_finds_answers_with_what_a_language_model_knows(checkpoint: Path, tmp_path: Path) -> None:
    rows = [
        {"context": "in a house by a lake", "question": "where", "answers": {"text": ["a lake"], "answer_start": [14]}}
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows * 12)))
    content = {
        "base": str(checkpoint), "task": "QUESTION_ANS", "method": "p_tuning_v2", "output_dir": str(tmp_path / "out"),
        "data": {"source": "rows.jsonl", "max_length": 48}, "training": {"max_steps": 2, "report_to": "none"},
    }  # fmt: skip
    outcome = run(make_recipe(content, folder=tmp_path))
    stored = body_of(AutoModelForCausalLM.from_pretrained(checkpoint))
    loaded = AutoModelForQuestionAnswering.from_pretrained(outcome.folder)
    assert isinstance(loaded.backbone, LlamaForQuestionAnswering)
    found = body_of(loaded.backbone)
    assert found.keys() == stored.keys() and all(torch.equal(found[n], t) for n, t in stored.items())


def test_a_body_that_was_drawn_anew_is_refused_with_what_reads_it(checkpoint: Path) -> None:
    with pytest.raises(BackboneError, match="has read nothing of") as refused:
        get_ptune_model(AutoModelForQuestionAnswering.from_pretrained(checkpoint), PTuneConfig(num_virtual_tokens=3))
    told = re.search(r"key_mapping=(\{.*\})\)", str(refused.value))
    assert told is not None
    mapping = {r"^model\.": "transformer."}
    assert told[1] == str(mapping)
    base = AutoModelForQuestionAnswering.from_pretrained(checkpoint, key_mapping=mapping)
    model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=3))
    assert model(**{k: v for k, v in batch("llama").items() if k != "labels"}).start_logits.isfinite().all()


def test_an_adapter_meets_no_body_that_was_drawn_anew(checkpoint: Path, tmp_path: Path) -> None:
    read = AutoModelForQuestionAnswering.from_pretrained(checkpoint, key_mapping={r"^model\.": "transformer."})
    get_ptune_model(read, PTuneConfig(num_virtual_tokens=3)).save_pretrained(tmp_path / "adapter")
    drawn = AutoModelForQuestionAnswering.from_pretrained(checkpoint)
    with pytest.raises(BackboneError, match="has read nothing of"):
        PTuneForQuestionAnswering.from_pretrained(tmp_path / "adapter", backbone=drawn)


@pytest.mark.parametrize("damage", ["no file", "no tensors", "no index"])
def test_what_cannot_be_compared_is_taken(damage: str, checkpoint: Path) -> None:
    base = AutoModelForQuestionAnswering.from_pretrained(checkpoint)
    weights = checkpoint / "model.safetensors"
    weights.unlink()
    if damage == "no tensors":
        weights.write_text("{}")
    if damage == "no index":
        (checkpoint / "model.safetensors.index.json").write_text("{}")
    get_ptune_model(base, PTuneConfig(num_virtual_tokens=3))


def test_parts_that_are_elsewhere_are_not_compared(checkpoint: Path, tmp_path: Path) -> None:
    """On a disk, or on other ranks."""
    places: dict[str, Any] = dict.fromkeys(("embed_tokens", "norm", "rotary_emb"), "cpu") | {"layers": "disk"}
    base = AutoModelForQuestionAnswering.from_pretrained(
        checkpoint,
        key_mapping={r"^model\.": "transformer."},
        device_map={f"transformer.{name}": place for name, place in places.items()} | {"qa_outputs": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )
    check_read(base)
    base = AutoModelForQuestionAnswering.from_pretrained(checkpoint)
    for parameter in base.parameters():
        parameter.data = torch.empty(0)
    check_read(base)


def test_a_checkpoint_of_the_class_itself_is_read(checkpoint: Path, tmp_path: Path) -> None:
    base = LlamaForQuestionAnswering(LlamaConfig.from_pretrained(checkpoint))
    get_ptune_model(base, PTuneConfig(num_virtual_tokens=3)).unwrap()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    base.save_pretrained(tmp_path / "answers", max_shard_size="40KB")
    get_ptune_model(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "answers"), PTuneConfig())
