"""What the machine dictates, and what it cannot do."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from dpo_sd.errors import UserError
from dpo_sd.training import hardware as hardware_module
from dpo_sd.training.hardware import Hardware, accumulation, auto


def cuda(monkeypatch, gpus: int, memory_gib: float = 24.0, bf16: bool = True) -> None:
    """Make torch see these GPUs."""
    properties = SimpleNamespace(name="Some GPU", total_memory=int(memory_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)


@pytest.mark.parametrize(("micro_batch", "world_size", "expected"), [(16, 1, 1), (4, 1, 4), (1, 2, 8), (2, 8, 1)])
def test_accumulation_times_micro_batch_times_devices_is_pairs_per_update(micro_batch, world_size, expected):
    assert accumulation(16, micro_batch, world_size) == expected
    assert expected * micro_batch * world_size == 16


def test_pairs_that_do_not_divide_are_refused_with_the_nearest_that_do():
    with pytest.raises(UserError, match=r"pairs_per_update=10 .*micro_batch=2 on each of 2 devices.*=8 or 12"):
        accumulation(10, 2, 2)


def test_too_few_pairs_for_one_micro_batch_are_refused_with_the_least_that_do():
    with pytest.raises(UserError, match=r"pairs_per_update=3 .*use pairs_per_update=4,"):
        accumulation(3, 4)


@pytest.mark.parametrize("name", ["pairs_per_update", "micro_batch", "world_size"])
def test_accumulation_refuses_a_number_below_1_by_name(name):
    values = {"pairs_per_update": 4, "micro_batch": 4, "world_size": 1} | {name: 0}
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        accumulation(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"memory_gib": 0.0}, "memory_gib must be positive, got 0.0"),
        ({"precision": "16-mixed"}, "precision 16-mixed needs a CUDA GPU"),
        ({"weights": "bfloat16"}, "weights bfloat16 need a mixed precision"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        Hardware(**values)


def test_every_process_of_a_launcher_has_a_device_of_its_own(monkeypatch):
    assert Hardware().device == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Hardware("cuda", "bf16-mixed", "bfloat16").device == torch.device("cuda:1")


def test_srun_says_which_device_is_a_processs_own_and_lightnings_own_processes_know_better(monkeypatch):
    monkeypatch.setenv("SLURM_LOCALID", "3")
    hardware = Hardware("cuda", "bf16-mixed", "bfloat16")
    assert hardware.device == torch.device("cuda:3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert hardware.device == torch.device("cuda:1")


def test_a_cpu_needs_no_check(monkeypatch):
    cuda(monkeypatch, gpus=0)
    Hardware().check(devices=2)


def test_a_gpu_that_has_all_it_takes_is_accepted(monkeypatch):
    cuda(monkeypatch, gpus=1, memory_gib=23.6)
    Hardware("cuda", "bf16-mixed", "bfloat16", memory_gib=24).check()


def test_a_machine_without_a_gpu_is_refused_with_what_is_there(monkeypatch):
    cuda(monkeypatch, gpus=0)
    with pytest.raises(
        UserError, match=r"hardware=1x8gb needs a CUDA GPU, .* none \(\d+ CPU cores\): use hardware=cpu"
    ):
        Hardware("cuda").check(preset="1x8gb")


def test_more_devices_than_gpus_are_refused(monkeypatch):
    cuda(monkeypatch, gpus=1)
    with pytest.raises(UserError, match=r"trainer.devices=2 .* has 1: use trainer.devices=1"):
        Hardware("cuda").check(devices=2)


def test_a_gpu_without_bfloat16_is_refused_with_what_it_can_do(monkeypatch):
    cuda(monkeypatch, gpus=1, bf16=False)
    with pytest.raises(UserError, match=r"Some GPU cannot: use hardware.precision=16-mixed"):
        Hardware("cuda", "bf16-mixed").check()


def test_a_smaller_gpu_than_the_preset_is_made_for_is_refused(monkeypatch):
    cuda(monkeypatch, gpus=1, memory_gib=7.8)
    with pytest.raises(UserError, match=r"hardware=1x24gb is made for 24 GiB, but Some GPU has 7.8"):
        Hardware("cuda", memory_gib=24).check(preset="1x24gb")


def test_the_preset_to_use_instead_is_the_largest_that_the_card_can_take(monkeypatch):
    cuda(monkeypatch, gpus=1, memory_gib=15.7)
    with pytest.raises(UserError, match=r"made for 24 GiB, but Some GPU has 15.7: use hardware=1x16gb,"):
        Hardware("cuda", memory_gib=24).check(preset="1x24gb")


def test_four_bits_are_refused_without_a_gpu_and_without_their_library(monkeypatch):
    with pytest.raises(UserError, match=r"weights nf4 need a CUDA GPU: use hardware.weights=int8"):
        Hardware(precision="bf16-mixed", weights="nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes, .* pip install -e '.\[gpu\]', or use hardware.weights"):
        Hardware("cuda", "bf16-mixed", "nf4").check()


@pytest.mark.parametrize(
    ("accelerator", "programs", "found"),
    [("cpu", [], "a C\\+\\+ compiler:"), ("cuda", ["g++"], "triton:")],
)
def test_compiling_is_refused_without_what_it_works_with(monkeypatch, accelerator, programs, found):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda program: program if program in programs else None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    with pytest.raises(
        UserError, match=rf"hardware.compile=true needs {found} install it .* leave hardware.compile out"
    ):
        Hardware(accelerator, "bf16-mixed", compile=True).check()


@pytest.mark.parametrize(
    ("memory_gib", "preset"),
    [
        (5.8, "cpu"),
        (7.7, "1x8gb"),
        (10.9, "1x12gb"),
        (15.7, "1x16gb"),
        (23.6, "1x24gb"),
        (47, "1x24gb"),
        (79, "1x80gb"),
    ],
)
def test_auto_is_the_largest_preset_that_the_gpu_holds(monkeypatch, memory_gib, preset):
    cuda(monkeypatch, gpus=2, memory_gib=memory_gib)
    taken = auto("sd15")
    assert taken.preset == preset and f"Some GPU, {memory_gib:.1f} GiB" in taken.why
    assert taken.why.endswith("is too small") == (preset == "cpu")


def test_auto_is_the_cpu_for_the_tiny_model_and_without_a_gpu(monkeypatch):
    cuda(monkeypatch, gpus=1)
    assert auto("tiny").preset == "cpu"
    cuda(monkeypatch, gpus=0)
    assert auto("sdxl") == ("cpu", "no CUDA GPU is found")


def test_auto_asks_torch_only_where_it_is_loaded_or_a_driver_is_there(monkeypatch, tmp_path):
    cuda(monkeypatch, gpus=1)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(hardware_module, "DRIVERS", (str(tmp_path / "none"),))
    assert auto("sd15").preset == "cpu" and "torch" not in sys.modules
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert auto("sd15").preset == "1x24gb"
