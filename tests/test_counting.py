"""Bytes and operations on the `meta` device, against tensors counted by hand."""

from __future__ import annotations

import torch

from dpo_sd.forecast.counting import CONTEXT, Alive, Phase, kernels
from dpo_sd.forecast.units import GIB


def test_tensors_are_counted_while_they_are_alive_and_views_are_not():
    there = torch.zeros(128)
    with Alive([there]) as alive:
        first = torch.zeros(256)
        view = first.view(16, 16)
        assert alive.now == 512 + 1024
        del first, view
        torch.zeros(1)  # rounded up to 512 bytes
    assert (alive.stays, alive.now, alive.peak) == (512, 512, 512 + 1024)


def test_a_product_of_matrices_is_counted_with_its_operations():
    with Alive() as alive:
        _ = torch.ones(2, 3) @ torch.ones(3, 5)
    assert alive.flops == 2 * 2 * 3 * 5


def test_an_operation_that_comes_again_is_counted_again_as_pytorch_answers_it():
    """Answers are remembered by layout: a transposed argument, or a number of another type, asks again."""
    x, whole = torch.empty(96, 128, device="meta"), torch.empty(96, 128, dtype=torch.int64, device="meta")
    norm, arguments = torch.nn.LayerNorm(128, device="meta"), (x, x.T.contiguous().T, x[::2])

    def results() -> list[torch.Tensor]:
        return [*(norm(each) for each in arguments), *(each + each for each in arguments), whole * 2, whole * 2.0]

    wanted = [(each.shape, each.stride(), each.dtype) for each in results()]
    for _ in range(2):
        with Alive() as alive:
            found = results()
        assert [(each.shape, each.stride(), each.dtype) for each in found] == wanted
        assert alive.now >= sum(each.nbytes for each in found)


def test_attention_is_counted_without_its_matrix():
    query = torch.empty(1, 8, 4096, 64, device="meta", requires_grad=True)
    with Alive() as alive, kernels(None, "cuda"):
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert alive.peak < 3 * query.nbytes < 8 * 4096 * 4096 * 4


def test_products_are_in_half_precision_and_norms_in_single_precision_on_a_gpu_alone():
    layer, norm = torch.nn.Linear(4, 4, device="meta"), torch.nn.LayerNorm(4, device="meta")
    x = torch.empty(2, 4, device="meta")
    for accelerator, precision in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        with kernels(torch.bfloat16, accelerator):
            assert layer(x).dtype == torch.bfloat16
            assert norm.bfloat16()(layer(x)).dtype == precision
    assert layer(x).dtype == torch.float32


def test_a_card_must_have_the_peak_a_tenth_of_what_passes_and_half_a_gib():
    assert Phase("any", stays=2 * GIB, passes=10 * GIB).needs == 13 * GIB + CONTEXT
