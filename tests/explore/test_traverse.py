"""Directions, walks along them, attributes and their edits; against closed forms on small and linear parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import some_images, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from latentpipe.cli import app
from latentpipe.data import image_set
from latentpipe.data.emoji_bank import open_bank
from latentpipe.explore import attributes, directions, traverse
from latentpipe.explore.directions import Direction
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import to_bytes
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.stage import VAEStage


def correlated(n: int = 400, shape: tuple[int, int, int] = (3, 2, 2)) -> torch.Tensor:
    """Latents N C h w with unequal variances and correlations."""
    generator = torch.Generator().manual_seed(0)
    size = int(np.prod(shape))
    return (torch.randn(n, size, generator=generator) @ torch.randn(size, size, generator=generator) + 1).view(n, *shape)


def stage() -> VAEStage:
    return VAEStage(tiny_vae())


def along(latents: torch.Tensor, direction: Direction) -> torch.Tensor:
    """Positions of latents (N) on a direction, in its own units."""
    unit = direction.vector.double() / direction.vector.double().square().sum()
    return (latents.double() * unit).flatten(1).sum(1)


@pytest.mark.parametrize("n", [400, 7])
def test_principal_components_are_those_of_the_singular_values(n: int) -> None:
    latents = correlated(n)
    rows = latents.flatten(1).double().numpy()
    _, values, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = directions.principal(latents, 5)
    assert [one.name for one in found] == [f"component {index}" for index in range(1, 6)]
    for one, value, axis in zip(found, values, axes, strict=False):
        assert one.score == pytest.approx(value**2 / (values**2).sum())
        vector = one.vector.flatten().double().numpy()
        assert abs(vector @ axis) == pytest.approx(np.linalg.norm(vector), rel=1e-5)
        assert vector[np.abs(vector).argmax()] > 0


@pytest.mark.parametrize("kind", ["channels", "principal", "supervised"])
def test_one_unit_is_one_standard_deviation(kind: str) -> None:
    latents = correlated()
    label = latents[:, 0, 0, 0] + latents[:, 1, 1, 1]
    found = {
        "channels": lambda: directions.channels(latents),
        "principal": lambda: directions.principal(latents, 12),
        "supervised": lambda: directions.supervised(latents, {"sum": label.numpy()}),
    }[kind]()
    for one in found:
        assert along(latents, one).std().item() == pytest.approx(1, rel=1e-5)


def test_components_of_latents_that_span_few_directions() -> None:
    latents = torch.randn(3, 4, 1, 1)
    assert len(directions.principal(latents, 8)) == 2
    assert sum(one.score for one in directions.principal(latents, 8)) == pytest.approx(1)
    with pytest.raises(UserError, match="all the same"):
        directions.principal(torch.ones(5, 4, 1, 1))
    with pytest.raises(UserError, match="1 or more"):
        directions.principal(latents, 0)
    with pytest.raises(UserError, match="several pictures; given 1"):
        directions.principal(latents[:1])
    with pytest.raises(UserError, match="not finite"):
        directions.channels(latents * torch.nan)


def test_channels_move_every_position_and_still_ones_are_left_out() -> None:
    latents = correlated()
    latents[:, 1] = 3.0
    found = directions.channels(latents)
    assert [one.name for one in found] == ["channel 0", "channel 2"]
    assert torch.equal(found[0].vector[0], found[0].vector[0, 0, 0].expand(2, 2))
    assert not found[0].vector[1:].any()


def test_a_yes_or_no_is_the_difference_of_the_means() -> None:
    latents = correlated()
    label = np.arange(400) % 3 == 0
    (found,) = directions.supervised(latents, {"third": label})
    difference = latents[label].mean(0) - latents[~label].mean(0)
    assert torch.allclose(found.gap * found.vector, difference, atol=1e-4)
    squared = np.corrcoef(along(latents, found).numpy(), label)[0, 1] ** 2
    assert found.score == pytest.approx(squared)


@given(st.floats(0.01, 50), st.floats(-9, 9))
def test_a_numbers_unit_and_zero_do_not_count(scale: float, shift: float) -> None:
    latents = correlated(60)
    label = latents[:, 0, 0, 0].double().numpy()
    first, second = directions.supervised(latents, {"a": label, "b": scale * label + shift})
    assert torch.allclose(first.vector, second.vector, atol=1e-4)
    assert first.gap == pytest.approx(second.gap, rel=1e-4)


def test_pictures_without_a_say_are_left_out() -> None:
    latents = correlated(60)
    label = np.where(np.arange(60) < 40, np.arange(60) % 2, np.nan)
    (found,) = directions.supervised(latents, {"some": label})
    (alone,) = directions.supervised(latents[:40], {"some": label[:40]})
    assert torch.allclose(found.gap * found.vector, alone.gap * alone.vector, atol=1e-5)


@pytest.mark.parametrize(("label", "words"), [(np.zeros(10), "the same for all 10"), (np.arange(9), "of 9 pictures"),
                                              (np.full(10, np.nan), "all 0 pictures")])  # fmt: skip
def test_labels_that_teach_nothing_are_refused(label: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        directions.supervised(correlated(10), {"it": label})


def test_work_is_reported_to_its_end() -> None:
    seen: list[tuple[int, int, str]] = []
    one = stage()
    latents = image_set.encode(one, some_images(6), lambda *told: seen.append(told))
    found = directions.principal(latents, 3, lambda *told: seen.append(told))
    traverse.changes(one, latents[:2], found, report=lambda *told: seen.append(told))
    ends = [told for told, after in zip(seen, [*seen[1:], (0, 0, "end")], strict=True) if told[2] != after[2]]
    assert [(done, what) for done, total, what in ends if done == total] == [
        (6, "encode"), (3, "principal components"), (12, "decode")
    ]  # fmt: skip


def test_a_walk_passes_through_the_picture_itself() -> None:
    one, images = stage(), some_images(8)
    latents = image_set.encode(one, images)
    (found,) = directions.principal(latents, 1)
    walked = traverse.walk(one, latents[3], found, [-1, 0, 2.5])
    assert walked.shape == (3, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(walked[1], one.decode(latents[3:4])[0], atol=1e-4)
        assert torch.allclose(walked[2], one.decode(latents[3:4] + 2.5 * found.vector)[0], atol=1e-4)
    assert torch.equal(walked, traverse.walk(one, latents[3:4], found, [-1, 0, 2.5]))
    with pytest.raises(ValueError, match="latents of one picture"):
        traverse.walk(one, latents, found)


class Linear(nn.Module):
    """An autoencoder of one 4 x 4 patch that is linear: picture = bias + latents @ weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, 3, 4, 4))
        self.decoder = nn.Identity()
        self.config = {"latent_channels": 2}

    def decode(self, raw: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (torch.einsum("bc,chij->bhij", raw[:, :, 0, 0], self.weights),)


def test_change_is_in_grey_levels_and_ranks() -> None:
    """Channel 0 moves every value by 0.1 of [-1, 1] a standard deviation, channel 1 by 0.02."""
    linear: Any = Linear()
    linear.weights.data[0], linear.weights.data[1] = 0.1, 0.02
    one = VAEStage(linear, LatentSpace(2, 4, (1.0, 1.0), (0.0, 0.0)))
    found = [Direction(f"channel {index}", torch.eye(2)[index].view(2, 1, 1), 0.5) for index in (1, 0)]
    changes = traverse.changes(one, torch.zeros(3, 2, 1, 1), found)
    assert changes == pytest.approx([4 * 0.02 * 127.5, 4 * 0.1 * 127.5], abs=1)
    assert [direction.name for direction, _ in traverse.ranked(one, torch.zeros(1, 2, 1, 1), found)] == ["channel 0", "channel 1"]


def test_the_sheet_holds_every_picture_in_its_place() -> None:
    one = stage()
    latents = image_set.encode(one, some_images(8))
    found = directions.principal(latents, 2)
    page = traverse.sheet(one, latents[0], found, [-2, 0, 2])
    assert page.size == (traverse.LABEL_PX + 3 * 19, 18 + 2 * 19)
    for row, direction in enumerate(found):
        pictures = to_bytes(traverse.walk(one, latents[0], direction, [-2, 0, 2]))
        for column, picture in enumerate(pictures):
            left, top = traverse.LABEL_PX + 19 * column, 18 + 19 * row
            cell = np.asarray(page.crop((left, top, left + 16, top + 16)))
            assert np.abs(cell.astype(int) - picture.permute(1, 2, 0).numpy()).max() <= 1


CAPTIONS = [("woman cook dark skin tone",), ("man cook medium dark skin tone",), ("grinning face",), ("frowning face",),
            ("red heart", "love"), ("blue heart",), ("rocket",), ("man and woman light skin tone",)]  # fmt: skip


@pytest.mark.parametrize(("attribute", "wanted"), [
    ("skin tone", [4, 3, None, None, None, None, None, 0]),
    ("woman", [1, 0, None, None, None, None, None, None]),
    ("smiling", [None, None, 1, 0, None, None, None, None]),
    ("red", [None, None, None, None, 1, 0, None, None]),
    ("heart", [0, 0, 0, 0, 1, 1, 0, 0]),
    ("cook woman", [1, 0, 0, 0, 0, 0, 0, 0]),
])  # fmt: skip
def test_labels_read_captions(attribute: str, wanted: list[float | None]) -> None:
    found = attributes.labels(CAPTIONS * 5, attribute)
    assert found == pytest.approx([np.nan if value is None else value for value in wanted] * 5, nan_ok=True)


@pytest.mark.parametrize("attribute", ["zebra", "red", "skin tone"])
def test_an_attribute_that_captions_hardly_name_is_refused(attribute: str) -> None:
    with pytest.raises(UserError, match="expected 5 of either kind"):
        attributes.labels(CAPTIONS, attribute)


def test_every_named_attribute_is_in_the_bank() -> None:
    for name in attributes.NAMES:
        found = attributes.labels(open_bank().captions, name)
        assert np.nansum(found > 0) >= 15


def test_an_edit_moves_by_the_gap_and_back() -> None:
    one, images = stage(), some_images(12)
    latents = image_set.encode(one, images)
    (found,) = directions.supervised(latents, {"half": np.arange(12) % 2})
    edited = attributes.edit(one, images[:3], found, 1.0)
    with torch.no_grad():
        wanted = one.decode(latents[:3] + latents[1::2].mean(0) - latents[::2].mean(0))
        assert torch.allclose(edited, wanted, atol=1e-4)
        assert torch.allclose(attributes.edit(one, images[:3], [found] * 3, 0.0), one.decode(latents[:3]), atol=1e-4)
    with pytest.raises(UserError, match="size that it was learnt at"):
        attributes.edit(one, some_images(1, side=32), found)


def test_local_directions_come_from_the_neighbours() -> None:
    """Two clusters whose attribute lies along different channels: each picture gets its own cluster's."""
    known = torch.zeros(40, 3, 1, 1)
    known[20:, 2] = 50
    label = np.arange(40) % 2.0
    known[:20, 0, 0, 0] = torch.from_numpy(label[:20]).float()
    known[20:, 1, 0, 0] = torch.from_numpy(label[20:]).float()
    first, second = attributes.local(torch.stack([known[0], known[30]]), known, label, "it", k=10)
    assert torch.allclose((first.gap * first.vector).flatten(), torch.tensor([1.0, 0, 0]), atol=1e-5)
    assert torch.allclose((second.gap * second.vector).flatten(), torch.tensor([0, 1.0, 0]), atol=1e-5)


def test_a_perfect_edit_is_judged_perfect_and_none_as_none() -> None:
    real = image_set.read_set(None, 64)
    pairs = attributes.pairs_of(real.captions, "light", "dark")[:12]
    for source, target in pairs:
        assert real.captions[source][0].replace("light", "dark") == real.captions[target][0]
    before, after = (real.images[[pair[side] for pair in pairs]] for side in (0, 1))
    wanted = [real.captions[target][0] for _, target in pairs]
    perfect = attributes.judge(after, before, after, after, wanted)
    assert (perfect.read.value, perfect.read_before.value) == (4, 0)
    assert (perfect.moved.value, perfect.kept.value, perfect.kept_before.value) == (1, 1, 1)
    none = attributes.judge(before, before, after, after, wanted)
    assert (none.moved.value, none.kept.value) == (0, 1)
    assert none.to_target == none.to_target_before
    noise = attributes.judge(some_images(12, 64), before, after, after, wanted)
    assert noise.kept.value < 0.2


@pytest.mark.parametrize(
    ("downscale", "size", "wanted"), [(4, None, 64), (64, None, 64), (128, None, 128), (24, None, 72), (8, 40, 40)]
)
def test_the_side_is_one_that_the_vae_takes(downscale: int, size: int | None, wanted: int) -> None:
    assert image_set.side_for(downscale, size) == wanted


def test_another_side_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Give --size 96"):
        image_set.side_for(32, 100)


def test_the_bank_is_read_by_split_in_a_fixed_order() -> None:
    every, held = image_set.read_set(None, 32), image_set.read_set(None, 32, split="held_out")
    assert len(every.images) == len(open_bank().captions) == len(set(every.keys))
    place = every.keys.index(held.keys[0])
    assert torch.equal(every.images[place], held.images[0])
    assert (
        to_bytes(held.images[:1])[0].permute(1, 2, 0).flatten().tolist()
        == open_bank().pixels[open_bank().keys.index(held.keys[0])].tolist()
    )
    with pytest.raises(UserError, match="no split"):
        image_set.read_set(None, 32, split="tests")


@pytest.fixture
def tiny(vae_folder: Path, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny VAE by a name, and an empty folder to work in."""
    shutil.copytree(vae_folder, own_home / "vae" / "tiny-kl")
    monkeypatch.chdir(tmp_path)
    return "tiny-kl"


def test_the_verb_ranks_and_writes_a_sheet(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["traverse", "--vae", tiny, "--size", "16", "--most", "300", "--rows", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "traverse.png"
    assert lines[0] == "directions of tiny-kl, from 300 pictures of emoji bank, 16 px"
    changes = [float(line.split("change")[1].split()[0]) for line in lines[2:-1]]
    assert len(changes) == 4
    assert changes == sorted(changes, reverse=True)
    with Image.open("traverse.png") as page:
        assert page.size == (traverse.LABEL_PX + 7 * 19, 18 + 4 * 19)


def test_the_verb_on_a_picture_and_a_folder_with_an_attribute(
    tiny: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = Path("many")
    many.mkdir()
    lines = []
    for index in range(5):
        for path in sorted(pictures.glob("*.png")):
            shutil.copy(path, many / f"{index}-{path.name}")
            lines.append(json.dumps({"file_name": f"{index}-{path.name}", "text": path.stem.replace("-", " ")}))
    (many / "metadata.jsonl").write_text("\n".join(lines))
    picture = next(pictures.glob("*.png"))
    arguments = ["--vae", tiny, "--size", "16", "--images", str(many), "--attribute", "red", "circle", "--json"]
    assert app.main(["traverse", str(picture), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["directions"]} == {"red", "circle"}
    assert found["n"] == 60
    assert Path(found["out"]).is_file()


def test_an_attribute_that_no_caption_names_is_said_before_the_pictures_are_encoded(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    monkeypatch.setattr("latentpipe.data.image_set.encode", lambda *_: begun.append(1))
    assert app.main(["traverse", "--vae", tiny, "--size", "16", "--most", "30", "--attribute", "zebras"]) == 2
    assert "'zebras': 0 of 30 captions" in capsys.readouterr().err
    assert not begun


@pytest.mark.parametrize(("arguments", "words"), [
    (["--rows", "0"], "--rows is 0"),
    (["--most", "1"], "--most is 1"),
    (["--out", "page.gif"], "ends in .png"),
    (["nowhere.png"], "no such file"),
    (["--attribute", "zebras"], "'zebras': 0 of 30 captions"),
    (["--size", "15"], "multiples of 2"),
])  # fmt: skip
def test_mistakes_are_one_sentence(tiny: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--vae", tiny] + (["--size", "16"] if "--size" not in arguments else [])
    rest += ["--most", "30"] if "--most" not in arguments else []
    assert app.main(["traverse", *arguments, *rest]) == 2
    assert words in capsys.readouterr().err
    assert not Path("traverse.png").exists()
