"""From a wrapped model to a folder that a stranger can load, and from there to the Hub."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import logging

from hf_ptune.adapter_file import ADAPTER_FOLDER, WEIGHTS_NAME, staged
from hf_ptune.backbone import TASKS, is_hub_id, read_tokenizer
from hf_ptune.cards import CARD_NAME, CURVES_NAME, FACTS_NAME, RunFacts, draw_curves, make_card, merge_seeds
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import PTuneError, naming, shorten
from hf_ptune.facts import facts_of, is_local, source_of
from hf_ptune.hub import adapter_files, commit_of, license_of, push_folder
from hf_ptune.pinning import UNPINNED
from hf_ptune.position_tables import positions_of_prompt, token_room
from hf_ptune.templates import name_virtual_tokens
from hf_ptune.tokenization import has_tokenizer

logger = logging.get_logger(__name__)
SHIM = "modeling_hf_ptune"
_NAMED = re.compile(r'(?:model=|from_pretrained\()"([^"]+)"')  # in a card's snippet


def write_repository(
    model: Any,
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    tokenizer: Any = None,
    keep_encoder: bool = False,
    facts: RunFacts | None = None,
    state_dict: dict[str, Tensor] | None = None,
    token: str | bool | None = None,
) -> Path:
    """Write everything that a repository of an adapter holds.

    Args:
        model: a wrapped model.
        folder: made where it is missing.
        repo_id: where it will be; the card names it.
        tokenizer: when unset, that of the folder or repository that the model was loaded from, or else the base's.
        keep_encoder: keep the reparameterisation, so that training can go on; else the prompt is flattened.
        facts: of the run; what the model itself tells when unset.
        state_dict: see `finish_folder`.
        token: for where the model was loaded from.

    Returns:
        The folder.
    """
    folder = Path(folder)
    if tokenizer is None:
        source, hub = source_of(model, token)
        tokenizer = tokenizer_of(model.config, source, **hub)
    if tokenizer is not None:
        name_virtual_tokens(model.config, tokenizer)
        save_tokenizer(tokenizer, folder)
    return finish_folder(model, folder, repo_id, keep_encoder=keep_encoder, facts=facts, state_dict=state_dict)


def finish_folder(
    model: Any,
    folder: Path,
    repo_id: str,
    *,
    keep_encoder: bool = False,
    facts: RunFacts | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> Path:
    """Write adapter, shim, facts and card into a folder that may hold a tokenizer already, which is fitted to it.

    Args:
        model: a wrapped model.
        folder: made where it is missing.
        repo_id: where it will be.
        keep_encoder: see `write_repository`.
        facts: see `write_repository`.
        state_dict: the adapter's tensors, where ranks hold parts of them and this rank alone writes.

    Returns:
        The folder.
    """
    model.save_pretrained(folder, flatten=not keep_encoder, state_dict=state_dict)
    fit_tokenizer(model, folder)
    add_shim(folder, type(model).task)
    facts = facts or facts_of(model, folder, state_dict)
    facts.adapter_bytes = (folder / WEIGHTS_NAME).stat().st_size
    facts.save(folder)
    _write_card(facts, folder, repo_id)
    return folder


def _write_card(facts: RunFacts, folder: Path, repo_id: str) -> None:
    """Put card and curves in the place of older ones, which may be links into the Hub's cache, whose files stay."""
    with staged(folder) as aside:
        with naming(aside / CURVES_NAME):
            curves = draw_curves(facts, aside / CURVES_NAME)
        with naming(aside / CARD_NAME):
            make_card(facts, repo_id, curves).save(aside / CARD_NAME)


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write a tokenizer into a folder, in the place of an older one when all its files are on the disk.

    Args:
        tokenizer: of transformers.
        folder: made where it is missing.
    """
    with staged(folder) as aside:
        tokenizer.save_pretrained(aside)


def fit_tokenizer(model: Any, folder: Path) -> None:
    """Let the tokenizer in a folder cut texts to what the prompt leaves of the base's positions, where it takes some.

    Args:
        model: a wrapped model.
        folder: has a tokenizer, or none.
    """
    path, room = folder / TOKENIZER_CONFIG_FILE, token_room(model)
    if room is None or not positions_of_prompt(model) or not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if (settings.get("model_max_length") or room + 1) <= room:
        return
    text = json.dumps(settings | {"model_max_length": room}, indent=2, sort_keys=True, ensure_ascii=False)
    with staged(folder) as aside, naming(aside / path.name):
        (aside / path.name).write_text(text + "\n", encoding="utf-8")


def add_shim(folder: Path, task: str) -> None:
    """Let transformers find the classes without an import of this package, for those who trust remote code."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config["architectures"][0]
    config["auto_map"] = {"AutoConfig": f"{SHIM}.PTuneConfig", TASKS[task].__name__: f"{SHIM}.{name}"}
    with staged(folder) as aside:
        (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (aside / f"{SHIM}.py").write_text(
            '"""Loads with `trust_remote_code=True`; needs `pip install hf_ptune`."""\n\n'
            f"from hf_ptune import PTuneConfig, {name}\n\n"
            f'__all__ = ["PTuneConfig", "{name}"]\n',
            encoding="utf-8",
        )


def remake_card(folder: Path, seeds: list[Path], repo_id: str | None = None) -> Path:
    """Make a folder's card again from the facts of its run.

    Args:
        folder: of an adapter, with the facts, which gets the card; or the output folder of a recipe's run, which stands
            for the one in it.
        seeds: folders of the same run with other seeds, likewise.
        repo_id: where the adapter is; the name of `folder` when unset.

    Returns:
        The card.

    Raises:
        PTuneError: a folder without facts, or facts of another run.
    """
    name = folder.resolve().name
    folder, *seeds = (_finished_in(f) for f in (folder, *seeds))
    facts = merge_seeds([RunFacts.load(f) for f in (folder, *seeds)])
    _write_card(facts, folder, repo_id or name)
    return folder / CARD_NAME


def _finished_in(folder: Path) -> Path:
    """The folder of an adapter; in the output folder of a recipe's run, which has facts but no weights, the one there.

    A push finishes the output folder itself.
    """
    inner = folder / ADAPTER_FOLDER
    return inner if (inner / FACTS_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file() else folder


def push_finished(folder: str | os.PathLike[str], repo_id: str, **push: Any) -> str:
    """Push a finished folder, or one that a Trainer wrote, with a card made for where it goes; the folder stays.

    Args:
        folder: see `hub.push_folder`.
        repo_id: `user/name`.
        push: see `hub.push_folder`.

    Returns:
        The address of the repository.

    Raises:
        AdapterFileError: the folder holds no adapter.
        ConfigError: it holds another model.
        HubError: the Hub refused, or could not be reached.
    """
    adapter_files(folder)  # else nothing is to be made
    settings, _ = PTuneConfig.get_config_dict(folder)
    _tell_of_base(settings.get("base_model_name_or_path"), f"base_model_name_or_path in {folder}/config.json")
    with tempfile.TemporaryDirectory(prefix="hf_ptune-") as aside:
        made = _made_for(repo_id, Path(folder), Path(aside), push.get("token"))
        return push_folder(folder, repo_id, instead={path.name: path for path in made}, **push)


def _made_for(repo_id: str, folder: Path, aside: Path, token: str | bool | None) -> list[Path]:
    """Write aside what a folder with the facts of a run lacks, and its card for another repository."""
    try:
        facts = RunFacts.load(folder)
    except PTuneError as error:
        if (folder / FACTS_NAME).exists():
            logger.warning(f"the card is pushed as it is: {error}")
        return []
    if not (folder / CARD_NAME).exists():
        facts.adapter_bytes = (folder / WEIGHTS_NAME).stat().st_size
        inherit_license(facts, token).save(aside)
        make_card(facts, repo_id, draw_curves(facts, aside / CURVES_NAME)).save(aside / CARD_NAME)
        if not (folder / f"{SHIM}.py").exists():
            shutil.copy(folder / "config.json", aside)
            add_shim(aside, facts.task)
        return list(aside.iterdir())
    text = (folder / CARD_NAME).read_text(encoding="utf-8", errors="replace")
    named = _NAMED.search(text)
    curves = CURVES_NAME if (folder / CURVES_NAME).exists() else None
    if named is None or named[1] == repo_id:
        return []
    if str(make_card(facts, named[1], curves)) != text:  # of several seeds, or edited
        logger.warning(
            f"{CARD_NAME} names {named[1]}, not {repo_id}, and is pushed as it is, since it is not what {FACTS_NAME} "
            f"makes. To make it again: hf-ptune card {folder} [FOLDERS OF OTHER SEEDS] --repo-id {repo_id}"
        )
        return []
    make_card(facts, repo_id, curves).save(aside / CARD_NAME)
    return [aside / CARD_NAME]


def publish(model: Any, repo_id: str, *, tokenizer: Any = None, keep_encoder: bool = False, **push: Any) -> str | None:
    """Write a repository and push it; only the first of several ranks does.

    Args:
        model: a wrapped model.
        repo_id: `user/name`.
        tokenizer: see `write_repository`.
        keep_encoder: see `write_repository`.
        push: see `hub.push_folder`.

    Returns:
        The address of the repository; `None` on other ranks, which do not wait.

    Raises:
        HubError: the push failed; the folder is kept, and named.
    """
    token = push.get("token")
    tensors = model.adapter_state_dict()  # where ranks hold parts, all of them come here
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return None
    base = model.config.base_model_name_or_path
    on_hub = _tell_of_base(base, "model.config.base_model_name_or_path")
    if base is not None and on_hub and model.config.base_model_revision is None:
        if model.__dict__.get(UNPINNED) and model.backbone.name_or_path == base:
            logger.warning(
                f"the adapter does not pin a commit of {base}: which one its base was loaded from is not known. Set "
                "model.config.base_model_revision before pushing."
            )
        else:
            model.config.base_model_revision = commit_of(base, token=token)
    folder = Path(tempfile.mkdtemp(prefix="hf_ptune-"))
    facts = inherit_license(facts_of(model, state_dict=tensors, token=token), token)
    write_repository(
        model,
        folder,
        repo_id,
        tokenizer=tokenizer,
        keep_encoder=keep_encoder,
        facts=facts,
        state_dict=tensors,
        token=token,
    )
    url = push_folder(folder, repo_id, **push)
    shutil.rmtree(folder)
    return url


def _tell_of_base(base: str | None, where: str) -> bool:
    """Warn of a base that others lack, or have only with a package; whether it is on the Hub.

    Args:
        base: its name.
        where: the place that says so, for messages.
    """
    if base is None or is_local(base):
        logger.warning(
            f"the adapter's base is a folder of this machine, which nobody else has. Set {where} to its id on the Hub "
            "before pushing."
        )
        return False
    if base.startswith("package:"):
        logger.warning(
            f"the adapter's base is {base}: whoever loads the adapter needs that package installed. Where the Hub has "
            f"the same base, set {where} to its id before pushing."
        )
        return False
    return True


def inherit_license(facts: RunFacts, token: str | bool | None = None) -> RunFacts:
    """Take the base's licence where none was given."""
    if facts.license is None and facts.base is not None and is_hub_id(facts.base):
        for name, value in license_of(facts.base, token).items():
            setattr(facts, name, value)
    return facts


def tokenizer_of(config: PTuneConfig, source: str | os.PathLike[str] | None = None, **hub: Any) -> Any:
    """The tokenizer of an adapter: its own, or that of the base which its configuration names.

    Args:
        config: of the adapter.
        source: folder or Hub id of the adapter, which may have a tokenizer of its own.
        hub: revision, subfolder, token, cache_dir and local_files_only of the source.

    Returns:
        The tokenizer, or `None` with a warning where neither has one.
    """
    if source is not None:
        hub = {k: v for k, v in hub.items() if v is not None}
        try:
            if has_tokenizer(source, **hub):
                return read_tokenizer(os.fspath(source), **hub)
        except Exception as error:  # whatever a damaged file raises, the base has one too
            logger.warning(f"the tokenizer of {source} cannot be read ({shorten(error)}); the base's is taken.")
    base = config.base_model_name_or_path
    if base is None:
        return None
    try:
        return read_tokenizer(base, config.base_model_revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        logger.warning(f"no tokenizer was found beside the base ({shorten(error)}); pass tokenizer=….")
        return None
