"""Folders of real pictures from outside (LATENTPIPE_ASSETS); test_data_folder.py does the same with pictures made by code."""

from pathlib import Path

import numpy as np
import pytest

from latentpipe import UserError
from latentpipe.data.image_folder import read_index, read_pictures
from latentpipe.pipelines.metadata.recipe import read


def test_photographs_of_every_kind_are_read(assets: Path) -> None:
    """Grey, alpha, wide gamut and 16-bit pictures of many sizes."""
    pictures = read_pictures(assets / "data" / "photos", 64)
    assert not pictures.skipped
    assert pictures.pixels.shape == (len(pictures.names), 64, 64, 3)
    spread = pictures.pixels.reshape(len(pictures.names), -1).std(1)
    assert np.count_nonzero(spread < 1) <= 2  # a wrong bit depth would come out all black or all white


@pytest.mark.parametrize("name", ["twemoji72", "fluent3d", "crawl_tiles32"])
def test_artwork_has_captions(assets: Path, name: str) -> None:
    items = read_index(assets / "data" / name)
    assert len(items) > 1000
    assert all(item.path.is_file() for item in items)
    assert sum(not item.captions for item in items) < 0.01 * len(items)  # a few tiles have an empty text


def test_pictures_of_other_tools_carry_no_recipe_of_ours(assets: Path) -> None:
    paths = [path for path in sorted((assets / "data" / "ai_images").iterdir()) if path.suffix in {".png", ".jpg", ".jpeg"}]
    assert paths
    for path in paths:
        with pytest.raises(UserError, match="carries no latentpipe recipe"):
            read(path)
