"""Files on the Hub, and one line for whatever goes wrong there."""

from __future__ import annotations

from collections.abc import Iterator
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
def hub_errors(repository: str) -> Iterator[None]:
    """Turns what goes wrong on the Hub into one line that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise UserError(f"{repository} asks for consent: accept its terms on its page, then hf auth login") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the Hub has no public {repository}: check its name, or hf auth login") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repository} has no such revision on the Hub: see its branches, tags and commits") from error
    except UserError:
        raise
    except (LocalEntryNotFoundError, HTTPError, OSError, ValueError) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise UserError(
            f"{repository} is not on this computer and {why}: fetch it once with a network, or give a local folder "
            f"or file ({type(error).__name__})"
        ) from error
