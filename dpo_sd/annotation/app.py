"""Annotation by people: a web server on this computer, with a route for the images."""

from __future__ import annotations

import getpass
import ipaddress
import logging
import socket
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpo_sd.annotation.annotator import Annotator
from dpo_sd.annotation.items import Mode
from dpo_sd.errors import UserError, check_range

if TYPE_CHECKING:
    from starlette.routing import Route

    from dpo_sd.annotation.desk import Desk
    from dpo_sd.judges.judge import Judge

log = logging.getLogger(__name__)


class Person(Annotator):
    """People, who vote in a browser.

    Args:
        name: annotator to begin with; it can be changed on the page. None takes the login name.
        mode: "pairs", or "best_worst" for sets of four.
        repeats: share of the items that come back with the sides swapped, in [0, 1].
        port: port that the server listens on, in [1, 65535].
        address: address that the server listens on.
        allow_remote: allows an `address` that other computers reach; whoever reaches it can read and vote.
        floor_ms: milliseconds that all pictures must have been on the screen before a decision counts, in [0, 10000].
        hosts: further names by which browsers may call this computer, such as that of a proxy. Requests by other names
            are refused: a page of somebody else's could have its name lead here.
        browser: whether a browser window is opened.

    Raises:
        UserError: if a value is out of range, or other computers reach `address` without `allow_remote`.
    """

    def __init__(
        self,
        name: str | None = None,
        mode: Literal["pairs", "best_worst"] = "pairs",
        repeats: float = 0.05,
        port: int = 8501,
        address: str = "127.0.0.1",
        allow_remote: bool = False,
        browser: bool = True,
        hosts: list[str] | None = None,
        floor_ms: int = 150,
    ) -> None:
        check_range("floor_ms", floor_ms, 0, 10_000)
        if name is not None and not name.strip():
            raise UserError("name must not be empty")
        if not 0 <= repeats <= 1:
            raise UserError(f"repeats must be in [0, 1], got {repeats}")
        if not 1 <= port <= 65535:
            raise UserError(f"port must be in [1, 65535], got {port}")
        if not (allow_remote or _is_loopback(address)):
            raise UserError(
                f"address={address} can be reached from other computers, and anyone there could read and vote: "
                "use 127.0.0.1, or give allow_remote=true as well"
            )
        self.name = (name or _user()).strip()
        self.mode: Mode = mode
        self.repeats = repeats
        self.port = port
        self.address = address
        self.browser = browser
        self.floor_ms = floor_ms
        self.hosts = _own_names(address) | set(hosts or ())

    def annotate(self, folder: Path, judge: Judge | None) -> None:
        """Serves the app until it is stopped; every vote is on the disk when the page says so.

        Raises:
            UserError: if there is a judge, the folder cannot be annotated or the port is taken.
        """
        if judge is not None:
            raise UserError(f"people vote without a judge, but {judge.name!r} is given: leave out judge")
        from dpo_sd.annotation.desk import Desk

        desk = Desk(folder, self.repeats)
        if not desk.items[self.mode]:
            raise UserError(f"{folder} has no complete sets of four: draw them with set_size=4, or use mode=pairs")
        self._check_port()

        import streamlit as st
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from dpo_sd.annotation import views

        views.setting = views.Setting(desk, self.name, self.mode, self.floor_ms)
        for note in desk.log.notes:
            _print_note(note)
        print(f"Annotating {folder} ({len(desk.log.pairs)} pairs) as {self.name}: http://{self.address}:{self.port}")
        print("Every vote is saved at once. Ctrl-C ends the server.", flush=True)
        # in a thread, because it may read gigabytes
        threading.Thread(target=lambda: _print_note(desk.note_changes()), daemon=True).start()

        @asynccontextmanager
        async def lifespan(_: st.App) -> AsyncIterator[None]:
            yield
            desk.log.close()

        page = Path(views.__file__).with_name("page.py")
        sys.argv = [str(page)]  # Streamlit puts the folder of this file on the path of modules
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=sorted(self.hosts))
        st.App(page, lifespan=lifespan, routes=[_image_route(desk)], middleware=[trusted]).run(
            config={
                "server.address": self.address,
                "server.port": self.port,
                "server.headless": not self.browser,
                "server.fileWatcherType": "none",
                "browser.gatherUsageStats": False,
                "client.toolbarMode": "viewer",
                "logger.hideWelcomeMessage": True,
                "theme.light.primaryColor": "#4a56c8",
                "theme.dark.primaryColor": "#8f9bff",
            }
        )

    def _check_port(self) -> None:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free
            try:
                probe.bind((self.address, self.port))
            except OSError as error:
                raise UserError(
                    f"cannot listen on {self.address}, port {self.port} ({error.strerror}): if the app runs already, "
                    f"use that one, otherwise take another port, annotator.port={self.port + 1}"
                ) from error


def _print_note(note: str) -> None:
    if note:
        print(f"note: {note}", flush=True)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _own_names(address: str) -> set[str]:
    """Names and addresses by which browsers call this computer where it listens on that address."""
    names = {address, "localhost", "127.0.0.1"}
    if ":" in address:
        names.add("[")  # what Starlette takes for the name in [::1]:8501
    if not _is_loopback(address):
        own = socket.gethostname()
        names |= {own, f"{own}.local", *_own_addresses()}
    return {name.lower() for name in names}


def _own_addresses() -> set[str]:
    found = set()
    with suppress(OSError):
        found |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of no computer; nothing is sent, but the way there begins at our address
        found.add(probe.getsockname()[0])
    return found


def _image_route(desk: Desk) -> Route:
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import FileResponse, PlainTextResponse, Response
    from starlette.routing import Route

    headers = {
        "Content-Security-Policy": "default-src 'none'",
        "Cross-Origin-Resource-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }

    async def serve(request: Request) -> Response:
        try:
            image = await run_in_threadpool(desk.image, request.path_params["token"])
        except UserError as error:
            log.warning("%s", error)  # the page must not name the file: that would say which image is which
            return PlainTextResponse("cannot be read", status_code=415, headers={"Cache-Control": "no-store"})
        if image is None:
            return PlainTextResponse("no such picture", status_code=404, headers={"Cache-Control": "no-store"})
        # without a checksum other bytes may have the same address tomorrow
        keep = "private, max-age=31536000, immutable" if image.checked else "no-store"
        return FileResponse(image.file, headers=headers | {"Cache-Control": keep})

    return Route("/pair-image/{token}", serve)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # an account without an entry, in a container for example
        raise UserError("name: this account has no name on this computer: give annotator.name=<name>") from error
