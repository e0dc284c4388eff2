"""Patches of others' methods: installed once, stacked, and left out where they do not apply."""

import importlib
import inspect
from typing import Any

import pytest
import transformers.trainer as trainer_module
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler

from hf_ptune import engines
from hf_ptune.callbacks import freeze
from hf_ptune.patching import replaces


@pytest.fixture
def theirs() -> Any:
    class Theirs:
        def __init__(self, name: str) -> None:
            self.name = name

        def call(self, word: str, end: str = ".") -> str:
            """Say a word."""
            return f"{self.name} {word}{end}"

    return Theirs


def loud(self: Any, original: Any, word: str, **kwargs: Any) -> Any:
    return original(word.upper(), **kwargs)


def twice(self: Any, original: Any, word: str, **kwargs: Any) -> Any:
    return original(f"{word} {word}", **kwargs)


def test_a_patch_keeps_what_is_told_of_the_method(theirs: Any) -> None:
    signature = inspect.signature(theirs.call)
    assert replaces(theirs, "call")(loud) is loud
    assert inspect.signature(theirs.call) == signature and theirs.call.__doc__ == "Say a word."
    assert theirs("a").call("b", end="!") == "a B!"


def test_other_calls_go_to_the_original(theirs: Any) -> None:
    replaces(theirs, "call", when=lambda first: first.name == "a")(loud)
    assert (theirs("a").call("b"), theirs("c").call("b")) == ("a B.", "c b.")


def test_the_same_patch_is_installed_once_and_others_stack(theirs: Any) -> None:
    for patch in (twice, loud, twice, loud):
        replaces(theirs, "call")(patch)
    assert theirs("a").call("b") == "a B B."


@pytest.mark.parametrize("module", [engines, freeze])
def test_a_module_that_is_executed_again_patches_nothing_twice(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patched = [(trainer_module, "deepspeed_load_checkpoint"), (CallbackHandler, "on_train_begin")]
    patched += [(Trainer, n) for n in ("train", "add_callback", "call_model_init", "create_model_card")]
    before = [getattr(where, name) for where, name in patched]
    names = dict(vars(module))
    try:
        importlib.reload(module)
        assert [getattr(where, name) for where, name in patched] == before
    finally:
        vars(module).update(names)
