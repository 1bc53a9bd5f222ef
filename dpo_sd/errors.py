"""The one exception that users meet, and settings in the form in which a message tells users to write them."""

from __future__ import annotations

import re
import shlex

# words of letters, digits and a few signs, with a slash or a letter in front, that Hydra reads as text
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z/][\w/.-]*(?: [\w/.-]+)*", re.ASCII | re.IGNORECASE)


class UserError(ValueError):
    """A mistake in a setting, a file or a folder; entry points print its message without a traceback."""


def override(key: str, value: str) -> str:
    """A setting as Hydra's command line takes it, key=value, with the value in quotes where it needs them.

    It is meant for `sys.argv`; `in_shell` is for what a user types.

    Args:
        key: dotted path of the setting, or a group.
        value: text that the setting is to have, read as text whatever it looks like.
    """
    if _PLAIN.fullmatch(value):
        return f"{key}={value}"
    # OmegaConf would look up ${x}; it takes a backslash off before it, and halves those in front
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    # in Hydra's quotes only the quote itself has a meaning, and backslashes before it or the closing one
    return f"{key}='" + re.sub(r"(\\*)('|\Z)", r"\1\1\2", value).replace("'", r"\'") + "'"


def check_range(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raises UserError, naming the setting, unless its value is in [least, most]."""
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise UserError(f"{name} must be at most {most}, got {value}")


def in_shell(key: str, value: object) -> str:
    """A setting as one types it in a shell, which has quotes of its own."""
    text = override(key, str(value))
    quoted = shlex.quote(text)
    # the two kinds of quotes are read more easily than one kind inside of itself
    return quoted if quoted == text or set('"$`\\!') & set(text) else f'"{text}"'
