"""Settings of each method where neither recipe nor preset says otherwise."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Defaults:
    """Hold what a method starts with.

    Args:
        options: fields of PTuneConfig.
        training: fields of TrainingArguments.
        source: where the numbers are from.
        head_learning_rate: that of the task's head beside the learning rate; the same when unset.
    """

    options: dict[str, Any]
    training: dict[str, Any]
    source: str
    head_learning_rate: float | None = None


_PROMPT: dict[str, Any] = {
    "num_virtual_tokens": 20,
    "prompt_tuning_init": "AUTO",
    "prefix_dropout": 0.0,
    "pooling": "auto",
    "head_states": "auto",
    "head_window": "auto",
}
# passes over the rows after which a prompt fits them too well beside a base without dropout, and heads that tag tokens
# are better off with the last layer than with a mix of all
_FEW_EPOCHS = 5
# the one table that measurements will change; `source` says what each row rests on
_DEFAULTS: dict[str, Defaults] = {
    "p_tuning_v2": Defaults(
        _PROMPT,
        {"learning_rate": 4e-2, "lr_scheduler_type": "linear", "warmup_steps": 0.06, "weight_decay": 0.0},
        "validation with MiniLM, one seed, at 2e-2, 4e-2 and 8e-2: TREC .910, .915, .902, SST-2 .848, .853, .868, AG "
        "News .882, .875, .870, banking77 .890, .895, .900, CLINC150 .902, .910, .912; with 8 and 40 tokens TREC .907, "
        ".915, SST-2 .850, .848, AG News .870, .875; with 4,000 and 5,000 rows at 1e-2, 2e-2, 4e-2 and 8e-2 TREC "
        ".928, .928, .935, .933, SST-2 .850, .860, .863, .858. Liu et al. 2022's scripts: 5e-3 to 6e-2. All that with "
        "the base's dropout; test without it and with it, three seeds: TREC .930 and .923, SST-2 .838 and .841, AG "
        "News .866 and .867, banking77 .913 and .906, CLINC150 .887 and .885",
    ),
    "prefix_tuning": Defaults(
        _PROMPT,
        {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 0.06, "weight_decay": 0.0},
        "MiniLM, one seed, validation: TREC .853 at 3e-4, .893 at 1e-3, .865 at 3e-3; SRL F1 .293 with the head, over "
        "the token alone, at 2e-2, .000 with the head at 1e-3, and .000 at 3e-3. Li & Liang 2021 take 5e-5",
        head_learning_rate=2e-2,
    ),
    "prompt_tuning": Defaults(
        _PROMPT,
        {"learning_rate": 1e-1, "lr_scheduler_type": "linear", "warmup_steps": 0.06, "weight_decay": 0.0},
        "TREC with MiniLM, the head reading a trained token, after 2 epochs of 5, validation by seeds: .858, .835, "
        ".848 at 1e-1, .838, .800 at 3e-1, .845 at 3e-2; reading the mean, at 1e-1 TREC .890, SST-2 .820 at the end",
    ),
    "p_tuning": Defaults(
        _PROMPT,
        {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_steps": 0.06, "weight_decay": 0.0},
        "Liu et al. 2021 take 1e-5 to 1e-4 with the base trained too; a frozen base takes more: TREC with MiniLM, one "
        "seed, the head reading a trained token, after 2 epochs of 5: .790 at 3e-3, .855 at 1e-2",
    ),
    "bitfit": Defaults(
        {},
        {"learning_rate": 3e-3, "lr_scheduler_type": "linear", "warmup_steps": 0.06, "weight_decay": 0.0},
        "TREC with MiniLM, one seed, validation: .805 at 1e-3 (the most that Ben Zaken et al. 2022 search), .885 at "
        "3e-3, .878 at 1e-2; .910 at 3e-3 with the head at 2e-2",
        head_learning_rate=2e-2,
    ),
}
# where a kind of task asks for something else, as far as it differs
_OF_TOKENS: dict[str, Defaults] = {
    "p_tuning_v2": Defaults(
        _DEFAULTS["p_tuning_v2"].options,
        _DEFAULTS["p_tuning_v2"].training | {"learning_rate": 8e-2},
        "validation F1 with MiniLM, one seed, 8e-2 and 4e-2: SRL .370 and .365, Broad Twitter .673 and .661, WikiGold "
        ".616 and .610, QA-SRL .444 and .403; test F1 of three seeds, the head reading a token's neighbours and the "
        "token alone: SRL .373 and .363, Broad Twitter .669 and .640, WikiGold .605 and .562, QA-SRL .511 and .462. "
        "The token alone, beside the base's dropout and with unmarked predicates: 8 and 40 tokens Broad Twitter .643 "
        "and .654, WikiGold .557 and .561 (validation); a mix of all layers and the last one under the head SRL .394 "
        "and .305, Broad Twitter .638 and .631, WikiGold .545 and .517; without and with dropout QA-SRL .462 and .352, "
        "Broad Twitter .640 and .638, WikiGold .562 and .545; SRL, validation with and without marks: .353 and .207 (V "
        "not scored)",
    ),
}
_OF_WRITERS: dict[str, Defaults] = {
    "p_tuning_v2": Defaults(
        _DEFAULTS["p_tuning_v2"].options | {"prompt_tuning_init": "SAMPLE_VOCAB"},
        _DEFAULTS["p_tuning_v2"].training | {"learning_rate": 3e-2},
        "SmolLM2-135M, one seed, loss at 3e-2 and 1e-2: E2E after 20 steps 1.71 and 1.79, Alpaca in Chinese after 15 "
        "2.093 and 2.091; at 3e-2, 1e-2 and 3e-3 E2E after 292 steps of 16 rows 1.40, 1.47 and 1.60, Alpaca after 188 "
        "1.75, 1.80 and 1.87; RANDOM starts far from text and ends at 2.30 on E2E after 20",
    ),
    "prompt_tuning": Defaults(
        _DEFAULTS["prompt_tuning"].options | {"prompt_tuning_init": "SAMPLE_VOCAB"},
        _DEFAULTS["prompt_tuning"].training | {"learning_rate": 3e-2},
        "start of Lester et al. 2021; E2E with SmolLM2-135M, one seed, loss after 20 steps: 1.93 at 3e-2, 1.94 at "
        "1e-1; RANDOM 1.99 and 1.96; after 292 steps of 16 rows 1.57 at 3e-2, 1.60 at 1e-2 and 1e-1",
    ),
}
# heads over a decoder, which reads a row from left to right
_OF_DECODERS: dict[str, Defaults] = {
    "p_tuning_v2": Defaults(
        _DEFAULTS["p_tuning_v2"].options,
        _DEFAULTS["p_tuning_v2"].training | {"learning_rate": 2e-2},
        "validation with SmolLM2-135M, one seed, from sampled words, at 1e-2, 2e-2 and 4e-2: TREC .943, .935, .935, "
        "heads reading the token alone WikiGold .690, .675, .658, Broad Twitter .669, .692, .683, SRL .308, .297, "
        ".294; SST-2 at 5e-3, 1e-2 and 2e-2 .865, .870, .878; from RANDOM at the same rates TREC .908, .935, .390, "
        "WikiGold .623, .666, .650, Broad Twitter .627, .610, .654, SRL .211, .211, .259, SST-2 .803, .798, .735",
    ),
    "prompt_tuning": Defaults(
        _DEFAULTS["prompt_tuning"].options,
        _DEFAULTS["prompt_tuning"].training | {"learning_rate": 1e-2},
        "SmolLM2-135M, 512 rows of TREC, 3 epochs, one seed, validation: from sampled words .828 at 1e-2, .623 at "
        "3e-2, .403 at 1e-1; from RANDOM .768, .738 and .533",
    ),
    "prefix_tuning": replace(
        _DEFAULTS["prefix_tuning"],
        training=_DEFAULTS["prefix_tuning"].training | {"learning_rate": 1e-4},
        source="SmolLM2-135M, 512 rows of TREC, 3 epochs, one seed, validation: from sampled words .897 at 1e-4 and "
        ".217 after one epoch at 1e-3; from RANDOM .478 and .260. Li & Liang 2021 take 5e-5",
    ),
}
_PAIRED = {"head_states": "auto_pairs"}
_OF_PAIRS: dict[str, Defaults] = {
    name: replace(found, options=found.options | _PAIRED)
    for name, found in _DEFAULTS.items()
    if "head_states" in found.options
} | {
    "prompt_tuning": Defaults(
        _DEFAULTS["prompt_tuning"].options | _PAIRED,
        _DEFAULTS["prompt_tuning"].training | {"learning_rate": 3e-2},
        "validation with MiniLM, one seed, at 3e-2, 1e-1 and 3e-1: CB .813, .750, .656, BoolQ .607, .587, .593; at "
        "3e-2 and 1e-1 RTE .490, .500",
    ),
    "p_tuning_v2": Defaults(
        _DEFAULTS["p_tuning_v2"].options | _PAIRED,
        _DEFAULTS["p_tuning_v2"].training | {"learning_rate": 2e-2},
        "validation with MiniLM, a mix of all layers and the last one under the mean, three seeds at 4e-2: BoolQ .619 "
        "and .594, CB .792 and .677; the mix at 1e-2, 2e-2, 4e-2 and 8e-2, one seed: BoolQ with 2,000 rows .630, .623, "
        ".567, .567; at 2e-2, 4e-2 and 8e-2 BoolQ with 600 .603, .610, .597, CB .813, .844, .688, RTE .510, .500, "
        ".515. Test at 2e-2 without the base's dropout, three seeds: BoolQ .599, CB .667, RTE .563, with it .599, "
        ".649, and RTE .514 at 8e-2",
    ),
}
_DEFAULTS_OF_TASKS = {
    "TOKEN_CLS": _OF_TOKENS,
    "QUESTION_ANS": _OF_TOKENS,
    "CAUSAL_LM": _OF_WRITERS,
    "SEQ_2_SEQ_LM": _OF_WRITERS,
}
_UNKNOWN_METHOD = Defaults({}, {}, "a method of somebody else's: transformers' own defaults")


def defaults_of(
    method: str, task: str | None = None, pairs: bool = False, epochs: float | None = None, causal: bool = False
) -> Defaults:
    """What a method starts with where nothing else is said.

    Args:
        method: a method of PTuneConfig; one registered elsewhere has none.
        task: a key of `backbone.TASKS`; methods may start otherwise where heads read every token, or text is written.
        pairs: whether every row to be classified has two texts.
        epochs: passes over the rows, where they are known; a prompt that sees them few times starts beside a base
            without dropout, and heads that tag tokens read the last layer where they are many.
        causal: whether the base is a decoder.
    """
    table = _OF_PAIRS if pairs else _DEFAULTS_OF_TASKS.get(task or "", {})
    if causal and table is not _OF_WRITERS:
        table = _OF_DECODERS
    found = table.get(method) or _DEFAULTS.get(method, _UNKNOWN_METHOD)
    if epochs is None or "prompt_tuning_init" not in found.options:
        return found
    if epochs <= _FEW_EPOCHS:
        return replace(found, options=found.options | {"backbone_dropout": False})
    return replace(found, options=found.options | {"head_states": "last"}) if task == "TOKEN_CLS" else found


def list_defaults() -> str:
    """The defaults of each method, and of the tasks and bases that ask for something else."""
    tables = {
        "": _DEFAULTS,
        ", and rows of two texts are classified": _OF_PAIRS,
        ", and tokens are tagged or spans found": _OF_TOKENS,
        ", and a head reads a decoder": _OF_DECODERS,
        ", and language models write text": _OF_WRITERS,
    }
    lines: list[str] = []
    for where, table in tables.items():
        lines += ["", f"where a recipe names no preset and is silent{where}:"]
        for method, found in table.items():
            head = {} if found.head_learning_rate is None else {"head_learning_rate": found.head_learning_rate}
            said = ", ".join(f"{k}={v}" for k, v in (found.options | found.training | head).items())
            lines.append(f"{method:14} {said}\n{'':14} {found.source}")
    return "\n".join(lines)
