"""scripts/slurm.sh with fake srun and scontrol: a signalled job is requeued and continued, a failed one is not."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from osp.config import Config
from osp.data.manifest import load_manifest, save_manifest
from osp.data.prepare import prepare
from osp.files import lock
from tests.conftest import ROOT, free_port, losses, overrides_of

SCRIPT = ROOT / "scripts" / "slurm.sh"
# Two tasks. With SIGNALLED=yes they receive SIGUSR1 after a few steps, as from SLURM shortly before the time limit.
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=0 ]] || exit 99
shift
[[ $SIGNALLED == early ]] && exit 138 # the exit status of a task that SIGUSR1 ended
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
if [[ $SIGNALLED == yes ]]; then
    until grep -qs '"step": 3' run/metrics.jsonl; do sleep 0.05; done
    kill -USR1 "${pids[@]}"
fi
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >> scontrol.log; fi
"""

JOB_ID = str(free_port(20_000, 32_000) - 20_000)  # the script derives the port of the ranks from it

Tiny = Callable[..., Config]


@pytest.fixture
def submit(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`submit(*overrides)`: run the job of sbatch on this host, in a folder laid out like the repository."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def job(*overrides: str, signalled: str = "no") -> subprocess.CompletedProcess[str]:
        path = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        environment = {
            **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NODELIST": "here",
            "SIGNALLED": signalled,
        }
        return subprocess.run(
            ["bash", str(SCRIPT), *overrides],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )

    return job


@pytest.mark.timeout(900)  # two jobs of two ranks
def test_signalled_job_is_requeued_and_the_next_one_completes_the_run(
    submit: Callable[..., subprocess.CompletedProcess[str]], tiny: Tiny, tmp_path: Path
) -> None:
    """The first job has the text of 3 steps, so it is signalled before its end on any machine."""
    quick = ("eval.every=0", "eval.tokens=64", "eval.sample_tokens=0", "checkpoint.every=0")
    job = tiny("train.steps=8", *quick, f"data.cache_dir={tmp_path / 'shards'}", "data.shard_tokens=1000")
    folder, config = prepare(job.data, job.tokenizer, progress=False), overrides_of(job)
    whole = load_manifest(folder)
    with lock(folder):  # a preparation seems to run
        part = dataclasses.replace(whole.train, shards=whole.train.shards[:1])
        save_manifest(dataclasses.replace(whole, train=part, complete=False), folder)
        first = submit(*config, signalled="yes")
        save_manifest(whole, folder)
    assert first.returncode == 0, first.stderr
    requeued = (tmp_path / "scontrol.log").read_text()
    assert requeued == f"requeue {JOB_ID}\n", first.stderr
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert stopped["reason"] == "SIGUSR1"
    assert stopped["step"] == 3
    second = submit(*config)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "scontrol.log").read_text() == requeued
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["reason"] == "complete"
    assert f"continuing after step {stopped['step']}" in second.stderr
    assert len(losses(tmp_path / "run")) == 8


def test_failed_job_is_not_requeued(
    submit: Callable[..., subprocess.CompletedProcess[str]], tiny: Tiny, tmp_path: Path
) -> None:
    """Not even if the marker of an earlier job, which a signal stopped, still exists."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stopped.json").write_text('{"reason": "SIGUSR1"}')
    done = submit(*overrides_of(tiny('data.paths=["nowhere.jsonl"]', f"data.cache_dir={tmp_path / 'shards'}")))
    assert done.returncode == 2, done.stderr
    assert "nowhere.jsonl" in done.stderr
    assert not (tmp_path / "scontrol.log").exists()


def test_job_signalled_before_its_first_step_is_requeued(
    submit: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = submit(f"run.dir={tmp_path / 'run'}", signalled="early")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {JOB_ID}\n"
