"""Hostile overrides: each is taken, or refused in one line before any weights load."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_forked
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dpo_sd import train
from dpo_sd.composition.schema import CONF_DIR

VALUES = (
    *("", "null", "-1", "0", "0.5", "-0.0", "1e300", "1e-300", "nan", "inf", "1e11", "true", "99999999", "1" * 20),
    *("x" * 300, "'..'", "'  '", "é€", "'a\0b'", "'a\udcff'", "'${x}'", "'${'", "/nowhere/at/all", "/dev/null"),
    *("[]", "[1,2]", "[{a:1}]", "{a:1}", "{_target_: os.getcwd}"),
)
OTHERS = (
    *("+callbacks.a=1", "+callbacks.a._target_=os.getcwd", "+callbacks.a._target_=nowhere.at.all", "callbacks=[1]"),
    *("+logger.a._target_=os.getcwd", "+logger.a._target_=os.nowhere", "+logger.a=1", "logger=[1]", "logger=../../x"),
    *("+x=1", "~model", "~seed", "+model=[sd15]", "hydra.run.dir=[1]", "+hydra.callbacks.a._target_=os.nowhere"),
    *("hydra/launcher=nowhere", "sweep=[1]", "model.path=''", "experiment=../../x", "=", "a", "a.b.c=1", "++=1"),
)
BASE = ("experiment=quickstart", "data.n_pairs=8", "data.n_validation=2", "pairs_per_update=4", "trainer.max_steps=2")


def settings() -> Iterator[str]:
    """All settings and groups of a training, by their dotted names."""

    def below(node: dict, prefix: str) -> Iterator[str]:
        for name, value in node.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict):
                yield from below(value, f"{prefix}{name}.")

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield from below(OmegaConf.to_container(compose("train", [*BASE]), resolve=False), "")  # type: ignore[arg-type]


def hostile(n: int) -> list[str]:
    dice = random.Random(0)
    every = [f"{name}={value}" for name in settings() for value in VALUES]
    return [*OTHERS, *dice.sample(every, n)]


@pytest.mark.parametrize("n", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_hostile_overrides_end_in_one_line_each(tmp_path, n):
    overrides = hostile(n)

    def work() -> None:
        def loaded(*arguments: object) -> None:
            raise SystemExit(0)

        train.loaded = loaded  # type: ignore[assignment]
        for override in overrides:
            GlobalHydra.instance().clear()
            os.environ.pop("HYDRA_FULL_ERROR", None)
            logging.getLogger().handlers.clear()
            places = [f"cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}"]
            sys.argv = ["train", *BASE, *places, override]
            print(json.dumps({"override": override}), file=sys.stderr, flush=True)
            try:
                train.main()
            except SystemExit as end:
                print(json.dumps({"code": end.code}), file=sys.stderr, flush=True)

    ended = run_forked(work, tmp_path, 500)
    assert ended.code == 0, ended.err[-2000:]
    bad, said = [], []
    override = ""
    for line in ended.err.splitlines():
        if line.startswith('{"override"'):
            override, said = json.loads(line)["override"], []
        elif line.startswith('{"code"'):
            code, errors = json.loads(line)["code"], [each for each in said if each.startswith("error: ")]
            if code not in (0, 1) or (code == 1 and len(errors) != 1) or any("Traceback" in each for each in said):
                bad.append((override[:80], code, said[-1:]))
        else:
            said.append(line)
    assert bad == []
    assert not list(Path(tmp_path).glob("run/*.ckpt"))
