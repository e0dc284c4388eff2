"""Tokenizers that close texts: with an end token, with another one, or not at all."""

from pathlib import Path
from typing import Any

import pytest
from test_data import words_tokenizer
from test_train import write_base, write_recipe
from tokenizers_of import KINDS, tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ptune.endings import closing_ids, end_ids
from hf_ptune.recipe import make_recipe
from hf_ptune.tasks import IGNORED
from hf_ptune.tasks.causal_lm import CausalLM
from hf_ptune.templates import Template, add_virtual_tokens
from hf_ptune.train import run
from hf_ptune.train_multitask import make_multitask_recipe
from hf_ptune.train_multitask import run as run_tasks

OTHERS = [("[SEP]", ["[SEP]"]), (None, ["[SEP]"]), ("h", ["h"])]


def feature_of(tokenizer: Any, **row: str) -> Any:
    task = CausalLM()
    return task.encode([task.check_row(row, "row 1")], tokenizer, [])[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("closes", [True, False])
def test_what_closes_texts(kind: str, closes: bool) -> None:
    tokenizer = tokenizer_of(kind, mask=closes)
    assert closing_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("[SEP]")] * closes
    tokenizer.eos_token = None
    assert end_ids(tokenizer) == closing_ids(tokenizer)


@pytest.mark.parametrize(("eos", "end"), OTHERS)
def test_answers_follow_their_prompt_and_end(eos: str | None, end: list[str]) -> None:
    """As in Chinese GPT-2s with the tokenizer of BERT, whose texts end in [SEP] and which may name no end token."""
    tokenizer = words_tokenizer()
    tokenizer.eos_token = eos
    feature = feature_of(tokenizer, prompt="a b", answer="c")
    assert tokenizer.convert_ids_to_tokens(feature["input_ids"]) == ["[CLS]", "a", "b", "c", *end]
    assert tokenizer.convert_ids_to_tokens([i for i in feature["labels"] if i != IGNORED]) == ["c", *end]
    assert tokenizer.convert_ids_to_tokens(feature["source_ids"]) == ["[CLS]", "a", "b"]
    add_virtual_tokens(tokenizer, 1)
    encoded = Template.parse("[P1] {text} b [MASK]").encode(tokenizer, {"text": "a"}, causal=True)
    assert tokenizer.convert_ids_to_tokens(encoded.inputs["input_ids"]) == ["[CLS]", "<|prompt_0|>", "a", "b"]
    assert encoded.answer_at == 3


def test_an_end_that_a_prompt_itself_holds_is_the_prompt_s() -> None:
    tokenizer = tokenizer_of("bytes", mask=False)
    feature = feature_of(tokenizer, prompt="it was[SEP]", answer="yes")
    assert feature["source_ids"] == tokenizer("it was[SEP]")["input_ids"]


def test_no_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of("bytes", mask=False)
    feature_of(tokenizer, prompt="it was ", answer="yes")
    assert not caplog.text
    tokenizer.eos_token = None
    feature_of(tokenizer, prompt="it was ", answer="yes")
    assert "has no token that ends texts, so no end of an answer is learned" in caplog.text


@pytest.mark.parametrize("several", [False, True])
def test_what_is_written_by_an_adapter_ends_where_answers_were_trained_to(several: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt2", "CAUSAL_LM", eos_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(base)
    content = write_recipe(tmp_path, "CAUSAL_LM", base)
    content["training"] |= {"max_steps": 1}
    if several:
        content["tasks"] = [{"name": "one", "task": content.pop("task"), "data": content.pop("data")}]
        run_tasks(make_multitask_recipe(content, folder=tmp_path))
        folder = tmp_path / "out" / "adapter" / "one"
    else:
        folder = run(make_recipe(content, folder=tmp_path)).folder
    assert AutoTokenizer.from_pretrained(folder).eos_token == "[SEP]"
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [tokenizer.sep_token_id]
