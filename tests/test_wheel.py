"""What is installed works where there is no checkout, and answers at once."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import dpo_sd

CHECKOUT = Path(dpo_sd.__file__).parents[1]
SECONDS = 4  # of the processor, which other programs on a busy machine do not stretch as they do the clock's


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=120)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def ask(installed: Path, place: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run Python with the unpacked wheel in an empty folder; also the processor time it took, in seconds."""
    place.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": ""}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{' '.join(arguments)[:60]}: {took:.1f} s of the processor, {wall:.1f} s")
    return ended, took


def test_the_wheel_holds_code_conf_and_assets_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}

    def files(folder: str, pattern: str) -> set[Path]:
        found = (CHECKOUT / folder).rglob(pattern)
        return {file for file in found if file.is_file() and "__pycache__" not in file.parts}

    code = {file.relative_to(CHECKOUT).as_posix() for file in files("dpo_sd", "*.py")}
    assets = {file.relative_to(CHECKOUT).as_posix() for file in files("dpo_sd/assets", "*")}
    conf = {f"dpo_sd/{file.relative_to(CHECKOUT).as_posix()}" for file in files("conf", "*")}
    assert "dpo_sd/conf/experiment/quickstart.yaml" in conf
    assert "dpo_sd/assets/tiny-sd/unet/diffusion_pytorch_model.safetensors" in assets
    assert code | assets | conf <= names
    assert {name for name in names - code - assets - conf if not name.startswith("dpo_sd/")} == set()
    assert not [name for name in names if "test" in Path(name).name or name.endswith((".pyc", ".ckpt", ".partial"))]


def test_outside_of_the_checkout_the_wheel_composes_from_its_own_conf(installed, tmp_path):
    code = (
        "import dpo_sd.composition.schema as s, dpo_sd.models.base as m; print(s.CONF_DIR); print(m.Base('tiny').path)"
    )
    ended, _ = ask(installed, tmp_path, "-c", code)
    assert ended.stdout.split() == [str(installed / "dpo_sd" / place) for place in ("conf", "assets/tiny-sd")]


def test_the_whole_configuration_is_shown_at_once(installed, tmp_path):
    ended, took = ask(installed, tmp_path, "-m", "dpo_sd.train", "experiment=quickstart", "--cfg", "job")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.search(r"^loss:\n  _target_: dpo_sd.losses.DiffusionDPOLoss\n  beta: 2000", ended.stdout, re.MULTILINE)
    assert took < SECONDS
    assert not list(tmp_path.iterdir())


def test_help_comes_at_once(installed, tmp_path):
    ended, took = ask(installed, tmp_path, "-m", "dpo_sd.train", "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "experiment" in ended.stdout and "quickstart" in ended.stdout
    assert took < SECONDS


def test_a_misspelt_key_is_named_at_once(installed, tmp_path):
    ended, took = ask(installed, tmp_path, "-m", "dpo_sd.train", "loss.betta=1")
    assert ended.returncode == 1
    assert "loss.betta: no such setting; did you mean loss.beta?" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert took < SECONDS
    assert not list(tmp_path.iterdir())
