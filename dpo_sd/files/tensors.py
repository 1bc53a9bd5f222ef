"""Tensors in safetensors files: written with checksums, their headers read, and a store by what they were made from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing
from dpo_sd.files.checksums import feed
from dpo_sd.files.room import writing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEY = 24  # hexadecimal digits
# bytes of a number by its name in safetensors; newer kinds are not measured
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
_DAMAGE = (ValueError, struct.error, AttributeError, TypeError, KeyError, IndexError, RecursionError)


_CHECKSUMS = "dpo_sd.checksums"  # in the metadata of our files
_OURS = "{ "  # begins our headers: what another program writes again, metadata and all, begins with a brace alone
_DIGITS = 16  # hexadecimal, of a checksum by XXH3
CHANGED = "its bytes have changed since they were written"


class HeaderError(ValueError):
    """No safetensors file, or a damaged one; the text says why and does not name the file."""


class Header(NamedTuple):
    """The beginning of a safetensors file, with one entry per tensor in each mapping.

    Args:
        shapes: sizes of each tensor by its name, in the order of the header.
        dtypes: safetensors' name of the kind of numbers, "F32" for example.
        offsets: where the bytes of each tensor begin in the file.
        metadata: texts by key; empty where the file has none.
        checksums: XXH3 of each tensor's bytes, or one of all of them together; none in files of other programs.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    offsets: dict[str, int]
    metadata: dict[str, str]
    checksums: Sequence[int] = ()

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the order of the header."""
        return list(self.shapes)


def read_header(file: str | Path) -> Header:
    """The header of a safetensors file, checked against the file's size; no tensor is read.

    Raises:
        HeaderError: if it is no safetensors file, or one that is cut short or inconsistent.
        OSError: if it cannot be read.
    """
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        try:
            length = opened.read(8)
            if (there := struct.unpack("<Q", length)[0]) > size:
                raise ValueError("its header is longer than the file")
            text = opened.read(there)
            header = _header(json.loads(text), 8 + there, size)
        except _DAMAGE as error:
            raise HeaderError(str(error)) from error
    return header._replace(checksums=_checked(length + text, header.metadata))


def _checked(raw: bytes, metadata: Mapping[str, str]) -> Sequence[int]:
    """The checksums of the data, which a file of ours has, once that of its header is right.

    Args:
        raw: the length of the header, and the header.
    """
    if not raw[9:10].isspace():  # behind the length and the brace
        return ()
    digits = metadata.get(_CHECKSUMS, "")
    own, *of_data = [digits[place : place + _DIGITS] for place in range(0, len(digits), _DIGITS)] or [""]
    if own != _of_header(raw):
        raise HeaderError(CHANGED)
    return [int(digits, 16) for digits in of_data]


def _of_header(raw: bytes) -> str:
    """The checksum of a header in which it stands itself, which counts as zeros."""
    return xxhash.xxh3_64_hexdigest(_with_checksum(raw, "0" * _DIGITS))


def _with_checksum(raw: bytes, digits: str) -> bytes:
    place = raw.find(f'"{_CHECKSUMS}":"'.encode()) + len(_CHECKSUMS) + 4
    return raw[:place] + digits.encode() + raw[place + _DIGITS :]


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, one_by_one: bool = False
) -> None:
    """Writes a safetensors file whole or not at all, with checksums; equal tensors and texts give equal bytes.

    Args:
        tensors: by name; none shares memory with another.
        metadata: texts by key.
        one_by_one: gives each tensor a checksum of its own, for files of which parts are read.

    Raises:
        OSError, SafetensorError: if the file cannot be written.
    """
    from safetensors.torch import save_file

    blank = "0" * _DIGITS * (1 + (len(tensors) if one_by_one else 1)) + " "  # which makes room for that of `_OURS`
    with replacing(file) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {**(metadata or {}), _CHECKSUMS: blank})
        with open(temporary, "rb+") as opened:
            length = opened.read(8)
            text = opened.read(*struct.unpack("<Q", length))
            entries = json.loads(text)
            texts = entries.pop("__metadata__")
            spans = [entry["data_offsets"] for entry in entries.values()]
            whole = [(0, max((end for _, end in spans), default=0))]
            of_data = _checksums(opened, 8 + len(text), spans if one_by_one else whole)
            texts[_CHECKSUMS] = blank[:_DIGITS] + "".join(f"{each:0{_DIGITS}x}" for each in of_data)
            # safetensors writes the metadata in another order at every start
            ordered = {"__metadata__": dict(sorted(texts.items())), **entries}
            header = _OURS + json.dumps(ordered, separators=(",", ":"), ensure_ascii=False)[1:]
            raw = length + header.encode().ljust(len(text))
            opened.seek(0)
            opened.write(_with_checksum(raw, _of_header(raw)))


def check_tensors(file: str | Path) -> Header:
    """The header of a safetensors file, all of whose bytes are checked if `write_tensors` wrote it as a whole.

    Raises:
        HeaderError: as `read_header`, and if a tensor has changed since it was written.
        OSError: if it cannot be read.
    """
    header = read_header(file)
    if header.checksums:
        with open(file, "rb") as opened:
            start = min(header.offsets.values(), default=0)
            if _checksums(opened, start, [(0, os.fstat(opened.fileno()).st_size - start)]) != header.checksums:
                raise HeaderError(CHANGED)
    return header


def _checksums(opened: BinaryIO, start: int, spans: Iterable[Sequence[int]]) -> list[int]:
    """Checksums of parts of a file, given by their beginnings and ends behind `start`."""
    return [feed(xxhash.xxh3_64(), opened, start + begins, start + ends).intdigest() for begins, ends in spans]


def _header(entries: dict[str, Any], start: int, size: int) -> Header:
    metadata = entries.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata holds more than texts")
    shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
    dtypes = {name: str(entry["dtype"]) for name, entry in entries.items()}
    end = 0  # of the tensors that were looked at, in bytes behind the header
    for (begins, ends), name in sorted((entry["data_offsets"], name) for name, entry in entries.items()):
        length = _BYTES.get(dtypes[name], 0) * math.prod(shapes[name])
        if begins != end or ends < begins or (dtypes[name] in _BYTES and ends - begins != length):
            raise ValueError(f"the place of {name} is not that of its numbers")
        end = ends
    if start + end != size:
        raise ValueError("it is cut short" if start + end > size else "it goes on behind its last tensor")
    return Header(
        shapes, dtypes, {name: start + entry["data_offsets"][0] for name, entry in entries.items()}, metadata, []
    )


def content_key(**made_from: Any) -> str:
    """Key of whatever follows from these values alone: 24 hexadecimal digits."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:KEY]


class TensorStore:
    """A folder of safetensors files (shards) that together hold one tensor per key, all of one precision.

    Several runs may read and write it at once: a shard appears whole or not at all, and never changes.

    Args:
        folder: made when something is first kept.
        dtype: precision of the tensors.
        shard_size: tensors per shard, which a killed run has to compute again at most.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, shard_size: int = 256):
        self.folder, self.dtype, self.shard_size = folder, dtype, shard_size
        self.notes: list[str] = []
        self._waiting: dict[str, Tensor] = {}
        self._stale = False  # whether the index lacks what was written since
        self._read_index()

    def _read_index(self) -> None:
        """Reads where every key lies into columns that are sorted by key: objects would not do for millions.

        Row i of the index says that key `_keys[i]` lies in shard number `_shards[i]`, an index into `files`, from byte
        `_offsets[i]` on, and has shape number `_shape_numbers[i]`, in `shapes`, and checksum `_checksums[i]`.
        """
        self.files: list[Path] = []
        columns = [
            _columns([]),
            np.empty(0, np.int32),
            np.empty(0, np.int64),
            np.empty(0, np.int16),
            np.empty(0, np.uint64),
        ]
        parts = [[column] for column in columns]
        known: dict[tuple[int, ...], int] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            if (header := self._header(file)) is None:
                continue
            numbers = [known.setdefault(shape, len(known)) for shape in header.shapes.values()]
            names = [name.encode() for name in header.names]
            read = (names, [len(self.files)] * len(numbers), list(header.offsets.values()), numbers, header.checksums)
            for part, column, values in zip(parts, columns, read, strict=True):
                part.append(np.array(values, column.dtype))
            self.files.append(file)
        self.shapes, self._stale = list(known), False
        keys, *others = map(np.concatenate, parts)
        order = np.argsort(keys, kind="stable")
        self._keys, self._shards, self._offsets, self._shape_numbers, self._checksums = (
            part[order] for part in (keys, *others)
        )

    def _header(self, file: Path) -> Header | None:
        """The header of a shard; None, with a note, where it cannot be read or is damaged and deleted."""
        try:
            header = read_header(file)
            if len(header.checksums) != len(header.shapes):
                raise HeaderError("it has no checksums")
            return header
        except HeaderError as error:
            self.notes.append(f"{file} is damaged ({error}): it is deleted, and what it held is computed anew")
            with suppress(OSError):
                file.unlink()
        except OSError as error:
            self.notes.append(f"{file} cannot be read ({error}): what it held is computed anew")
        return None

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
        """Keeps a tensor; it is on disk after the next `flush` or when `shard_size` of them wait.

        Raises:
            UserError: if there is no room on the disk; what was written before stays.
        """
        self._waiting[key] = tensor.detach().to("cpu", self.dtype).contiguous().clone()
        if len(self._waiting) >= self.shard_size:
            self._write()

    def flush(self) -> None:
        """Writes the tensors that wait; they can be read afterwards.

        Raises:
            UserError: as `put`.
        """
        if self._waiting:
            self._write()
        if self._stale:
            self._read_index()

    def _write(self) -> None:
        from safetensors import SafetensorError

        name = hashlib.sha256("".join(sorted(self._waiting)).encode()).hexdigest()[:KEY]
        file = self.folder / f"{name}.safetensors"
        with writing(file, SafetensorError):
            write_tensors(file, self._waiting, one_by_one=True)
        self._waiting, self._stale = {}, True

    def rows(self, keys: Sequence[str] | np.ndarray) -> StoredTensors:
        """The tensors under these keys, in this order, to be read from disk one by one.

        Raises:
            KeyError: if one is missing; `flush` comes before.
        """
        places = self._places(_columns(keys))
        if (places < 0).any():
            raise KeyError(str(keys[int(np.argmax(places < 0))]))
        return StoredTensors(
            self.files,
            self.shapes,
            self.dtype,
            self._shards[places],
            self._offsets[places],
            self._shape_numbers[places],
            self._checksums[places],
        )


class StoredTensors:
    """A sequence of tensors on disk; it holds 22 bytes for each, and reads without mapping files into memory.

    Made by `TensorStore.rows`.

    Args:
        files, shapes: shards, and shapes, that the columns count.
        dtype: precision of all tensors.
        shards, offsets, shape_numbers, checksums: columns as in the store's index, one row per tensor.
        most_open: shards that are open for reading at once.
    """

    def __init__(
        self,
        files: list[Path],
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        shards: np.ndarray,
        offsets: np.ndarray,
        shape_numbers: np.ndarray,
        checksums: np.ndarray,
        most_open: int = 64,
    ):
        self.files, self.shapes, self.dtype, self.most_open = files, shapes, dtype, most_open
        self.shards, self.offsets, self.shape_numbers, self.checksums = shards, offsets, shape_numbers, checksums
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors by shard, the latest used last

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, row: int) -> Tensor:
        import torch

        shape = self.shapes[self.shape_numbers[row]]
        length = math.prod(shape) * self.dtype.itemsize
        data = os.pread(self._descriptor(int(self.shards[row])), length, int(self.offsets[row]))
        if xxhash.xxh3_64_intdigest(data) != self.checksums[row]:
            file = self.files[self.shards[row]]
            with suppress(OSError):
                file.unlink()
            raise UserError(f"{file} is damaged and is deleted: start again, and what it held is computed anew")
        return torch.frombuffer(bytearray(data), dtype=self.dtype).reshape(shape)

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            try:
                self._open[shard] = os.open(self.files[shard], os.O_RDONLY)
            except FileNotFoundError as error:
                raise UserError(f"{self.files[shard]} was deleted while it was in use: start again") from error
            if len(self._open) > self.most_open:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def __getstate__(self) -> Mapping[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # another process opens the files itself

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def _columns(keys: Sequence[str] | np.ndarray) -> np.ndarray:
    return np.asarray(keys).astype(f"S{KEY}")
