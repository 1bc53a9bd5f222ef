"""The annotation app in a real browser: every key press is one vote on what was on the screen, whatever happens."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpo_sd.annotation.desk import token
from dpo_sd.preferences.log import EventLog, read_events
from dpo_sd.preferences.outcome import standing
from dpo_sd.preferences.pair_folder import Pair, pair_id, read_pairs, write_pairs

playwright = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright (it is in the dev extra) for the browser tests"
)
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium, for the browser tests")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# records what the screen shows at every key press on pictures that are all seen, before the app hears of it; keys that
# are held count once
WATCH = """
() => {
  const deep = (root, selector) => [
    ...root.querySelectorAll(selector),
    ...[...root.querySelectorAll('*')].flatMap((e) => (e.shadowRoot ? deep(e.shadowRoot, selector) : [])),
  ];
  window.panes = () => deep(document, '.pane img').map((image) => image.src.split('/').pop());
  window.seen = [];
  window.broken = () => deep(document, '.pane.broken').length > 0;
  window.ready = () => deep(document, '.annotator.seen').length > 0;
  window.addEventListener('keydown', (e) =>
    e.repeat || !window.ready() || window.seen.push([e.key, ...window.panes()]), true);
  window.press = (key) => document.body.dispatchEvent(
    new KeyboardEvent('keydown', { key, bubbles: true, composed: true, cancelable: true }));
}
"""


def make_folder(
    folder: Path, n: int = 60, size: int = 96, per_set: int = 2, prompts: list[str] | None = None, seed: int = 0
) -> Path:
    """Pairs, or sets, of noise in different colours."""
    rng = np.random.default_rng(seed)
    pairs = []
    (folder / "images").mkdir(parents=True)
    for i in range(n):
        prompt = prompts[i % len(prompts)] if prompts else f"prompt {i}"
        files = []
        for k in range(per_set):
            name = f"images/{i:05}-{k}.png"
            noise = rng.integers(0, 60, (size, size, 3)) + rng.integers(0, 190, 3)
            Image.fromarray(noise.astype(np.uint8)).save(folder / name, compress_level=1)
            files.append((name, hashlib.sha256((folder / name).read_bytes()).hexdigest()))
        for (a, uid_a), (b, uid_b) in itertools.combinations(files, 2):
            ranking = f"set/{i}" if per_set > 2 else None
            pairs.append(
                Pair(pair_id(prompt, uid_a, uid_b), prompt, a, b, uid_a, uid_b, ranking, "secret-A", "secret-B")
            )
    write_pairs(folder, pairs)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`python -m dpo_sd.annotate` on a folder, in a process of its own."""

    def __init__(self, folder: Path, *settings: str, port: int | None = None):
        self.folder, self.port = folder, port or free_port()
        command = [sys.executable, "-m", "dpo_sd.annotate", f"pairs={folder}", "annotator.name=anna"]
        command += ["annotator.browser=false", f"annotator.port={self.port}", "annotator.repeats=0"]
        command += ["annotator.floor_ms=0", *settings]
        self.log = open(folder.parent / f"server-{self.port}.log", "ab")  # noqa: SIM115 - the process writes it
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=1)
                return
            assert self.process.poll() is None, Path(self.log.name).read_text()
            time.sleep(0.05)
        raise TimeoutError(Path(self.log.name).read_text())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def serve(folder: Path, *settings: str, port: int | None = None) -> Server:
        started.append(Server(folder, *settings, port=port))
        return started[-1]

    yield serve
    for server in started:
        if server.process.poll() is None:
            server.kill(signal.SIGTERM)


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Any]]:
    contexts = []

    def open_page(server: Server, scheme: str = "light", width: int = 1280, height: int = 720) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.outside = []  # addresses asked for beyond the server
        page.on("request", lambda request: server.url not in request.url and page.outside.append(request.url))
        page.goto(server.url)
        ready(page)
        return page

    yield open_page
    for context in contexts:
        context.close()


def ready(page: Any) -> None:
    """Waits for the pictures, then watches the keys."""
    page.locator(".pane img").nth(1).wait_for(timeout=30_000, state="attached")
    page.evaluate(WATCH)
    page.wait_for_function("() => window.panes().length >= 2 && window.panes().every((name) => name.length === 32)")
    page.wait_for_function("() => window.ready() || window.broken()")


def press(page: Any, keys: str) -> None:
    """Presses one key after the other, each as soon as the pictures are seen."""
    for key in keys:
        page.wait_for_function("() => window.ready()")
        page.keyboard.press(key)


def log_of(folder: Path) -> list[Any]:
    """The votes and flags that stand, in the order of the log."""
    ids = {pair.pair_id for pair in read_pairs(folder)}
    file = folder / "annotations.jsonl"
    return standing(read_events(file, ids)) if file.exists() else []


def votes(folder: Path) -> list[Any]:
    return [each for each in log_of(folder) if each.event_type == "vote"]


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return value


def expected(seen: list[list[str]]) -> list[tuple[str, str, str]]:
    """(left token, right token, choice) of the key presses that choose a side."""
    return [(left, right, {"1": "left", "2": "right"}[key]) for key, left, right in seen if key in ("1", "2")]


def tokens(event: Any) -> tuple[str, str]:
    """Of image_0 and image_1."""
    return token(event.image_0, event.image_0_uid), token(event.image_1, event.image_1_uid)


def given(events: list[Any]) -> list[tuple[str, str, str]]:
    found = []
    for event in events:
        left, right = tokens(event)
        if event.left_image == "image_1":
            left, right = right, left
        choice = "left" if event.choice == event.left_image else "right"
        found.append((left, right, choice))
    return found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("shared") / "pairs")


@pytest.fixture
def folder(pairs, tmp_path) -> Path:
    return shutil.copytree(pairs, tmp_path / "pairs")


# ---- who may ask


@pytest.mark.parametrize("path", ["/", "/_stcore/health", "/pair-image/{token}"])
def test_a_page_whose_name_was_made_to_lead_here_gets_nothing(serve, folder, path):
    server = serve(folder)
    pair = read_pairs(folder)[0]
    address = server.url + path.format(token=token(pair.image_0, pair.image_0_uid))
    for host, status in ((f"127.0.0.1:{server.port}", 200), (f"localhost:{server.port}", 200), ("evil.example", 400)):
        request = urllib.request.Request(address, headers={"Host": host})
        try:
            answer = urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            answer = error.code
        assert answer == status, host


# ---- votes


def test_every_key_is_its_decision_and_backspace_takes_it_back(serve, open_page, folder):
    page = open_page(serve(folder))
    keys = {
        "1": "left",
        "2": "right",
        "ArrowLeft": "left",
        "ArrowRight": "right",
        "0": "tie",
        "9": "both_bad",
        " ": "skip",
    }
    for key in keys:
        page.keyboard.press("Space" if key == " " else key)
        page.wait_for_timeout(120)
    events = wait_for(lambda: len(found := votes(folder)) == len(keys) and found)
    for event, choice in zip(events, keys.values(), strict=True):
        right = "image_1" if event.left_image == "image_0" else "image_0"
        assert event.choice == {"left": event.left_image, "right": right}.get(choice, choice)
        assert (event.annotator_id, event.input) == ("anna", "key")
    before = page.evaluate("window.panes()")
    page.keyboard.press("Backspace")
    page.keyboard.press("Backspace")
    wait_for(lambda: len(votes(folder)) == len(keys) - 2)
    assert page.evaluate("window.panes()") != before
    assert [event.event_id for event in votes(folder)] == [event.event_id for event in events[:-2]]


def test_a_key_stands_for_its_place_where_the_layout_writes_another_script(serve, open_page, folder):
    page = open_page(serve(folder))

    def press(key: str, code: str, **more: bool) -> None:
        page.evaluate(
            "(event) => document.body.dispatchEvent(new KeyboardEvent('keydown', "
            "{ ...event, bubbles: true, composed: true, cancelable: true }))",
            {"key": key, "code": code, **more},
        )
        page.wait_for_timeout(120)

    for key, code in (("&", "Digit1"), ("é", "Digit2"), ("ч", "KeyX"), ("1", "Numpad1")):
        press(key, code)
    wait_for(lambda: len(log_of(folder)) == 4)
    assert [each.event_type for each in log_of(folder)] == ["vote", "vote", "flag", "vote"]
    for held in ("ctrlKey", "altKey", "metaKey", "isComposing", "modifierAltGraph"):
        press("1", "Digit1", **{held: True})
    for key, code in (("Process", "Digit1"), ("ö", "KeyX"), (";", "KeyX")):  # with x elsewhere on the keyboard
        press(key, code)
    page.wait_for_timeout(600)
    assert len(log_of(folder)) == 4


@pytest.mark.parametrize("gap", [0, 40, 150])
def test_forty_presses_in_bursts_of_eight_are_forty_votes_on_what_was_on_the_screen(serve, open_page, folder, gap):
    page = open_page(serve(folder))
    rng = random.Random(gap)
    for _ in range(5):
        for _ in range(8):
            page.keyboard.press(rng.choice("12"))
            page.wait_for_timeout(gap)
        page.wait_for_timeout(400)
    seen = page.evaluate("window.seen")  # of the others it is said that the pictures are still loading
    events = wait_for(lambda: len(found := votes(folder)) >= len(seen) and found)
    page.wait_for_timeout(300)
    assert given(votes(folder)) == expected(seen)
    assert len({event.pair_id for event in events}) == len(events) >= 5 * (1 if gap == 0 else 3 if gap == 40 else 8)


def test_pictures_that_are_not_there_get_no_vote_and_the_others_get_theirs(serve, open_page, folder):
    page = open_page(serve(folder))
    shown = page.evaluate("window.panes()")
    page.context.set_offline(True)
    for _ in range(12):  # the pictures that were fetched before are judged, and then there are none
        page.keyboard.press("1")
        page.wait_for_timeout(150)
    assert "Loading" in page.locator(".hint").inner_text()
    accepted = expected(page.evaluate("window.seen"))
    assert accepted[0][:2] == tuple(shown) and len(accepted) < 12
    page.context.set_offline(False)
    events = wait_for(lambda: len(found := votes(folder)) >= len(accepted) and found)
    assert given(events) == accepted
    page.wait_for_function("() => window.ready()", timeout=20_000)
    page.keyboard.press("2")
    wait_for(lambda: len(votes(folder)) == len(accepted) + 1)


def test_a_decision_that_is_too_fast_to_have_seen_anything_is_refused(serve, open_page, folder):
    page = open_page(serve(folder, "annotator.floor_ms=1500"))
    page.keyboard.press("1")
    assert "too fast" in page.locator(".hint").inner_text()
    page.wait_for_timeout(1600)
    page.keyboard.press("1")
    (event,) = wait_for(lambda: votes(folder))
    assert 1500 <= event.duration_ms < 4000


def test_a_held_key_is_one_vote_and_so_is_a_double_click(serve, open_page, folder):
    page = open_page(serve(folder))
    for _ in range(6):  # playwright repeats a key that is down
        page.keyboard.down("1")
    page.keyboard.up("1")
    wait_for(lambda: len(votes(folder)) == 1)
    page.wait_for_timeout(500)
    page.locator(".pane").first.dblclick()
    wait_for(lambda: len(votes(folder)) == 2)
    page.wait_for_timeout(700)
    page.locator(".pane").nth(1).click()
    third = wait_for(lambda: len(found := votes(folder)) == 3 and found[-1])
    assert third.input == "mouse" and third.choice != third.left_image


def test_wheel_and_keys_zoom_both_pictures_alike_and_dragging_is_no_vote(serve, open_page, folder):
    page = open_page(serve(folder))

    def transforms() -> list[str]:
        images = page.locator(".pane img").all()
        return [image.evaluate("e => getComputedStyle(e).transform") for image in images]

    assert set(transforms()) <= {"none", "matrix(1, 0, 0, 1, 0, 0)"}
    box = page.locator(".pane").first.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.wheel(0, -400)
    page.keyboard.press("+")
    wait_for(lambda: len(set(transforms())) == 1 and "matrix(3" in transforms()[0])
    zoomed = transforms()
    page.mouse.down()
    page.mouse.move(box["x"] + 180, box["y"] + 160, steps=5)
    page.mouse.up()
    wait_for(lambda: transforms() != zoomed and len(set(transforms())) == 1)
    page.wait_for_timeout(300)
    assert not votes(folder)
    page.keyboard.press("1")
    assert wait_for(lambda: votes(folder))[0].zoomed


def test_a_held_f_shows_the_one_picture_in_the_place_of_the_other(serve, open_page, folder):
    page = open_page(serve(folder))
    before = page.evaluate("window.panes()")
    page.keyboard.down("f")
    wait_for(lambda: page.evaluate("window.panes()") == before[::-1])
    page.keyboard.press("1")  # nothing is chosen while they flicker
    page.keyboard.up("f")
    wait_for(lambda: page.evaluate("window.panes()") == before)
    page.wait_for_timeout(300)
    assert not votes(folder)


def test_x_reports_a_pair_as_unfit_and_backspace_takes_that_back(serve, open_page, folder):
    page = open_page(serve(folder))
    before = page.evaluate("window.panes()")
    page.keyboard.press("x")
    wait_for(lambda: [each.event_type for each in log_of(folder)] == ["flag"])
    assert page.evaluate("window.panes()") != before
    page.keyboard.press("Backspace")
    wait_for(lambda: log_of(folder) == [])
    assert page.evaluate("window.panes()") == before
    page.get_by_role("button", name="Unfit").click()
    assert wait_for(lambda: log_of(folder))[0].input == "mouse"


def test_a_picture_is_chosen_with_tab_and_enter_also_after_it_was_dragged(serve, open_page, folder):
    page = open_page(serve(folder))
    pane = page.locator(".pane").first
    box = pane.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.wheel(0, -400)
    page.mouse.down()
    page.mouse.move(box["x"] + 180, box["y"] + 160, steps=5)
    page.mouse.up()
    pane.focus()
    page.keyboard.press("Enter")
    event = wait_for(lambda: votes(folder))[0]
    assert (event.choice, event.input) == (event.left_image, "key")


def test_words_below_the_pictures_do_not_move_them(serve, open_page, folder):
    page = open_page(serve(folder))
    before = page.locator(".pane").first.bounding_box()
    page.keyboard.press("1")
    page.get_by_text("Left chosen.").wait_for()
    assert page.locator(".pane").first.bounding_box() == before


# ---- nothing is lost


def test_a_reload_in_the_middle_of_a_burst_loses_nothing(serve, open_page, folder):
    page = open_page(serve(folder))
    seen = []
    for _ in range(3):
        press(page, "121")
        seen += page.evaluate("window.seen")
        page.reload()
        ready(page)
    events = wait_for(lambda: len(found := votes(folder)) >= 9 and found)
    assert sorted(given(events)) == sorted(expected(seen))


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_server_that_is_killed_again_and_again_loses_no_vote(serve, open_page, folder, kills):
    server = serve(folder)
    page = open_page(server)
    rng = random.Random(0)
    page.evaluate("window.typing = setInterval(() => window.press(Math.random() < 0.5 ? '1' : '0'), 700)")
    acknowledged: set[str] = set()
    for _ in range(kills):
        page.wait_for_timeout(rng.uniform(0, 900))
        acknowledged |= {event.event_id for event in votes(folder)}
        server.kill()
        server = serve(folder, port=server.port)
        assert acknowledged <= {event.event_id for event in votes(folder)}
    page.evaluate("clearInterval(window.typing)")
    pressed = len(page.evaluate("window.seen.filter(([, left]) => left)"))
    events = wait_for(lambda: len(found := votes(folder)) >= min(pressed, 60) and found, seconds=40)
    assert len({event.pair_id for event in events}) == len(events)
    assert pressed >= kills


def test_a_disk_that_is_full_is_said_and_the_vote_is_saved_once_there_is_room(serve, open_page, folder):
    server = serve(folder)
    page = open_page(server)
    page.keyboard.press("1")
    wait_for(lambda: len(votes(folder)) == 1)
    size = (folder / "annotations.jsonl").stat().st_size
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
    page.keyboard.press("2")
    page.get_by_text("vote not saved").first.wait_for(timeout=10_000)
    assert (folder / "annotations.jsonl").stat().st_size == size
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_for(lambda: len(votes(folder)) == 2)
    page.get_by_text("vote not saved").first.wait_for(state="hidden", timeout=10_000)


def test_a_vote_that_can_never_be_saved_is_said_and_kept_and_holds_nothing_up(serve, open_page, folder):
    server = serve(folder)
    page = open_page(server)
    page.keyboard.press("1")
    page.get_by_text("Saved", exact=True).wait_for()
    server.kill()
    page.keyboard.press("2")
    page.evaluate(
        """() => {
        for (const [key, value] of Object.entries(localStorage).filter(([key]) => key.startsWith("dpo_sd.vote."))) {
          localStorage.setItem(key, value.replace(/"item":"[0-9a-f]+"/, '"item":"of pairs drawn anew since"'));
          localStorage.setItem(key.slice(0, -36) + "damaged", "{nonsense");
        }
        }"""
    )
    context = page.context
    page.close()
    serve(folder, port=server.port)
    page = context.new_page()
    page.goto(server.url)
    ready(page)
    said = page.get_by_text("1 vote not counted but kept in annotations.refused.jsonl")
    said.wait_for()
    page.keyboard.press("1")
    wait_for(lambda: len(votes(folder)) == 2)
    page.wait_for_timeout(500)
    assert said.is_visible()
    assert len((folder / "annotations.refused.jsonl").read_text().splitlines()) == 1


def test_two_browsers_on_two_servers_lose_and_double_nothing(serve, open_page, folder):
    one, other = (open_page(serve(folder, f"annotator.name={name}")) for name in ("anna", "ben"))
    for _ in range(10):
        press(one, "1")
        press(other, "2")
    events = wait_for(lambda: len(found := votes(folder)) >= 20 and found)
    assert len(events) == 20
    for page, name in ((one, "anna"), (other, "ben")):
        assert given([event for event in events if event.annotator_id == name]) == expected(
            page.evaluate("window.seen")
        )


def test_metadata_is_current_once_the_app_is_idle_and_after_it_has_stopped(serve, open_page, folder):
    server = serve(folder)
    page = open_page(server)
    press(page, "12012")
    wait_for(lambda: len(votes(folder)) == 5)
    metadata = folder / "metadata.jsonl"
    wait_for(lambda: metadata.exists() and len(metadata.read_text().splitlines()) == 4, seconds=3)
    page.keyboard.press("1")
    wait_for(lambda: len(votes(folder)) == 6)
    server.kill(signal.SIGTERM)
    assert len(metadata.read_text().splitlines()) == 5


# ---- what is shown


HOSTILE = [
    "<img src=http://203.0.113.7/x.png onerror=alert(1)><script>alert(2)</script>",
    "![x](http://203.0.113.7/y.png) **bold** `code` :smile: $x^2$",
    "قطة حمراء على أريكة زرقاء",
    "🦊 " + "very " * 1000 + "long",
]


def test_prompts_are_shown_literally_and_fetch_nothing(serve, open_page, tmp_path):
    folder = make_folder(tmp_path / "pairs", 4, prompts=HOSTILE)
    page = open_page(serve(folder))
    seen = set()
    for _ in HOSTILE:
        seen.add(page.locator(".prompt").inner_text())
        page.keyboard.press("1")
        page.wait_for_timeout(300)
    assert {text.strip() for text in seen} == {text.strip() for text in HOSTILE}
    page.get_by_role("link", name="Gallery").click()
    page.wait_for_timeout(1500)
    assert page.outside == []


def test_neither_the_page_nor_its_addresses_tell_what_drew_a_picture(serve, open_page, folder):
    server = serve(folder)
    page = open_page(server)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for _ in range(3):
        page.keyboard.press("1")
        page.wait_for_timeout(200)
    everything = page.content() + page.locator(".annotator").evaluate("e => e.outerHTML") + "".join(asked)
    for secret in ("secret", "image_0", "image_1", "00000-0", ".png"):
        assert secret not in everything


def test_pictures_of_a_former_folder_on_the_same_port_are_not_shown_again(serve, open_page, tmp_path):
    former, newer = (make_folder(tmp_path / name / "pairs", 2, seed=seed) for seed, name in enumerate(("a", "b")))
    server = serve(former)
    page = open_page(server)
    server.kill()
    serve(newer, port=server.port)
    page.goto(server.url)
    ready(page)
    shown = page.evaluate(
        """() => Promise.all(window.panes().map(async (name) => {
        const answer = await fetch(`/pair-image/${name}`);
        const digest = await crypto.subtle.digest("SHA-256", await answer.arrayBuffer());
        return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
        }))"""
    )
    assert set(shown) in [{pair.image_0_uid, pair.image_1_uid} for pair in read_pairs(newer)]


def test_a_picture_that_cannot_be_read_can_only_be_skipped(serve, open_page, tmp_path):
    folder = make_folder(tmp_path / "pairs", 2)
    for file in (folder / "images").glob("*-0.png"):
        file.write_bytes(file.read_bytes()[:200])
    page = open_page(serve(folder))
    page.locator(".trouble:visible").wait_for(timeout=10_000)
    page.keyboard.press("1")
    page.wait_for_timeout(400)
    assert not votes(folder)
    page.keyboard.press("Space")
    assert wait_for(lambda: votes(folder))[0].choice == "skip"


@pytest.mark.parametrize("address", ["../pairs.jsonl", "%2e%2e%2fpairs.jsonl", "0", "images/00000-0.png"])
def test_the_route_of_the_pictures_serves_nothing_else(serve, folder, address):
    try:
        answer = urllib.request.urlopen(f"{serve(folder).url}/pair-image/{address}").read()
    except urllib.error.HTTPError as refused:
        answer = refused.read()
    assert b"prompt" not in answer and not answer.startswith(b"\x89PNG")


def test_two_presses_on_a_set_of_four_settle_five_of_its_six_pairs(serve, open_page, tmp_path):
    folder = make_folder(tmp_path / "pairs", 3, per_set=4)
    page = open_page(serve(folder, "annotator.mode=best_worst"))
    shown = page.evaluate("window.panes()")
    assert len(shown) == 4
    page.keyboard.press("3")
    page.keyboard.press("1")
    events = wait_for(lambda: len(found := votes(folder)) >= 5 and found)
    assert len(events) == 5 and len({event.ranking_id for event in events}) == 1
    for event in events:
        winner, loser = tokens(event) if event.choice == "image_0" else tokens(event)[::-1]
        assert winner == shown[2] or loser == shown[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_laptop_and_shows_no_error(serve, open_page, folder, scheme):
    page = open_page(serve(folder), scheme)
    press(page, "1212012")
    wait_for(lambda: len(votes(folder)) == 7)
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    buttons = page.locator("footer button").all()
    assert all(button.bounding_box()["y"] + button.bounding_box()["height"] <= 720 for button in buttons)
    page.get_by_role("link", name="Statistics").click()
    page.get_by_text("Annotators").first.wait_for(timeout=10_000)
    page.get_by_text("experiment=style_dpo").first.wait_for(timeout=10_000)
    page.get_by_role("link", name="Gallery").click()
    page.wait_for_timeout(1000)
    assert page.get_by_text("Traceback").count() == 0
    assert "is better" in page.inner_text("body") or page.get_by_text("is better").count()


def test_with_the_sidebar_closed_its_button_covers_nothing(serve, open_page, folder):
    page = open_page(serve(folder), width=700, height=900)
    button = page.get_by_test_id("stExpandSidebarButton").bounding_box()
    assert page.locator(".count").bounding_box()["x"] >= button["x"] + button["width"]


# ---- speed


def test_ten_thousand_pairs_are_no_burden(serve, open_page, tmp_path):
    small = make_folder(tmp_path / "small", 4, size=16)
    lines = (small / "pairs.jsonl").read_text().splitlines()
    many = []
    for i in range(10_000):
        row = json.loads(lines[i % 4]) | {"prompt": f"prompt {i}"}
        many.append(row | {"pair_id": pair_id(row["prompt"], row["image_0_uid"], row["image_1_uid"])})
    (small / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    server = serve(small)
    started = time.monotonic()
    page = open_page(server)
    seconds = time.monotonic() - started
    print(f"first page of 10 000 pairs after {seconds:.1f} s")
    assert seconds < 6  # 3 on idle cores
    memory = lambda: int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096  # noqa: E731
    page.keyboard.press("1")
    wait_for(lambda: len(votes(small)) == 1)
    before = memory()
    for _ in range(40):
        page.keyboard.press("1")
        page.wait_for_timeout(200)
    wait_for(lambda: len(votes(small)) == 41)
    assert memory() - before < 40 * 2**20


PLAIN = """
import sys
from pathlib import Path
import streamlit as st
files = sorted(Path(sys.argv[1]).glob("images/*.png"))
st.session_state.setdefault("at", 0)
def step():
    st.session_state.at += 1
st.button("next", on_click=step, shortcut="n")
for column, file in zip(st.columns(2), files[2 * st.session_state.at :][:2]):
    column.image(str(file))
"""


@pytest.mark.slow
def test_from_key_to_both_pictures_decoded_is_a_fifth_of_a_plain_page(serve, browser, open_page, tmp_path):
    """Prints the medians: pytest -s -m slow tests/test_annotation_browser.py."""
    folder = make_folder(tmp_path / "pairs", 26, size=1024)
    page = open_page(serve(folder), width=1600, height=900)
    page.wait_for_timeout(1500)
    ours = []
    for _ in range(20):
        ours.append(
            page.evaluate(
                """async () => {
                const deep = (root, s) => [...root.querySelectorAll(s),
                  ...[...root.querySelectorAll('*')].flatMap((e) => (e.shadowRoot ? deep(e.shadowRoot, s) : []))];
                const before = window.panes().join();
                const start = performance.now();
                window.press('1');
                while (window.panes().join() === before) await new Promise(requestAnimationFrame);
                await Promise.all(deep(document, '.pane img').map((image) => image.decode()));
                return performance.now() - start;
                }"""
            )
        )
        page.wait_for_timeout(400)
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    port = free_port()
    settings = ["--server.headless=true", f"--server.port={port}", "--server.address=127.0.0.1"]
    command = [sys.executable, "-m", "streamlit", "run", str(script), *settings, "--", str(folder)]
    plain = []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(f"http://127.0.0.1:{port}")
        page.locator("img").nth(1).wait_for(timeout=30_000)
        page.wait_for_timeout(1500)
        for _ in range(12):
            plain.append(
                page.evaluate(
                    """async () => {
                    const images = () => [...document.querySelectorAll('img')];
                    const before = images().map((i) => i.src).join();
                    const start = performance.now();
                    document.querySelector('button[kind=secondary]').click();
                    const changed = () => { const now = images().map((i) => i.src);
                      return now.length === 2 && before.split(',').every((s) => !now.includes(s)); };
                    while (!changed()) await new Promise(requestAnimationFrame);
                    await Promise.all(images().map((image) => image.decode()));
                    return performance.now() - start;
                    }"""
                )
            )
            page.wait_for_timeout(400)
        page.close()
    finally:
        process.terminate()
        process.wait()
    fast, slow = statistics.median(ours), statistics.median(plain)
    print(f"key to both 1024x1024 pictures decoded: {fast:.0f} ms; a plain st.image page: {slow:.0f} ms")
    assert fast <= slow / 5


def test_statistics_are_right_after_a_restart(serve, open_page, folder):
    server = serve(folder)
    page = open_page(server)
    for key in "1110":
        page.keyboard.press(key)
        page.wait_for_timeout(60)
    wait_for(lambda: len(votes(folder)) == 4)
    server.kill()
    with contextlib.closing(EventLog(folder)) as log:
        assert len(log.events) == 4
    page = open_page(serve(folder))
    assert "4 of 60" in page.locator(".count").inner_text()
