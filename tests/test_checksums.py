"""Changed bits are noticed when a file is read: 500 mutations of a checkpoint, of shards, of errors and of a LoRA."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo_sd.errors import UserError
from dpo_sd.files.checksums import is_whole, seal
from dpo_sd.files.tensors import HeaderError, TensorStore, check_tensors, read_header, write_tensors
from dpo_sd.lora.reading import read_lora
from dpo_sd.lora.weights import LoRAWeights
from dpo_sd.lora.writing import save_diffusers, save_kohya
from dpo_sd.losses import PairErrors
from dpo_sd.training.checkpoints import AtomicCheckpointIO
from dpo_sd.training.reference_cache import ReferenceErrors
from dpo_sd.training.resume import read_checkpoint

MUTATIONS = 500


def mutations(whole: bytes) -> list[bytes]:
    """The file with a flipped bit, another byte, cut short, longer, or with a stretch of zeros or of another place."""
    dice, found = random.Random(0), []
    while len(found) < MUTATIONS:
        kind, place, changed = dice.randrange(6), dice.randrange(len(whole)), bytearray(whole)
        if kind == 0:
            changed[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[place] = dice.randrange(256)
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            changed += dice.randbytes(1 + place % 64)
        elif kind == 4:
            changed[place : place + 64] = bytes(len(changed[place : place + 64]))
        else:
            other = dice.randrange(len(whole))
            changed[place : place + 16] = whole[other : other + 16]
        if changed != whole:
            found.append(bytes(changed))
    return found


def unnoticed(file: Path, read: Callable[[], object], errors: tuple[type[Exception], ...]) -> int:
    """How many mutations of a file its reader takes for the file itself."""
    whole, count = file.read_bytes(), 0
    for changed in mutations(whole):
        file.write_bytes(changed)
        with suppress(*errors):
            count += read() is not None
    file.write_bytes(whole)
    assert read() is not None
    return count


def test_every_mutation_of_a_checkpoint_is_noticed(tmp_path):
    file = tmp_path / "last.ckpt"
    content = {"identity": {"settings": {}}, "global_step": 3, "adapters": {"policy": {"a": torch.randn(40, 40)}}}
    AtomicCheckpointIO().save_checkpoint(content | {"optimizer_states": [], "loops": {}}, file)
    assert unnoticed(file, lambda: read_checkpoint(file), (UserError,)) == 0


def test_a_damaged_checkpoint_names_the_newest_whole_one(tmp_path):
    for name in ("last", "step=000100", "step=000200", "step=000300"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / f"{name}.ckpt")
    for name in ("last", "step=000300"):
        (tmp_path / f"{name}.ckpt").write_bytes(b"?" * 999)
    with pytest.raises(UserError, match=r"last.ckpt is damaged.*go on with .resume=.*step=000200.ckpt"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_every_mutation_of_a_shard_is_noticed_and_costs_no_more_than_the_shard(tmp_path):
    store = TensorStore(tmp_path, torch.float32)
    keys = [f"{number:024x}" for number in range(5)]
    tensors = [torch.randn(4, 3, 5) for _ in keys]
    for key, tensor in zip(keys, tensors, strict=True):
        store.put(key, tensor)
    store.flush()
    (file,) = tmp_path.iterdir()

    def read() -> object:
        store = TensorStore(tmp_path, torch.float32)
        if store.lacks(keys).any():
            assert store.notes and not file.exists()
            return None
        rows = store.rows(keys)
        read = [rows[row] for row in range(len(rows))]
        assert all(map(torch.equal, read, tensors))
        return read

    assert unnoticed(file, read, (UserError,)) == 0


def test_every_mutation_of_the_references_errors_is_noticed(tmp_path, caplog):
    ids = np.arange(20)
    kept = ReferenceErrors(tmp_path, ids, draws=3)
    kept.put(range(20), [1] * 20, PairErrors(torch.randn(20), torch.randn(20)))
    kept.save()
    (file,) = tmp_path.iterdir()
    assert unnoticed(file, lambda: ReferenceErrors(tmp_path, ids, draws=3).filled or None, ()) == 0
    assert "computed anew" in caplog.text


def test_every_mutation_of_a_tensor_file_is_noticed(tmp_path):
    file = tmp_path / "lora.safetensors"
    tensors = {"b": torch.randn(30, 4), "a": torch.randn(7).half(), "none": torch.zeros(0, 3)}
    write_tensors(file, tensors, {"rank": "4", "comment": "0" * 40 + ' "dpo_sd.checksums":"é'})
    assert unnoticed(file, lambda: check_tensors(file), (HeaderError,)) == 0
    read = load_file(file)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert read_header(file).metadata["rank"] == "4"


def test_equal_tensors_give_equal_bytes_in_every_process(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from dpo_sd.files.tensors import write_tensors; "
        "write_tensors(Path(sys.argv[1]), {n: torch.arange(4.0) for n in sys.argv[2]}, {n: n for n in 'qwertzuiop'})"
    )
    written = []
    for number, order in enumerate(("abc", "cba", "bca")):
        file = tmp_path / f"{number}.safetensors"
        subprocess.run([sys.executable, "-c", code, str(file), order], check=True)
        written.append(file.read_bytes())
    assert written[0] == written[1] == written[2]


def test_a_seal_changes_nothing_for_who_does_not_know_it(tmp_path):
    torch.save({"a": 1}, tmp_path / "x.ckpt")
    assert not is_whole(tmp_path / "x.ckpt")
    seal(tmp_path / "x.ckpt")
    assert is_whole(tmp_path / "x.ckpt") and torch.load(tmp_path / "x.ckpt", weights_only=True) == {"a": 1}


def test_every_mutation_of_a_lora_of_ours_is_noticed(tmp_path):
    factors = {"lora_A": torch.randn(4, 320), "lora_B": torch.randn(320, 4)}
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = LoRAWeights({f"{name}.{half}.weight": factor for half, factor in factors.items()}, {name: 3.0})
    for file in (
        save_diffusers(lora, tmp_path / "d.safetensors"),
        save_kohya(lora, tmp_path / "k.safetensors", "sd15"),
    ):
        assert unnoticed(file, lambda file=file: read_lora(file), (UserError,)) == 0
