"""The entry points' Hydra application."""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpo_sd.composition.checks import CHECKS, check_settings, sweeping
from dpo_sd.composition.messages import explain
from dpo_sd.composition.options import find_own_modules, flags_first
from dpo_sd.composition.replay import check_replayed, resume_arguments
from dpo_sd.composition.resolvers import register
from dpo_sd.composition.schema import CONF_DIR
from dpo_sd.composition.streams import keep_talking
from dpo_sd.errors import UserError


def entry_point(
    config_name: str, resumable: bool = False
) -> Callable[[Callable[[DictConfig], Any]], Callable[..., Any]]:
    """Decorator that makes `main(cfg)` a Hydra application on `conf/<config_name>.yaml`.

    The composition is checked before main begins. A mistake of the user's ends in one message and exit code 1, Ctrl-C
    in exit code 130; other exceptions keep their traceback. Called with a configuration, `main(cfg)` only runs.

    Args:
        config_name: name of the file in conf/, without its ending; `CHECKS` has its check, `check_settings` serves the
            others.
        resumable: understands `resume=<run>`, see `dpo_sd.training.resume`.
    """

    reported: list[Exception] = []  # of the jobs of a sweep
    given: list[str] = []  # the command line of a start that replays another's settings

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[..., Any]:
        @functools.wraps(main)
        def job(cfg: DictConfig) -> Any:
            try:
                if given:
                    check_replayed(cfg, given)
                CHECKS.get(config_name, check_settings)(cfg)
                return main(cfg)
            except Exception as error:
                message = explain(error)
                logging.getLogger("dpo_sd.failure").error(message or "failed", exc_info=message is None)
                _report(error)
                reported.append(error)
                if not sweeping():
                    if message:
                        _remove_empty_folder()
                    sys.exit(1)
                if message:
                    reported.append(told := UserError(message))
                    raise told from error
                raise  # Hydra notes it and starts the next job

        application = hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base="1.3")(job)

        @functools.wraps(main)
        def run(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return main(cfg)
            keep_talking()
            wants_all = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
            os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come out of Hydra as they are
            try:
                sys.argv[1:] = flags_first(sys.argv[1:])
                find_own_modules(sys.argv[1:])
                arguments = resume_arguments(sys.argv[1:]) if resumable else sys.argv[1:]
                if arguments != sys.argv[1:]:
                    given[:] = sys.argv[1:]
                    sys.argv[1:] = arguments
                application()
            except KeyboardInterrupt:
                sys.exit(130)
            except ValueError as error:  # a plain one is Hydra's own, about its flags and groups
                _report(error if explain(error) else UserError(error))
                sys.exit(1)
            except Exception as error:
                if error not in reported:
                    _report(error if explain(error) or wants_all else _uncomposed(error))
                sys.exit(1)

        return run

    return decorate


def _uncomposed(error: Exception) -> UserError:
    """One line for what Hydra says of settings that it cannot compose, whatever it raises."""
    reason = str(error).partition("\n")[0]
    return UserError(
        f"these settings cannot be composed ({type(error).__name__}: {reason}); HYDRA_FULL_ERROR=1 in the environment "
        "shows where"
    )


def _remove_empty_folder() -> None:
    """Takes away the folder of a job that a mistake ended before there was anything but its log."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    log = folder / f"{HydraConfig.get().job.name}.log"
    with suppress(OSError):
        if list(folder.iterdir()) == [log]:
            log.unlink()
            folder.rmdir()


def _report(error: BaseException) -> None:
    message = explain(error)
    if message is None:
        traceback.print_exception(error)
    else:
        print(f"error: {message}", file=sys.stderr)


register()
