"""Decided pairs as a parquet file with the columns of Pick-a-Pic v2."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing
from dpo_sd.preferences.events import LABELS
from dpo_sd.preferences.outcome import Preference
from dpo_sd.preferences.pair_folder import changed_images, check_image, image_file
from dpo_sd.preferences.reading import read_preferences

ROW_GROUP = 32  # pairs held in memory together: about 100 MB of 1024² PNG
COLUMNS = pa.schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "created_at": pa.timestamp("ns"),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_0_url": pa.string(),
        "image_1_uid": pa.string(),
        "image_1_url": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),
        "__index_level_0__": pa.int64(),
    }
)
logger = logging.getLogger(__name__)


def export_pickapic(folder: str | Path, file: str | Path, ties: bool = False) -> int:
    """Writes the decided pairs of a folder as a parquet file with the columns of Pick-a-Pic v2.

    The images are the files' own bytes; pairs of which one has changed since it was judged are left out with a warning.
    A row sums up all annotators, so user_id is 0; ranking_id is a number per set of images; the addresses are "", and
    so is best_image_uid of a tie.

    Args:
        folder: a pair folder with votes.
        file: the parquet file to write, whole or not at all.
        ties: whether tied pairs are written too, labelled ½ and ½.

    Returns:
        The number of rows.

    Raises:
        UserError: when there is nothing to write, or an image cannot be used.
        OSError: when the file cannot be written.
    """
    wanted = ("image_0", "image_1", "tie") if ties else ("image_0", "image_1")
    decided = [each for each in read_preferences(folder) if each.status in wanted]
    changed = changed_images(folder, [each.pair for each in decided])
    if changed:
        named = ", ".join(image for images in list(changed.values())[:5] for image in images)
        logger.warning("left out %d pairs with a picture that has changed since it was judged: %s", len(changed), named)
    preferences = [each for each in decided if each.pair.pair_id not in changed]
    if not preferences:
        raise UserError(f"{folder} has no decided pair to export: annotate it with python -m dpo_sd.annotate")
    for preference in preferences:
        check_image(image_file(folder, preference.pair.image_0))
        check_image(image_file(folder, preference.pair.image_1))
    per_prompt = Counter(each.pair.prompt for each in preferences)
    rankings: dict[str, int] = {}
    with replacing(file) as temporary, pq.ParquetWriter(temporary, COLUMNS) as writer:
        for start in range(0, len(preferences), ROW_GROUP):
            rows = []
            for index, preference in enumerate(preferences[start : start + ROW_GROUP], start):
                pair = preference.pair
                rows.append(
                    _row(Path(folder), preference)
                    | {
                        "ranking_id": rankings.setdefault(pair.ranking_id or pair.pair_id, len(rankings)),
                        "num_example_per_prompt": per_prompt[pair.prompt],
                        "__index_level_0__": index,
                    }
                )
            writer.write_table(pa.Table.from_pylist(rows, schema=COLUMNS))
    return len(preferences)


def _row(folder: Path, preference: Preference) -> dict[str, Any]:
    pair = preference.pair
    jpg_0, jpg_1 = (image_file(folder, image).read_bytes() for image in (pair.image_0, pair.image_1))
    uid_0, uid_1 = (hashlib.sha256(data).hexdigest() for data in (jpg_0, jpg_1))
    created = datetime.fromisoformat(preference.decided_at) if preference.decided_at else None
    label_0 = LABELS[preference.status]
    return {
        "are_different": uid_0 != uid_1,
        "best_image_uid": {"image_0": uid_0, "image_1": uid_1}.get(preference.status, ""),
        "caption": _utf8(pair.prompt),
        "created_at": created.replace(tzinfo=None) if created else None,
        "has_label": True,
        "image_0_uid": uid_0,
        "image_0_url": "",
        "image_1_uid": uid_1,
        "image_1_url": "",
        "jpg_0": jpg_0,
        "jpg_1": jpg_1,
        "label_0": label_0,
        "label_1": 1 - label_0,
        "model_0": _utf8(pair.model_0 or ""),
        "model_1": _utf8(pair.model_1 or ""),
        "user_id": 0,
    }


def _utf8(text: str) -> str:
    """With lone surrogates, which UTF-8 cannot hold, escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
