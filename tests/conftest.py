"""Whole commands in forked processes: all of a run but the ten seconds that its imports take."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

if TYPE_CHECKING:
    from twins import SingleFile

# of tiny runs: what they learn and draw matters to no test
SMALL = (
    "data.n_pairs=8",
    "data.n_validation=2",
    "pairs_per_update=4",
    "hardware.micro_batch=4",
    "trainer.max_steps=6",
    "trainer.validate_every=3",
    "sampler.steps=2",
    "callbacks.samples.n_prompts=2",
    "callbacks.verdict.n_prompts=4",
    "callbacks.checkpoint.every=2",
)


class Ended(NamedTuple):
    """code: of the exit; the negative signal where one killed the process."""

    code: int
    out: str
    err: str


def run_forked(work: Callable[[], object], folder: Path, timeout: float = 500) -> Ended:
    """Call `work` in a copy of this process, as if it were a command: `SystemExit` and exceptions become exit codes.

    What `work` changes, patches included, ends with the copy. Output is kept in `folder`.
    """
    paths = [folder / f"{name}-{time.monotonic_ns()}" for name in ("out", "err")]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, path in enumerate(paths, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (
                os.fdopen(1, "w", buffering=1),
                os.fdopen(2, "w", buffering=1, errors="backslashreplace"),
            )
            torch.set_num_threads(1)  # the threads of OpenMP are not copied: work shared out to them would never end
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # neither pytest's own end nor anything else that the copy has inherited
    deadline = time.monotonic() + timeout
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError("\n".join(path.read_text() for path in paths))
        time.sleep(0.02)
    out, err = (path.read_text(errors="replace") for path in paths)
    return Ended(os.waitstatus_to_exitcode(status), out, err)


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`twin("sdxl")`: the diffusers folder of a small model of random weights with all that is particular to a family.

    For tests that change nothing in it.
    """
    from twins import make_folder

    folder = tmp_path_factory.mktemp("twins")

    @functools.cache
    def twin(family: str) -> Path:
        return make_folder(folder / family, family)

    return twin


@pytest.fixture(scope="session")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SingleFile]:
    """`single_file("sd15")`: the same as one file in Stability's layout."""
    from twins import make_single_file

    folder = tmp_path_factory.mktemp("single")

    @functools.cache
    def single_file(family: str) -> SingleFile:
        (folder / family).mkdir()
        return make_single_file(folder / family, family)

    return single_file


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """`command(*arguments, patch=f)`: `python -m dpo_sd.train *arguments` in a forked process that calls f() first.

    `program="generate"` or `"annotate"` is another command.
    """
    import diffusers
    import transformers

    # what they import when they are first asked for
    _ = diffusers.StableDiffusionPipeline, diffusers.DPMSolverMultistepScheduler, transformers.CLIPTextModel
    folder = tmp_path_factory.mktemp("output")

    def command(
        *arguments: str, patch: Callable[[], object] = lambda: None, timeout: float = 500, program: str = "train"
    ) -> Ended:
        def work() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which pytest-xdist's processes ignore
            os.chdir(folder)
            sys.argv = [program, *arguments]
            patch()
            importlib.import_module(f"dpo_sd.{program}").main()

        return run_forked(work, folder, timeout)

    return command


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """`small(folder, *overrides)`: the arguments of a tiny run in that folder; all of them share one cache."""
    cache = tmp_path_factory.mktemp("cache")

    def small(folder: Path, *overrides: str) -> list[str]:
        return [*SMALL, f"cache_dir={cache}", f"hydra.run.dir={folder}", *overrides]

    return small


@pytest.fixture(scope="session")
def train(command: Callable[..., Ended], small: Callable[..., list[str]]) -> Callable[..., Ended]:
    """`train(folder, *overrides, patch=f)`: that run, in a forked process; `without` leaves out small settings."""

    def train(folder: Path, *overrides: str, without: tuple[str, ...] = (), **options: object) -> Ended:
        arguments = [each for each in small(folder) if not each.startswith(without)] if without else small(folder)
        return command(*arguments, *overrides, **options)

    return train
