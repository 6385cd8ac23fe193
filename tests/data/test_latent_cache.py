"""The latent cache: what it holds, whose it is, and how it is sampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import edit_json, tiny_vae
from safetensors.torch import load_file, save_file

from latentpipe import UserError, VAEStage
from latentpipe.checkpoints.vae_io import load_vae, save_vae, vae_hash
from latentpipe.data.image_folder import read_pictures
from latentpipe.data.latent_cache import LatentCache, default_path, encode_folder, open_cache
from latentpipe.utils.images import to_images
from latentpipe.utils.io import read_header


def test_the_cache_is_the_posterior_of_every_picture(pictures: Path, vae_folder: Path, cache_file: Path) -> None:
    cache = open_cache(cache_file, vae_folder)
    read = read_pictures(pictures, 16)
    with torch.no_grad():
        mean, std = VAEStage(load_vae(vae_folder)).posterior(to_images(read.pixels))
    assert torch.allclose(cache.mean.float(), mean, atol=2e-3)
    assert torch.allclose(cache.std.float(), std, atol=2e-3)
    assert cache.mean.dtype == torch.float16
    assert cache.captions == read.captions
    assert cache.size_px == 16
    assert cache.vae_hash == vae_hash(vae_folder)


def test_batches_do_not_matter(pictures: Path, vae_folder: Path, cache_file: Path, tmp_path: Path) -> None:
    for batch in (1, 5, 12):
        other = encode_folder(pictures, vae_folder, tmp_path / "x.safetensors", 16, batch=batch, progress=list)
        assert torch.allclose(other.mean.float(), load_file(cache_file)["mean"].float(), atol=2e-3)
        assert open_cache(tmp_path / "x.safetensors", vae_folder).captions == other.captions


def test_a_cache_of_another_vae_is_refused_with_both_hashes(cache_file: Path, vae_folder: Path, tmp_path: Path) -> None:
    digest = save_vae(tiny_vae(1), tmp_path / "other", {})
    with pytest.raises(UserError) as error:
        open_cache(cache_file, tmp_path / "other")
    assert digest[:16] in str(error.value)
    assert vae_hash(vae_folder)[:16] in str(error.value)


def test_a_changed_factor_makes_the_cache_stale(cache_file: Path, vae_copy: Path) -> None:

    edit_json(vae_copy / "config.json", scaling_factor=0.5)
    with pytest.raises(UserError, match="encode the pictures again"):
        open_cache(cache_file, vae_copy)


def test_what_is_no_cache_is_refused(vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a latent cache"):
        open_cache(vae_folder / "diffusion_pytorch_model.safetensors", vae_folder)
    save_file({"mean": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"format": "latentpipe.latents.0"})
    with pytest.raises(UserError, match="not a latent cache"):
        open_cache(tmp_path / "x.safetensors", vae_folder)
    with pytest.raises(UserError, match="no such file"):
        open_cache(tmp_path / "none.safetensors", vae_folder)


def test_a_truncated_cache_is_refused(cache_file: Path, vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(cache_file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        open_cache(tmp_path / "x.safetensors", vae_folder)


def test_sizes_that_do_not_divide_are_refused(pictures: Path, vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        encode_folder(pictures, vae_folder, tmp_path / "x.safetensors", 15)
    assert not list(tmp_path.iterdir())


def test_samples_have_the_posteriors_mean_and_std() -> None:
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    cache = LatentCache(mean.view(2, 1, 1, 1).half(), std.view(2, 1, 1, 1).half(), [(), ()], 8, "x")
    n = 20_000
    for row in range(2):
        drawn = cache.sample(torch.full((n,), row), torch.Generator().manual_seed(row))
        assert drawn.dtype == torch.float32
        error = float(std[row]) / n**0.5
        assert drawn.mean().item() == pytest.approx(float(mean[row]), abs=5 * error)
        assert drawn.std().item() == pytest.approx(float(std[row]), rel=5 / (2 * n) ** 0.5)


def test_samples_follow_the_generator(cache_file: Path, vae_folder: Path) -> None:
    cache = open_cache(cache_file, vae_folder)
    chosen = torch.tensor([3, 0, 3])
    first, again, other = (cache.sample(chosen, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[2])  # the same picture, drawn afresh


def test_the_default_path_names_vae_and_size(vae_folder: Path) -> None:
    path = default_path(Path("a"), vae_folder, 64)
    assert path == Path("a") / ".latents" / f"{vae_hash(vae_folder)[:16]}-64.safetensors"


def test_the_cache_inside_the_folder_is_no_picture(vae_folder: Path, tmp_path: Path) -> None:
    from helpers import write_pictures

    folder = write_pictures(tmp_path / "set")
    (folder / "metadata.jsonl").unlink()
    first = encode_folder(folder, vae_folder, default_path(folder, vae_folder, 16), 16)
    again = encode_folder(folder, vae_folder, default_path(folder, vae_folder, 16), 16)
    assert torch.equal(first.mean, again.mean)


@pytest.mark.parametrize(
    ("tensors", "facts", "words"),
    [
        ({}, {"captions": "[]"}, "expected .0, 4, 8, 8."),
        ({}, {"captions": '[["a"]]'}, "expected .1, 4, 8, 8."),
        ({"mean": lambda mean: mean[:5]}, {}, r"its mean is \(5, 4, 8, 8\), expected \(12"),
        ({"std": lambda std: std[:, :3]}, {}, r"its std is \(12, 3, 8, 8\)"),
        ({"mean": lambda mean: mean[0]}, {}, r"its mean is \(4, 8, 8\)"),
        ({"mean": lambda mean: mean[:0], "std": lambda std: std[:0]}, {"captions": "[]"}, "it holds no picture"),
        ({"mean": lambda mean: mean.clone().index_fill_(0, torch.tensor(3), torch.nan)}, {}, "its mean holds values"),
        ({"std": lambda std: std.clone().index_fill_(0, torch.tensor(3), torch.inf)}, {}, "its std holds values that"),
        ({"std": lambda std: -std}, {}, "values below 0"),
        ({"mean": lambda mean: mean.int()}, {}, "stored as int32"),
        ({}, {"size_px": "100000000000"}, "its size_px"),
        ({}, {"size_px": "-16"}, "its size_px"),
        ({}, {"size_px": "1024"}, r"expected \(12, 4, 512, 512\)"),
        ({}, {"size_px": "15"}, "multiples of 2"),
        ({}, {"captions": "{}"}, "not a list of texts"),
        ({}, {"captions": '["red", "blue"]'}, "not a list of texts"),
        ({}, {"captions": "[[1]]"}, "no text"),
        ({}, {"captions": "[" * 100_000}, "captions"),
    ],
)
def test_a_damaged_cache_is_refused_when_it_is_opened(
    cache_file: Path, vae_folder: Path, tmp_path: Path, tensors: dict, facts: dict[str, str], words: str
) -> None:
    held = load_file(cache_file)
    held = {name: tensors.get(name, lambda value: value)(value).contiguous() for name, value in held.items()}
    save_file(held, tmp_path / "x.safetensors", metadata=dict(read_header(cache_file).metadata) | facts)
    with pytest.raises(UserError, match=f"damaged: .*{words}.*encode the pictures again"):
        open_cache(tmp_path / "x.safetensors", vae_folder)


def test_latents_beyond_fp16_are_not_kept(pictures: Path, vae_copy: Path, tmp_path: Path) -> None:
    edit_json(vae_copy / "config.json", scaling_factor=1e6)
    with pytest.raises(UserError, match="beyond the range of fp16"):
        encode_folder(pictures, vae_copy, tmp_path / "x.safetensors", 16)
    assert not (tmp_path / "x.safetensors").exists()


def test_kinds_give_each_picture_its_weight(vae_folder: Path, tmp_path: Path) -> None:
    import json

    from helpers import draw_shape

    lines = []
    for name, kind in (("a", "tone"), ("b", None), ("c", "flag")):
        draw_shape("red", "bar").save(tmp_path / f"{name}.png")
        lines += [json.dumps({"file_name": f"{name}.png", "text": text, "kind": kind}) for text in ("bar", "red bar")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    encode_folder(tmp_path, vae_folder, tmp_path / "x.safetensors", 16)
    cache = open_cache(tmp_path / "x.safetensors", vae_folder)
    assert cache.kinds == ("tone", "", "flag")
    assert cache.weights({"tone": 0.25}) == [0.25, 1.0, 1.0]
    assert cache.weights({}) == [1.0] * 3
    with pytest.raises(UserError, match=r"'tones'.*has: flag, tone"):
        cache.weights({"tones": 0.25})


def test_without_kinds_all_weigh_the_same(vae_folder: Path, cache_file: Path) -> None:
    cache = open_cache(cache_file, vae_folder)
    assert cache.kinds == ()
    assert cache.weights({}) == [1.0] * 12
    with pytest.raises(UserError, match="has: none"):
        cache.weights({"tone": 0.5})
