"""The reference's errors, kept: read where they are the same numbers, and never where anything is another."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_sd.losses import PairErrors
from dpo_sd.training.reference_cache import ReferenceErrors

IDS = np.array([50, 10, 30], np.int64)


def errors(*values: float) -> PairErrors:
    chosen = torch.tensor(values)
    return PairErrors(chosen, chosen + 0.5)


def found(kept: ReferenceErrors, rows: list[int], draws: list[int]) -> list[float | None]:
    known, (chosen, rejected) = kept.get(rows, draws)
    assert torch.equal(rejected[known], chosen[known] + 0.5)
    return [value if is_known else None for value, is_known in zip(chosen.tolist(), known.tolist(), strict=True)]


def test_what_was_put_is_found_by_pair_and_draw(tmp_path):
    kept = ReferenceErrors(tmp_path, IDS, 2)
    assert found(kept, [0, 2], [0, 1]) == [None, None]
    kept.put([0, 2], [0, 1], errors(1.0, 2.0))
    assert found(kept, [2, 0, 0, 1], [1, 0, 1, 0]) == [2.0, 1.0, None, None]
    assert (kept.hits, kept.asked) == (2, 6)
    assert kept.filled == pytest.approx(2 / 6)


def test_without_a_folder_they_are_kept_in_memory_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = ReferenceErrors(None, IDS, 1)
    kept.put([2], [0], errors(1.0))
    kept.save()
    assert found(kept, [2, 0], [0, 0]) == [1.0, None] and not list(tmp_path.iterdir())


def test_what_is_known_never_changes(tmp_path):
    """Or a run that is continued would read other numbers than it has computed."""
    kept = ReferenceErrors(tmp_path, IDS, 1)
    kept.put([0], [0], errors(1.0))
    kept.put([0, 1], [0, 0], errors(1.1, 2.0))
    assert found(kept, [0, 1], [0, 0]) == [1.0, 2.0]


def test_a_later_run_reads_them_to_the_bit_in_whatever_order_its_pairs_stand(tmp_path):
    kept, third = ReferenceErrors(tmp_path / "new" / "folder", IDS, 2), 1 / 3
    kept.put([0, 1, 2], [0, 0, 1], errors(1.0, third, 3.0))
    kept.save()
    later = ReferenceErrors(tmp_path / "new" / "folder", np.array([30, 99, 10, 50]), 2)
    assert found(later, [3, 2, 0, 1], [0, 0, 1, 0]) == [1.0, float(np.float32(third)), 3.0, None]
    assert later.filled == pytest.approx(3 / 8)


def test_processes_read_what_all_have_computed_and_go_on_from_their_own(tmp_path):
    for rank, value in ((0, 1.0), (1, 2.0)):
        each = ReferenceErrors(tmp_path, IDS, 1, rank)
        each.put([rank], [0], errors(value))
        each.save()
    assert found(ReferenceErrors(tmp_path, IDS, 1, 0), [0, 1], [0, 0]) == [1.0, 2.0]
    assert found(ReferenceErrors(tmp_path, IDS, 1, 0, resumed=True), [0, 1], [0, 0]) == [1.0, None]
    assert found(ReferenceErrors(tmp_path, IDS, 1, 2, resumed=True), [0, 1], [0, 0]) == [1.0, 2.0]


def test_pairs_that_stand_twice_are_found_at_both_places(tmp_path):
    kept = ReferenceErrors(tmp_path, IDS, 1)
    kept.put([1], [0], errors(1.0))
    kept.save()
    assert found(ReferenceErrors(tmp_path, np.array([10, 30, 10]), 1), [0, 1, 2], [0, 0, 0]) == [1.0, None, 1.0]


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 1)])
def test_another_number_of_draws_shares_those_that_are_the_same(tmp_path, first, second):
    kept = ReferenceErrors(tmp_path, IDS, first)
    kept.put([0] * first, list(range(first)), errors(*map(float, range(first))))
    kept.save()
    assert found(ReferenceErrors(tmp_path, IDS, second), [0], [0]) == [0.0]


def test_runs_on_other_pairs_and_other_processes_take_nothing_away(tmp_path):
    for ids, rank in ((IDS, 0), (IDS + 1, 0), (IDS, 1)):
        kept = ReferenceErrors(tmp_path, ids, 2, rank)
        kept.put([rank], [0], errors(float(ids[0] + rank)))
        kept.save()
    again = ReferenceErrors(tmp_path, np.concatenate([IDS, IDS + 1]), 1)
    assert found(again, [0, 1, 3], [0, 0, 0]) == [50.0, 51.0, 51.0]
    ReferenceErrors(tmp_path, IDS, 2).save()
    assert ReferenceErrors(tmp_path, IDS, 2).filled == pytest.approx(2 / 6)


def test_putting_and_asking_for_what_is_unknown_does_not_wait_for_the_device(tmp_path, monkeypatch):
    kept, fetched = ReferenceErrors(tmp_path, IDS, 1), []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: fetched.append(1) or cpu(self))
    kept.put([0], [0], errors(1.0))
    kept.get([1], [0])
    assert not fetched
    kept.get([0], [0])
    assert fetched


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, None, "other columns", "text", "another zip", "no zip"])
def test_a_damaged_file_is_said_and_its_errors_are_computed_anew(tmp_path, caplog, content):
    kept = ReferenceErrors(tmp_path, IDS, 1)
    kept.put([0], [0], errors(1.0))
    kept.save()
    assert kept.file is not None
    whole = kept.file.read_bytes()
    if content == "other columns":
        np.savez(kept.file, content_ids=IDS, errors=np.zeros((2, 1, 2), np.float32))
    elif content == "text":
        np.savez(kept.file, content_ids=IDS, errors=np.full((3, 1, 2), "1"))
    elif content == "another zip":  # which asks for a version of the format that nobody has
        place = whole.rfind(b"PK\x01\x02") + 6
        kept.file.write_bytes(whole[:place] + b"\xd2" + whole[place + 1 :])
    elif content == "no zip":
        with kept.file.open("wb") as file:
            np.save(file, IDS)
    else:
        kept.file.write_bytes(whole[: len(whole) // 2] if content is None else content)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        assert ReferenceErrors(tmp_path, IDS, 1).filled == 0
    assert str(kept.file) in caplog.text and "computed anew" in caplog.text


def test_a_file_with_code_in_it_is_not_run(tmp_path, caplog):
    np.savez(tmp_path / "x.npz", content_ids=np.array([object()]), errors=np.zeros((1, 1, 2)))
    with caplog.at_level(logging.WARNING):
        assert ReferenceErrors(tmp_path, IDS, 1).filled == 0
    assert "computed anew" in caplog.text


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_run(tmp_path, caplog):
    (tmp_path / "a file").touch()
    kept = ReferenceErrors(tmp_path / "a file", IDS, 1)
    kept.put([0], [0], errors(1.0))
    with caplog.at_level(logging.WARNING):
        kept.save()
    assert "cannot be written" in caplog.text
    assert found(kept, [0], [0]) == [1.0]


def test_errors_of_single_images_serve_no_pairs_and_those_of_chosen_images_serve_both(tmp_path):
    single = ReferenceErrors(tmp_path, IDS, 1, images=1)
    single.put([0], [0], PairErrors(torch.tensor([1.0]), torch.zeros(0)))
    known, (chosen, rejected) = single.get([0, 1], [0, 0])
    assert known.tolist() == [True, False] and chosen[0] == 1 and rejected.shape == (0,)
    single.save()
    pairs = ReferenceErrors(tmp_path, IDS, 1)
    assert found(pairs, [0, 1], [0, 0]) == [None, None]
    pairs.put([1], [0], errors(2.0))
    pairs.save()
    again = ReferenceErrors(tmp_path, IDS, 1, images=1)
    known, (chosen, _) = again.get([0, 1, 2], [0, 0, 0])
    assert known.tolist() == [True, True, False] and chosen[:2].tolist() == [1.0, 2.0]
    assert found(ReferenceErrors(tmp_path, IDS, 1), [0, 1], [0, 0]) == [None, 2.0]


def test_nothing_known_and_nothing_asked_is_written_and_read(tmp_path):
    ReferenceErrors(tmp_path, IDS, 1).save()
    assert ReferenceErrors(tmp_path, IDS, 1).filled == 0
