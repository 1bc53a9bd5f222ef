"""Rows of a dataset: their images, and a tally of those that are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dpo_sd.errors import UserError


def image_bytes(value: Any, column: str, where: str) -> bytes | None:
    """The bytes of an image as a dataset holds it; None where there is none.

    Args:
        value: bytes, or `{"bytes": …, "path": …}` with bytes or with a path on the Hub.
        column, where: names of the column and the row, for messages.

    Raises:
        UserError: if it is no image.
    """
    if isinstance(value, dict) and value.keys() >= {"bytes", "path"}:
        if value["bytes"] is None and "://" in (value["path"] or ""):
            import fsspec

            with fsspec.open(value["path"], "rb") as file:
                return file.read()  # type: ignore[union-attr]
        value = value["bytes"]
    if value is not None and not isinstance(value, bytes):
        raise UserError(f"{where}: column {column} holds {type(value).__name__}, not pictures")
    return value or None


class Tally:
    """Tells rows that were kept from those that were left out, and counts the latter.

    Args:
        named: reasons whose first five rows are named.
    """

    def __init__(self, named: Sequence[str]):
        self.named = named
        self.read = 0
        self.left_out: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def kept(self, entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The entries of an extract that were kept; the others are counted on the way."""
        for entry in entries:
            self.read += 1
            if "left_out" not in entry:
                yield entry
                continue
            reason = entry["left_out"]
            self.left_out[reason] += 1
            if reason in self.named and self.left_out[reason] <= 5:
                self.places.setdefault(reason, []).append(entry["where"])

    def __str__(self) -> str:
        """`120 rows read; left out: 12 tied, 2 without a caption (row 5 of a.parquet; row 9 of a.parquet)`"""
        said = []
        for reason, n in self.left_out.most_common():
            places = "; ".join(self.places.get(reason, [])) + (" …" if reason in self.places and n > 5 else "")
            said.append(f"{n} {reason}" + (f" ({places})" if places else ""))
        return f"{self.read} rows read" + (f"; left out: {', '.join(said)}" if said else "")
