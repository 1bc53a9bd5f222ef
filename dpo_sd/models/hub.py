"""Files on the Hub, and one line for whatever goes wrong there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_sd.errors import UserError


def quiet_libraries() -> None:
    """Keeps the progress bars of loading and remarks on parts that are not used here out of the way."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def snapshot(repository: str, patterns: list[str]) -> Path:
    """The folder of a repository's files on this computer, fetched from the Hub if they are missing."""
    from huggingface_hub import snapshot_download

    with hub_errors(repository):
        return Path(snapshot_download(repository, allow_patterns=patterns))


@contextmanager
def hub_errors(
    repository: str,
    kind: str = "",
    revision: str | None = None,
    otherwise: Callable[[Exception, bool], str] | None = None,
) -> Iterator[None]:
    """Turns errors of the Hub into one line that says what to do.

    Args:
        repository: name, `owner/name`.
        kind: what it is, put before its name where there is none of that name: "dataset ".
        revision: branch, tag or commit that was asked for.
        otherwise: message for errors that say nothing of the repository, given the error and whether HF_HUB_OFFLINE is
            set; None writes one for the files of a model.

    Raises:
        UserError: if there is such an error inside.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise no_consent(repository) from error
    except RepositoryNotFoundError as error:
        raise not_there(repository, kind) from error
    except RevisionNotFoundError as error:
        named = f"revision {revision}" if revision else "such revision"
        raise UserError(f"{repository} has no {named} on the Hub: see its branches, tags and commits") from error
    except (HTTPError, OSError, ValueError) as error:  # LocalEntryNotFoundError is among them
        message = (otherwise or _unreachable(repository))(error, constants.HF_HUB_OFFLINE)
        raise UserError(message) from error


def no_consent(repository: str) -> UserError:
    """The error of a gated repository."""
    return UserError(f"{repository} asks for consent: accept its terms on its page, then hf auth login")


def not_there(repository: str, kind: str = "") -> UserError:
    """The error of a repository that is private or does not exist."""
    return UserError(f"the Hub has no public {kind}{repository}: check its name, or hf auth login")


def _unreachable(repository: str) -> Callable[[Exception, bool], str]:
    def message(error: Exception, offline: bool) -> str:
        return (
            f"{repository} is not on this computer and "
            f"{'HF_HUB_OFFLINE is set' if offline else 'the Hub cannot be reached'}: fetch it once with a network, or "
            f"give a local folder or file ({type(error).__name__})"
        )

    return message
