"""Train, save, resume, evaluate and generate on an engine; each rank writes what it found."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import on_cpu
from setup_engines import adapter, generated, rows, scores, trainer

from hf_ptune import GuardCallback, MemoryCallback
from hf_ptune.engines import engine_name

# an engine has to be there before it can predict, and only training makes one
GENERATING: dict[str, Any] = {
    "predict_with_generate": True,
    "max_steps": 1,
    "learning_rate": 0.0,
    "save_strategy": "no",
}
FAMILY, METHOD = "llama", "prefix_tuning"


def counts(output: Any) -> dict[str, float]:
    """What reaches the metrics, so that a row that is counted twice is seen."""
    return {"rows": len(output.label_ids), "sum": float(output.label_ids.sum())}


def main(folder: Path) -> None:
    on_cpu.prepare()
    settings = {"ddp_backend": "gloo", "use_cpu": "DS_ACCELERATOR" not in os.environ}
    bases = (folder / "bases").resolve()
    found: dict[str, Any] = {}

    def make(name: str, family: str = FAMILY, method: str = METHOD, **further: Any) -> Any:
        watching = [GuardCallback(), MemoryCallback()] if name == "whole" else []
        return trainer(bases, family, method, folder / name, 2, watching, **(settings | further))

    run = make("whole", compute_metrics=counts)
    model = run.model
    found["split_when_loaded"] = sum(p.numel() for p in model.backbone.parameters()) == 0
    run.train()
    found["wrapper"] = [c.__name__ for c in type(run.model_wrapped).__mro__]
    found["world"], found["engine"] = run.args.world_size, engine_name()
    found["local"] = sum(
        (p.ds_tensor if hasattr(p, "ds_id") else p.to_local() if hasattr(p, "to_local") else p).numel()
        for p in model.backbone.state_dict(keep_vars=True).values()
    )
    found["whole"] = adapter(run)
    found["log"] = run.state.log_history
    found["evaluation"] = run.evaluate()

    run = make("resumed")
    run.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    found["resumed"] = adapter(run)

    run = make("from_one")
    run.train(resume_from_checkpoint=str(folder / "alone" / "checkpoint-2"))
    found["from_one"] = adapter(run)

    run = make(
        "best",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        save_only_model=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the loss falls with every step, so that the last one is not the best
        rows_=rows(FAMILY)[:4],
    )
    run.train()
    found["best_step"] = run.state.best_global_step
    found["best"] = adapter(run)
    found["best_loss"] = [run.state.best_metric, run.evaluate()["eval_loss"]]

    # FSDP2 of torch 2.13 refuses T5, whose embeddings are tied three ways, with or without a prompt
    family = "llama" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "t5"
    run = make("generated", family, "p_tuning", **GENERATING)
    run.train()
    found["generated"] = generated(run, family)
    found["scores"] = scores(run, family)
    (folder / f"rank{run.args.process_index}.json").write_text(json.dumps(found))
    on_cpu.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
