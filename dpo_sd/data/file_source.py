"""Sources whose images lie in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_sd.data.cache import Cache
from dpo_sd.data.preparing import prepare
from dpo_sd.data.source import Found, PreparedData, Source
from dpo_sd.data.splitting import Split

if TYPE_CHECKING:
    from dpo_sd.data.frames import Framing
    from dpo_sd.models.sampling import Sampler
    from dpo_sd.models.stable_diffusion import StableDiffusion


class FileSource(Source):
    """A source of image files: a subclass says in `look` which they are, and all else follows."""

    _split: Split | None = None

    def look(self, cache: Cache, fetch: bool) -> Split | Found:
        """Samples for training and validation, or how much there can be where they are not fetched and shall not be.

        Args:
            cache, fetch: as in `Source.find`.

        Raises:
            UserError: as `Source.find`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no look(cache, fetch)")

    def find(self, cache: Cache, fetch: bool) -> Found:
        found = self._split or self.look(cache, fetch)
        if isinstance(found, Found):
            return found
        self._split = found
        return found.found()

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        if self._split is None:
            self.find(cache, fetch=True)
        assert self._split is not None
        return prepare(model, self._split, framing, cache)
