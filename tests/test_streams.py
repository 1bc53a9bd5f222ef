"""A terminal, a pipe or an encoding ends no run."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

TALKER = """
import sys, time
from dpo_sd.composition.streams import keep_talking
keep_talking()
for number in range(20):
    print("score 0.5 → 0.6", number, flush=True)
    print("a bar ▌", number, file=sys.stderr)
    time.sleep(0.02)
open(sys.argv[1], "w").write("went on")
"""


@pytest.fixture
def talk(tmp_path):
    """Starts a program that prints much and then writes a file, and returns its output where that is read."""

    def talk(arguments: str = "", **how: str) -> str:
        end = tmp_path / "end"
        end.unlink(missing_ok=True)
        command = f'"{sys.executable}" -c "$TALKER" "{end}" {arguments}'
        done = subprocess.run(
            ["bash", "-c", command], env=os.environ | {"TALKER": TALKER} | how, capture_output=True, check=True
        )  # fmt: skip
        assert end.read_text() == "went on" and b"Traceback" not in done.stderr
        return done.stdout.decode("latin-1")

    return talk


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_nothing(talk, unbuffered):
    assert talk("2>&1 | head -1 && sleep 1", PYTHONUNBUFFERED=unbuffered).startswith("score")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_program_without_streams_goes_on(talk, closed):
    talk(closed)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_what_an_encoding_lacks_is_written_out(talk, encoding):
    assert r"score 0.5 \u2192 0.6 19" in talk(PYTHONIOENCODING=encoding)


def test_a_terminal_that_has_closed_ends_nothing(tmp_path):
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TALKER, str(tmp_path / "end")], stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    os.read(terminal, 10)
    os.close(terminal)
    assert process.wait(60) == 0
    assert (tmp_path / "end").read_text() == "went on"
