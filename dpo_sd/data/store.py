"""Tensors on disk by what they were made from, in shards that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_sd.errors import UserError
from dpo_sd.files import replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARD = 256  # tensors: what a killed run has to compute again at most
OPEN = 64  # shards that are kept open for reading
KEY = 24  # hexadecimal digits


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
        self._waiting: dict[str, Tensor] = {}
        self._read_index()

    def _read_index(self) -> None:
        """Where every key lies, as sorted columns: Python objects would not do for millions."""
        self.files, self.notes = [], []
        keys, shards, offsets, shapes = [], [], [], []
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                start, header = _header(file)
            except (OSError, ValueError, struct.error) as error:
                self.notes.append(f"{file} cannot be read ({error}): what it held is computed anew")
                continue
            for key, entry in header.items():
                keys.append(key.encode())
                shards.append(len(self.files))
                offsets.append(start + entry["data_offsets"][0])
                shapes.append(tuple(entry["shape"]))
            self.files.append(file)
        known = sorted(set(shapes))
        number = {shape: index for index, shape in enumerate(known)}
        order = np.argsort(np.array(keys, dtype=f"S{KEY}"), kind="stable")
        self.shapes = known
        self._keys = np.array(keys, dtype=f"S{KEY}")[order]
        self._shards = np.array(shards, dtype=np.int32)[order]
        self._offsets = np.array(offsets, dtype=np.int64)[order]
        self._shape_numbers = np.array([number[shape] for shape in shapes], dtype=np.int16)[order]

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys that nothing is kept under, each once."""
        unique = list(dict.fromkeys(keys))
        places = self._places(unique)
        return [key for key, place in zip(unique, places, strict=True) if place < 0 and key not in self._waiting]

    def _places(self, keys: Sequence[str]) -> np.ndarray:
        """The row of the index that holds each key, -1 for none."""
        wanted = np.array([key.encode() for key in keys], dtype=f"S{KEY}")
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
        """Writes what waits, and reads the index anew.

        Raises:
            UserError: as `put`.
        """
        if self._waiting:
            self._write()
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
        self._waiting = {}

    def rows(self, keys: Sequence[str]) -> StoredTensors:
        """The tensors under these keys, in this order, to be read from disk one by one.

        Raises:
            KeyError: when one is missing; `flush` comes before.
        """
        places = self._places(keys)
        if (places < 0).any():
            raise KeyError(keys[int(np.argmax(places < 0))])
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
            self._open[shard] = os.open(self.files[shard], os.O_RDONLY)
            if len(self._open) > OPEN:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # another process opens the files itself

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


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
