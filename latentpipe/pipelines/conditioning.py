"""Pictures that a drawing follows: ControlNets, T2I-Adapters and IP-Adapters, each with a weight and a range of steps.

Lvmin Zhang et al., arXiv:2302.05543; Chong Mou et al., arXiv:2302.08453; Hu Ye et al., arXiv:2308.06721.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from latentpipe.pipelines import families
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import flatten
from latentpipe.utils.io import content_hash, printable, read_json

# class of the network: kind, and the classes of denoisers that it was made beside
NETWORKS = {
    "ControlNetModel": ("controlnet", "UNet2DConditionModel"),
    "SD3ControlNetModel": ("controlnet", "SD3Transformer2DModel"),
    "FluxControlNetModel": ("controlnet", "FluxTransformer2DModel"),
    "SanaControlNetModel": ("controlnet", "SanaTransformer2DModel"),
    "T2IAdapter": ("t2i-adapter", "UNet2DConditionModel"),
    "IPAdapter": ("ip-adapter", "UNet2DConditionModel"),
}
WIDTHS = ("in_channels", "cross_attention_dim", "joint_attention_dim", "caption_channels", "pooled_projection_dim")
GIVEN = "(given)"


@dataclass(frozen=True, eq=False)
class IPAdapter:
    """The tensors of an IP-Adapter's file, and the picture encoder that they were made for."""

    state: dict[str, dict[str, Any]]
    encoder: Any

    def state_dict(self) -> dict[str, Any]:
        """All tensors by one name each."""
        found = {f"{part}.{name}": value for part, values in self.state.items() for name, value in values.items()}
        return found | {f"image_encoder.{name}": value for name, value in self.encoder.state_dict().items()}


@dataclass(frozen=True, eq=False)
class Control:
    """A network and the picture that it makes a drawing follow.

    network  a ControlNet or T2IAdapter of diffusers, or an `IPAdapter`; `open_control` opens files
    image    what it reads: edges, depth, ..., or for an IP-Adapter any picture
    weight   1: as it was trained
    steps    shares of the steps between which it acts, from 0 to 1
    """

    network: Any
    image: Image.Image
    weight: float = 1.0
    steps: tuple[float, float] = (0.0, 1.0)
    name: str = GIVEN
    digest: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if type(self.network).__name__ not in NETWORKS:
            raise UserError(
                f"{type(self.network).__name__} is no network to control with; expected one of {', '.join(NETWORKS)}."
            )
        if not isinstance(self.image, Image.Image):
            raise UserError(f"the picture of a control is a {type(self.image).__name__}; expected a PIL picture.")
        low, high = self.steps
        if not (math.isfinite(self.weight) and abs(self.weight) <= 10) or not 0 <= low < high <= 1:
            raise UserError(
                f"control '{self.name}' has weight {self.weight} and steps {low} to {high}; expected a weight from -10 to 10 and "
                "two shares, 0 <= begin < end <= 1."
            )
        if not self.digest:
            object.__setattr__(self, "digest", content_hash(self.network.state_dict()))

    @property
    def kind(self) -> str:
        """controlnet, t2i-adapter or ip-adapter."""
        return NETWORKS[type(self.network).__name__][0]


def open_control(path: str | Path, image: Image.Image, weight: float = 1.0, steps: tuple[float, float] = (0.0, 1.0)) -> Control:
    """A control from a diffusers folder: of a ControlNet or T2I-Adapter, or of an IP-Adapter with its `image_encoder`."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected the diffusers folder of a ControlNet, a T2I-Adapter or an IP-Adapter.")
    name = printable(folder.resolve().name)[:200]
    try:
        network = _ip_adapter(folder) if (folder / "image_encoder").is_dir() else _network(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} cannot be opened as a control: {str(error).splitlines()[0]}") from None
    return Control(network, image, weight, steps, name)


def _network(folder: Path) -> Any:
    import diffusers

    found = read_json(folder / "config.json").get("_class_name") if (folder / "config.json").is_file() else None
    if found not in NETWORKS:
        raise UserError(
            f"{folder} holds {found or 'no config.json'}; expected one of {', '.join(NETWORKS)}, or an IP-Adapter's folder."
        )
    return getattr(diffusers, found).from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()


def _ip_adapter(folder: Path) -> IPAdapter:
    from safetensors.torch import load_file
    from transformers import CLIPVisionModelWithProjection

    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(
            f"{folder} holds {len(files)} .safetensors files beside image_encoder; expected the one of the IP-Adapter."
        )
    state: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(files[0]).items():
        part, _, rest = key.partition(".")
        if part not in state:
            raise UserError(f"{files[0]} holds '{key}'; expected the tensors image_proj.* and ip_adapter.* of an IP-Adapter.")
        state[part][rest] = value
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", use_safetensors=True, local_files_only=True)
    return IPAdapter(state, encoder.eval())


def by_kind(controls: Sequence[Control], kind: str) -> list[Control]:
    """Those of one kind, in their order."""
    return [control for control in controls if control.kind == kind]


def class_of(host: Any, controls: Sequence[Control], has_image: bool) -> str:
    """The pipeline class that draws with these controls; UserError where there is none for this family."""
    family = families.family_of(host)
    nets, adapters = by_kind(controls, "controlnet"), by_kind(controls, "t2i-adapter")
    if nets and adapters:
        raise UserError(
            f"ControlNet '{nets[0].name}' and T2I-Adapter '{adapters[0].name}' exclude each other in one picture; leave one out."
        )
    if len(adapters) > 1:
        raise UserError(f"{len(adapters)} T2I-Adapters were given; expected one. ControlNets may be several.")
    if nets:
        found = family.control_image if has_image else family.control
        what = "ControlNets beside a picture to begin from" if has_image else "ControlNets"
    elif adapters:
        found = "" if has_image else next((name for name in family.more if name.endswith("AdapterPipeline")), "")
        what = "T2I-Adapters beside a picture to begin from" if has_image else "T2I-Adapters"
    else:
        return family.image if has_image else family.text
    if not found:
        raise UserError(f"{family.name} has no pipeline that takes {what}; leave '{(nets or adapters)[0].name}' out.")
    return found


def check_controls(host: Any, controls: Sequence[Control], size: tuple[int, int], has_image: bool) -> None:
    """UserError where a control was made for another family, is given a picture of another shape, or excludes another."""
    class_of(host, controls, has_image)
    model = getattr(host, families.denoiser(host))
    for control in controls:
        cls, made_for = type(control.network).__name__, NETWORKS[type(control.network).__name__][1]
        if type(model).__name__ != made_for:
            raise UserError(
                f"{cls} '{control.name}' is made for a {made_for}, and this model's denoiser is a {type(model).__name__}; choose "
                "a control of this family."
            )
        config = getattr(control.network, "config", {})
        for key in WIDTHS if control.kind == "controlnet" else ():
            theirs, ours = config.get(key), model.config.get(key)
            if theirs is not None and ours is not None and theirs != ours and not (key == "in_channels" and ours > theirs):
                raise UserError(
                    f"{cls} '{control.name}' has {key} {theirs}, and this model's denoiser {ours}: it is of another family; "
                    "choose one of this family."
                )
        downscale, read_at = families.expected_latents(host)[1], _downscale(config)
        if read_at not in (None, downscale):
            raise UserError(
                f"{cls} '{control.name}' brings pictures to 1/{read_at} size, and this model's latents are at 1/{downscale}: it "
                "was made for another model; choose one of this one."
            )
        width, height = control.image.size
        if control.kind != "ip-adapter" and width * size[1] != height * size[0]:
            raise UserError(
                f"the picture of control '{control.name}' has {width} x {height} pixels, and {size[0]} x {size[1]} are drawn; "
                "give one of that shape."
            )
        if control.kind == "t2i-adapter" and control.steps[0] > 0:
            raise UserError(
                f"T2I-Adapter '{control.name}' begins at {control.steps[0]}; it acts from the first step on, so give 0."
            )


def _downscale(config: Mapping[str, Any]) -> int | None:
    """By what a network of Stable Diffusion brings its picture to the size of latents; None where its config does not say."""
    if "conditioning_embedding_out_channels" in config:
        return 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    if "downscale_factor" in config:  # those of Stable Diffusion XL begin at half the latents' size
        return config["downscale_factor"] // (2 if config.get("adapter_type") == "full_adapter_xl" else 1)
    return None


def parts_of(controls: Sequence[Control], like: Any) -> dict[str, Any]:
    """The further components of the pipeline class, where and as the denoiser `like` computes."""
    found = {}
    for part, kind in (("controlnet", "controlnet"), ("adapter", "t2i-adapter")):
        nets = [control.network.to(like.device, like.dtype) for control in by_kind(controls, kind)]
        if nets:
            found[part] = nets[0] if len(nets) == 1 else nets
    return found


def arguments_of(cls: type, controls: Sequence[Control], size: tuple[int, int], n: int) -> dict[str, Any]:
    """The arguments of the call that these controls add, as diffusers names them."""
    wanted = inspect.signature(cls.__call__).parameters  # type: ignore[operator]
    found: dict[str, Any] = {}

    def one_or_all(values: list[Any]) -> Any:
        return values[0] if len(values) == 1 else values

    if nets := by_kind(controls, "controlnet"):
        pictures = [_fitted(net.image, size) for net in nets]
        found["control_image" if "control_image" in wanted else "image"] = one_or_all(pictures)
        found["controlnet_conditioning_scale"] = one_or_all([net.weight for net in nets])
        for side, name in enumerate(("control_guidance_start", "control_guidance_end")):
            if name in wanted:
                found[name] = one_or_all([net.steps[side] for net in nets])
            elif any(net.steps != (0.0, 1.0) for net in nets):
                raise UserError(f"{cls.__name__} takes no range of steps; leave the steps of its ControlNets out.")
    for adapter in by_kind(controls, "t2i-adapter"):
        found |= {"image": _fitted(adapter.image, size), "adapter_conditioning_scale": adapter.weight}
        found["adapter_conditioning_factor"] = adapter.steps[1]
    if prompts := by_kind(controls, "ip-adapter"):
        if "ip_adapter_image" not in wanted:
            raise UserError(f"{cls.__name__} takes no IP-Adapter; leave '{prompts[0].name}' out.")
        found["ip_adapter_image"] = [flatten(one.image) for one in prompts]
    return found


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    plain = flatten(picture)
    return plain if plain.size == size else plain.resize(size, Image.Resampling.LANCZOS)


def active(control: Control, step: int, steps: int) -> bool:
    """Whether a control acts in step `step` (from 0), by the rule of diffusers' ControlNets."""
    low, high = control.steps
    return not (step / steps < low or (step + 1) / steps > high)


def weigh_pictures(pipe: Any, controls: Sequence[Control], step: int, steps: int) -> None:
    """Set the weights of the IP-Adapters for a step; those that are outside of their range have none."""
    if prompts := by_kind(controls, "ip-adapter"):
        pipe.set_ip_adapter_scale([one.weight if active(one, step, steps) else 0.0 for one in prompts])


@contextmanager
def prompted_by_pictures(pipe: Any, controls: Sequence[Control]) -> Iterator[None]:
    """IP-Adapters in the cross-attention of a pipeline's UNet, for as long as it draws; the UNet is then what it was."""
    prompts = by_kind(controls, "ip-adapter")
    if not prompts:
        yield
        return
    from transformers import CLIPImageProcessor

    unet = pipe.unet
    before = unet.attn_processors, unet.encoder_hid_proj, unet.config.encoder_hid_dim_type
    encoder = prompts[0].network.encoder.to(unet.device, unet.dtype)
    side = encoder.config.image_size
    pipe.register_modules(image_encoder=encoder, feature_extractor=CLIPImageProcessor(size=side, crop_size=side))
    try:
        try:
            unet._load_ip_adapter_weights([one.network.state for one in prompts], low_cpu_mem_usage=False)
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"IP-Adapter '{prompts[0].name}' does not fit this UNet: {str(error).splitlines()[0]} Choose one of this family."
            ) from None
        yield
    finally:
        unet.set_attn_processor(before[0])
        unet.encoder_hid_proj = before[1]
        unet.config.encoder_hid_dim_type = before[2]
