"""README's Python code, as a newcomer copies it: each snippet by itself, on a tiny base."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from families import build
from hub import HubServer, connect
from tokenizers_of import tokenizer_of
from transformers import AutoModelForSequenceClassification

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune.adapter_file import WEIGHTS_NAME

SNIPPETS = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parents[1] / "README.md").read_text(), re.M | re.S)
BASE, ADAPTER = "bert-base-uncased", "outputs/quickstart/adapter"  # as README names them
Check = Callable[[str, HubServer], bool]
# what is in one snippet alone -> whether it has done what README says, by what it printed and left
DONE: dict[str, Check] = {
    "pipeline(": lambda printed, _: bool(re.search("'label': '(food|history)'", printed)),
    "trainer.train()": lambda printed, _: "trainable params" in printed and Path("adapter", WEIGHTS_NAME).is_file(),
    "get_multitask_model(": lambda *_: all(Path("adapters", t, WEIGHTS_NAME).is_file() for t in ("topic", "ner")),
    "push_to_hub(": lambda _, hub: WEIGHTS_NAME in hub.repos["user/adapter"].at().files,
    "verbalizer=": lambda printed, _: bool(re.search("entailment|contradiction|neutral", printed)),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_user("user", "user-writes")
        connect(monkeypatch, server)
        monkeypatch.setenv("HF_TOKEN", "user-writes")
        yield server


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What README's names stand for: folders by the name of the base, and of what the quickstart leaves."""
    monkeypatch.chdir(tmp_path)
    build("bert", "MASKED_LM").save_pretrained(BASE)
    backbone = AutoModelForSequenceClassification.from_pretrained(BASE, id2label={0: "food", 1: "history"})
    get_ptune_model(backbone, PTuneConfig(num_virtual_tokens=4)).save_pretrained(ADAPTER)
    for folder in (BASE, ADAPTER):
        tokenizer_of("wordpiece").save_pretrained(folder)


def test_every_snippet_is_known() -> None:
    assert [sum(word in snippet for word in DONE) for snippet in SNIPPETS] == [1] * len(DONE)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("word", DONE)
def test_a_snippet_runs_as_it_is_copied(word: str, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    for snippet in (s for s in SNIPPETS if word in s):
        exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})
    assert DONE[word](capsys.readouterr().out, hub)
