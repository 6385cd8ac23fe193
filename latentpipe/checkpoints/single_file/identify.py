"""What a safetensors or GGUF file is, by its header alone: family, role, channels, prediction, parts, quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.identify import looks_like
from latentpipe.checkpoints.single_file import families
from latentpipe.checkpoints.single_file.parts import WORDS, Contents, Part, contents, is_adapter, names_an_embedding
from latentpipe.checkpoints.single_file.prediction import Prediction, predicted
from latentpipe.checkpoints.single_file.refusals import check_kind
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.gguf_header import BLOCKS, GGUFHeader, read_gguf
from latentpipe.utils.io import Header, is_gguf, read_header

FLOATS = {"F64", "F32", "F16", "BF16"}
FP8 = {"F8_E4M3": "fp8 (e4m3)", "F8_E5M2": "fp8 (e5m2)"}


@dataclass(frozen=True)
class Identity:
    """What a file is.

    role          "model", "unet", "transformer", "vae", "text encoder", "text encoders", "lora", "embedding" or "unknown"
    family        name of `families.FAMILIES`; None where the role has none, or where nothing here knows it
    readings      the families that its shapes fit, where these are several
    why           what speaks against opening it, in a sentence; empty where nothing does
    quantization  "fp8 (e4m3)", "scaled fp8 (e4m3)", "GGUF Q8_0", "nf4", ...; empty for plain floats
    """

    path: Path
    role: str
    contents: Contents
    metadata: Mapping[str, str]
    family: str | None = None
    readings: tuple[str, ...] = ()
    channels: int | None = None
    prediction: Prediction | None = None
    dtype: str = ""
    quantization: str = ""
    why: str = ""

    @property
    def parts(self) -> Mapping[str, Part]:
        """Its networks by slot."""
        return self.contents.parts

    def facts(self) -> dict[str, Any]:
        """What a person is told, as plain values."""
        predicts = self.prediction
        return {
            "file": str(self.path),
            "role": self.role,
            "family": self.family,
            **({"readings": list(self.readings)} if len(self.readings) > 1 else {}),
            "channels": self.channels,
            **(
                {"prediction": predicts.kind, "zero_terminal_snr": predicts.zero, "known_from": predicts.source}
                if predicts
                else {}
            ),
            "parts": {WORDS.get(slot, slot): counted(len(part.names), "tensor") for slot, part in self.parts.items()},
            "dtype": self.dtype,
            "quantization": self.quantization or None,
            "left_out": counted(self.contents.leftovers + len(self.contents.strange), "tensor"),
            **({"refused": self.why} if self.why else {}),
        }


def identify(path: Path, family: str | None = None, config: bool = False) -> Identity:
    """What a file is. `family` is what a person says; with a `config` folder the shapes need not be those of a known family.

    UserError where it is neither, or a person's word contradicts its shapes. Anything else that speaks against
    opening it is told in `why`.
    """
    path = Path(path)
    check_kind(path)
    packed = read_gguf(path) if is_gguf(path) else None
    header = read_header(path) if packed is None else packed.header
    try:
        found = contents(header, path)
    except UserError as error:
        return Identity(path, "unknown", Contents({}, frozenset(), 0, tuple(header.shapes)), header.metadata, why=str(error))
    dtype, quantized, wrong = _numbers(header) if packed is None else _types(packed)
    base: dict[str, Any] = {"metadata": header.metadata, "dtype": dtype, "quantization": quantized}
    if is_adapter(header.shapes):
        return Identity(
            path, "lora", found, why=f"{path} holds a LoRA (or a network with one attached), not a whole model.", **base
        )
    if names_an_embedding(header.shapes):
        return Identity(path, "embedding", found, why=f"{path} holds a textual inversion embedding, not a model.", **base)
    role = _role(found)
    if packed is not None and (why := _not_read(path, role, found, packed)):
        return Identity(path, role, found, why=why, **base)
    if role == "unknown":
        what = families.other(header.shapes)
        what = f"looks like {what}" if what else f"looks like {looks_like(header.shapes)}"
        return Identity(path, role, found, why=f"{path} is no model of pictures that is known here; it {what}.", **base)
    if wrong:
        return Identity(path, role, found, why=f"{path}: {wrong}", **base)
    if "denoiser" not in found.parts:
        return Identity(path, role, found, why=f"{path} holds {_only(found)} and no denoiser.", **base)
    return _denoiser(path, role, found, header, family, config, base)


def _denoiser(
    path: Path, role: str, found: Contents, header: Header, family: str | None, config: bool, base: dict[str, Any]
) -> Identity:
    part = found.parts["denoiser"]
    try:
        known = [families.named(family).name] if family else []
        if not config:
            known = _settled(part, family)
        taken = families.channels(part)
    except UserError as error:
        return Identity(path, role, found, why=str(error), **base)
    predicts = None
    if known:
        try:
            predicts = predicted(known[0], path, found, header.metadata)
        except UserError as error:
            base["why"] = str(error)
    family = known[0] if known else None
    return Identity(path, role, found, family=family, readings=tuple(known), channels=taken, prediction=predicts, **base)


def _settled(part: Part, family: str | None) -> list[str]:
    """The readings of a denoiser, with the one that a person states alone; UserError where that contradicts its shapes."""
    if family is not None and families.named(family).name == "sdxl" and part.layout in ("ldm", "diffusers-unet"):
        try:
            known = families.readings(part)
        except UserError as error:
            if "of other depths" not in str(error):
                raise
            known = ["sdxl"]
    else:
        known = families.readings(part)
    if family is None:
        return known
    if family not in known:
        fits = " or ".join(f"'{name}'" for name in known)
        raise UserError(f"{part.path} was said to be of the family '{family}'; the shapes of its denoiser are those of {fits}.")
    return [family]


def _role(found: Contents) -> str:
    slots = set(found.parts)
    if not slots:
        return "unknown"
    if slots == {"denoiser"}:
        return "unet" if found.parts["denoiser"].layout in ("ldm", "diffusers-unet") else "transformer"
    if "denoiser" in slots:
        return "model"
    return "vae" if slots == {"vae"} else "text encoder" if len(slots) == 1 else "text encoders"


def _only(found: Contents) -> str:
    return " and ".join(f"a {WORDS[slot]}" for slot in found.parts)


def _not_read(path: Path, role: str, found: Contents, packed: GGUFHeader) -> str:
    """Why a GGUF file is none that is read; empty for a transformer alone."""
    if role == "transformer":
        return ""
    stated = packed.metadata.get("general.architecture", "")[:40]
    what = f"it holds {'a UNet' if role == 'unet' else _only(found)}" if found.parts else families.other(packed.shapes)
    what = what if found.parts else f"it looks like {what or 'a model of another kind'}"
    return (
        f"{path} is a GGUF file of which nothing is read here: {what}{f' (architecture {stated!r})' if stated else ''}; read "
        "are the transformers of FLUX.1 and Stable Diffusion 3 and 3.5. Give it as safetensors."
    )


def _types(packed: GGUFHeader) -> tuple[str, str, str]:
    """As `_numbers`, of a GGUF file."""
    strange = next((name for name, kind in packed.types.items() if kind not in BLOCKS), None)
    wrong = f"{strange[:80]} is quantized as {packed.types[strange]}; read are {', '.join(BLOCKS)}." if strange else ""
    dtype = ", ".join(sorted({kind for name, kind in packed.types.items() if packed.shapes[name]}))
    return dtype, f"GGUF {packed.quantization}", wrong


def _numbers(header: Header) -> tuple[str, str, str]:
    """Dtypes in words, quantization, and why they cannot be read (empty where they can)."""
    names = header.shapes
    kinds = sorted({header.dtypes[name] for name, shape in names.items() if shape})
    dtype = ", ".join(kinds)
    bits = next((word for name in names for word in ("nf4", "fp4") if f"bitsandbytes__{word}" in name), "")
    if bits or any(name.endswith((".absmax", ".quant_map")) for name in names):
        bits = bits or "4 bits"
        return (
            dtype,
            bits,
            f"its weights are quantized by bitsandbytes ({bits}), which is not read; give it in fp16, bf16 or fp8.",
        )
    fp8 = next((word for kind, word in FP8.items() if kind in kinds), "")
    scaled = any(name.endswith((".scale_weight", ".weight_scale")) for name in names)
    if any(name.endswith((".weight_scale_2", ".qweight", ".qzeros", ".g_idx")) for name in names):
        return (
            dtype,
            "quantized",
            "its weights are quantized in blocks (nvfp4, mxfp8, GPTQ or AWQ), which is not read; give fp16, bf16 or fp8.",
        )
    strange = [kind for kind in kinds if kind not in FLOATS and kind not in FP8]
    wrong = [
        name
        for name, shape in names.items()
        if len(shape) > 1 and header.dtypes[name] in strange and not name.endswith("position_ids")
    ]
    if wrong:
        return dtype, "quantized", f"{wrong[0]} is stored as {header.dtypes[wrong[0]]}; expected floats of 8 to 64 bits."
    return dtype, f"scaled {fp8}" if fp8 and scaled else fp8, ""
