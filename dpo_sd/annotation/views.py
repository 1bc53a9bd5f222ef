"""The pages of the app: annotate, statistics, gallery."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import streamlit as st
from streamlit.components.v2 import component

from dpo_sd.annotation.desk import Desk, Receipt, count, refusal, token
from dpo_sd.annotation.items import Mode
from dpo_sd.errors import UserError
from dpo_sd.preferences.outcome import Preference, fold

if TYPE_CHECKING:  # scipy comes with it, which the page that takes votes does without
    from dpo_sd.annotation.summary import Summary, Votes

CLIENT = Path(__file__).parent / "client"
QUEUE = "annotator"  # key of the component, whose state is the queue of votes
PER_PAGE = 24  # cards of the gallery
PERCENT = "%.0f %%"

MODES: dict[Mode, str] = {"pairs": "Pairs", "best_worst": "Best and worst of four"}
SHOWS = {"all": "All", "undecided": "Undecided", "disputed": "Disputed"}
FINISHED = {
    "all": "You have judged everything here.",
    "undecided": "Every pair here is decided or skipped.",
    "disputed": "There is no pair left that annotators disagree on.",
}
VERDICTS = {
    "image_0": "left is better",
    "image_1": "right is better",
    "tie": "tie",
    "both_bad": "both bad",
    "disputed": "disputed",
    "skipped": "skipped",
    "flagged": "reported as unfit",
}
STYLE = """<style>
.stMainBlockContainer { padding: 0.75rem 1.5rem; max-width: none; }
.stAppHeader { background: none; height: 2rem; min-height: 0; }
body:has([data-testid="stExpandSidebarButton"]) { --beside-sidebar-button: 2.5rem; }
</style>"""


class Setting(NamedTuple):
    """The folder at work, and the annotator and the mode that the page begins with.

    Args:
        floor_ms: milliseconds that pictures must have been on the screen before a decision counts.
    """

    desk: Desk
    name: str
    mode: Mode
    floor_ms: int = 0


setting: Setting = None  # type: ignore[assignment]  # one per server, given before the first visit


def show() -> None:
    """Builds the page, as Streamlit asks for it at every visit and every vote."""
    st.set_page_config(
        page_title=f"Annotate {setting.desk.name}", page_icon="⚖️", layout="wide", initial_sidebar_state=240
    )
    st.html(STYLE)
    page = st.navigation(
        [
            st.Page(annotate, title="Annotate", icon=":material/compare:", default=True),
            st.Page(statistics, title="Statistics", icon=":material/monitoring:"),
            st.Page(gallery, title="Gallery", icon=":material/grid_view:"),
        ]
    )
    modes = [mode for mode in MODES if setting.desk.items[mode]]
    with st.sidebar:  # here and not on the page they are for, because elsewhere Streamlit would forget them
        st.text_input("Annotator", value=setting.name, key="name", max_chars=80)
        st.radio("Show", list(SHOWS), format_func=SHOWS.__getitem__, key="show")
        if len(modes) > 1:
            st.radio("Judge", modes, format_func=MODES.__getitem__, key="mode", index=modes.index(setting.mode))
    try:
        page.run()
    except (OSError, UserError) as error:  # the log can no longer be read
        st.error("The votes cannot be read, so no more are taken. Those not saved yet are kept in this browser.")
        st.text(str(error))


def annotate() -> None:
    """The page that shows images and takes votes; whatever must be quick happens in the browser."""
    desk, state = setting.desk, st.session_state
    name, mode, chosen = state.name.strip() or setting.name, state.get("mode", setting.mode), state.show
    receipt: Receipt = state.setdefault("receipt", Receipt([]))
    window = desk.window(name, mode, chosen)
    result = _component("annotator")(
        key=QUEUE,
        data={
            **window,
            "context": f"{desk.folder_id} {mode} {chosen} {name}",
            "folder": desk.folder_id,
            "annotator": name,
            "session": state.setdefault("session_id", str(uuid4())),
            "mode": mode,
            "answered": state.get("sent"),
            "acknowledged": receipt.acknowledged,
            "problem": receipt.problem or refusal(state.get("refused", ())),
            "finished": FINISHED[chosen],
            "floor_ms": setting.floor_ms,
        },
        on_queue_change=_receive,
    )
    if _receive_queue(result.get("queue")):  # to a new server an old page sends its queue without changing it
        st.rerun()
    if window["left"] == 0:
        _what_next()


def _receive() -> None:
    _receive_queue(st.session_state[QUEUE].get("queue"))


def _receive_queue(queue: dict[str, Any] | None) -> bool:
    """Writes down the votes that the client sent, unless that was done before; returns whether they were new."""
    if not queue or queue["sent"] == st.session_state.get("sent"):
        return False
    receipt = setting.desk.receive(queue["votes"], queue.get("clock"))
    st.session_state.sent, st.session_state.receipt = queue["sent"], receipt
    # shown from now on: later votes that are saved do not make these good
    st.session_state.refused = (*st.session_state.get("refused", ()), *receipt.refused)
    return True


def statistics() -> None:
    """The page of what the votes say about models and annotators, and how far to trust them."""
    from dpo_sd.annotation.summary import summarise

    desk = setting.desk
    desk.log.refresh()
    summary = summarise(desk.log.pairs.values(), list(desk.log.events))
    st.header("Statistics")
    if not summary.together.votes:
        st.info("No votes yet.")
        return
    _metrics(summary)
    if summary.models:
        _win_rates(summary)
    _annotators(summary)
    _habits(summary.together)
    _what_next()
    for note in desk.log.notes:
        st.text(f"Note: {note}")


def _metrics(summary: Summary) -> None:
    statuses, together = summary.statuses, summary.together
    for column, (label, value, words) in zip(
        st.columns(5),
        [
            ("Decided pairs", summary.decided, f"{count(statuses['tie'], 'tie')}, {statuses['both_bad']} both bad"),
            ("Votes", together.votes, f"{together.skips} skipped, {statuses['flagged']} reported as unfit"),
            ("Disputed pairs", statuses["disputed"], "as many votes for one as for the other"),
            ("Steady", _percent(together.steady), "repeats answered as at first"),
            ("Agreement α", _number(summary.agreement), f"Krippendorff, {count(summary.shared, 'shared pair')}"),
        ],
        strict=True,
    ):
        column.metric(label, value, border=True)
        column.caption(words)


def _win_rates(summary: Summary) -> None:
    st.subheader("Win rates")
    st.caption("Against all others, a pair counting once and a tie half, with 95 % Wilson intervals.")
    st.dataframe(
        [
            {
                "Drawn by": model,
                "Win rate": 100 * rate.rate,
                "From": 100 * rate.low,
                "To": 100 * rate.high,
                "Pairs": rate.n,
            }
            for model, rate in summary.models
        ],
        column_config={
            "Win rate": st.column_config.ProgressColumn(format=PERCENT, min_value=0, max_value=100),
            "From": st.column_config.NumberColumn(format=PERCENT),
            "To": st.column_config.NumberColumn(format=PERCENT),
        },
    )


def _annotators(summary: Summary) -> None:
    from dpo_sd.annotation.summary import TOO_FAST_MS

    st.subheader("Annotators")
    st.dataframe(
        [
            {
                "Annotator": who.name,
                "Votes": who.votes,
                "Skipped": who.skips,
                "Seconds a vote": who.seconds,
                f"Under {TOO_FAST_MS} ms": who.too_fast,
                "Left chosen": who.left and 100 * who.left.rate,
                "p (no side favoured)": who.left_p,
                "Steady": who.steady and 100 * who.steady.rate,
                "Repeats": who.steady.n if who.steady else 0,
                "Flip rate ε": who.flip_rate,
            }
            for who in summary.annotators
        ],
        column_config={
            "Seconds a vote": st.column_config.NumberColumn(format="%.1f"),
            "Left chosen": st.column_config.NumberColumn(format=PERCENT),
            "Steady": st.column_config.NumberColumn(format=PERCENT),
            "p (no side favoured)": st.column_config.NumberColumn(format="%.2g"),
            "Flip rate ε": st.column_config.NumberColumn(format="%.3f"),
        },
        placeholder="–",
    )


def _habits(together: Votes) -> None:
    from dpo_sd.annotation.summary import position_words, smoothing_override, smoothing_words

    st.text(position_words(together))
    st.text(smoothing_words(together))
    if setting_of_the_loss := smoothing_override(together):
        st.code(setting_of_the_loss, language=None)


def gallery() -> None:
    """The page of the decided pairs, `PER_PAGE` at a time."""
    desk = setting.desk
    desk.log.refresh()
    decided = [each for each in fold(desk.log.pairs.values(), list(desk.log.events)) if each.status in VERDICTS]
    st.header("Gallery")
    if not decided:
        st.info("Nothing is decided yet.")
        return
    counts = {status: sum(each.status == status for each in decided) for status in VERDICTS}
    statuses = st.pills(
        "Verdict",
        [status for status in VERDICTS if counts[status]],
        selection_mode="multi",
        format_func=lambda status: f"{VERDICTS[status].capitalize()} ({counts[status]})",
        label_visibility="collapsed",
    )
    chosen = [each for each in decided if not statuses or each.status in statuses]
    pages = -(-len(chosen) // PER_PAGE)
    number = st.number_input(f"Page, of {pages}", 1, pages, key="page", width=140) if pages > 1 else 1
    cards = [_card(each) for each in chosen[(number - 1) * PER_PAGE : number * PER_PAGE]]
    _component("gallery")(key="gallery", data={"cards": cards})


def _card(preference: Preference) -> dict[str, Any]:
    pair, status = preference.pair, preference.status
    return {
        "prompt": pair.prompt,
        "shown": [token(pair.image_0, pair.image_0_uid), token(pair.image_1, pair.image_1_uid)],
        "chosen": {"image_0": 0, "image_1": 1}.get(status),
        "verdict": f"{VERDICTS[status]} · {count(preference.n_votes, 'vote')}",
    }


def _what_next() -> None:
    from dpo_sd.annotation.summary import train_command

    desk = setting.desk
    preferences = fold(desk.log.pairs.values(), list(desk.log.events))
    decided = sum(each.status in ("image_0", "image_1") for each in preferences)
    st.subheader("What next")
    if decided:
        are = "pair is" if decided == 1 else "pairs are"
        st.text(f"{decided} {are} decided. Train the LoRA on them:")
        st.code(train_command(desk.log.folder), language="bash", wrap_lines=True)
    else:
        st.text("No pair has a better picture yet, so there is nothing to train on.")


@functools.cache
def _component(name: str):
    """The part of the page that runs in the browser, from the files of that name in client/."""
    return component(
        f"dpo_sd.{name}",
        html=(CLIENT / f"{name}.html").read_text(encoding="utf-8"),
        css=(CLIENT / f"{name}.css").read_text(encoding="utf-8"),
        js=(CLIENT / f"{name}.js").read_text(encoding="utf-8"),
    )


def _percent(rate: Any) -> str:
    return "–" if rate is None else f"{100 * rate.rate:.0f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
