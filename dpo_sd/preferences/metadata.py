"""The rows of metadata.jsonl, which training reads: from preferences, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from dpo_sd.files.json_lines import json_line
from dpo_sd.preferences.events import is_time
from dpo_sd.preferences.outcome import SIDES, Preference
from dpo_sd.preferences.pair_folder import Pair, pair_id

METADATA = "metadata.jsonl"
# texts that are numbers in other programs, as the ranking_id of Pick-a-Pic
_NAMES = ("pair_id", "ranking_id", "model_0", "model_1", "image_0_uid", "image_1_uid")


def metadata_rows(preferences: Iterable[Preference]) -> list[dict[str, Any]]:
    """The rows of metadata.jsonl: the pairs of which one image is preferred, with hard labels.

    An unknown seed is left out, an unknown text is "".
    """
    decided = [each for each in preferences if each.status in SIDES]
    per_prompt = Counter(each.pair.prompt for each in decided)
    rows = []
    for preference in decided:
        pair, prefer_0 = preference.pair, preference.status == "image_0"
        row = {
            "prompt": pair.prompt,
            "image_0": pair.image_0,
            "image_1": pair.image_1,
            "prefer_0": prefer_0,
            "prefer_1": not prefer_0,
            "caption": pair.prompt,
            "label_0": float(prefer_0),
            "label_1": float(not prefer_0),
            "has_label": True,
            "are_different": pair.image_0_uid != pair.image_1_uid,
            "best_image_uid": pair.image_0_uid if prefer_0 else pair.image_1_uid,
            "image_0_uid": pair.image_0_uid,
            "image_1_uid": pair.image_1_uid,
            "model_0": pair.model_0 or "",
            "model_1": pair.model_1 or "",
            "ranking_id": pair.ranking_id or "",
            "created_at": preference.decided_at or "",
            "num_example_per_prompt": per_prompt[pair.prompt],
            "pair_id": pair.pair_id,
            "n_votes": preference.n_votes,
            "votes_0": preference.votes_0,
            "votes_1": preference.votes_1,
            "votes_tie": preference.votes_tie,
            "agreement": preference.agreement,
        }
        seeds = {"seed_0": pair.seed_0, "seed_1": pair.seed_1}
        rows.append(row | {key: seed for key, seed in seeds.items() if seed is not None})
    return rows


def metadata_text(preferences: Iterable[Preference]) -> str:
    """Content of metadata.jsonl."""
    return "".join(json_line(row) for row in metadata_rows(preferences))


def preference_of(row: dict[str, Any]) -> Preference:
    """The preference in a row of metadata.jsonl, of which three keys suffice where nobody has decided, and five else.

    Where neither image is preferred, it is undecided, or what the numbers of votes say. Numbers may stand for true and
    false, and be written as other programs do: 1.0, or NaN where there is none.

    Raises:
        ValueError: if a key is missing or a value contradicts another.
    """
    for key in ("prompt", "image_0", "image_1"):
        if key not in row:
            raise ValueError(f"the key {key!r} is missing")
    row = {key: _whole(value) if isinstance(value, float) else value for key, value in row.items()}
    row |= {key: str(row[key]) for key in _NAMES if isinstance(row.get(key), int)}
    prefers = row.get("prefer_0"), row.get("prefer_1")
    prefer_0, prefer_1 = (False if each is None else each for each in prefers)  # nobody has looked at it
    if not all(isinstance(each, int) and each in (0, 1) for each in (prefer_0, prefer_1)) or (prefer_0 and prefer_1):
        raise ValueError(
            "exactly one of prefer_0 and prefer_1 must be true, or both false where nobody has decided, got "
            f"{prefer_0!r:.20} and {prefer_1!r:.20}"
        )
    pair = Pair(
        pair_id=row.get("pair_id") or pair_id(str(row["prompt"]), str(row["image_0"]), str(row["image_1"])),
        prompt=row["prompt"],
        image_0=row["image_0"],
        image_1=row["image_1"],
        image_0_uid=row.get("image_0_uid") or "",
        image_1_uid=row.get("image_1_uid") or "",
        ranking_id=row.get("ranking_id") or None,
        model_0=row.get("model_0") or None,
        model_1=row.get("model_1") or None,
        seed_0=row.get("seed_0"),
        seed_1=row.get("seed_1"),
    )
    votes_0, votes_1 = _count(row, "votes_0", int(prefer_0)), _count(row, "votes_1", int(prefer_1))
    votes_tie = _count(row, "votes_tie", 0)
    votes_bad = _count(row, "n_votes", votes_0 + votes_1 + votes_tie) - votes_0 - votes_1 - votes_tie
    created = row.get("created_at")
    decided_at = created if isinstance(created, str) and is_time(created) else None
    preference = Preference(pair, votes_0, votes_1, votes_tie, votes_bad, 0, False, decided_at)
    if votes_bad < 0 or [preference.status == side for side in SIDES] != [prefer_0, prefer_1]:
        raise ValueError("the numbers of votes contradict prefer_0 and prefer_1")
    return preference


def _whole(value: float) -> float | int | None:
    """A whole number as such, and None for NaN."""
    return int(value) if value.is_integer() else value if value == value else None


def _count(row: dict[str, Any], key: str, default: int) -> int:
    value = row.get(key, default)
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} must be a whole number of at least 0, got {value!r:.100}")
    return value
