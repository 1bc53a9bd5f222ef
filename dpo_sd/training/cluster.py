"""Jobs of a scheduler: one run folder for all processes and restarts of a job, and the way back into the queue."""

from __future__ import annotations

import os
import signal
import subprocess

# Slurm sends this before it takes a machine away, when asked to: sbatch --signal=USR1@90
PREEMPTED = signal.SIGUSR1


def in_slurm() -> bool:
    """Whether this process is part of a Slurm job."""
    return "SLURM_JOB_ID" in os.environ


def run_id() -> str | None:
    """Number that all processes and restarts of a Slurm or torchrun job share; None outside of a job."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    return None if job in (None, "", "none") else job


def restarted() -> bool:
    """Whether this job ran before and was put back into the queue."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def first_process() -> bool:
    """Whether this process speaks for all that train together."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def local_rank() -> int:
    """Number of this process among those on this machine, from torchrun or Lightning, or else from Slurm's srun."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def launched() -> bool:
    """Whether a launcher starts the processes on other machines too."""
    return in_slurm() or "TORCHELASTIC_RUN_ID" in os.environ or "MASTER_ADDR" in os.environ


def requeue() -> str:
    """Puts this Slurm job back into the queue, and returns a line on whether that worked."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"job {job} could not be put back into the queue: {error}"
    if done.returncode:
        return f"job {job} could not be put back into the queue: {done.stderr.strip()}"
    return f"job {job} is in the queue again and goes on from here"
