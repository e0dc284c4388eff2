"""Who is killed loses nothing that a checkpoint holds, and nobody waits for the dead."""

import signal
import subprocess
from pathlib import Path

import pytest
from launch import command, environment
from setup_engines import save_bases, trainer

from hf_ptune.engines import is_whole, last_checkpoint
from hf_ptune.errors import PTuneError

HERE = Path(__file__).parent


@pytest.mark.parametrize("what", ["rank", "job"])
def test_killed_while_training(what: str, tmp_path: Path) -> None:
    save_bases(tmp_path / "bases", ["llama"])
    done = subprocess.run(
        command("ddp", [HERE / "crash.py", tmp_path, what]),
        env=environment("ddp"),
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    if what == "rank":
        assert done.returncode == 1 and "SIGKILL" in done.stderr and "rank      : 1" in done.stderr
    else:
        assert done.returncode == -signal.SIGKILL
    last = last_checkpoint(tmp_path / what)
    assert last == str(tmp_path / what / "checkpoint-2")
    run = trainer(tmp_path / "bases", "llama", "prefix_tuning", tmp_path / what, 1, use_cpu=True, save_strategy="no")
    unfinished = tmp_path / what / "checkpoint-3"
    if what == "job":
        assert (unfinished / "model.safetensors").is_file() and not is_whole(unfinished)
        with pytest.raises(PTuneError, match="checkpoint-2"):
            run.train(resume_from_checkpoint=str(unfinished))
    run.train(resume_from_checkpoint=True)
    assert [e["step"] for e in run.state.log_history if "loss" in e] == [1, 2, 3, 4]
