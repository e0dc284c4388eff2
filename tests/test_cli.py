"""The command line: init, run, train, convert; push, card and info are tried with the Hub."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, build
from safetensors import SafetensorError
from test_train import words_tokenizer, write_base, write_recipe
from tokenizers_of import tokenizer_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import hf_ptune
from hf_ptune import (
    PTuneConfig,
    PTuneForCausalLM,
    PTunePreTrainedModel,
    cli,
    get_ptune_model,
    train,
    train_multitask,
)
from hf_ptune.adapter_file import WEIGHTS_NAME, is_fresh
from hf_ptune.backbone import TASKS
from hf_ptune.cli import main
from hf_ptune.errors import PTuneError
from hf_ptune.fresh_base import load_tokenizer
from hf_ptune.methods import method_names
from hf_ptune.publishing import write_repository
from hf_ptune.tasks import Answer

SCRIPT = """
import argparse, sys
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path")
folder = parser.parse_args().model_name_or_path
config = AutoConfig.from_pretrained(folder, num_labels=3)
model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
ids = AutoTokenizer.from_pretrained(folder)("a b", return_tensors="pt")
print(__name__, sys.argv[0].endswith("script.py"), model(**ids).logits.shape[-1], config.vocab_size)
"""


@pytest.fixture
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_script_trains_what_init_writes(tmp_path: Path, argv: None, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    folder = str(tmp_path / "new")
    options = ["--method", "p_tuning", "--num-virtual-tokens", "5", "--num-labels", "3"]
    assert main(["init", "--base", base, *options, folder]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (model.config.num_virtual_tokens, model.config.num_labels, model.config.flattened) == (5, 3, False)
    assert is_fresh(folder)  # nobody has trained it
    model.save_pretrained(tmp_path / "again")
    assert not is_fresh(tmp_path / "again")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert main(["run", str(script), "--model_name_or_path", folder]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "__main__ True 3 99"


def test_a_head_for_other_labels_is_refused_with_its_cure(tmp_path: Path) -> None:
    base, folder = write_base(tmp_path / "base", "bert", "SEQ_CLS"), str(tmp_path / "new")
    assert main(["init", "--base", base, "--method", "p_tuning_v2", "--task", "SEQ_CLS", folder]) == 0
    with pytest.raises(PTuneError, match=r"\(2,\) in the file, \(5,\) expected.*init --num-labels"):
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)


def test_init_tells_the_task_of_a_language_model(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt2", "CAUSAL_LM")
    assert main(["init", "--base", base, "--method", "prefix_tuning", str(tmp_path / "new")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    ids = AutoTokenizer.from_pretrained(tmp_path / "new")("a b", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2, min_new_tokens=2).shape[1] == ids["input_ids"].shape[1] + 2


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "MASKED_LM"), ("bert", "TOKEN_CLS"), ("bart", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("gpt2", "CAUSAL_LM")],
)
def test_init_takes_the_task_that_a_base_was_trained_for(family: str, task: str, tmp_path: Path) -> None:
    build(family, task).float().save_pretrained(tmp_path / "base")
    words_tokenizer().save_pretrained(tmp_path / "base")
    assert main(["init", "--base", str(tmp_path / "base"), "--method", "p_tuning_v2", str(tmp_path / "new")]) == 0
    assert PTuneConfig.from_pretrained(tmp_path / "new").task == task


@pytest.mark.parametrize("own_class", ["RobertaTokenizer", "TokenizersBackend"])
def test_words_to_be_tagged_keep_their_spaces_in_the_tokenizer_of_init(
    own_class: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", "roberta", "TOKEN_CLS", vocab_size=600)
    tokenizer_of("bytes").save_pretrained(base)
    path = Path(base, "tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": own_class}))
    words, options = ["hello", "Rome", "x"], ["--base", base, "--method", "p_tuning_v2", "--num-labels", "2"]
    plain = AutoTokenizer.from_pretrained(base)
    in_a_text, one_by_one = plain(" hello Rome x")["input_ids"], plain(words, is_split_into_words=True)["input_ids"]
    assert in_a_text != one_by_one
    for task, wanted in [("TOKEN_CLS", in_a_text), ("SEQ_CLS", one_by_one)]:
        folder = str(tmp_path / task)
        assert main(["init", *options, "--task", task, folder]) == 0
        assert ("add_prefix_space" in capsys.readouterr().out) == (task == "TOKEN_CLS")
        saved = AutoTokenizer.from_pretrained(folder)
        assert saved(words, is_split_into_words=True)["input_ids"] == wanted
    if own_class == "RobertaTokenizer":
        spaced = AutoTokenizer.from_pretrained(base, add_prefix_space=True)
        assert spaced(words, is_split_into_words=True)["input_ids"] == in_a_text


@pytest.mark.parametrize(
    ("family", "method", "room"),
    [
        ("gpt2", "prompt_tuning", 123),
        ("gpt2", "p_tuning_v2", 123),
        ("bart", "p_tuning", 59),
        ("bert", "p_tuning", None),
    ],
)
def test_texts_are_cut_to_what_the_prompt_leaves(family: str, method: str, room: int | None, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family, "SEQ_CLS", eos_token_id=3)
    folders = [str(tmp_path / name) for name in ("fresh", "pushed", "converted")]
    options = ["--method", method, "--num-virtual-tokens", "5", "--num-labels", "2"]
    assert main(["init", "--base", base, *options, folders[0]]) == 0
    write_repository(AutoModelForSequenceClassification.from_pretrained(folders[0]), folders[1], "user/adapter")
    assert main(["convert", folders[1], folders[2]]) == 0
    limit = AutoTokenizer.from_pretrained(base).model_max_length
    for folder in folders:
        classify = pipeline("text-classification", folder)
        assert classify.tokenizer.model_max_length == (room or limit)
        if room:
            assert classify(" ".join("abcdefgh" * 40), truncation=True)[0]["label"].startswith("LABEL_")


def test_a_tokenizer_that_cuts_shorter_than_a_prompt_asks_stays(tmp_path: Path) -> None:
    base, folder = write_base(tmp_path / "base", "gpt2", "SEQ_CLS"), str(tmp_path / "fresh")
    words = load_tokenizer(base)
    words.model_max_length = 9
    words.save_pretrained(base)
    assert main(["init", "--base", base, "--method", "p_tuning_v2", "--num-labels", "2", folder]) == 0
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 9


def test_errors_are_messages(tmp_path: Path, argv: None, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    new = str(tmp_path / "new")
    for arguments, message in [
        (["init", "--base", base, "--method", "bitfit", base], "not empty"),
        (["init", "--base", base, "--method", "bitfit", new], "pass --task"),
        (["init", "--base", base, "--method", "p_tuning", "--num-virtual-tokens", "0", new], "expected at least 1"),
        (["init", "--base", "package:no_such/x", "--method", "bitfit", new], "not installed"),
        (["init", "--base", "./nothing", "--method", "bitfit", new], "the base './nothing' cannot be loaded"),
        (["run", str(tmp_path / "none.py")], "no such script"),
        (["train", str(tmp_path / "none.yaml")], "cannot be read"),
        (["info", str(tmp_path / "none")], "none"),
        (["convert", str(tmp_path / "none"), new], "none"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
    assert not Path(new).exists()


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device: '{out}'"),
        (OSError(28, "No space left on device", "a/README.md"), "[Errno 28] No space left on device: 'a/README.md'"),
        (Exception("No space left on device (os error 28)"), "[Errno 28] No space left on device: '{out}'"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "[Errno 28] I/O error: No space"),
        (PTuneError("it is not there (os error 2)"), "it is not there (os error 2)"),
    ],
    ids=repr,
)
def test_what_the_system_refuses_is_one_line(
    raised: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("hf_ptune.train.run", fail)
    monkeypatch.setattr("hf_ptune.info.describe_adapter", fail)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(write_recipe(tmp_path, "SEQ_CLS", "base")))
    for command in (lambda: main(["train", str(path)]), lambda: train.main([str(path)])):
        assert command() == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: " + told.format(out=tmp_path / "out"))
    assert main(["info", "adapter"]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("text")

    monkeypatch.setattr("hf_ptune.train.run", fail)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(write_recipe(tmp_path, "SEQ_CLS", "base")))
    with pytest.raises(KeyError):
        main(["train", str(path)])


def test_train_takes_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("hf_ptune.train.run", seen.append)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(write_recipe(tmp_path, "SEQ_CLS", "base")))
    assert main(["train", str(path), "--seed=5", "--training.max_steps=3"]) == 0
    assert main(["train", "--seed=5", str(path), "--training.max_steps=3"]) == 0
    assert [(r.seed, r.training["max_steps"]) for r in seen] == [(5, 3)] * 2


@pytest.mark.parametrize("module", [train, train_multitask])
def test_overrides_may_hold_spaces(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module, "run", seen.append)
    path, labels = tmp_path / "r.yaml", "--data.labels=[early, late]"
    content = write_recipe(tmp_path, "SEQ_CLS", "base")
    if module is train_multitask:
        labels = labels.replace("data.labels", "card.limits")
        content["tasks"] = [{"name": "one", "task": content.pop("task"), "data": content.pop("data")}]
    path.write_text(json.dumps(content))
    for arguments in ([labels, str(path)], [str(path), labels]):
        assert main(["train", *arguments]) == module.main(arguments) == 0
    recipes = [next(iter(r.tasks.values())) if module is train_multitask else r for r in seen]
    assert [r.data.labels or r.card.limits for r in recipes] == [["early", "late"]] * 4


def test_a_sweep_takes_overrides_with_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli, "run_sweep", lambda *given: seen.append(given))
    rates = ["--learning-rates", "1e-2", "3e-2"]
    assert main(["sweep", "r.yaml", *rates, "--data.labels=[early, late]", "--folder=a b", "--seeds=1"]) == 0
    given, overrides = seen[0]
    assert (given.recipe, given.learning_rates, given.folder, given.seeds) == ("r.yaml", [1e-2, 3e-2], "a b", [1])
    assert overrides == ["--data.labels=[early, late]"]


def test_paths_on_a_command_line_may_begin_in_the_user_s_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves `~` as it is in quotes, and behind `--option=`."""
    monkeypatch.setenv("HOME", "/home/me")
    for line, names in {
        "init --base=~/base --method=bitfit ~/new": ("base", "folder"),
        "run ~/script.py ~/argument": ("script",),
        "train ~/r.yaml": ("recipe",),
        "evaluate ~/r.yaml --adapter=~/adapter": ("recipe", "adapter"),
        "sweep ~/r.yaml --folder=~/grid": ("recipe", "folder"),
        "push ~/adapter me/adapter": ("folder",),
        "card ~/one ~/two": ("folder", "seeds"),
        "convert ~/peft ~/ours": ("source", "target"),
        "info ~/adapter": ("source",),
    }.items():
        given = cli.make_parser().parse_args(line.split())
        assert all("'/home/me/" in repr(getattr(given, name)) for name in names), line
    assert cli.make_parser().parse_args(["run", "s.py", "~/a"]).arguments == ["~/a"]  # the script's own affair


def test_an_interruption_looks_where_checkpoints_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(recipe: Any) -> None:
        checkpoint(recipe.output_dir, 3)
        raise KeyboardInterrupt

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("hf_ptune.train.run", interrupted)
    (tmp_path / "r.yaml").write_text(json.dumps(write_recipe(tmp_path, "SEQ_CLS", "base")))
    assert train.main(["~/r.yaml", "--output_dir=~/runs"]) == 130
    assert f"goes on from {tmp_path}/runs/checkpoint-3" in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_texts_that_a_terminal_cannot_show_are_escaped(
    encoding: str, errors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / WEIGHTS_NAME).write_bytes(b"")
    (tmp_path / "r.yaml").write_text(json.dumps(write_recipe(tmp_path, "SEQ_CLS", "base")))
    text = "größe 漢字 \ud800"
    answers, score = [Answer(text, text, text)], {"accuracy": 1.0}
    outcome = train.Outcome(score, score, tmp_path / "adapter", answers)
    monkeypatch.setattr("hf_ptune.train.run", lambda recipe: train.report(outcome, "accuracy"))
    monkeypatch.setattr("hf_ptune.info.describe_adapter", lambda *_, **__: text)
    monkeypatch.setattr("hf_ptune.evaluation.evaluate", lambda *_: print(text))
    monkeypatch.setattr(cli, "run_sweep", lambda *_: print(text))
    recipe = str(tmp_path / "r.yaml")
    for command in (["train", recipe], ["evaluate", recipe], ["sweep", recipe], ["info", "adapter"]):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors=errors))
        assert main(command) == 0
        sys.stdout.flush()
        assert text.encode(encoding, "backslashreplace") in written.getvalue()


def checkpoint(folder: str | Path, step: int) -> None:
    """Write what tells a whole checkpoint from an unfinished one."""
    made = Path(folder) / f"checkpoint-{step}"
    made.mkdir(parents=True, exist_ok=True)
    (made / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize(
    ("resume", "written", "told"),
    [
        ([], [], "the same command starts anew"),
        ([], [6], "resume_from_checkpoint={folder}/checkpoint-6 goes on from {folder}/checkpoint-6"),
        ([], [9], "resume_from_checkpoint=true goes on from {folder}/checkpoint-9"),
        ([], [6, 12], "resume_from_checkpoint=true goes on from {folder}/checkpoint-12"),
        (["--training.resume_from_checkpoint=true"], [], "the same command goes on from {folder}/checkpoint-9"),
        (["--training.resume_from_checkpoint={folder}/checkpoint-3"], [], "goes on from {folder}/checkpoint-3"),
        (["--training.resume_from_checkpoint=true"], [12], "=true goes on from {folder}/checkpoint-12"),
    ],
)
def test_an_interruption_names_no_checkpoint_of_an_earlier_run(
    resume: list[str],
    written: list[int],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(recipe: Any) -> None:
        for step in written:
            checkpoint(recipe.output_dir, step)
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_ptune.train.run", interrupted)
    path, folder = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(json.dumps(write_recipe(tmp_path, "SEQ_CLS", "base")))
    for step in (3, 9):
        checkpoint(folder, step)
    assert main(["train", str(path), *(option.format(folder=folder) for option in resume)]) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith(told.format(folder=folder) + ".\n")


def test_an_interruption_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_ptune.train.run", interrupted)
    monkeypatch.setattr(cli, "run_sweep", interrupted)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(write_recipe(tmp_path, "SEQ_CLS", "base")))
    assert main(["train", str(path)]) == 130 and "the same command starts anew" in capsys.readouterr().err
    monkeypatch.setattr("hf_ptune.train.run", lambda recipe: (checkpoint(recipe.output_dir, 3), interrupted()))
    assert main(["train", str(path), f"--output_dir={tmp_path / 'other'}"]) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "resume_from_checkpoint=true" in said and "checkpoint-3" in said
    assert main(["sweep", str(path)]) == 130 and "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr("hf_ptune.evaluation.evaluate", interrupted)
    monkeypatch.setattr("hf_ptune.publishing.remake_card", interrupted)
    monkeypatch.setattr(cli, "run_script", interrupted)
    for command in (["evaluate", str(path)], ["card", str(tmp_path)], ["run", "script.py"]):
        assert main(command) == 130 and capsys.readouterr().err == "interrupted.\n"


def test_a_reader_that_has_gone_is_no_error() -> None:
    code = "import sys; from hf_ptune.cli import main; sys.exit(main(['presets']))"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert done.returncode == 0 and "pipe" not in done.stderr.lower(), done.stderr


def test_a_pipe_that_breaks_while_work_is_done_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("hf_ptune.convert.convert", broken)
    assert main(["convert", "a", str(tmp_path / "b")]) == 2 and "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_tells_of_overrides(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--section.key=value" in said and "--variant=name" in said and "--seed=1" in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"hf_ptune {hf_ptune.__version__}\n"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"], ["sweep"], ["nothing"]])
def test_no_answer_of_the_parser_waits_for_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from hf_ptune.cli import main
try:
    main({arguments})
except SystemExit:
    print("loaded:", sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("loaded: []\n"), done.stdout + done.stderr


def test_init_lists_its_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["init", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ", ".join(method_names()) in said and ", ".join(sorted(TASKS)) in said
    with pytest.raises(SystemExit, match="2"):
        main(["init", "--base", "b", "--method", "none", "folder"])
    said = capsys.readouterr().err
    assert "argument --method: invalid choice: 'none'" in said and all(name in said for name in method_names())


def test_convert_writes_other_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = build("gpt2").eval()
    backbone.name_or_path = str(tmp_path / "base")
    backbone.save_pretrained(tmp_path / "base")
    model = get_ptune_model(backbone, PTuneConfig(method="prompt_tuning", num_virtual_tokens=3)).eval()
    model.save_pretrained(tmp_path / "ours")
    names = {"peft": "peft", "prompt_embeds": "prompt.pt"}
    for form, name in names.items():
        assert main(["convert", str(tmp_path / "ours"), str(tmp_path / name), "--to", form]) == 0
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "back")]) == 0
    assert torch.equal(torch.load(tmp_path / "prompt.pt"), model.prompt.weight.detach())
    inputs = batch("gpt2")
    with torch.no_grad():
        expected = model(**inputs).logits.float()
    for folder in ("peft", "back"):
        loaded = PTuneForCausalLM.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            assert torch.allclose(loaded(**inputs).logits.float(), expected, atol=1e-5)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "peft")]) == 2
    assert "not empty" in capsys.readouterr().err


def write_adapter(folder: Path, base: Path, **options: Any) -> PTunePreTrainedModel:
    """An adapter on a saved base without a tokenizer, one of its own beside it, which knows a further word."""
    build("bert", "MASKED_LM").save_pretrained(base)
    tokenizer = tokenizer_of("wordpiece")
    tokenizer.add_tokens(["<user>"])
    model = get_ptune_model(
        AutoModelForMaskedLM.from_pretrained(base), PTuneConfig(num_virtual_tokens=2, **options), tokenizer
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("template", [None, "{text} [P2] [MASK]"])
def test_convert_keeps_the_adapter_s_own_tokenizer(template: str | None, tmp_path: Path) -> None:
    options = {"method": "prompt_tuning"} | ({} if template is None else {"template": template})
    write_adapter(tmp_path / "ours", tmp_path / "base", **options)
    tokenizer_of("wordpiece").save_pretrained(tmp_path / "base")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    old, new = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "again"))
    assert new.get_vocab() == old.get_vocab() and "<user>" in new.get_vocab()
    ids = [AutoConfig.from_pretrained(tmp_path / name).virtual_token_ids for name in ("ours", "again")]
    assert ids[0] == ids[1] and (ids[0] is None) is (template is None)


def test_no_tokenizer_without_words_is_made_of_a_base_s_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_adapter(tmp_path / "ours", tmp_path / "base")
    for path in (tmp_path / "ours").glob("token*"):
        path.unlink()
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    write_repository(model, tmp_path / "pushed", "user/adapter")
    assert caplog.text.count("no tokenizer was found beside the base") == 2
    assert not list(tmp_path.glob("again/token*")) and not list(tmp_path.glob("pushed/token*"))
    with pytest.raises(PTuneError, match="has no vocabulary"):
        load_tokenizer(str(tmp_path / "base"))


def test_a_repository_gets_the_tokenizer_of_the_folder_that_was_loaded(tmp_path: Path) -> None:
    model = write_adapter(tmp_path / "ours", tmp_path / "base")
    tokenizer_of("wordpiece").save_pretrained(tmp_path / "base")
    model.__dict__["_ptune_source"] = (str(tmp_path / "ours"), {"revision": None, "local_files_only": True})
    write_repository(model, tmp_path / "pushed", "user/adapter")
    assert "<user>" in AutoTokenizer.from_pretrained(tmp_path / "pushed").get_vocab()
    model.__dict__["_ptune_source"] = (str(tmp_path / "gone"), {})
    write_repository(model, tmp_path / "other", "user/adapter")
    assert "<user>" not in AutoTokenizer.from_pretrained(tmp_path / "other").get_vocab()


def test_convert_takes_the_base_s_tokenizer_where_the_adapter_s_is_damaged(tmp_path: Path) -> None:
    write_adapter(tmp_path / "ours", tmp_path / "base")
    tokenizer_of("wordpiece").save_pretrained(tmp_path / "base")
    (tmp_path / "ours" / "tokenizer.json").write_text("{")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "new")]) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "new")) == len(AutoTokenizer.from_pretrained(tmp_path / "base"))


def test_a_failed_convert_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "ours", tmp_path / "base", method="prompt_tuning", template="{text} [P2] [MASK]")
    for path in (tmp_path / "ours").glob("token*"):
        path.unlink()
    tokenizer_of("wordpiece").save_pretrained(tmp_path / "base")  # which gives virtual tokens other ids
    for form in ("hf_ptune", "peft", "prompt_embeds"):
        assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "new"), "--to", form]) == 2
        assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "new").exists()


def test_convert_makes_the_folder_of_a_file(tmp_path: Path) -> None:
    write_adapter(tmp_path / "ours", tmp_path / "base", method="prompt_tuning", pooling="cls")
    target = tmp_path / "a" / "b" / "prompt.pt"
    assert main(["convert", str(tmp_path / "ours"), str(target), "--to", "prompt_embeds"]) == 0
    assert torch.load(target).shape[0] == 2


def test_info_takes_what_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration without geometry, which is watched anew on loading, and facts of no run."""
    write_adapter(tmp_path / "ours", tmp_path / "base")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    del config["geometry"]
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    (tmp_path / "ours" / "run_facts.json").write_text('{"method": "p_tuning", "task": "FOO"}')
    AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    assert main(["info", str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "task: MASKED_LM\n" in said and "metrics: not known" in said and "task is 'FOO'" in said


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_info_does_without_a_base_that_is_not_there(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "package:no_such_package/tiny"
    config = PTuneConfig(method=method, num_virtual_tokens=2, base_model_name_or_path=base)
    get_ptune_model(build("llama"), config).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"base: {base}" in told and ("are not at hand" in told) == (method == "prompt_tuning")


def test_info_of_a_folder_without_an_adapter_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert f"error: {tmp_path} holds no adapter (" in capsys.readouterr().err


def test_info_says_what_a_peft_folder_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "ours", tmp_path / "base")
    folder = tmp_path / "of peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert main(["info", str(folder)]) == 2
    assert f"an adapter of PEFT's, not one of this package. To have it as one: hf-ptune convert '{folder}'" in (
        capsys.readouterr().err
    )
