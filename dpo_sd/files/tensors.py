"""Tensors on disk by what they were made from, in shards that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARD = 256  # tensors: what a killed run has to compute again at most
OPEN = 64  # shards that are kept open for reading
KEY = 24  # hexadecimal digits
_DAMAGE = (ValueError, struct.error, AttributeError, TypeError, KeyError, IndexError, RecursionError)


def content_key(**made_from: Any) -> str:
    """Key of whatever follows from these values alone: 24 hexadecimal digits."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:KEY]


class TensorStore:
    """A folder of safetensors files that together hold one tensor per key, all of one precision.

    Several runs may read and write it at once: a file, once there, never changes.

    Args:
        folder: made when something is first kept.
        dtype: of the tensors.
    """

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.folder, self.dtype = folder, dtype
        self.notes: list[str] = []
        self._waiting: dict[str, Tensor] = {}
        self._stale = False  # whether the index lacks what was written since
        self._read_index()

    def _read_index(self) -> None:
        """Where every key lies, as sorted columns: Python objects would not do for millions."""
        self.files: list[Path] = []
        keys, shards, offsets, numbers = [], [], [], []
        known: dict[tuple[int, ...], int] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                start, header = _header(file)
                shapes = [tuple(map(int, entry["shape"])) for entry in header.values()]
                offsets.append(np.array([entry["data_offsets"][0] for entry in header.values()], np.int64) + start)
            except OSError as error:
                self.notes.append(f"{file} cannot be read ({error}): what it held is computed anew")
                continue
            except _DAMAGE as error:
                self.notes.append(f"{file} is damaged ({error}): it is deleted, and what it held is computed anew")
                with suppress(OSError):
                    file.unlink()
                continue
            keys.append(np.array([key.encode() for key in header], f"S{KEY}"))
            shards.append(np.full(len(header), len(self.files), np.int32))
            numbers.append(np.array([known.setdefault(shape, len(known)) for shape in shapes], np.int16))
            self.files.append(file)
        self.shapes, self._stale = list(known), False
        together = np.concatenate([np.empty(0, f"S{KEY}"), *keys])
        order = np.argsort(together, kind="stable")
        self._keys = together[order]
        self._shards = np.concatenate([np.empty(0, np.int32), *shards])[order]
        self._offsets = np.concatenate([np.empty(0, np.int64), *offsets])[order]
        self._shape_numbers = np.concatenate([np.empty(0, np.int16), *numbers])[order]

    def lacks(self, keys: Sequence[str] | np.ndarray) -> np.ndarray:
        """Whether nothing is kept under each key: (n,), bool."""
        wanted = _columns(keys)
        lacking = self._places(wanted) < 0
        return lacking & ~np.isin(wanted, _columns(list(self._waiting))) if self._waiting else lacking

    def _places(self, wanted: np.ndarray) -> np.ndarray:
        """The row of the index that holds each key, -1 for none."""
        if not len(self._keys):
            return np.full(len(wanted), -1)
        places = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        return np.where(self._keys[places] == wanted, places, -1)

    def put(self, key: str, tensor: Tensor) -> None:
        """Keeps a tensor; it is on disk after the next `flush` or when `SHARD` of them wait.

        Raises:
            UserError: when there is no room on the disk; what was written before stays.
        """
        self._waiting[key] = tensor.detach().to("cpu", self.dtype).contiguous().clone()
        if len(self._waiting) >= SHARD:
            self._write()

    def flush(self) -> None:
        """Writes what waits; it can be read afterwards.

        Raises:
            UserError: as `put`.
        """
        if self._waiting:
            self._write()
        if self._stale:
            self._read_index()

    def _write(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        name = hashlib.sha256("".join(sorted(self._waiting)).encode()).hexdigest()[:KEY]
        file = self.folder / f"{name}.safetensors"
        try:
            with replacing(file) as temporary:
                save_file(self._waiting, temporary)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file} cannot be written ({error}): make room, or choose another place with cache_dir=<folder>; "
                "what is complete is kept"
            ) from error
        self._waiting, self._stale = {}, True

    def rows(self, keys: Sequence[str] | np.ndarray) -> StoredTensors:
        """The tensors under these keys, in this order, to be read from disk one by one.

        Raises:
            KeyError: when one is missing; `flush` comes before.
        """
        places = self._places(_columns(keys))
        if (places < 0).any():
            raise KeyError(str(keys[int(np.argmax(places < 0))]))
        columns = (self._shards[places], self._offsets[places], self._shape_numbers[places])
        return StoredTensors(self.files, self.shapes, self.dtype, *columns)


class StoredTensors:
    """A sequence of tensors on disk; it holds 14 bytes for each, and reads without mapping files into memory.

    Made by `TensorStore.rows`.
    """

    def __init__(
        self,
        files: list[Path],
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        shards: np.ndarray,
        offsets: np.ndarray,
        shape_numbers: np.ndarray,
    ):
        self.files, self.shapes, self.dtype = files, shapes, dtype
        self.shards, self.offsets, self.shape_numbers = shards, offsets, shape_numbers
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors by shard, the latest used last

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, row: int) -> Tensor:
        import torch

        shape = self.shapes[self.shape_numbers[row]]
        length = math.prod(shape) * self.dtype.itemsize
        data = os.pread(self._descriptor(int(self.shards[row])), length, int(self.offsets[row]))
        if len(data) != length:
            raise UserError(f"{self.files[self.shards[row]]} is cut short: delete it, and its tensors are made anew")
        return torch.frombuffer(bytearray(data), dtype=self.dtype).reshape(shape)

    def shape(self, row: int) -> tuple[int, ...]:
        return self.shapes[self.shape_numbers[row]]

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            try:
                self._open[shard] = os.open(self.files[shard], os.O_RDONLY)
            except FileNotFoundError as error:
                raise UserError(f"{self.files[shard]} was deleted while it was in use: start again") from error
            if len(self._open) > OPEN:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # another process opens the files itself

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def _columns(keys: Sequence[str] | np.ndarray) -> np.ndarray:
    return np.asarray(keys).astype(f"S{KEY}")


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and its entries by key."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > os.path.getsize(file):
            raise ValueError("its header is longer than the file")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end > os.path.getsize(file):
        raise ValueError("it is cut short")
    return 8 + length, header
