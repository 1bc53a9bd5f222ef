"""Weights & Biases: whose login counts, and what happens where its server does not answer."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.errors import AuthenticationError

from dpo_sd.errors import UserError
from dpo_sd.training import wandb_mode


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def log_in(file: Path, host: str) -> None:
    file.write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    file.chmod(0o600)


def default_host() -> str:
    return wandb.Settings().base_url.removeprefix("https://")


@pytest.mark.parametrize("host", ["the default", "api.wandb.ai"])
def test_a_login_at_the_server_or_at_its_former_name_counts(tmp_path, host):
    assert wandb_mode.logged_out()
    log_in(tmp_path / ".netrc", default_host() if host == "the default" else host)
    assert not wandb_mode.logged_out()


def test_a_login_elsewhere_does_not_count_for_a_server_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example.org:8080")
    monkeypatch.setenv("NETRC", str(tmp_path / "logins"))
    log_in(tmp_path / "logins", "api.wandb.ai")
    assert wandb_mode.logged_out()
    log_in(tmp_path / "logins", "wandb.example.org:8080")
    assert not wandb_mode.logged_out()


def test_a_key_or_a_token_in_the_environment_is_a_login(monkeypatch):
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "/token")
    assert not wandb_mode.logged_out()


class Logger:
    """As much of Lightning's as matters, with the mode in which its run began."""

    def __init__(self, offline: bool = False, failure: Exception | None = None):
        self._offline, self.failure, self.began = offline, failure, False
        self._wandb_init: dict[str, str] = {}

    @property
    def experiment(self) -> Any:
        if self.failure is not None:
            raise self.failure
        self.began = True
        return SimpleNamespace()


@pytest.fixture
def port(monkeypatch) -> int:
    """A port of this computer where nobody listens, as wandb's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{number}")
    return number


def begin(logger: Logger) -> None:
    wandb_mode.begin(logger)  # type: ignore[arg-type]


def test_without_an_answer_a_run_writes_offline_and_says_so(port, caplog):
    begin(logger := Logger())
    assert logger.began and logger._wandb_init == {"mode": "offline"}
    assert "does not answer" in caplog.text and "`wandb sync` sends it later" in caplog.text


@pytest.mark.parametrize("offline", [True, False])
def test_who_is_offline_by_choice_is_not_kept_waiting(monkeypatch, port, offline, caplog):
    if not offline:
        monkeypatch.setenv("WANDB_MODE", "disabled")
    begin(logger := Logger(offline))
    assert logger.began and not caplog.text


def test_a_key_that_is_refused_is_one_line_with_a_way_on(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="logger=wandb: invalid key; with WANDB_MODE=offline"):
        begin(Logger(failure=AuthenticationError("invalid key")))
