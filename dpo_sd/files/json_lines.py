"""JSON objects, one on each line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_sd.errors import UserError


def json_line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON with its newline, in UTF-8 but for lone surrogates, which are escaped.

    Raises:
        ValueError: if a number in it is not finite.
    """
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def read_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and the JSON objects on those lines; blank lines are passed over.

    Raises:
        UserError: if a line is not a JSON object; the message names it.
    """
    # at newlines only: prompts may hold the other separators at which str.splitlines cuts
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                yield number, parse_object(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: {error}") from error


def parse_object(line: bytes | str) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        ValueError: if there is none.
    """
    try:
        record = json.loads(line if isinstance(line, str) else line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): restore or remove the line") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object: restore or remove the line")
    return record
