"""LoRA files and tags as people have them: other names, bundled embeddings, whole-number alpha, subfolders, fits in part."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentpipe import Engine, Finished, LatentPipeline, UserError, replay
from latentpipe.checkpoints.embedding import Embedding
from latentpipe.cli.app import main
from latentpipe.explore.inpaint import inpaint
from latentpipe.explore.interpolate import between_prompts
from latentpipe.lora.prompt_tags import split_tags
from latentpipe.lora.state_dict.io import read_lora, write_lora
from latentpipe.pipelines.metadata.reader import TAG
from latentpipe.utils.errors import LatentpipeWarning

Tensors = dict[str, torch.Tensor]
LDM = {  # of a UNet with two levels of one layer
    "down_blocks.1.attentions.0": "input_blocks.3.1", "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.attentions.1": "output_blocks.1.1",
}  # fmt: skip


def factors(pipe: LatentPipeline) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Down and up of each attention layer of the UNet, in the blocks that LDM also has."""
    random = torch.Generator().manual_seed(0)
    shapes = {name: m.weight.shape for name, m in pipe.host.unet.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = {name: shape for name, shape in shapes.items() if ".attn" in name and name.startswith(tuple(LDM))}
    assert chosen
    return {
        name: (torch.randn(2, shape[1], generator=random) * 0.3, torch.randn(shape[0], 2, generator=random) * 0.3)
        for name, shape in chosen.items()
    }


def named(pipe: LatentPipeline, stem: Any, alpha: torch.Tensor | None = None) -> Tensors:
    """kohya's three tensors for each layer, under what `stem` makes of its path."""
    found: Tensors = {}
    for path, (down, up) in factors(pipe).items():
        own = stem(path)
        found |= {f"{own}.lora_down.weight": down, f"{own}.lora_up.weight": up}
        found[f"{own}.alpha"] = torch.tensor(2.0) if alpha is None else alpha.clone()
    return found


def kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def ldm(path: str) -> str:
    head = next(place for place in LDM if path.startswith(f"{place}."))
    return LDM[head] + path[len(head) :]


def put(home: Path, name: str, tensors: Tensors) -> Path:
    path = home / "lora" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def drawn(pipe: LatentPipeline, prompt: str, **more: Any) -> np.ndarray:
    return np.asarray(pipe(prompt, seed=1, num_inference_steps=2, **more)[0].image, np.int16)


@pytest.fixture
def reference(pipe: LatentPipeline, own_home: Path) -> np.ndarray:
    """The picture with the plain adapter, installed as "plain"."""
    put(own_home, "plain", named(pipe, kohya))
    return drawn(pipe, "red circle <lora:plain:0.7>")


@pytest.mark.parametrize(
    "stem", [lambda p: "unet." + ldm(p), lambda p: "diffusion_model." + ldm(p), lambda p: "model.diffusion_model." + ldm(p), ldm]
)  # fmt: skip
def test_case_17_ldm_blocks_with_dots_draw_what_kohyas_names_draw(
    pipe: LatentPipeline, own_home: Path, reference: np.ndarray, stem: Any
) -> None:
    put(own_home, "dotted", named(pipe, stem))
    put(own_home, "flat-ldm", named(pipe, lambda path: "lora_unet_" + ldm(path).replace(".", "_")))
    assert np.array_equal(drawn(pipe, "red circle <lora:dotted:0.7>"), reference)
    assert np.array_equal(drawn(pipe, "red circle <lora:flat-ldm:0.7>"), reference)
    assert not np.array_equal(drawn(pipe, "red circle"), reference)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_case_35_an_alpha_of_whole_numbers_is_read(
    pipe: LatentPipeline, own_home: Path, reference: np.ndarray, dtype: torch.dtype
) -> None:
    path = put(own_home, "whole", named(pipe, kohya, torch.tensor(2, dtype=dtype)))
    assert np.array_equal(drawn(pipe, "red circle <lora:whole:0.7>"), reference)
    assert read_lora(path).hash == read_lora(own_home / "lora" / "plain.safetensors").hash


@pytest.mark.parametrize("end", ["clip_l", "clip_g", "string_to_param.*"])
def test_case_16_a_bundled_embedding_that_does_not_fit_is_one_note_and_the_adapter_draws(
    pipe: LatentPipeline, own_home: Path, reference: np.ndarray, end: str, capsys: Any
) -> None:
    path = put(own_home, "bundled", named(pipe, kohya) | {f"bundle_emb.my thing.{end}": torch.randn(1, 8)})
    with pytest.warns(LatentpipeWarning, match=r"brings the embedding 'my thing', which was left out: .* width 8, and") as notes:
        picture = drawn(pipe, "red circle <lora:bundled:0.7>")
    assert len([note for note in notes if "bundled" in str(note.message)]) == 1
    assert np.array_equal(picture, reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LatentpipeWarning)
        report = pipe.attach_lora(path)
        pipe.detach_lora()
    assert report.left_out == ("the embedding 'my thing'",)
    assert main(["lora", "inspect", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["embeddings"] == ["my thing"]


@pytest.mark.parametrize("end", ["emb_params", "clip_l", "string_to_param.*"])
def test_case_16_a_bundled_embedding_is_on_with_its_adapter_and_is_replayed(
    pipe: LatentPipeline, model_folder: Path, own_home: Path, tmp_path: Path, end: str
) -> None:
    vectors = torch.randn(2, pipe.host.text_encoder.config.hidden_size)
    path = put(own_home, "bundled", named(pipe, kohya) | {f"bundle_emb.My.Thing.{end}": vectors})
    picture = pipe("red <my.thing> <lora:bundled:0.7>", seed=1, num_inference_steps=2)[0]
    assert picture.recipe.embeddings == ["My.Thing"]
    assert pipe.embeddings.on == {}
    picture.save(tmp_path / "x.png")
    assert replay(tmp_path / "x.png", model_folder, device="cpu").difference == 0
    alone = Embedding("x", {"": {"": vectors}} if end != "clip_l" else {"": {"text_encoder": vectors}})
    pipe.attach_lora("bundled", 0.7)
    pipe.attach_embedding(alone)
    same = [pipe(f"red <{name}>", seed=1, num_inference_steps=2)[0] for name in ("x", "My.Thing")]
    assert same[0].image.tobytes() == same[1].image.tobytes() == picture.image.tobytes()
    for layout in ("kohya", "diffusers", "peft"):
        write_lora(read_lora(path), tmp_path / f"{layout}.safetensors", layout)  # type: ignore[arg-type]
        (back,) = read_lora(tmp_path / f"{layout}.safetensors").embeddings
        assert (back.name, back.hash) == ("My.Thing", alone.hash)


def test_case_16_partial_can_be_asked_for_everywhere(
    pipe: LatentPipeline, model_folder: Path, own_home: Path, reference: np.ndarray, tmp_path: Path, capsys: Any
) -> None:
    alien = {"lora_unet_nowhere.lora_down.weight": torch.ones(2, 4), "lora_unet_nowhere.lora_up.weight": torch.ones(4, 2)}
    put(own_home, "odd", named(pipe, kohya) | alien)
    for call in (lambda: drawn(pipe, "red circle <lora:odd:0.7>"), lambda: pipe.set_lora({"odd": 0.7})):
        with pytest.raises(UserError, match=r"fits in part only"):
            call()
    with pytest.warns(LatentpipeWarning, match="taken in part; left out: unet has no layer nowhere"):
        picture = drawn(pipe, "red circle <lora:odd:0.7:partial>")  # in a tag
    assert np.array_equal(picture, reference)
    with pytest.raises(UserError, match=r"fits in part only"):
        drawn(pipe, "red circle <lora:odd:0.7>")  # once allowed is not always allowed
    with pytest.warns(LatentpipeWarning, match="taken in part"):
        pipe.set_lora({"odd": 0.7}, partial=True)  # in Python
    assert np.array_equal(drawn(pipe, "red circle"), reference)
    pipe.detach_lora()
    for prompt, loras in (("red circle <lora:odd:0.7>", {}), ("red circle", {"odd": 0.7})):  # as the page and the API do
        settings = {"seed": 1, "num_inference_steps": 2, "loras": loras}
        with pytest.warns(LatentpipeWarning, match="taken in part"):
            *_, last = Engine(pipe).run(prompt, lora_partial=True, **settings)
        assert isinstance(last, Finished)
        assert np.array_equal(np.asarray(last.pictures[0].image), reference)
        with pytest.raises(UserError, match=r"fits in part only"):
            list(Engine(pipe).run(prompt, **settings))
    shutil.copytree(model_folder, own_home / "models" / "tiny")
    grid = ["grid", "red circle <lora:odd:0.7>", "--x", "lora:odd=0.7", "--model", "tiny", "--steps", "2", "--seed", "1"]
    assert main([*grid, "--out", str(tmp_path / "no.png")]) == 2
    assert "fits in part only" in capsys.readouterr().err
    assert main([*grid, "--out", str(tmp_path / "yes.png"), "--lora-partial"]) == 0
    generate = ["generate", "red circle <lora:odd:0.7>", "--model", "tiny", "--steps", "2", "--seed", "1", "--out", str(tmp_path)]
    assert main([*generate, "--lora-partial"]) == 0


def test_case_16_the_page_and_the_api_have_the_option() -> None:
    gr = pytest.importorskip("gradio")
    from latentpipe.ui import api, grid
    from latentpipe.ui.form import build_form, build_prompt
    from latentpipe.ui.state import App

    with gr.Blocks():
        app = App()
        form = build_form(app, *build_prompt())
        rest = grid._rest(app)
    values = {field: getattr(field, "value", None) for field in form.inputs}
    assert form.settings(values)["lora_partial"] is False
    assert form.settings(values | {form.partial: True})["lora_partial"] is True
    values = {field: field.value for field in rest.values()}
    assert grid.settings_of(rest, values | {rest["lora_partial"]: True})["lora_partial"] is True
    asked = api._settings("", 2, 1, 1, 1, 0, 0, "", {"odd": "0.7:partial", "plain": 1})
    assert (asked["loras"], asked["lora_partial"]) == ({"odd": 0.7, "plain": 1.0}, True)
    assert api._settings("", 2, 1, 1, 1, 0, 0, "", {"odd": 0.7})["lora_partial"] is False
    for wrong in ({"odd": "0.7"}, {"odd": "x:partial"}, {"odd": True}, ["odd"]):
        with pytest.raises(gr.Error, match="no object of names and weights"):
            api._settings("", 2, 1, 1, 1, 0, 0, "", wrong)


def test_case_11_lyco_attaches_as_lora_does(pipe: LatentPipeline, reference: np.ndarray) -> None:
    assert np.array_equal(drawn(pipe, "red circle <lyco:plain:0.7>"), reference)
    assert split_tags("a <LyCO: b :0.5>") == ("a", {"b": 0.5})
    assert [found[1] for found in TAG.finditer("a <lyco:b:1>")] == ["b"]  # in pictures of other programs


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("red apple <hypernet:x:0.7>", r"'<hypernet:x:0\.7>' in the prompt: hypernetworks are not supported"),
        ("red apple <wildcard:x>", "'wildcard' is not supported; the kinds that are: lora, lyco"),
        ("red apple <lroa:flat:0.7>", r"did you mean 'lora'\?"),
    ],
)
def test_case_11_a_kind_that_is_not_supported_is_named(pipe: LatentPipeline, prompt: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        pipe(prompt, seed=1, num_inference_steps=1)


@pytest.mark.parametrize("prompt", ["I <3 you", "a < b : c > d", "<cat-toy>", "<1:2>", "x <>"])
def test_case_11_what_is_no_tag_stays(prompt: str) -> None:
    assert split_tags(prompt) == (prompt, {})


def test_case_11_tags_elsewhere_are_followed_or_refused(pipe: LatentPipeline, reference: np.ndarray) -> None:
    from PIL import Image

    canvas = Image.new("RGB", pipe.native_size, (200, 60, 60))
    hole = Image.new("L", canvas.size, 255)
    with_tag = inpaint(pipe, canvas, hole, "red circle <lora:plain:0.7>", num_inference_steps=2)
    pipe.set_lora({"plain": 0.7})
    assert with_tag.tobytes() == inpaint(pipe, canvas, hole, "red circle", num_inference_steps=2).tobytes()
    pipe.set_lora({})
    assert with_tag.tobytes() != inpaint(pipe, canvas, hole, "red circle", num_inference_steps=2).tobytes()
    with pytest.raises(UserError, match=r"a path between prompts takes no LoRA"):
        between_prompts(pipe, "red <lora:plain:1>", "blue", 2, num_inference_steps=1)
    with pytest.warns(LatentpipeWarning, match="negative prompt"):
        pipe("x", num_inference_steps=1, negative_prompt="<lora:plain:1>")


def test_case_11_a_recipe_that_was_drawn_with_the_tag_as_words_is_replayed(
    model_folder: Path, own_home: Path, reference: np.ndarray, tmp_path: Path
) -> None:
    from latentpipe import Settings, replay

    shutil.copytree(model_folder, own_home / "models" / "tiny")
    pipe = LatentPipeline.from_pretrained("tiny", device="cpu")
    before = pipe.literal("red <lyco:plain:1> <hypernet:x:1>", 1, 1, None, pipe.check(Settings(num_inference_steps=2)))[0]
    before.save(tmp_path / "old.png")
    assert replay(tmp_path / "old.png").difference == 0


def test_case_36_a_lora_in_a_subfolder_is_found_by_its_stem_and_by_its_path(
    pipe: LatentPipeline, own_home: Path, reference: np.ndarray, tmp_path: Path, capsys: Any
) -> None:
    put(own_home, "style/deep", named(pipe, kohya))
    for name in ("deep", "style/deep"):
        assert np.array_equal(drawn(pipe, f"red circle <lora:{name}:0.7>"), reference)
        pipe.attach_lora(name)
        pipe.detach_lora()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ".hidden").mkdir(parents=True)
    shutil.copy(own_home / "lora" / "plain.safetensors", elsewhere / "linked.safetensors")
    shutil.copy(own_home / "lora" / "plain.safetensors", elsewhere / ".hidden" / "unseen.safetensors")
    (own_home / "lora" / "link").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(own_home / "lora")
    assert main(["ls", "lora"]) == 0
    listed = capsys.readouterr().out
    assert "style/deep" in listed
    assert "link/linked" in listed
    assert "unseen" not in listed
    assert main(["inspect", "deep"]) == 0
    put(own_home, "other/deep", named(pipe, kohya))
    for call in (lambda: drawn(pipe, "x <lora:deep:1>"), lambda: pipe.attach_lora("deep")):
        with pytest.raises(UserError, match=r"several LoRA files named 'deep': other/deep, style/deep"):
            call()
    assert np.array_equal(drawn(pipe, "red circle <lora:style/deep:0.7>"), reference)


def test_case_36_models_and_vaes_in_subfolders_are_found_too(model_folder: Path, vae_folder: Path, own_home: Path) -> None:
    from latentpipe.checkpoints.registry import available, find_model, name_of

    shutil.copytree(model_folder, own_home / "models" / "mine" / "tiny")
    shutil.copytree(vae_folder, own_home / "vae" / "set" / "soft")
    shutil.copy(vae_folder / "diffusion_pytorch_model.safetensors", own_home / "vae" / "set" / "bare.sft")
    assert find_model("tiny") == find_model("mine/tiny") == own_home / "models" / "mine" / "tiny"
    assert find_model("tiny", "vae") == own_home / "models" / "mine" / "tiny" / "vae"
    assert find_model("soft", "vae") == own_home / "vae" / "set" / "soft"
    assert find_model("bare", "vae") == own_home / "vae" / "set" / "bare.sft"
    assert name_of(own_home / "vae" / "set" / "soft", "vae") == "set/soft"
    assert not {"mine/tiny/unet", "set"} & set(available("vae"))
