"""JSON objects, one on each line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_sd.errors import UserError
from dpo_sd.files.texts import utf_8


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
        UserError: if the file cannot be read, or a line is not a JSON object; the message names it.
    """
    # at newlines only: prompts may hold the other separators at which str.splitlines cuts
    for number, line in enumerate(utf_8(file).split(b"\n"), start=1):
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
    remedy = "restore or remove the line"
    try:
        text = line if isinstance(line, str) else line.decode("utf-8-sig")
        if text.strip()[:1] in ("[", "]") or text.strip()[-1:] in (",", "{"):
            remedy = "write one whole object a line, without the brackets and commas of an array"
        record = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON ({error}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): {remedy}") from error
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: {remedy}")
    return record
