"""Train on two ranks until one of them, or the whole job in the middle of a save, is killed."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import on_cpu
from setup_engines import trainer
from torch import distributed
from transformers import TrainerCallback

FATAL = 3  # the step


class Killing(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == FATAL and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, what: str) -> None:
    on_cpu.prepare()
    run = trainer(
        (folder / "bases").resolve(),
        "llama",
        "prefix_tuning",
        folder / what,
        2,
        [Killing()] if what == "rank" else [],
        save_steps=1,
        use_cpu=True,
        ddp_backend="gloo",
    )
    if what == "job":
        save = run._save_optimizer_and_scheduler

        def killing(output_dir: str) -> None:
            save(output_dir)
            if run.state.global_step == FATAL:
                distributed.barrier()
                with suppress(ProcessLookupError):
                    os.kill(os.getppid(), signal.SIGKILL)  # the launcher
                os.kill(os.getpid(), signal.SIGKILL)

        run._save_optimizer_and_scheduler = killing
    run.train()
    on_cpu.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
