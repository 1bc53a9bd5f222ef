"""Runs commands on the pretended card, each in a fork: `python run.py <folder>`, which holds commands.json.

commands.json has lists of words by a name; `<name>.json` then says how each ended, and what was copied and waited for.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import card

folder = Path(sys.argv[1])


def run(name: str, words: list[str]) -> None:
    program, *sys.argv[1:] = words
    code: object = 0
    with (folder / f"{name}.txt").open("w", buffering=1, errors="backslashreplace") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        try:
            importlib.import_module(f"dpo_sd.{program}").main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
    (folder / f"{name}.json").write_text(json.dumps({"code": code or 0, "copies": card.copies, "waits": card.waits}))


card.insert()
import diffusers  # noqa: E402  # once for all forks
import lightning  # noqa: E402, F401
import transformers  # noqa: E402

_ = diffusers.StableDiffusionPipeline, diffusers.DPMSolverMultistepScheduler, transformers.CLIPTextModel
for name, words in json.loads((folder / "commands.json").read_text()).items():
    child = os.fork()
    if not child:
        try:
            run(name, words)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
