"""The command line: `hf-ptune init`, `run`, `train`, `evaluate`, `sweep`, `presets`, `push`, `card`, `convert`, `info`.

Torch and transformers take seconds to import, so that each command imports what it needs when it runs.
"""

import argparse
import os
import runpy
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import hf_ptune
from hf_ptune.console import let_print
from hf_ptune.overrides import split_overrides

_OVERRIDDEN = ("train", "evaluate", "sweep")  # commands that take changes of a recipe
_OWN = ("--learning-rates", "--lengths", "--seeds", "--folder", "--adapter")  # their own options that take values
_path = os.path.expanduser  # a shell leaves `~` alone in quotes and behind `--option=`
_OVERRIDES = (
    "Further options change the recipe: --key=value or --section.key=value sets any of its keys, as --seed=1 or "
    "--training.learning_rate=1e-2, and --variant=name takes the changes that it has under variants, before all others."
)


class _Later(Collection[str]):
    """Choices that are looked up when one is checked or the help shows them."""

    def __init__(self, names: Callable[[], Sequence[str]]) -> None:
        self._names = names

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


def _methods() -> Sequence[str]:
    from hf_ptune.methods import method_names

    return method_names()


def _tasks() -> Sequence[str]:
    from hf_ptune.backbone import TASKS

    return sorted(TASKS)


def _forms() -> Sequence[str]:
    from hf_ptune.convert import FORMS

    return FORMS


def init(
    base: str,
    method: str,
    folder: str | Path,
    task: str | None = None,
    num_virtual_tokens: int | None = None,
    num_labels: int | None = None,
    revision: str | None = None,
) -> None:
    """Write a folder that any script can train: configuration, fresh adapter and tokenizer.

    Args:
        base: Hub id, local folder, or `package:` name.
        method: a method of PTuneConfig.
        folder: where to write.
        task: a key of `backbone.TASKS`; SEQ_CLS where num_labels is given, else what the base was trained for.
        num_virtual_tokens: P; PTuneConfig's default when unset.
        num_labels: labels of a fresh head; transformers' default when unset.
        revision: a commit or branch of a base on the Hub; the main branch when unset.

    Raises:
        PTuneError: the folder holds files, the task cannot be told, or the base cannot take the method.
    """
    from hf_ptune.adapter_file import mark_fresh
    from hf_ptune.backbone import anchored
    from hf_ptune.configuration_ptune import PTuneConfig
    from hf_ptune.errors import PTuneError
    from hf_ptune.fresh_base import keep_spaces, load_base, load_tokenizer
    from hf_ptune.publishing import fit_tokenizer, save_tokenizer
    from hf_ptune.wrapping import get_ptune_model

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PTuneError(f"{folder} is there already and not empty; name a new folder.")
    options = {} if num_virtual_tokens is None else {"num_virtual_tokens": num_virtual_tokens}
    config = PTuneConfig(method=method, base_model_name_or_path=anchored(base), base_model_revision=revision, **options)
    task = task or ("SEQ_CLS" if num_labels else _task_of_base(base, revision))
    tokenizer = load_tokenizer(base, revision)
    labels = [f"LABEL_{n}" for n in range(num_labels or 0)]
    model = get_ptune_model(load_base(base, task, labels, tokenizer, config, {"revision": revision}), config, tokenizer)
    model.save_pretrained(folder)
    mark_fresh(folder)
    if task == "TOKEN_CLS" and keep_spaces(tokenizer):
        print("the tokenizer puts a space before every word (add_prefix_space=True), as words in a text have it")
    save_tokenizer(tokenizer, folder)
    fit_tokenizer(model, folder)
    model.print_trainable_parameters()
    print(f"written: {folder}. Train it with any script: hf-ptune run SCRIPT --model_name_or_path {folder}")


def _task_of_base(base: str, revision: str | None) -> str:
    from transformers import AutoConfig

    from hf_ptune.backbone import blaming, resolve, task_of_class
    from hf_ptune.errors import BackboneError

    with blaming(base):
        config = AutoConfig.from_pretrained(resolve(base), revision=revision or "main")
    architecture = (config.architectures or [""])[0]
    found = task_of_class(architecture, config.is_encoder_decoder)
    if found not in (None, "FEATURE_EXTRACTION"):  # of a body alone nothing is known
        return found
    if config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    raise BackboneError(f"the task for {base} ({architecture or config.model_type}) is not told; pass --task.")


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a script as its own program, with the Auto classes knowing adapters.

    Args:
        script: path of the script.
        arguments: its own.

    Raises:
        PTuneError: there is no such file.
    """
    from hf_ptune.errors import PTuneError

    if not Path(script).is_file():
        raise PTuneError(f"{script}: there is no such script.")
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def run_sweep(given: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Run the grid that the command line describes, and print its table."""
    from hf_ptune.errors import PTuneError
    from hf_ptune.sweep import command_of, shared_of, sweep
    from hf_ptune.sweep_table import report
    from hf_ptune.train_multitask import read_any_recipe

    recipe = read_any_recipe(given.recipe, overrides)
    folder = Path(given.folder or f"{shared_of(recipe).output_dir}-sweep")
    command = command_of(given.recipe, overrides)
    grid = (given.learning_rates, given.lengths, given.seeds)
    found = sweep(recipe, folder, *grid, command=command, retry=given.retry)
    print(report(found, folder))
    if all(trial.error for trial in found.trials):
        raise PTuneError("no run of the grid succeeded; the table says why.")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="hf-ptune", description="Prompt learning as a part of transformers.")
    parser.add_argument("--version", action="version", version=f"hf_ptune {hf_ptune.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    # --seed is a recipe's, and no short form of --seeds
    add_parser = partial(commands.add_parser, allow_abbrev=False)

    new = add_parser("init", help="write a fresh adapter that any script can train")
    new.add_argument("folder", type=_path, help="folder to write; new or empty")
    new.add_argument("--base", required=True, type=_path, help="Hub id, local folder, or package:<module>/<folder>")
    new.add_argument("--revision", help="a commit or branch of a base on the Hub")
    new.add_argument("--method", required=True, metavar="METHOD", choices=_Later(_methods), help="%(choices)s")
    new.add_argument(
        "--task",
        metavar="TASK",
        choices=_Later(_tasks),
        help="%(choices)s; SEQ_CLS with --num-labels, else what the base is for, when unset",
    )
    new.add_argument("--num-virtual-tokens", type=int, metavar="N")
    new.add_argument("--num-labels", type=int, metavar="N", help="labels of the fresh head")

    script = add_parser("run", help="run a script in which Auto classes know adapters")
    script.add_argument("script", type=_path)
    script.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")

    recipe = add_parser("train", help="train by a recipe", epilog=_OVERRIDES)
    recipe.add_argument("recipe", type=_path, help="a YAML file")

    measured = add_parser("evaluate", help="measure an adapter on a recipe's held-out and test rows", epilog=_OVERRIDES)
    measured.add_argument("recipe", type=_path, help="a YAML file")
    measured.add_argument(
        "--adapter",
        type=_path,
        help="folder or id on the Hub, or the folder around those of several tasks; what the run left when unset",
    )

    grid = add_parser("sweep", help="train by a recipe with several learning rates and lengths", epilog=_OVERRIDES)
    grid.add_argument("recipe", type=_path, help="a YAML file")
    grid.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[],
        metavar="LR",
        help="about 0.1, 0.3, 1 and 3 times training.learning_rate, or the method's own where the recipe names none, "
        "when unset",
    )
    grid.add_argument("--lengths", type=int, nargs="+", default=[], metavar="N", help="numbers of virtual tokens")
    grid.add_argument("--seeds", type=int, nargs="+", default=[], metavar="N", help="the recipe's own when unset")
    grid.add_argument(
        "--folder", type=_path, help="takes results, table and plot; outputs of the recipe with -sweep when unset"
    )
    grid.add_argument("--retry", action="store_true", help="run again what failed before")

    add_parser("presets", help="list published settings and each method's defaults, with their sources")

    push = add_parser("push", help="push a finished adapter folder to the Hub")
    push.add_argument("folder", type=_path)
    push.add_argument("repo_id", help="user/name")
    push.add_argument("--private", action="store_true", default=None)
    push.add_argument("--revision", help="a branch")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--commit-message", default="Upload adapter")
    push.add_argument("--commit-description")

    card = add_parser("card", help="make the model card of a folder again, from the facts of its run")
    card.add_argument("folder", type=_path, help="of an adapter, or what a recipe's run has written")
    card.add_argument("seeds", nargs="*", type=_path, help="folders of the same run with other seeds")
    card.add_argument("--repo-id", help="user/name; the folder's name when unset")

    form = add_parser("convert", help="write an adapter of ours or PEFT's in another form")
    form.add_argument("source", type=_path, help="folder or id on the Hub")
    form.add_argument("target", type=_path, help="folder to write; a file for prompt_embeds")
    form.add_argument("--to", default="hf_ptune", metavar="FORM", choices=_Later(_forms), help="%(choices)s")

    told = add_parser("info", help="say what an adapter is, without loading its base")
    told.add_argument("source", type=_path, help="folder or id on the Hub")
    told.add_argument("--revision")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those of the process when unset.

    Returns:
        The exit code: 0, 2 after an error that has been printed, 130 after an interruption, or 143 after SIGTERM.
    """
    parser = make_parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    overrides: list[str] = []
    if arguments and arguments[0] in _OVERRIDDEN:
        arguments, overrides = split_overrides(arguments, _OWN)
    given, further = parser.parse_known_args(arguments)
    further += overrides
    if further and given.command not in _OVERRIDDEN:
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    from hf_ptune.errors import INTERRUPTED, TERMINATED, PTuneError, Terminated, from_system

    if given.command != "run":  # a script's output is its own affair
        let_print()
    try:
        if given.command == "train":
            from hf_ptune import train, train_multitask

            walk = train_multitask if train_multitask.names_tasks(given.recipe, further) else train
            return walk.main([given.recipe, *further])
        if given.command == "sweep":
            run_sweep(given, further)
        elif given.command == "evaluate":
            from hf_ptune.evaluation import evaluate, evaluate_tasks
            from hf_ptune.train_multitask import MultiTaskRecipe, read_any_recipe

            recipe = read_any_recipe(given.recipe, further)
            if isinstance(recipe, MultiTaskRecipe):
                evaluate_tasks(recipe, given.adapter)
            else:
                evaluate(recipe, given.adapter)
        elif given.command == "run":
            run_script(given.script, given.arguments)
        elif given.command == "presets":
            from hf_ptune.presets import list_presets

            print(list_presets(), flush=True)
        elif given.command == "push":
            from hf_ptune.publishing import push_finished

            names = ("private", "revision", "create_pr", "commit_message", "commit_description")
            print(push_finished(given.folder, given.repo_id, **{k: getattr(given, k) for k in names}))
        elif given.command == "card":
            from hf_ptune.publishing import remake_card

            print(remake_card(Path(given.folder), [Path(s) for s in given.seeds], given.repo_id))
        elif given.command == "convert":
            from hf_ptune.convert import convert

            convert(given.source, given.target, given.to)
            print(f"written: {given.target}")
        elif given.command == "info":
            from hf_ptune.info import describe_adapter

            print(describe_adapter(given.source, revision=given.revision))
        else:
            own = (given.num_virtual_tokens, given.num_labels, given.revision)
            init(given.base, given.method, given.folder, given.task, *own)
    except KeyboardInterrupt as interrupted:
        further_on = "; the same command goes on with the runs that are left" if given.command == "sweep" else ""
        print(f"interrupted{further_on}.", file=sys.stderr)
        return TERMINATED if isinstance(interrupted, Terminated) else INTERRUPTED
    except Exception as error:  # of OSErrors some are the Hub's answers by way of transformers
        if isinstance(error, BrokenPipeError) and given.command in ("presets", "info"):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # who read has gone; the end writes no more
            return 0
        told = error if isinstance(error, (PTuneError, OSError)) else from_system(error)
        if told is None or (given.command == "run" and told is not error):  # a script's errors are its own
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
