"""What a file is, by its header alone: families of true shapes (in files of zeros that take no room), and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sized
import torch
import written

from latentpipe.checkpoints.single_file import prediction, tokenizers
from latentpipe.checkpoints.single_file.gather import Stated, open_file
from latentpipe.checkpoints.single_file.identify import identify
from latentpipe.utils.errors import UserError

UNET = written.UNET
BIAS = f"{UNET}{prediction.SD2_MARK}"
KNOWN = [
    # family, channels, what diffusers opens it as
    ("sd1", 4, "StableDiffusionPipeline"),
    ("sd1", 9, "StableDiffusionInpaintPipeline"),
    ("sd1", 8, "StableDiffusionInstructPix2PixPipeline"),
    ("sd2", 4, "StableDiffusionPipeline"),
    ("sd2", 9, "StableDiffusionInpaintPipeline"),
    ("sdxl", 4, "StableDiffusionXLPipeline"),
    ("sdxl", 9, "StableDiffusionXLInpaintPipeline"),
    ("sdxl-refiner", 4, "StableDiffusionXLImg2ImgPipeline"),
    ("ssd-1b", 4, "StableDiffusionXLPipeline"),
    ("vega", 4, "StableDiffusionXLPipeline"),
]


@pytest.mark.parametrize(("family", "channels", "pipeline"), KNOWN)
def test_a_whole_model_is_known_by_its_shapes(family: str, channels: int, pipeline: str, tmp_path: Path) -> None:
    file = sized.hollow(sized.whole(family, channels), tmp_path / "renamed-flux-v_pred.sft")
    found = identify(file)
    assert (found.role, found.family, found.channels, found.why) == ("model", family, channels, "")
    assert found.prediction is not None
    assert found.prediction.kind == "epsilon"
    opened = open_file(file)
    assert opened.configs.pipeline == pipeline
    assert {*opened.sources} == {
        name for name, source in opened.configs.index.items() if isinstance(source, list) and name in opened.configs.networks
    }


@pytest.mark.parametrize(
    ("name", "channels", "family", "readings"),
    [
        ("sd3", 16, "sd3", 1),
        pytest.param("sd3.5-medium", 16, "sd3.5", 1, marks=pytest.mark.slow),  # its table of positions is computed
        pytest.param("sd3.5-large", 16, "sd3.5", 1, marks=pytest.mark.slow),
        ("flux-dev", 64, "flux-dev", 2),
        ("flux-schnell", 64, "flux-schnell", 1),
        ("flux-fill", 384, "flux-fill", 1),
        ("flux-depth", 128, "flux-control", 1),
    ],
)
@pytest.mark.parametrize("prefix", [UNET, ""])
def test_a_transformer_is_known_by_its_shapes(
    name: str, channels: int, family: str, readings: int, prefix: str, tmp_path: Path
) -> None:
    file = sized.hollow(written.under(prefix, sized.denoiser(name, channels)), tmp_path / "model.safetensors", "BF16")
    found = identify(file)
    assert (found.role, found.family, len(found.readings), found.why) == ("transformer", family, readings, "")
    with pytest.raises(UserError, match=r"holds the transformer .* missing: .*text_encoder.*--parts"):
        open_file(file)


@pytest.mark.parametrize("family", sized.UNETS)
@pytest.mark.parametrize("names", ["bare", "comfy", "diffusers"])
def test_a_unet_alone_is_known_under_any_prefix_and_names(family: str, names: str, tmp_path: Path) -> None:
    model = sized.network(family)
    tensors = (
        model.state_dict()
        if names == "diffusers"
        else written.under("" if names == "bare" else "diffusion_model.", written.ldm_unet(model))
    )
    found = identify(sized.hollow(tensors, tmp_path / "unet.safetensors"))
    assert (found.role, found.family, found.channels, found.why) == ("unet", family, 4, "")


def test_the_shipped_configs_make_networks_of_exactly_these_shapes(tmp_path: Path) -> None:
    from latentpipe.checkpoints.single_file.opening import load

    for family in ("sd1", "vega"):
        pipe = load(sized.hollow(sized.whole(family), tmp_path / f"{family}.safetensors"), None)
        own = sized.network(family).state_dict()
        assert {name: value.shape for name, value in pipe.unet.state_dict().items()} == {
            name: value.shape for name, value in own.items()
        }
        assert pipe.unet.dtype == torch.float16
        assert is_mapped(pipe.unet.conv_in.weight, tmp_path / f"{family}.safetensors")
        assert is_mapped(pipe.vae.decoder.conv_in.weight, tmp_path / f"{family}.safetensors")


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor's memory is the file's own pages, not a copy."""
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    return any(int(first, 16) <= tensor.data_ptr() < int(last, 16) for first, last in ranges)


@pytest.mark.parametrize("part", ["l", "h", "g"])
def test_text_encoders_alone_are_told_apart_by_their_width(part: str, tmp_path: Path) -> None:
    for number, tensors in enumerate((written.clip(sized.clip(part)), written.open_clip(sized.clip(part)))):
        found = identify(sized.hollow(tensors, tmp_path / f"{number}.safetensors"))
        assert (found.role, [*found.parts]) == ("text encoder", [f"clip_{part}"])


# --- prediction ---------------------------------------------------------------------------------------------

PREDICTIONS: list[tuple[str, list[str], str, dict[str, str], tuple[str, bool, str]]] = [
    ("sdxl", [], "", {}, ("epsilon", False, "assumed")),
    ("sdxl", ["v_pred"], "", {}, ("v_prediction", False, "marker keys")),
    ("sdxl", ["v_pred", "ztsnr"], "", {}, ("v_prediction", True, "marker keys")),
    ("sdxl", ["v_pred"], "eps", {"modelspec.prediction_type": "epsilon"}, ("v_prediction", False, "marker keys")),
    ("sd1", [], "v", {"modelspec.prediction_type": "epsilon"}, ("v_prediction", False, "model.yaml")),
    ("sd1", [], "eps", {"modelspec.prediction_type": "v"}, ("epsilon", False, "model.yaml")),
    ("sd1", [], "", {"modelspec.prediction_type": "v"}, ("v_prediction", False, "modelspec.prediction_type")),
    ("sd1", [], "", {"modelspec.predict_key": "epsilon"}, ("epsilon", False, "modelspec.predict_key")),
    (
        "sd1",
        [],
        "",
        {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
        ("v_prediction", True, "ss_v_parameterization"),
    ),
]


@pytest.mark.parametrize(("family", "markers", "yaml", "metadata", "expected"), PREDICTIONS)
def test_the_prediction_and_where_it_is_known_from(
    family: str, markers: list[str], yaml: str, metadata: dict[str, str], expected: tuple[str, bool, str], tmp_path: Path
) -> None:
    tensors: dict[str, Any] = written.under(UNET, sized.denoiser(family)) | dict.fromkeys(markers, ())
    file = sized.hollow(tensors, tmp_path / "model.safetensors", "F16", metadata)
    if yaml:
        (tmp_path / "model.yaml").write_text(f"model:\n  params:\n    parameterization: {yaml}\n")
    found = identify(file).prediction
    assert found is not None
    assert (found.kind, found.zero) == expected[:2]
    assert expected[2] in found.source


@pytest.mark.parametrize(("spread", "kind"), [(0.02, "epsilon"), (0.2, "v_prediction")])
def test_stable_diffusion_2_is_told_by_one_bias(spread: float, kind: str, tmp_path: Path) -> None:
    tensors = written.under(UNET, sized.denoiser("sd2"))
    file = sized.hollow({BIAS: tensors.pop(BIAS)} | tensors, tmp_path / "model.safetensors", "F32")
    values = torch.linspace(-1, 1, 320) * spread * 3**0.5
    with open(file, "r+b") as stream:  # the bias is the first tensor
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start)
        stream.write(values.numpy().tobytes())
    found = identify(file).prediction
    assert found is not None
    assert (found.kind, "weights" in found.source) == (kind, True)


def test_schedulers_follow_the_prediction(tmp_path: Path) -> None:
    marks: dict[str, Any] = {"v_pred": (), "ztsnr": ()}
    for family, cls in (("sdxl", "EulerDiscreteScheduler"), ("sd1", "DDIMScheduler")):
        config = open_file(sized.hollow(sized.whole(family) | marks, tmp_path / f"{family}.safetensors")).configs.scheduler
        assert config["_class_name"] == cls
        assert (config["prediction_type"], config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (
            "v_prediction",
            True,
            "trailing",
        )
    stated = open_file(tmp_path / "sdxl.safetensors", Stated(prediction="epsilon"))
    assert stated.configs.scheduler["prediction_type"] == "epsilon"
    assert "rescale_betas_zero_snr" not in stated.configs.scheduler
    assert (
        open_file(sized.hollow(sized.whole("sd1"), tmp_path / "plain.safetensors")).configs.scheduler["_class_name"]
        == "PNDMScheduler"
    )


# --- what does not open -------------------------------------------------------------------------------------

XL = written.under(UNET, {"input_blocks.0.0.weight": (320, 4, 3, 3)})
STRANGE: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}, "holds a LoRA"),
    ("peft", {"base_model.model.unet.conv_in.lora_A.weight": (4, 320)}, "holds a LoRA"),
    ("embedding", {"emb_params": (5, 768)}, "textual inversion"),
    ("sdxl embedding", {"clip_l": (5, 768), "clip_g": (5, 1280)}, "textual inversion"),
    ("vae", {"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}, "holds a VAE and no denoiser"),
    ("vae of a checkpoint", {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}, "holds a VAE and no denoiser"),
    ("controlnet", {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "ControlNet"),
    ("ldm controlnet", {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "ControlNet"),
    ("ip-adapter", {"image_proj.proj.weight": (3072, 1024)}, "IP-Adapter"),
    (
        "chroma",
        {
            "distilled_guidance_layer.in_proj.bias": (5120,),
            "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
            "img_in.weight": (3072, 64),
        },
        "Chroma",
    ),
    (
        "flux 2",
        {"single_stream_modulation.lin.weight": (6, 6), "double_blocks.0.img_attn.qkv.weight": (6, 6), "img_in.weight": (6, 128)},
        r"FLUX\.2",
    ),
    ("hunyuan video", {"txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": (6,)}, "HunyuanVideo"),
    (
        "wan",
        {"model.diffusion_model.head.modulation": (1, 2, 1536), "model.diffusion_model.blocks.0.self_attn.q.weight": (6, 6)},
        "Wan",
    ),
    ("pixart", {"t_block.1.weight": (6, 6), "y_embedder.y_embedding": (120, 4096)}, "PixArt"),
    ("sana", {"blocks.0.cross_attn.q_linear.weight": (6, 6)}, "Sana"),
    ("lumina", {"cap_embedder.0.weight": (6,)}, "Lumina"),
    ("auraflow", {"model.double_layers.0.attn.w2q.weight": (6, 6)}, "AuraFlow"),
    ("qwen-image", {"transformer_blocks.0.img_mod.1.weight": (6, 6), "txt_norm.weight": (6,)}, "Qwen-Image"),
    ("cascade", {"clip_txt_mapper.weight": (6, 6)}, "Stable Cascade"),
    ("motion", {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (6,)}, "AnimateDiff"),
    ("llama", {"model.layers.0.self_attn.q_proj.weight": (6, 6), "lm_head.weight": (6, 6)}, "a language model"),
    ("gpt-2", {"h.0.attn.c_attn.weight": (6, 6)}, "a language model"),
    (
        "stable audio",
        {"pretransform.model.encoder.layers.0.weight_g": (6, 1, 1), "model.model.transformer.layers.0.x": (6,)},
        "an audio model",
    ),
    ("whisper", {"model.encoder.conv1.weight": (6, 80, 3)}, "an audio model"),
    ("upscaler", {"body.0.rdb1.conv1.weight": (6, 6, 3, 3), "conv_first.weight": (6, 3, 3, 3)}, "an upscaler"),
    ("vision", {"vision_model.embeddings.patch_embedding.weight": (6, 3, 14, 14)}, "an image encoder"),
    ("nothing", {}, "an empty file"),
    ("unknown", {"a.weight": (6,), "b.weight": (6,)}, "something else"),
    (
        "no entrance",
        {"model.diffusion_model.output_blocks.0.0.in_layers.0.weight": (6,)},
        r"not complete; it has no input_blocks\.0\.0\.weight",
    ),
    (
        "nf4",
        {**XL, f"{UNET}out.2.weight.quant_state.bitsandbytes__nf4": (80,), f"{UNET}out.2.weight.absmax": (5,)},
        "bitsandbytes .nf4.",
    ),
    ("two denoisers", {**XL, "diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "two networks of one kind"),
    ("edm", {"edm_mean": (4,), "edm_std": (4,)}, "EDM"),
    ("cosxl", {"edm_vpred.sigma_max": ()}, "EDM"),
]


@pytest.mark.parametrize(("name", "tensors", "said"), STRANGE, ids=[row[0] for row in STRANGE])
def test_what_is_no_model_of_these_is_told_in_a_sentence(name: str, tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    if said == "EDM":
        tensors = {**written.under(UNET, sized.denoiser("sdxl")), **tensors}
    file = sized.hollow(tensors, tmp_path / "sd15-v1-5-pruned.safetensors")
    with pytest.raises(UserError, match=said) as raised:
        open_file(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (
        identify(file).family in (None, "sdxl") if said == "EDM" else identify(file).family is None
    )  # never taken for Stable Diffusion 1.5


@pytest.mark.parametrize(
    ("family", "channels", "said"),
    [("sd2", 5, r"5 channels \(a depth map"), ("sd1", 7, "7 channels"), ("sdxl-refiner", 9, "9 channels")],
)
def test_other_numbers_of_channels_are_refused(family: str, channels: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        open_file(sized.hollow(sized.whole(family, channels), tmp_path / "model.safetensors"))


def test_another_depth_is_refused_and_taken_where_it_is_stated(tmp_path: Path) -> None:
    kept = {name: value for name, value in sized.whole("sdxl").items() if ".middle_block.1.transformer_blocks.9." not in name}
    file = sized.hollow(kept, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="--family sdxl"):
        open_file(file)
    assert open_file(file, Stated(family="sdxl")).identity.family == "sdxl"
    with pytest.raises(UserError, match="the shapes of its denoiser are those of 'sd1'"):
        open_file(sized.hollow(sized.whole("sd1"), tmp_path / "other.safetensors"), Stated(family="sdxl"))
    with pytest.raises(UserError, match="Did you mean 'sdxl'"):
        open_file(file, Stated(family="sdlx"))


def test_two_readings_are_listed_and_the_family_decides(tmp_path: Path) -> None:
    file = sized.hollow(sized.whole("flux-dev", 64), tmp_path / "model.safetensors", "BF16")
    assert identify(file).facts()["readings"] == ["flux-dev", "flux-kontext"]
    assert open_file(file).configs.pipeline == "FluxPipeline"
    assert open_file(file, Stated(family="flux-kontext")).configs.pipeline == "FluxKontextPipeline"
    with pytest.raises(UserError, match="matches flows"):
        open_file(file, Stated(prediction="v"))


FILES: list[tuple[str, bytes, str]] = [
    ("empty", b"", r"empty \(0 bytes\)"),
    ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n", "git LFS pointer"),
    ("html", b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    ("json", b'{"error": "Repository not found"}', "a text of 33 bytes"),
    ("gguf", b"GGUF\3\0\0\0" + bytes(64), "a GGUF file of which nothing is read here"),
    ("pickle", b"\x80\x02}q\0.", "a pickle"),
    ("zip", b"PK\3\4" + bytes(64), "a pickle"),
    ("noise", bytes(range(200)), "not a safetensors file"),
    ("cut", (1000).to_bytes(8, "little") + b'{"a": ', "not a safetensors file"),
]


@pytest.mark.parametrize(("name", "content", "said"), FILES, ids=[row[0] for row in FILES])
def test_files_of_other_kinds_are_told_by_their_first_bytes(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        open_file(file)


# --- tokenizers, real files ---------------------------------------------------------------------------------


def test_the_vocabulary_of_clip_is_the_published_one() -> None:
    import hashlib

    text = json.dumps(tokenizers.clip_vocabulary(), separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == "5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363"
    merges = (tokenizers.DATA / "clip_merges.txt").read_bytes()
    assert hashlib.sha256(merges).hexdigest() == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


def test_the_shipped_tokenizers_read_as_the_published_ones() -> None:
    configs = json.loads((tokenizers.DATA / "sd3.json").read_text())
    first, second, third = (tokenizers.bundled_tokenizer(configs[name]) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
    assert first("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = [tokenizer("cat", padding="max_length").input_ids for tokenizer in (first, second)]
    assert [(len(ids), ids[-1]) for ids in padded] == [(77, 49407), (77, 0)]
    assert third("a photo of a cat").input_ids == [3, 9, 1202, 13, 3, 9, 1712, 1]


def test_every_real_file_is_told(assets: Path) -> None:
    roles = {}
    for path in sorted((assets / "weights").rglob("*.safetensors")):
        found = identify(path)
        assert found.why
        roles[path.name] = found.role
    assert {*roles.values()} == {"lora", "embedding"}
    for path in sorted((assets / "weights").rglob("*.p*t*")):
        with pytest.raises(UserError, match="latentpipe convert"):
            identify(path)


REAL = {
    "Alien_Style": ("lora", None),
    "Face_Reference_IP_Adapter_Plus_Face": ("unknown", None),
    "Hard_Edge_Detection_canny_diffusion_pytorch_model.fp16": ("unet", None),
    "IP_Adapter_SD1_model": ("unknown", None),
    "Juggernaut_XL_v9_text_encoder_2_model.fp16": ("text encoder", None),
    "Juggernaut_XL_v9_text_encoder_model.fp16": ("text encoder", None),
    "Juggernaut_XL_v9_unet_diffusion_pytorch_model.fp16": ("unet", "sdxl"),
    "Juggernaut_XL_v9_vae_diffusion_pytorch_model.fp16": ("vae", None),
    "RealESRGAN_x2plus": ("unknown", None),
    "Standard_Reference_IP_Adapter": ("unknown", None),
    "SwinIR_-_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN": ("unknown", None),
    "clip-vit-large-patch14_model": ("unknown", None),
    "shinkai_makoto_offset": ("lora", None),
    "siglip-so400m-patch14-384_model": ("unknown", None),
    "stripped_models_peft_adapter_model": ("lora", None),
    "text_encoder_model": ("text encoder", None),
}


@pytest.mark.parametrize("name", REAL)
def test_the_names_and_shapes_of_real_files_are_told(name: str, assets: Path, tmp_path: Path) -> None:
    listed = json.loads((assets / "weights" / "manifests" / f"{name}.json").read_text())
    if len(listed) < 3:  # of upscalers: under the name of their training's average
        listed = next(iter(listed.values()))
    shapes = {key: entry["shape"] for key, entry in listed.items() if "shape" in entry}
    found = identify(sized.hollow(shapes, tmp_path / "model.safetensors"))
    assert (found.role, found.family) == REAL[name]
    assert bool(found.why) == (found.family is None)
