"""ControlNets, T2I-Adapters and IP-Adapters: latents as diffusers' own call has them, recipes that replay, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import tiny_hosts
import torch
from helpers import draw_shape
from PIL import Image
from safetensors.torch import save_file
from tiny_hosts import SIDE
from transformers import CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from latentpipe import LatentPipeline, UserError, replay
from latentpipe.checkpoints.registry import find_model
from latentpipe.cli.app import main
from latentpipe.pipelines import hosting
from latentpipe.pipelines.conditioning import Control, IPAdapter, active, open_control
from latentpipe.utils.io import content_hash

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore")]


def hint(colour: str = "red", side: int = SIDE) -> Image.Image:
    return draw_shape(colour, "circle").resize((side, side))


@pytest.fixture(scope="module")
def sd15() -> Any:
    """Stable Diffusion 1 with words."""
    tokenizer = CLIPTokenizer.from_pretrained(find_model("emoji") / "tokenizer")
    host = hosting.rebuild(tiny_hosts.sd15(), text_encoder=tiny_hosts.clip(False), tokenizer=tokenizer)
    return tiny_hosts.quiet(host)


@pytest.fixture(scope="module")
def nets() -> list[Any]:
    """Two ControlNets for it."""
    first = tiny_families.controlnet("Stable Diffusion 1/2")
    second = tiny_families.controlnet("Stable Diffusion 1/2")
    with torch.no_grad():
        for value in second.parameters():
            value.mul_(0.9)
    return [first, second]


@pytest.fixture(scope="module")
def picture_prompt(sd15: Any) -> IPAdapter:
    """A random IP-Adapter for its UNet."""
    torch.manual_seed(4)
    unet = sd15.unet
    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    )
    state: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    state["image_proj"] = {"proj.weight": torch.randn(4 * 8, 8), "proj.bias": torch.randn(32), "norm.weight": torch.ones(8)}
    state["image_proj"]["norm.bias"] = torch.zeros(8)
    number = 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            width = module.to_k.out_features
            state["ip_adapter"][f"{number}.to_k_ip.weight"] = torch.randn(width, 8)
            state["ip_adapter"][f"{number}.to_v_ip.weight"] = torch.randn(width, 8)
            number += 2
    return IPAdapter(state, CLIPVisionModelWithProjection(config).eval())


def ours(host: Any, controls: tuple[Control, ...], **settings: Any) -> torch.Tensor:
    """Latents that a LatentPipeline draws."""
    pipe = LatentPipeline(host)
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "size": (SIDE, SIDE), "controls": controls} | settings
    from latentpipe.pipelines.sampling import settings_of

    with torch.no_grad():
        return pipe.denoise(["red circle"], [5], pipe.check(settings_of(given)))


def theirs(cls: str, host: Any, **call: Any) -> torch.Tensor:
    """Latents of diffusers' own call."""
    parts = {name: call.pop(name) for name in ("controlnet", "adapter", "image_encoder", "feature_extractor") if name in call}
    pipe = tiny_hosts.quiet(hosting.rebuild(host, getattr(diffusers, cls), **parts))
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "prompt": ["red circle"], "output_type": "latent"}
    return pipe(**given, generator=[torch.Generator().manual_seed(5)], **call).images


def test_one_controlnet_equals_diffusers(sd15: Any, nets: list[Any]) -> None:
    control = Control(nets[0], hint(), 0.7, (0.0, 0.5))
    more = {"controlnet_conditioning_scale": 0.7, "control_guidance_start": 0.0, "control_guidance_end": 0.5}
    own = theirs("StableDiffusionControlNetPipeline", sd15, controlnet=nets[0], image=hint(), height=SIDE, width=SIDE, **more)
    assert torch.equal(ours(sd15, (control,)), own)
    assert not torch.equal(ours(sd15, ()), own)
    assert not torch.equal(ours(sd15, (dataclasses.replace(control, steps=(0.0, 1.0)),)), own)


def test_several_controlnets_and_a_picture_to_begin_from(sd15: Any, nets: list[Any]) -> None:
    controls = (Control(nets[0], hint(), 0.7), Control(nets[1], hint("blue"), 0.4, (0.25, 1.0)))
    own = theirs(
        "StableDiffusionControlNetImg2ImgPipeline", sd15, controlnet=nets, image=hint("green"), strength=0.8,
        control_image=[hint(), hint("blue")], controlnet_conditioning_scale=[0.7, 0.4], control_guidance_start=[0.0, 0.25],
        control_guidance_end=[1.0, 1.0],
    )  # fmt: skip
    found = ours(sd15, controls, image=hint("green"), strength=0.8)
    assert torch.equal(found, own) or (found - own).abs().max() <= 1e-6  # the factor of the VAE is applied by the stage


def test_a_t2i_adapter_equals_diffusers() -> None:
    name = "StableDiffusionXLAdapterPipeline"
    host = hosting.rebuild(tiny_hosts.complete("sdxl"), vae=tiny_hosts.kl(4, scaling_factor=0.13025))
    adapter = tiny_families.t2i_adapter(True)
    own = theirs(
        name,
        host,
        adapter=adapter,
        image=hint(),
        height=SIDE,
        width=SIDE,
        adapter_conditioning_scale=0.6,
        adapter_conditioning_factor=0.5,
    )
    assert torch.equal(ours(host, (Control(adapter, hint(), 0.6, (0.0, 0.5)),)), own)
    with pytest.raises(UserError, match=r"begins at 0\.2; it acts from the first step"):
        ours(host, (Control(adapter, hint(), 0.6, (0.2, 0.5)),))


def test_an_ip_adapter_equals_diffusers_and_leaves_the_unet(sd15: Any, nets: list[Any], picture_prompt: IPAdapter) -> None:
    from transformers import CLIPImageProcessor

    before, plain = content_hash(sd15.unet.state_dict()), ours(sd15, ())
    found = ours(sd15, (Control(picture_prompt, hint("blue", 48), 0.8),))
    both = ours(sd15, (Control(picture_prompt, hint("blue", 48), 0.8), Control(nets[0], hint())))
    late = ours(sd15, (Control(picture_prompt, hint("blue", 48), 0.8, (0.5, 1.0)),))
    assert content_hash(sd15.unet.state_dict()) == before
    assert torch.equal(ours(sd15, ()), plain)
    import copy

    own = copy.copy(sd15)
    unet = copy.deepcopy(sd15.unet)
    processor = CLIPImageProcessor(size=16, crop_size=16)
    own = hosting.rebuild(sd15, unet=unet, image_encoder=picture_prompt.encoder, feature_extractor=processor)
    tiny_hosts.quiet(own)
    unet._load_ip_adapter_weights([picture_prompt.state], low_cpu_mem_usage=False)
    own.set_ip_adapter_scale(0.8)
    given = {
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "prompt": ["red circle"],
        "output_type": "latent",
        "height": SIDE,
        "width": SIDE,
    }
    expected = own(**given, generator=[torch.Generator().manual_seed(5)], ip_adapter_image=[hint("blue", 48)]).images
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert not torch.equal(both, found)
    assert not torch.equal(late, found)
    assert not torch.equal(late, plain)


def test_steps_are_counted_as_controlnets_count_them() -> None:
    net = tiny_families.controlnet("Stable Diffusion 1/2")
    acts = [active(Control(net, hint(), 1.0, (0.25, 0.75)), step, 4) for step in range(4)]
    assert acts == [False, True, True, False]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "family",
            "SD3ControlNetModel '.given.' is made for a SD3Transformer2DModel, and this model's denoiser is a UNet2DCondition",
        ),
        ("half", "ControlNetModel '.given.' brings pictures to 1/2 size, and this model's latents are at 1/8"),
        ("width", "ControlNetModel '.given.' has cross_attention_dim 16, and this model's denoiser 8: it is of another family"),
        ("size", "the picture of control '.given.' has 48 x 32 pixels, and 32 x 32 are drawn"),
        ("both", "ControlNet '.given.' and T2I-Adapter '.given.' exclude each other"),
        ("weight", "weight 20.0 and steps 0.0 to 1.0; expected a weight from -10 to 10"),
        ("network", "UNet2DConditionModel is no network to control with; expected one of ControlNetModel"),
        ("interval", "Guidance cannot be switched step by step beside controls"),
    ],
)
def test_what_cannot_be_is_told(sd15: Any, nets: list[Any], what: str, told: str) -> None:
    made = {
        "family": lambda: (Control(tiny_families.controlnet("Stable Diffusion 3"), hint()),),
        "half": lambda: (
            Control(diffusers.ControlNetModel.from_unet(sd15.unet, conditioning_embedding_out_channels=(4, 8)), hint()),
        ),
        "width": lambda: (Control(diffusers.ControlNetModel.from_unet(tiny_hosts.unet(4, 16)), hint()),),
        "size": lambda: (Control(nets[0], hint().resize((48, 32))),),
        "both": lambda: (Control(nets[0], hint()), Control(tiny_families.t2i_adapter(False), hint())),
        "weight": lambda: (Control(nets[0], hint(), 20.0),),
        "network": lambda: (Control(sd15.unet, hint()),),
        "interval": lambda: (Control(nets[0], hint()),),
    }[what]
    interval = (0.0, 0.5) if what == "interval" else (0.0, 1.0)
    with pytest.raises(UserError, match=told):
        ours(sd15, made(), guidance_interval=interval)


def test_a_family_without_controlnets_says_so() -> None:
    host = tiny_hosts.complete("sana")
    net = tiny_families.controlnet("Sana")
    pipe = LatentPipeline(host)
    with pytest.raises(
        UserError, match=r"Sana has no pipeline that takes ControlNets beside a picture to begin from|begins from a picture"
    ):
        pipe("abc", seed=1, size=(64, 64), image=hint(), controls=(Control(net, hint(side=64)),))


@pytest.mark.slow
def test_from_the_command_line_and_replayed(sd15: Any, nets: list[Any], picture_prompt: IPAdapter, tmp_path: Path) -> None:
    sd15.save_pretrained(tmp_path / "model")
    nets[0].save_pretrained(tmp_path / "edges")
    picture_prompt.encoder.save_pretrained(tmp_path / "look" / "image_encoder")
    flat = {f"{part}.{name}": value for part, values in picture_prompt.state.items() for name, value in values.items()}
    save_file(flat, tmp_path / "look" / "ip.safetensors")
    hint().save(tmp_path / "hint.png")
    controls = [
        "--control",
        f"{tmp_path / 'edges'}={tmp_path / 'hint.png'}",
        "--control",
        f"{tmp_path / 'look'}={tmp_path / 'hint.png'}",
    ]
    arguments = ["generate", "red circle", "--model", str(tmp_path / "model"), "--steps", "3", "--size", str(SIDE), "--seed", "3"]
    weights = ["--control-weight", "0.8", "--control-steps", "0-0.7", "--control-steps", "0.3-1"]
    assert main([*arguments, *controls, *weights, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    picture = next((tmp_path / "out").glob("*.png"))
    pairs = [(tmp_path / "edges", tmp_path / "hint.png"), (tmp_path / "look", tmp_path / "hint.png")]
    again = replay(picture, model=tmp_path / "model", device="cpu", controls=pairs)
    assert again.difference == 0
    assert [one.steps for one in again.picture.recipe.controls] == [(0.0, 0.7), (0.3, 1.0)]
    assert main(["replay", str(picture), "--model", str(tmp_path / "model"), "--device", "cpu", *controls]) == 0
    with pytest.raises(UserError, match=r"drawn with these controls: edges \(controlnet\), look \(ip-adapter\); give each"):
        replay(picture, model=tmp_path / "model", device="cpu")
    with pytest.raises(UserError, match=r"the network of control 'edges' is .*, the picture's was"):
        replay(picture, model=tmp_path / "model", device="cpu", controls=[pairs[1], pairs[0]])
    with pytest.raises(UserError, match=r"holds no config\.json; expected one of ControlNetModel"):
        open_control(tmp_path, hint())
