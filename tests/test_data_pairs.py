"""Pair folders as training data: what is used, what is left out and said, and the split by prompt."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from album import Album, brightness, prompts_of
from PIL import Image

from dpo_sd.data.cache import Cache
from dpo_sd.data.frames import Framing
from dpo_sd.data.pairs import Pairs
from dpo_sd.errors import UserError
from dpo_sd.files.hashes import read_sha256
from dpo_sd.preferences.events import vote
from dpo_sd.preferences.log import EventLog
from dpo_sd.preferences.pair_folder import Pair, pair_id, read_pairs, write_pairs


def make_folder(folder: Path, prompts: Sequence[str], size: int = 64) -> list[Pair]:
    """A pair per prompt: image_0 of brightness 2i + 1, image_1 of 2i + 2."""
    pairs = []
    for i, prompt in enumerate(prompts):
        for k in range(2):
            file = folder / f"images/{i}-{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size), (2 * i + k + 1,) * 3).save(file)
        uids = f"{i}a", f"{i}b"
        names = f"images/{i}-0.png", f"images/{i}-1.png"
        pairs.append(Pair(pair_id(prompt, *uids), prompt, *names, *uids))
    write_pairs(folder, pairs)
    return pairs


def annotate(folder: Path, choices: Mapping[str, Sequence[Any]]) -> None:
    """Votes of annotator after annotator, in the order of the pairs."""
    log = EventLog(folder)
    for name, given in choices.items():
        log.append(
            [vote(pair, choice, "image_0", name) for pair, choice in zip(log.pairs.values(), given, strict=False)]
        )
    log.close()


def prepared(folder: Path, **settings: Any) -> tuple[Any, list[str]]:
    source = Pairs(str(folder), **settings)
    data = source.prepare(Album(), None, Framing(), Cache(folder / "cache"))  # type: ignore[arg-type]
    return data, data.report


PROMPTS = [f"prompt {i}" for i in range(8)]


def everything(data: Any) -> dict[str, tuple[float, float, float, float]]:
    """(chosen, rejected, label, weight) by prompt."""
    return {
        part.prompts[row]: (
            brightness(part.chosen, row),
            brightness(part.rejected, row),
            float(part.label[row]),
            float(part.weight[row]),
        )
        for part in (data.train, data.validation)
        for row in range(len(part))
    }


def test_the_preferred_picture_is_the_chosen_one(tmp_path):
    make_folder(tmp_path, PROMPTS)
    annotate(tmp_path, {"anna": ["image_0", "image_1"] * 4})
    data, _ = prepared(tmp_path)
    found = everything(data)
    assert found["prompt 2"][:2] == (5, 6) and found["prompt 3"][:2] == (8, 7)
    assert {label for _, _, label, _ in found.values()} == {1.0}


def test_a_pair_is_the_same_sample_whoever_wins(tmp_path):
    """So that two annotators' labels are compared under the same noise and timesteps."""
    found = []
    for choices in (["image_0"] * 8, ["image_1"] * 8):
        folder = tmp_path / choices[0]
        make_folder(folder, PROMPTS)
        annotate(folder, {"anna": choices})
        found.append(prepared(folder)[0])
    assert found[0].train.sample_ids.tolist() == found[1].train.sample_ids.tolist()
    assert set(found[0].train.contents).isdisjoint(found[1].train.contents)
    assert found[0].fingerprint != found[1].fingerprint


def test_a_picture_that_changed_after_its_vote_is_left_out_and_named(tmp_path):
    make_folder(tmp_path, PROMPTS)
    pairs = [
        replace(pair, image_0_uid=(uid := read_sha256(tmp_path / pair.image_0)), image_1_uid="b",
                pair_id=pair_id(pair.prompt, uid, "b"))
        for pair in read_pairs(tmp_path)
    ]  # fmt: skip
    write_pairs(tmp_path, pairs)
    annotate(tmp_path, {"anna": ["image_0"] * 8})
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images/3-0.png")
    data, report = prepared(tmp_path)
    assert "prompt 3" not in everything(data)
    assert any("changed since it was judged" in line and "images/3-0.png" in line for line in report)


def test_training_and_validation_share_no_prompt_and_the_seed_decides(tmp_path):
    prompts = [f"prompt {i % 10}" for i in range(40)]
    make_folder(tmp_path, prompts)
    annotate(tmp_path, {"anna": ["image_0"] * 40})
    splits = []
    for seed in (0, 0, 1):
        data, report = prepared(tmp_path, validation=0.3, seed=seed)
        assert set(prompts_of(data.train)).isdisjoint(prompts_of(data.validation))
        assert len(data.train) + len(data.validation) == 40 and len(set(prompts_of(data.validation))) == 3
        assert "training: 28 pairs on 7 prompts; validation: 12 on 3 others" in report[-1]
        assert set(data.held_out_prompts) == set(prompts_of(data.validation))
        splits.append(set(prompts_of(data.validation)))
    assert splits[0] == splits[1] != splits[2]


def test_what_is_not_decided_is_counted_and_left_out(tmp_path):
    make_folder(tmp_path, PROMPTS)
    annotate(tmp_path, {"anna": ["image_0", "tie", "skip", "both_bad", "image_1", "image_0"]})
    data, report = prepared(tmp_path)
    assert sorted(everything(data)) == ["prompt 0", "prompt 4", "prompt 5"]
    assert report[0] == f"{tmp_path}: 8 pairs: 3 decided, 2 undecided, 1 tie, 1 skipped, 1 both bad"


def test_ties_train_with_one_half_on_request(tmp_path):
    make_folder(tmp_path, PROMPTS)
    annotate(tmp_path, {"anna": ["image_0", "tie", "image_1"]})
    found = everything(prepared(tmp_path, ties=True)[0])
    assert {prompt: label for prompt, (_, _, label, _) in found.items()} == {
        "prompt 0": 1,
        "prompt 1": 0.5,
        "prompt 2": 1,
    }


def test_soft_labels_are_the_share_of_votes_for_the_chosen_picture(tmp_path):
    make_folder(tmp_path, PROMPTS[:2])
    annotate(tmp_path, {"anna": ["image_1", "image_0"], "ben": ["image_1", "image_0"], "cleo": ["image_0", "image_0"]})
    hard, soft = (everything(prepared(tmp_path, soft_labels=soft)[0]) for soft in (False, True))
    assert (hard["prompt 0"][2], hard["prompt 1"][2]) == (1, 1)
    assert (soft["prompt 0"][2], soft["prompt 1"][2]) == (pytest.approx(2 / 3), 1)
    assert soft["prompt 0"][:2] == (2, 1)


def test_weights_by_prompt_make_every_prompt_count_alike(tmp_path):
    make_folder(tmp_path, ["often"] * 6 + ["once", "other"])
    annotate(tmp_path, {"anna": ["image_0"] * 8})
    tried = (prepared(tmp_path, weight_by_prompt=True, seed=seed)[0] for seed in range(20))
    data = next(data for data in tried if prompts_of(data.validation) == ["other"])
    weights = dict.fromkeys(prompts_of(data.train), 0.0)
    for prompt, weight in zip(prompts_of(data.train), data.train.weight.tolist(), strict=True):
        weights[prompt] += weight
    assert weights["often"] == pytest.approx(weights["once"])
    assert data.train.weight.mean() == pytest.approx(1)


def test_unreadable_pictures_are_left_out_and_named(tmp_path):
    make_folder(tmp_path, PROMPTS)
    annotate(tmp_path, {"anna": ["image_0"] * 8})
    (tmp_path / "images/1-0.png").unlink()
    whole = (tmp_path / "images/2-1.png").read_bytes()
    (tmp_path / "images/2-1.png").write_bytes(whole[:60])
    (tmp_path / "images/3-0.png").write_text("<html>")
    data, report = prepared(tmp_path, validation=0.5)
    assert sorted(everything(data)) == ["prompt 0", "prompt 4", "prompt 5", "prompt 6", "prompt 7"]
    said = "; ".join(report)
    assert all(name in said for name in ("1-0.png", "2-1.png", "3-0.png"))


def test_a_folder_of_invoke_trainings_five_keys_is_read(tmp_path):
    make_folder(tmp_path, PROMPTS)
    (tmp_path / "pairs.jsonl").unlink()
    rows = [
        {"prompt": f"prompt {i}", "image_0": f"images/{i}-0.png", "image_1": f"images/{i}-1.png"}
        | {"prefer_0": i % 2 == 0, "prefer_1": i % 2 == 1}
        for i in range(8)
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = everything(prepared(tmp_path)[0])
    assert found["prompt 0"][:2] == (1, 2) and found["prompt 1"][:2] == (4, 3)
    assert len(set(prepared(tmp_path)[0].train.sample_ids)) == 7


def rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A metadata.jsonl in place of votes."""
    (folder / "pairs.jsonl").unlink()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def five(i: int, better: int | None = 0, prompt: str | None = None) -> dict[str, Any]:
    """The row of a pair of `make_folder`."""
    names = {f"image_{k}": f"images/{i}-{k}.png" for k in range(2)}
    prefer = {"prefer_0": better == 0, "prefer_1": better == 1}
    return {"prompt": prompt or f"prompt {i}"} | names | prefer


def test_rows_that_nobody_has_judged_yet_are_counted_and_left_out(tmp_path):
    make_folder(tmp_path, PROMPTS)
    rows(tmp_path, [five(i, i % 2 if i < 4 else None) for i in range(8)])
    data, report = prepared(tmp_path)
    assert len(everything(data)) == 4
    assert report[0] == f"{tmp_path}: 8 pairs: 4 decided, 4 undecided"


def test_a_pair_that_is_listed_twice_counts_once_and_opposite_verdicts_are_a_dispute(tmp_path):
    make_folder(tmp_path, PROMPTS)
    turned = five(1) | {"image_0": "images/1-1.png", "image_1": "images/1-0.png"}
    rows(tmp_path, [*[five(i) for i in range(8)], five(0), turned])
    data, report = prepared(tmp_path)
    found = everything(data)
    assert len(found) == 7 and "prompt 1" not in found and found["prompt 0"][:2] == (1, 2)
    assert report[0] == f"{tmp_path}: 8 pairs: 7 decided, 1 disputed"
    assert "2 pairs are listed more than once, 1 of them in both orders" in report[1]
    assert "1 of them have opposite verdicts: images/1-0.png and images/1-1.png" in report[1]


def test_the_same_pictures_under_other_names_are_said(tmp_path):
    make_folder(tmp_path, PROMPTS)
    for k in range(2):
        (tmp_path / f"images/9-{k}.png").write_bytes((tmp_path / f"images/0-{k}.png").read_bytes())
    rows(tmp_path, [*[five(i) for i in range(8)], five(9, 1, "prompt 0")])
    data, report = prepared(tmp_path)
    assert len(data.train) + len(data.validation) == 9
    (line,) = [line for line in report if "several times" in line]
    assert line.startswith("2 samples are 1 pairs several times, and each of them counts")
    assert "2 do not agree which picture is better: 'prompt 0'" in line


def test_names_as_other_systems_write_them_are_found(tmp_path):
    make_folder(tmp_path, PROMPTS)
    (tmp_path / "images").rename(tmp_path / unicodedata.normalize("NFD", "Bögen"))
    lines = [json.dumps(five(i)).replace("images/", "Bögen" + ("/" if i else "\\\\")) for i in range(8)]
    (tmp_path / "pairs.jsonl").unlink()
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    data, report = prepared(tmp_path)
    assert len(everything(data)) == 8 and len(report) == 2


def test_a_picture_that_changed_is_noticed_under_any_spelling_of_its_name(tmp_path):
    make_folder(tmp_path, PROMPTS)
    rows(tmp_path, [five(i) | {"image_0": f"images\\{i}-0.png", "image_0_uid": "0" * 64} for i in range(2)])
    with pytest.raises(UserError, match="the data has 0 pairs"):
        prepared(tmp_path)


def test_a_name_that_is_not_utf_8_is_left_out_and_printed(tmp_path):
    make_folder(tmp_path, PROMPTS)
    os.rename(tmp_path / "images/3-0.png", os.fsencode(tmp_path) + b"/images/\xe9.png")
    rows(tmp_path, [five(i) | ({"image_0": "images/\udce9.png"} if i == 3 else {}) for i in range(8)])
    data, report = prepared(tmp_path)
    assert len(everything(data)) == 7
    assert any(r"images/\udce9.png" in line and "not UTF-8" in line for line in report) and "\n".join(report).encode()


def test_an_empty_prompt_is_said(tmp_path):
    make_folder(tmp_path, PROMPTS)
    rows(tmp_path, [five(i) | ({"prompt": " "} if i == 3 else {}) for i in range(8)])
    data, report = prepared(tmp_path)
    assert len(everything(data)) == 8
    assert "1 pairs have an empty prompt and are trained on it: images/3-0.png and images/3-1.png" in report


def test_half_of_a_character_in_a_prompt_is_trained_on_and_said(tmp_path):
    make_folder(tmp_path, [*PROMPTS, "a fox \ud83e"])
    annotate(tmp_path, {"anna": ["image_0"] * 9})
    data, report = prepared(tmp_path)
    assert "a fox �" in everything(data)
    assert r"1 prompts hold half of a character, which is read as �: 'a fox \ud83e'" in report


def test_the_verdict_is_on_the_folders_own_prompts_that_training_has_not_seen(tmp_path):
    make_folder(tmp_path, PROMPTS)
    annotate(tmp_path, {"anna": ["image_0"] * 8})
    data, _ = prepared(tmp_path, validation=3)
    assert data.held_out_prompts == sorted(prompts_of(data.validation)) and len(data.held_out_prompts) == 3
    assert set(data.held_out_prompts) == set(PROMPTS) - set(prompts_of(data.train))
    found = Pairs(str(tmp_path), validation=3).find(Cache(tmp_path / "cache"), fetch=False)
    assert found.held_out == data.held_out_prompts


def test_what_is_found_is_what_is_prepared_and_the_same_with_and_without_fetching(tmp_path):
    make_folder(tmp_path / "pairs", PROMPTS)
    annotate(tmp_path / "pairs", {"anna": ["image_0", "tie", *["image_1"] * 6]})
    found = [Pairs(str(tmp_path / "pairs")).find(Cache(tmp_path / "cache"), fetch=fetch) for fetch in (False, True)]
    assert found[0] == found[1] and not (tmp_path / "cache").exists()
    data, report = prepared(tmp_path / "pairs")
    assert (found[0].train, found[0].validation, found[0].both) == (len(data.train), len(data.validation), 7)
    assert found[0].prompts == [prompt for prompt in PROMPTS if prompt != "prompt 1"]
    assert found[0].report == report[: len(found[0].report)]
    assert (found[0].fetched, found[0].drawn) == (True, 0)


@pytest.mark.parametrize(
    ("choices", "settings", "message"),
    [
        ([], {}, "has no decided pair .*8 undecided.* choose the better pictures with python -m dpo_sd.annotate"),
        (["tie"] * 8, {}, r"has no decided pair .*8 tie"),
        (["image_0"], {}, "1 pairs on 1 prompts, and validation needs prompts of its own"),
        (["image_0"] * 8, {"validation": 0.0}, "validation must be a share above 0"),
        (["image_0"] * 8, {"validation": 0.6}, "validation must be a share above 0 and at most 0.5"),
        (["image_0"] * 8, {"caption_dropout": 2.0}, "caption_dropout must be between 0 and 1"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_any_model_loads(tmp_path, choices, settings, message):
    make_folder(tmp_path, PROMPTS)
    annotate(tmp_path, {"anna": choices})
    with pytest.raises(UserError, match=message):
        Pairs(str(tmp_path), **settings).find(Cache(tmp_path / "cache"), fetch=False)


def test_several_folders_are_one_data_set_and_a_repeated_pair_has_noises_of_its_own(tmp_path):
    for name, prompts in (("one", PROMPTS), ("two", ["another", "one more", "prompt 0"])):
        make_folder(tmp_path / name, prompts)
        annotate(tmp_path / name, {"anna": ["image_0"] * len(prompts)})
    source = Pairs([str(tmp_path / "one"), f"{tmp_path / 'two'}:2"], validation=2, weight_by_prompt=True)
    data = source.prepare(Album(), None, Framing(), Cache(tmp_path / "cache"))  # type: ignore[arg-type]
    texts = [data.train.prompts[row] for row in range(len(data.train))]
    assert set(texts).isdisjoint(prompts_of(data.validation)) and len({*texts, *prompts_of(data.validation)}) == 10
    for prompt in {"another", "one more"} & set(texts):
        assert texts.count(prompt) == 2
    assert len(set(data.train.sample_ids.tolist())) == len(data.train) == len(set(data.train.contents.tolist()))
    weights: dict[str, float] = {}
    for prompt, weight in zip(texts, data.train.weight, strict=True):
        weights[prompt] = weights.get(prompt, 0.0) + float(weight)
    assert max(weights.values()) == pytest.approx(min(weights.values()))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="pairs is empty"):
        Pairs("")
    with pytest.raises(UserError, match="nowhere"):
        Pairs(str(tmp_path / "nowhere")).find(Cache(tmp_path / "cache"), fetch=False)


def test_pictures_of_another_size_are_brought_to_that_of_the_model_and_it_is_said(tmp_path):
    make_folder(tmp_path, PROMPTS, size=32)
    annotate(tmp_path, {"anna": ["image_0"] * 8})
    data, report = prepared(tmp_path)
    assert data.train.chosen.read(0, False, (0.5, 0.5))[0].shape == (4, 8, 8)
    assert "14 training pictures are smaller than the training size and are scaled up" in report
