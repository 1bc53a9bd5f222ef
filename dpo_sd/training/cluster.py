"""Jobs of a scheduler: one run folder for all processes and restarts of a job, and the way back into the queue."""

from __future__ import annotations

import os
import re
import signal
import subprocess

# Slurm sends this before it takes a machine away, when asked to: sbatch --signal=USR1@90
PREEMPTED = signal.SIGUSR1
_NO_STEP = 2**32 - 16  # Slurm's numbers from here on are batch scripts and shells, where many commands run


def in_slurm() -> bool:
    """Whether this process is part of a Slurm job."""
    return "SLURM_JOB_ID" in os.environ


def run_id() -> str | None:
    """Name of a launch, alike in all its processes, and in its restarts under srun; None outside of Slurm and torchrun.

    It has the numbers of Slurm's job and of srun's step in it, and the name or the process of torchrun.
    """
    job, step, torchrun = (os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"))
    if _number("SLURM_STEP_ID") >= _NO_STEP:
        step = None
    if torchrun == "none":  # it was given no name; its processes on one machine have one parent, and srun starts others
        torchrun = None if step else f"torchrun-{os.getppid()}"
    return re.sub(r"[^\w.-]", "_", ".".join(part for part in (job, step, torchrun) if part)).lstrip(".") or None


def _number(name: str) -> int:
    """The number in a variable of the environment; 0 where there is none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def restarted() -> bool:
    """Whether this job ran before and was put back into the queue."""
    return any(_number(name) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def first_process() -> bool:
    """Whether this process speaks for all that train together."""
    return all(_number(name) == 0 for name in ("RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID"))


def local_rank() -> int:
    """Number of this process among those on this machine, from torchrun or Lightning, or else from Slurm's srun."""
    return _number("LOCAL_RANK" if "LOCAL_RANK" in os.environ else "SLURM_LOCALID")


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
