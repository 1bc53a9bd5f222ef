"""Pick-a-Pic and datasets like it: what is used of the rows, what is left out and said, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torch.testing import assert_close

from dpo_sd.composition.checks import check_settings
from dpo_sd.composition.resolvers import register
from dpo_sd.composition.schema import CONF_DIR
from dpo_sd.data.batches import Visits
from dpo_sd.data.cache import Cache
from dpo_sd.data.frames import Framing
from dpo_sd.data.pickapic import PickAPic
from dpo_sd.data.splitting import Split
from dpo_sd.data.tables import TabularDataset
from dpo_sd.errors import UserError
from dpo_sd.models.base import Base
from dpo_sd.models.sampling import Sampler
from dpo_sd.preferences.events import vote
from dpo_sd.preferences.log import EventLog
from dpo_sd.preferences.pair_folder import Pair, pair_id, write_pairs
from dpo_sd.preferences.parquet import COLUMNS, export_pickapic


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DPO_SD_CACHE", str(tmp_path / "memory"))


def jpeg(number: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A picture of its own for each number up to 256."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def row(number: int, label_0: Any = 1.0, **changes: Any) -> dict[str, Any]:
    """A row as Pick-a-Pic v2 has it, with pictures 2n and 2n + 1; those that do not matter here stay null."""
    rest: dict[str, Any] = {name: None for name in COLUMNS.names}
    label_1 = None if label_0 is None else 1 - label_0
    labels = {"label_0": label_0, "label_1": label_1, "has_label": label_0 is not None}
    pictures = {"jpg_0": jpeg(2 * number), "jpg_1": jpeg(2 * number + 1)}
    return rest | {"caption": f"prompt {number}"} | labels | pictures | changes


def parquet(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=COLUMNS), file, row_group_size=3)
    return file


def fetched(path: Path, **settings: Any) -> Split:
    """The samples, as a training would have them."""
    split = PickAPic(str(path), **settings).look(Cache(path.parent / "cache"), fetch=True)
    assert isinstance(split, Split)
    return split


def everything(found: Split) -> dict[str, tuple[bytes, bytes, float, float]]:
    """(chosen, rejected, label, weight) by prompt."""
    together = {}
    for part in (found.train, found.validation):
        assert part.rejected is not None
        for n, prompt in enumerate(part.prompts):
            chosen, rejected = ((side.folder / side.paths[n]).read_bytes() for side in (part.chosen, part.rejected))
            together[prompt] = (chosen, rejected, float(part.label[n]), float(part.weight[n]))
    return together


def refused(path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        fetched(path, **settings)
    return str(caught.value)


def test_the_labels_say_which_picture_is_chosen(tmp_path):
    file = parquet(tmp_path / "a.parquet", [row(0, 1.0), row(1, 0.0), row(2, 1.0)])
    both = everything(fetched(file))
    assert both["prompt 0"] == (jpeg(0), jpeg(1), 1, 1) and both["prompt 1"] == (jpeg(3), jpeg(2), 1, 1)


def test_ties_are_left_out_and_said_or_trained_on_with_one_half(tmp_path):
    file = parquet(tmp_path / "a.parquet", [row(0), row(1, 0.5), row(2, 0.0), row(3, 0.5)])
    found = fetched(file)
    assert sorted(everything(found)) == ["prompt 0", "prompt 2"]
    assert found.report[0] == f"{file}, train: 4 rows read; left out: 2 tied"
    assert "2 of the 4 pairs are ties" in fetched(file, ties=True).report[0]
    with_ties = everything(fetched(file, ties=True))
    assert with_ties["prompt 1"] == (jpeg(2), jpeg(3), 0.5, 1) and with_ties["prompt 2"][2] == 1 and len(with_ties) == 4


def test_rows_without_label_caption_or_picture_are_counted_and_the_broken_ones_named(tmp_path):
    rows = [
        row(0),
        row(1, None),
        row(2, has_label=False),
        row(3, caption=None),
        row(4, caption=" "),
        row(5, jpg_1=None),
    ]
    found = fetched(parquet(tmp_path / "a.parquet", [*rows, row(6)]))
    assert sorted(everything(found)) == ["prompt 0", "prompt 6"]
    assert "7 rows read; left out: 2 without a label" in found.report[0]
    assert "2 without a caption (row 3 of a.parquet; row 4 of a.parquet)" in found.report[0]
    assert "1 without a picture (row 5 of a.parquet)" in found.report[0]


NAN = float("nan")


@pytest.mark.parametrize(
    ("yes", "no"),
    [({"has_label": 1}, {"has_label": 0}), ({"has_label": "True"}, {"has_label": "false"}), ({}, {"label_0": NAN})],
)
def test_whether_a_row_has_a_label_is_read_in_numbers_texts_and_nan(yes, no, tmp_path):
    rows = [row(0) | yes, row(1) | yes | {"label_1": NAN}, row(2) | yes | no]
    found = fetched(untyped(tmp_path / "a.parquet", rows))
    assert sorted(everything(found)) == ["prompt 0", "prompt 1"] and "1 without a label" in found.report[0]


@pytest.mark.parametrize("value", [2, "maybe"])
def test_a_has_label_that_is_neither_is_refused_with_its_row(value, tmp_path):
    file = untyped(tmp_path / "a.parquet", [row(n, has_label=value) for n in range(2)])
    assert f"row 0 of a.parquet: column has_label is {value!r}, and it is true or false" in refused(file)


def test_pictures_that_are_the_same_or_cannot_be_read_are_left_out_and_said(tmp_path):
    same, page = row(1, jpg_1=jpeg(2)), row(2, jpg_0=b"<html>gone</html>")
    found = fetched(parquet(tmp_path / "a.parquet", [row(0), same, page, row(3)]))
    assert sorted(everything(found)) == ["prompt 0", "prompt 3"]
    said = "\n".join(found.report)
    assert "left out 1 of 4 whose two pictures are the same file" in said
    assert "left out 1 of 4 that cannot be read" in said and "is a web page" in said


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"label_0": 0.7}, "row 2 of a.parquet: column label_0 is 0.7, and a label is 1, 0 or, for a tie, 0.5"),
        ({"label_1": -1.0}, "row 2 of a.parquet: column label_1 is -1.0"),
        ({"label_1": 1.0}, "row 2 of a.parquet: label_0 1.0 and label_1 1.0 do not add up to 1"),
    ],
)
def test_labels_that_are_none_are_refused_with_their_row(changes, what, tmp_path):
    assert what in refused(parquet(tmp_path / "a.parquet", [row(0), row(1), row(2, **changes), row(3)]))


def untyped(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file whose types are those of the values that it has."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


@pytest.mark.parametrize("first", [[row(0, None)], [row(0, None, caption=None)], [], [row(0, None, jpg_0=None)]])
@pytest.mark.parametrize("order", ["a", "z"])
def test_a_file_without_labels_or_rows_is_read_beside_the_others(first, order, tmp_path):
    untyped(tmp_path / "set" / f"{order}.parquet", first)
    untyped(tmp_path / "set" / "m.parquet", [row(i) for i in range(1, 5)])
    split = fetched(tmp_path / "set")
    assert sorted(everything(split)) == [f"prompt {i}" for i in range(1, 5)]
    assert f"{4 + len(first)} rows read" in split.report[0]
    assert not first or "left out: 1 without a label" in split.report[0]


def test_a_column_that_nobody_asks_for_may_be_in_one_file_alone(tmp_path):
    for changed in ("a", "b"):
        for name in ("a", "b"):
            rows = [row(n + 2 * (name == "b")) | ({"zz": "x"} if name == changed else {}) for n in range(2)]
            untyped(tmp_path / changed / "set" / f"{name}.parquet", rows)
        assert len(everything(fetched(tmp_path / changed / "set"))) == 4


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([row(0) | {"label_0": "1", "label_1": "0"}], r"b\.parquet has a column of another type .*label_0"),
        (
            [{key: value for key, value in row(0).items() if key != "has_label"}],
            r"do not both have the column has_label",
        ),
        ([{key: value for key, value in row(0).items() if key != "label_0"}], r"b\.parquet has no column label_0"),
    ],
)
def test_files_that_do_not_go_together_are_named(other, message, tmp_path):
    untyped(tmp_path / "set" / "a.parquet", [row(1), row(2)])
    untyped(tmp_path / "set" / "b.parquet", other)
    with pytest.raises(UserError, match=message):
        fetched(tmp_path / "set")


@pytest.mark.parametrize("name", ["my [best] photos*", "a?", "{a,b}", "[x]"])
def test_signs_of_patterns_in_names_are_only_names(name, tmp_path):
    parquet(tmp_path / name / "train [1].parquet", [row(0), row(1)])
    parquet(tmp_path / "my b photos" / "train.parquet", [row(5)])
    assert sorted(everything(fetched(tmp_path / name))) == ["prompt 0", "prompt 1"]
    assert sorted(everything(fetched(tmp_path / name / "train [1].parquet"))) == ["prompt 0", "prompt 1"]


def test_an_empty_path_is_not_the_working_folder():
    with pytest.raises(UserError, match="path is empty"):
        PickAPic("")


def test_the_ending_of_a_parquet_file_may_be_in_capitals(tmp_path):
    parquet(tmp_path / "set" / "A.PARQUET", [row(0), row(1)])
    assert len(everything(fetched(tmp_path / "set"))) == 2


@pytest.mark.parametrize("name", ["a::b/c.parquet", "set/a::b.parquet"])
def test_a_name_that_the_reader_would_take_for_a_chain_of_addresses_is_refused(name, tmp_path):
    file = parquet(tmp_path / name, [row(0), row(1)])
    for path in (file, file.parent):
        assert f"{file} has :: in its name" in refused(path)


def test_a_column_that_changes_its_type_on_the_hub_is_one_line():
    with (
        pytest.raises(UserError, match=r"owner/set has a column of other types .* Couldn't cast"),
        TabularDataset("owner/set").reading(),
    ):
        raise TypeError("Couldn't cast array of type double to null")


def test_a_linked_folder_of_parquet_files_is_refused_rather_than_passed_over(tmp_path):
    parquet(tmp_path / "set" / "a.parquet", [row(0), row(1)])
    parquet(tmp_path / "elsewhere" / "b.parquet", [row(2)])
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    assert "set/more is a link to a folder" in refused(tmp_path / "set")


def test_pairs_that_are_there_several_times_are_said(tmp_path):
    file = parquet(tmp_path / "a.parquet", [row(0), row(1), row(2), row(0), row(1, 0.0)])
    (line,) = [line for line in fetched(file).report if "several times" in line]
    assert line.startswith("4 samples are 2 pairs several times, and each of them counts; of these 2 do not agree")
    assert line.endswith("'prompt 1'")


def test_a_dataset_of_nothing_but_ties_or_of_one_prompt_is_refused(tmp_path):
    ties = parquet(tmp_path / "ties.parquet", [row(0, 0.5), row(1, 0.5)])
    assert "2 tied; no pair is left: see data.columns and data.ties" in refused(ties)
    one = parquet(tmp_path / "one.parquet", [row(0), row(1, caption="prompt 0")])
    assert "2 pairs on 1 prompts" in refused(one)
    pages = parquet(tmp_path / "pages.parquet", [row(0, jpg_0=b"<html>")])
    assert "can be used" in refused(pages) and "is a web page" in refused(pages)


def test_columns_of_other_datasets_are_named(tmp_path):
    table = pa.table(
        {
            "text": [f"prompt {i}" for i in range(3)],
            "left": [jpeg(2 * i) for i in range(3)],
            "right": [jpeg(2 * i + 1) for i in range(3)],
            "left_is_better": [True, False, True],
            "label_1": ["of another kind"] * 3,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    columns: dict[str, str | None] = {"caption": "text", "image_0": "left", "image_1": "right"}
    columns |= {"label_0": "left_is_better", "label_1": None}
    both = everything(fetched(tmp_path / "a.parquet", columns=columns))
    assert both["prompt 1"] == (jpeg(3), jpeg(2), 1, 1) and both["prompt 2"][:2] == (jpeg(4), jpeg(5))


def test_pairs_may_be_ready_made(tmp_path):
    rows = [{"prompt": f"p{i}", "win": {"bytes": jpeg(i), "path": None}, "lose": jpeg(i + 9)} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    both = everything(
        fetched(tmp_path / "a.parquet", columns={"caption": "prompt", "chosen": "win", "rejected": "lose"})
    )
    assert both["p1"] == (jpeg(1), jpeg(10), 1, 1)


def test_a_column_is_one_setting():
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", ["data=pickapic", "data.columns.chosen=win", "data.columns.rejected=lose"])
    check_settings(cfg)
    source = instantiate(cfg.data)
    assert source.columns["chosen"] == "win" and source.needed["data.columns.caption"] == ["caption"]


def test_columns_that_are_missing_are_named_before_anything_is_read(tmp_path):
    pq.write_table(pa.table({"caption": ["a"], "jpg_0": [b""]}), tmp_path / "a.parquet")

    def says(**columns: str | None) -> str:
        with pytest.raises(UserError) as caught:
            PickAPic(str(tmp_path / "a.parquet"), columns=columns).find(Cache(tmp_path / "cache"), fetch=False)
        return str(caught.value)

    assert "no column jpg_1: name it with data.columns.image_1=<column>; it has caption, jpg_0" in says()
    assert "no column win: name it with data.columns.chosen=<column>" in says(chosen="win", rejected="lose")
    assert "no column better: name it with data.columns.label_1" in says(
        image_1="jpg_0", label_0="jpg_0", label_1="better"
    )
    assert "data.columns.rejected=<column>" in says(chosen="win")
    assert "data.columns.caption=<column>" in says(caption=None)
    assert "columns.image is unknown: it can be caption, image_0" in says(image="jpg_0")


def test_what_cannot_be_a_dataset_is_refused_before_anything_is_read(tmp_path):
    def says(path: Path | str, **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            PickAPic(str(path), **settings).find(Cache(tmp_path / "cache"), fetch=False)
        return str(caught.value)

    (tmp_path / "page.parquet").write_text("<html>not found</html>")
    assert "page.parquet is no parquet file" in says(tmp_path / "page.parquet")
    (tmp_path / "empty").mkdir()
    assert "holds no parquet file" in says(tmp_path / "empty")
    assert "no such folder or file" in says("pickapic")
    file = parquet(tmp_path / "set/data/train-00000-of-00001.parquet", [row(0), row(1)])
    assert "has no split test: it has train; write data.split=<one of them>" in says(tmp_path / "set", split="test")
    assert "has no revision=main" in says(file, revision="main")
    assert "max_pairs must be at least 2" in says(file, max_pairs=1)
    assert "validation must be a share above 0" in says(file, validation=0)
    assert "got 1.5" in says(file, validation=1.5)
    assert "caption_dropout" in says(file, caption_dropout=1.5)


def test_pairs_that_were_not_read_yet_are_bounded_by_the_rows_and_those_that_were_are_known(tmp_path):
    labels = [1.0, 0.5, None, 0.0]
    rows = [row(n, labels[n % 4], caption=None if n == 5 else f"prompt {n // 2}") for n in range(16)]
    rows[3] |= {"jpg_1": rows[3]["jpg_0"]}
    path, cache = str(parquet(tmp_path / "a.parquet", rows)), Cache(tmp_path / "cache")
    seen = PickAPic(path).find(cache, fetch=False)
    assert (seen.train, seen.validation, seen.both, seen.prompts, seen.fetched) == (15, 1, 16, 16, False)
    assert seen.report == ["at most 16 rows, 1 of them held back: to be read, so ties are not known yet"]
    assert "at most 4 pairs" in PickAPic(path, max_pairs=4).find(cache, fetch=False).report[0]
    assert not cache.folder.exists()
    found = PickAPic(path).find(cache, fetch=True)
    assert (found.train, found.validation, found.both, found.fetched) == (6, 1, 7, True)
    assert any("left out 1 of 8 whose two pictures are the same file" in line for line in found.report)
    assert PickAPic(path).find(cache, fetch=False) == found
    assert (
        "at most 4 pairs" in PickAPic(path, max_pairs=4, seed=3).find(cache, fetch=False).report[0]
    )  # another extract
    assert PickAPic(path, max_pairs=4).find(cache, fetch=False).both == 3


def test_a_dataset_that_is_too_small_is_refused_without_reading_it(tmp_path):
    for n in range(2):
        file = parquet(tmp_path / f"{n}.parquet", [row(0)] * n)
        with pytest.raises(UserError, match="has fewer than two rows, and validation needs a prompt of its own"):
            PickAPic(str(file)).find(Cache(tmp_path / "cache"), fetch=False)


def test_pairs_weigh_one_over_the_pairs_of_their_prompt(tmp_path):
    prompts = ["a", "a", "a", "b"]
    file = parquet(tmp_path / "a.parquet", [row(i, caption=prompt) for i, prompt in enumerate(prompts)])
    found = fetched(file, weight_by_prompt=True)
    weights = {prompt: weight for prompt, (*_, weight) in everything(found).items()}
    assert weights == {"a": pytest.approx(1 / 3), "b": 1}


def test_training_and_validation_share_no_prompt(tmp_path):
    file = parquet(tmp_path / "a.parquet", [row(i, caption=f"prompt {i % 5}") for i in range(20)])
    found = fetched(file, validation=0.4)
    assert len(set(found.validation.prompts)) == 2 and not set(found.train.prompts) & set(found.validation.prompts)
    assert len(set(fetched(file, validation=1).validation.prompts)) == 1


def test_the_file_that_the_annotation_exports_is_read_back(tmp_path):
    pairs = []
    for i in range(4):
        names = f"images/{i}-0.png", f"images/{i}-1.png"
        for k, name in enumerate(names):
            file = tmp_path / "pairs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (50 * i, 100 * k, 0)).save(file)
        pairs.append(Pair(pair_id(f"prompt {i}", f"{i}a", f"{i}b"), f"prompt {i}", *names, f"{i}a", f"{i}b"))
    write_pairs(tmp_path / "pairs", pairs)
    with closing(EventLog(tmp_path / "pairs")) as log:
        choices = ("image_0", "image_1", "tie", "image_0")
        log.append([vote(p, choice, "image_0", "ann") for p, choice in zip(pairs, choices, strict=True)])
    export_pickapic(tmp_path / "pairs", tmp_path / "a.parquet", ties=True)
    both = everything(fetched(tmp_path / "a.parquet", ties=True))
    assert both["prompt 1"][0] == (tmp_path / "pairs/images/1-1.png").read_bytes()
    assert [both[f"prompt {i}"][2] for i in range(4)] == [1, 1, 0.5, 1]


def test_pairs_of_several_shapes_train(tmp_path):
    """Both pictures of a pair have one size, and one noise, timestep, crop and flip."""
    shapes = [(96, 96), (150, 75), (75, 150), (64, 64), (200, 100), (120, 90)]
    rows = [
        row(i, 1.0, jpg_0=jpeg(2 * i, shape), jpg_1=jpeg(2 * i + 1, (shape[1], shape[0])))
        for i, shape in enumerate(shapes)
    ]
    rows += [
        row(9 + i, 0.0, jpg_0=jpeg(50 + 2 * i, shape), jpg_1=jpeg(51 + 2 * i, shape)) for i, shape in enumerate(shapes)
    ]
    source = PickAPic(str(parquet(tmp_path / "a.parquet", rows)))
    model = Base().load()
    data = source.prepare(model, Sampler(), Framing(flip=True), Cache(tmp_path / "cache"))
    assert (
        len(data.train) == 11 and len(data.validation) == 1 and data.held_out_prompts == data.validation.prompts.texts
    )
    assert any(line.startswith("training sizes: ") for line in data.report)
    visits = Visits(data.train, 0, 1000, model.factor)
    seen = [visits[(n, draw)] for n in range(11) for draw in range(2)]
    assert len({tuple(visit.chosen.shape) for visit in seen}) >= 2
    for visit in seen:
        assert visit.rejected is not None and visit.chosen.shape == visit.rejected.shape == visit.noise.shape
    again = PickAPic(str(tmp_path / "a.parquet")).prepare(
        model, Sampler(), Framing(flip=True), Cache(tmp_path / "cache")
    )
    assert again.fingerprint == data.fingerprint
    assert_close(Visits(again.train, 0, 1000, model.factor)[(3, 1)].chosen, visits[(3, 1)].chosen)
