"""Whether Weights & Biases takes a run's data while it goes, or only what is sent later from its folder."""

from __future__ import annotations

import logging
import netrc
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dpo_sd.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)
WAIT = 5.0  # seconds for an answer


def logged_out() -> bool:
    """Whether wandb would ask for a login."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return False
    try:
        logins = netrc.netrc(os.environ.get("NETRC") or None)
    except (OSError, netrc.NetrcParseError):
        return True
    hosts = [urlsplit(_server()).netloc]
    if not os.environ.get("WANDB_BASE_URL"):
        hosts.append("api.wandb.ai")  # a login at the default server's former name holds
    return not any(logins.authenticators(host) for host in hosts)


def begin(logger: WandbLogger) -> None:
    """Begins the run at wandb, offline where its server does not answer.

    Raises:
        UserError: if wandb refuses it, for a wrong key for example.
    """
    import wandb
    from wandb.errors import Error

    if wandb.run is not None:  # of the job before in a sweep
        wandb.finish()
    if not logger._offline and "WANDB_MODE" not in os.environ and not _answers():
        log.warning("wandb writes offline into the run folder; `wandb sync` sends it later")
        logger._wandb_init["mode"] = "offline"
    try:
        _ = logger.experiment
    except Error as error:
        raise UserError(
            f"logger=wandb: {str(error).strip() or type(error).__name__}; with WANDB_MODE=offline in the environment "
            "it writes into the run folder, and `wandb sync` sends that later"
        ) from error


def _answers() -> bool:
    import requests

    try:
        requests.head(_server(), timeout=WAIT)
    except requests.RequestException as error:
        log.warning("%s does not answer (%s)", _server(), type(error).__name__)
        return False
    return True


def _server() -> str:
    import wandb

    return os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
