"""Hub ids from a local cache that huggingface_hub made: the right picture, or a sentence that says what is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import LoopbackHub, Repository, files_of

from latentpipe import LatentPipeline, Picture
from latentpipe.checkpoints.places.hub_cache import HubId, cached, default_cache, missing, parse_id, repositories
from latentpipe.checkpoints.registry import find_lora, find_model
from latentpipe.cli.app import main
from latentpipe.utils.errors import UserError


def download(name: str, home: Path, **named: Any) -> Path:
    """What huggingface_hub makes of a repository in its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return Path(snapshot_download(name, cache_dir=home / "hub", endpoint=os.environ["HF_ENDPOINT"], max_workers=1, **named))


@pytest.fixture
def fetched(hub: LoopbackHub, hub_home: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of a whole model that huggingface_hub fetched; the hub is gone afterwards."""
    from huggingface_hub import constants

    hub.add("org/tiny", files_of(model_folder))
    snapshot = download("org/tiny", hub_home)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return snapshot


def picture(name: str) -> Picture:
    return LatentPipeline.from_pretrained(name, device="cpu")("red circle", seed=3, num_inference_steps=2)[0]


@pytest.mark.slow
def test_an_id_draws_what_its_folder_draws(
    fetched: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = picture(str(model_folder)).image
    drawn = picture("org/tiny")
    assert np.array_equal(drawn.image, expected)
    assert np.array_equal(picture(f"org/tiny@{fetched.name}").image, expected)
    assert drawn.recipe.model == f"org/tiny@{fetched.name}"
    drawn.save(tmp_path / "x.png")
    assert main(["replay", str(tmp_path / "x.png")]) == 0
    (fetched / "model_index.json").unlink()
    assert main(["replay", str(tmp_path / "x.png")]) == 2
    shutil.rmtree(fetched.parent.parent)
    assert main(["replay", str(tmp_path / "x.png")]) == 2
    err = capsys.readouterr().err
    assert "is incomplete; missing: model_index.json" in err
    assert "which is not installed" in err


@pytest.mark.slow
def test_a_model_in_half_precision_alone_is_pulled_and_drawn(
    hub: LoopbackHub, hub_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny_hosts

    pipe = tiny_hosts.complete("sdxl")
    pipe.save_pretrained(tmp_path / "full")
    pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    hub.add("org/xl", files_of(tmp_path / "full") | files_of(tmp_path / "half"))
    assert main(["pull", "org/xl"]) == 0
    place = Path(capsys.readouterr().out.strip())
    taken = [path.name for path in place.rglob("*.safetensors")]
    assert taken
    assert all(".fp16." in name for name in taken)
    drawn = LatentPipeline.from_pretrained("org/xl", device="cpu")("abc", seed=3, num_inference_steps=2, size=(32, 32))[0]
    same = LatentPipeline.from_pretrained(tmp_path / "half", device="cpu")("abc", seed=3, num_inference_steps=2, size=(32, 32))[0]
    assert np.array_equal(drawn.image, same.image)


def test_places_by_id(fetched: Path) -> None:
    assert find_model("org/tiny") == fetched
    assert find_model("org/tiny", "vae") == fetched / "vae"
    assert find_model("org/tiny/vae", "vae") == fetched / "vae"


def test_verbs_take_an_id(fetched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "org/tiny"]) == 0
    assert f'"folder": "{fetched}"' in capsys.readouterr().out
    assert main(["generate", "red", "--model", "org/none", "--out", "x.png"]) == 2
    assert "'latentpipe pull org/none' fetches it" in capsys.readouterr().err


def test_main_means_what_it_meant_when_it_was_fetched_last(hub: LoopbackHub, hub_home: Path, vae_folder: Path) -> None:
    old = hub.add("org/vae", files_of(vae_folder))
    first = download("org/vae", hub_home)
    new = hub.add("org/vae", files_of(vae_folder) | {"README.md": b"new"})
    second = download("org/vae", hub_home)
    assert first != second
    assert find_model("org/vae", "vae") == second
    assert find_model(f"org/vae@{old}", "vae") == first
    assert find_model(f"org/vae@{old[:8]}", "vae") == first
    shutil.rmtree(second)  # the branch moved, and nothing of it is there
    with pytest.raises(
        UserError, match=rf"not its revision 'main' \(now {new[:12]}\); there is org/vae@{old}\. 'latentpipe pull"
    ):
        find_model("org/vae", "vae")
    assert find_model(f"org/vae@{old}", "vae") == first


def test_branches_and_tags(hub: LoopbackHub, hub_home: Path, vae_folder: Path) -> None:
    repository = hub.repositories.setdefault("org/vae", Repository("org/vae"))
    repository.commit(files_of(vae_folder), "refs/pr/1")
    place = download("org/vae", hub_home, revision="refs/pr/1")
    assert find_model("org/vae@refs/pr/1", "vae") == place
    with pytest.raises(UserError, match="not its revision 'main'"):
        find_model("org/vae", "vae")
    assert repositories(hub_home / "hub") == {f"org/vae@{place.name}": place}


PARTS = [
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "text_encoder/model.safetensors",
    "tokenizer",
    "scheduler",
]


@pytest.mark.parametrize("path", PARTS)
def test_a_missing_file_is_named(fetched: Path, path: str) -> None:
    place = fetched / path
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(UserError, match=rf"incomplete; missing: {path.split('/')[0]}.*'latentpipe pull org/tiny' fetches"):
        find_model("org/tiny")


@pytest.mark.parametrize("path", [*PARTS[:3], "model_index.json", "tokenizer/tokenizer.json"])
def test_a_link_that_leads_nowhere_is_named(fetched: Path, path: str) -> None:
    (fetched / path).resolve().unlink()
    with pytest.raises(UserError, match=rf"incomplete.*{path}"):
        find_model("org/tiny")


def test_a_file_that_was_cut_is_named(fetched: Path) -> None:
    blob = (fetched / PARTS[0]).resolve()
    blob.write_bytes(blob.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{PARTS[0]} \(it has 1,000 of [\d,]+ bytes\)"):
        find_model("org/tiny")


def test_what_is_missing_comes_by_pull(
    hub: LoopbackHub, hub_home: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/tiny", files_of(model_folder))
    snapshot = download("org/tiny", hub_home)
    (snapshot / PARTS[0]).resolve().unlink()
    (snapshot / PARTS[1]).unlink()
    assert main(["pull", "org/tiny"]) == 0
    assert capsys.readouterr().out.strip() == str(snapshot)
    assert find_model("org/tiny") == snapshot
    assert files_of(snapshot) == files_of(model_folder)


def test_shards_and_variants(tmp_path: Path) -> None:
    part = tmp_path / "unet"
    part.mkdir()
    (part / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert missing(part) == ["diffusion_pytorch_model.safetensors (weights)"]
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    shards = [f"diffusion_pytorch_model-0000{at}-of-00002.safetensors" for at in (1, 2)]
    index.write_text(f'{{"weight_map": {{"a": "{shards[0]}", "b": "{shards[1]}"}}}}')
    (part / shards[0]).write_text("x")
    assert missing(part) == [shards[1]]
    (part / shards[1]).write_text("x")
    assert missing(part) == []
    (part / shards[1]).unlink()
    (part / "diffusion_pytorch_model.fp16.safetensors").write_text("x")
    assert missing(part) == []


def test_single_files(hub: LoopbackHub, hub_home: Path) -> None:
    hub.add("org/lora", {"flat.safetensors": b"x" * 9, "README.md": b"y"})
    hub.add("org/two", {"a.safetensors": b"x", "b.safetensors": b"y"})
    place = download("org/lora", hub_home)
    download("org/two", hub_home)
    assert find_lora("org/lora") == place / "flat.safetensors"
    assert find_lora("org/two/b.safetensors").read_bytes() == b"y"
    with pytest.raises(UserError, match=r"name one of them: org/two/a\.safetensors, org/two/b\.safetensors"):
        find_lora("org/two")
    with pytest.raises(UserError, match=r"has no 'c\.safetensors'; there is a\.safetensors, b\.safetensors"):
        find_lora("org/two/c.safetensors")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name/sub/folder", HubId("org/name", None, "sub/folder")),
        ("org/name/a.safetensors@refs/pr/2", HubId("org/name", "refs/pr/2", "a.safetensors")),
        ("name", None),
        ("./name", None),
        ("/org/name", None),
        ("org/name/../x", None),
        ("org/name@../../x", None),
        ("org/na--me", None),
        ("../org/name", None),
        ("org/", None),
        ("org/name@", None),
        ("a b/c", None),
    ],
)
def test_ids(text: str, expected: HubId | None) -> None:
    assert parse_id(text) == expected
    if expected is not None:
        assert str(expected) == text


def test_folders_and_names_win_over_ids(fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert find_model("org/tiny") == tmp_path / "org" / "tiny"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As huggingface_hub decides it, which reads the environment when it is imported."""
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "huggingface" / "hub"
    for name, tail in zip(reversed(names), ("huggingface/hub", "hub", "", ""), strict=True):
        monkeypatch.setenv(name, f"$HOME/{name}")
        assert default_cache() == tmp_path / name / tail


def test_a_cache_without_rights_and_a_damaged_one(fetched: Path, hub_home: Path) -> None:
    folder = hub_home / "hub" / "models--org--tiny"
    (folder / "refs" / "main").write_text("no commit")
    with pytest.raises(UserError, match="not its revision 'main'"):
        find_model("org/tiny")
    (fetched / "model_index.json").unlink()
    (fetched / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        find_model(f"org/tiny@{fetched.name}")
    if os.geteuid():
        (folder / "snapshots").chmod(0)
        with pytest.raises(UserError, match="permission denied"):
            find_model("org/tiny")
        (folder / "snapshots").chmod(0o755)
    assert cached("org/other") is None
