"""Other programs' words for settings: from the text inside a picture to one flat mapping in our words.

sd-parsers reads the formats. It trusts what it reads, so text and graphs are bounded first, and whatever it raises is for the
caller to catch. Its own extraction from files is not used: it has no bounds and knows a picture by its address in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from PIL import Image
from sd_parsers.data import PromptInfo
from sd_parsers.parsers import AUTOMATIC1111Parser, ComfyUIParser, FooocusParser, InvokeAIParser, NovelAIParser

from latentpipe.utils.reading import parse_json

MAX_LINES = 64 * 1024  # characters; sd-parsers' searches take quadratic time in text that is not JSON
MAX_WALK = 10_000  # samplers times links and nodes of a graph: sd-parsers walks the graph again for each sampler
USER_COMMENT, EXIF_IFD = 0x9286, 0x8769
GRAPH_TAGS = (0x0110, 0x010F, 0x010E, 0x0131, 0x013B)  # Model, Make, ImageDescription, Software, Artist
_GRAPH = re.compile(r"(prompt|workflow)\s*:\s*(\{.*)", re.IGNORECASE | re.DOTALL)
QUOTED = re.compile(r': "(?:\\.|[^\\"])*"')
INVOKE = {"invokeai_metadata", "sd-metadata", "Dream"}
NOVELAI = {"Comment", "Description", "Source"}
CHUNKS = {"parameters", "prompt", "workflow", *INVOKE, *NOVELAI}
"""Text chunks that hold settings; EXIF's UserComment counts as `parameters`."""

# A setting's names, without case, spaces and signs; the first that is stated counts.
NAMES = {
    "prompt": ("prompt", "positiveprompt"),
    "negative": ("negative", "negativeprompt"),
    "sampler": ("sampler", "samplername"),
    "schedule": ("scheduler", "scheduletype", "samplersigma"),
    "steps": ("steps",),
    "guidance": ("cfgscale", "cfg", "guidancescale"),
    "seed": ("seed", "noiseseed"),
    "strength": ("denoisingstrength", "denoise", "strength"),
    "size": ("size", "resolution"),
    "model": ("model", "basemodelname", "ckptname", "unetname"),
    "vae": ("vae", "vaename"),
    "loras": ("loras",),
}
ELSEWHERE = {
    "clipskip", "ensd", "eta", "hiresupscale", "hiresupscaler", "hiressteps", "hirescfgscale", "hiresprompt", "refiner",
    "refinermodel", "refinerswitch", "sharpness", "adaptivecfg", "admguidance", "cfgrescalemultiplier", "tiling", "seamlessx",
    "seamlessy", "variationseed", "variationseedstrength", "facerestoration", "controlnet0", "controlnet1", "transformations",
    "freeu", "styles", "noise",
}  # fmt: skip
"""Settings that decide pixels there and do not exist here."""
PLAIN_NODES = (
    "KSampler",
    "Empty",
    "VAE",
    "LoraLoader",
    "CLIPTextEncode",
    "Checkpoint",
    "SaveImage",
    "PreviewImage",
    "UNETLoader",
)

Stated = dict[str, Any]
"""Values as found, by the keys of NAMES; "elsewhere": name -> value; "nodes", "samplers": of a ComfyUI graph."""


def user_comment(exif: bytes) -> str:
    """EXIF's UserComment, or ""; eight bytes name the encoding (Exif 2.32), and UTF-16 comes in both byte orders."""
    tags = Image.Exif()
    tags.load(exif)
    value = tags.get_ifd(EXIF_IFD).get(USER_COMMENT) or tags.get(USER_COMMENT)
    if isinstance(value, bytes) and value.startswith(b"UNICODE\0"):
        body = value[8:]
        big = body.startswith(b"\xfe\xff") or body[::2].count(0) >= body[1::2].count(0)
        value = body.decode("utf-16-be" if big else "utf-16-le", "replace")
    elif isinstance(value, bytes):
        value = value.removeprefix(b"ASCII\0\0\0").decode("utf-8", "replace")
    return value.strip("\ufeff\0 ") if isinstance(value, str) else ""


def exif_graph(exif: bytes) -> dict[str, str]:
    """ComfyUI's `prompt` and `workflow` out of EXIF: JPEG and WebP have no text chunks, so savers put them into Make, Model, ...

    Each begins with its name and a colon, in whatever case (``prompt:{...}``, ``Workflow: {...}``).
    """
    tags = Image.Exif()
    tags.load(exif)
    found: dict[str, str] = {}
    for tag in GRAPH_TAGS:
        value = tags.get(tag)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        match = _GRAPH.match(value.strip("\0 ")) if isinstance(value, str) else None
        if match:
            found.setdefault(match[1].lower(), match[2])
    return found


def readers(texts: Mapping[str, str]) -> Iterator[tuple[str, Callable[[], Stated]]]:
    """The formats that the text chunks may be in, likeliest first: a name, and what reads it (and raises anything)."""
    text = texts.get("parameters", "").strip()
    if text.startswith("{"):
        yield _json_reader(text)
    elif text:
        yield "A1111", lambda: _a1111(_short(text))
    if "prompt" in texts:
        yield "ComfyUI", lambda: _comfy(_json(texts["prompt"]))
    if INVOKE & set(texts):
        yield "InvokeAI", lambda: _invoke(texts)
    if set(texts) >= NOVELAI:
        short = {key: texts[key][: 500 if key == "Source" else MAX_LINES] for key in NOVELAI}
        yield "NovelAI", lambda: _flat_info(NovelAIParser().parse(short))


def _json(text: str) -> Any:
    """ComfyUI writes NaN, and others a key twice."""
    return parse_json(text, foreign=True)


def _json_reader(text: str) -> tuple[str, Callable[[], Stated]]:
    """Programs that write JSON where A1111 writes lines."""
    try:
        data = _json(text)
    except ValueError:
        return "JSON", lambda: _json(text)
    if isinstance(data.get("sui_image_params"), dict):
        return "SwarmUI", lambda: _flat(data["sui_image_params"])
    if isinstance(data.get("extraMetadata"), str):
        return "Civitai", lambda: _flat(_json(data["extraMetadata"]))
    if data.get("software") == "RuinedFooocus":
        return "RuinedFooocus", lambda: _flat(data)
    if isinstance(data.get("prompt"), dict):
        return "ComfyUI", lambda: _comfy(data["prompt"])
    if any(isinstance(node, dict) and "class_type" in node for node in data.values()):
        return "ComfyUI", lambda: _comfy(data)
    return "Fooocus", lambda: _flat_info(FooocusParser().parse({"parameters": text}))


def _short(text: str) -> str:
    if len(text) > MAX_LINES:
        raise ValueError(f"longer than {MAX_LINES} characters")
    return text


def word(name: Any) -> str:
    """A name without case, spaces and signs but "+", to compare by."""
    return re.sub(r"[^a-z0-9+]", "", str(name)[:80].lower())


def _flat(data: Mapping[str, Any]) -> Stated:
    found = {word(key): value for key, value in reversed(list(data.items())) if value is not None}
    stated: Stated = {
        name: next(found[one] for one in words if one in found)
        for name, words in NAMES.items()
        if not found.keys().isdisjoint(words)
    }
    if {"width", "height"} <= set(found):
        stated["size"] = f"{found['width']}x{found['height']}"
    return stated | {"elsewhere": {key: value for key, value in data.items() if word(key) in ELSEWHERE}}


def _flat_info(found: PromptInfo) -> Stated:
    """What sd-parsers found; the first sampler's settings, and prompts of several parts joined with commas."""
    first = found.samplers[0]
    stated = _flat({**first.parameters, **found.metadata, "sampler": first.name})
    stated["prompt"] = ", ".join(str(prompt) for prompt in found.prompts)
    stated["negative"] = ", ".join(str(prompt) for prompt in found.negative_prompts)
    if first.model:
        stated["model"] = first.model.name
    return stated


def _a1111(text: str) -> Stated:
    # sd-parsers 0.6 fails where the negative prompt's heading comes twice, and takes "Steps: 5" inside quotes for a setting.
    before, heading, after = text.partition("Negative prompt:")
    *lines, last = (before + heading + after.replace("Negative prompt:", "Negative prompt")).split("\n")
    last = QUOTED.sub(lambda found: ": " + re.sub("[,:]", ";", found[0][3:-1]), last)
    return _flat_info(AUTOMATIC1111Parser().parse({"parameters": "\n".join([*lines, last])}))


def _invoke(texts: Mapping[str, str]) -> Stated:
    # The parser of the old command line (Dream) takes quadratic time over white space.
    known = {key: _short(" ".join(texts[key].split())) if key == "Dream" else texts[key] for key in INVOKE & set(texts)}
    stated = _flat_info(InvokeAIParser().parse(known))
    if "invokeai_metadata" in known:  # sd-parsers 0.6 looks for the model's name under its former key only
        stated["model"] = _json(known["invokeai_metadata"]).get("model")
    return stated


def _comfy(data: Mapping[str, Any]) -> Stated:
    """A ComfyUI graph, as it was run. Its links come from the graph itself: the `workflow` beside it lacks those of subgraphs."""
    nodes = {
        str(key): node
        for key, node in data.items()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict) and isinstance(node.get("class_type"), str)
    }
    if not nodes:
        raise ValueError("it has no nodes")
    links = [
        [0, str(value[0]), 0, key, 0, "CLIP" if name.startswith("clip") else "OTHER"]
        for key, node in nodes.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list) and len(value) == 2 and str(value[0])[:80] in nodes
    ]
    samplers = sum({"sampler_name", "steps", "cfg"} <= set(node["inputs"]) for node in nodes.values())
    if max(samplers, 1) * (len(links) + len(nodes)) > MAX_WALK:
        raise ValueError(f"its {len(nodes)} nodes, {len(links)} links and {samplers} samplers are more than is read")
    found = ComfyUIParser().parse({"prompt": nodes, "workflow": {"links": links}})
    found.metadata.clear()
    loose = _loose(nodes)
    stated = loose | (_flat_info(found) if found.samplers else {})
    if not isinstance(stated.get("model"), str):  # sd-parsers 0.6 takes a LoRA's link for the model's name
        stated["model"] = loose.get("model")
    other = {node["class_type"] for node in nodes.values() if not node["class_type"].startswith(PLAIN_NODES)}
    return stated | {"nodes": sorted(other), "samplers": samplers}


def _loose(nodes: Mapping[str, Any]) -> Stated:
    """Settings that are found without following links: a node's own words, the first node's first."""
    values: dict[str, Any] = {}
    loras, texts = [], []
    for node in nodes.values():
        inputs = {key: value for key, value in node["inputs"].items() if not isinstance(value, list | dict)}
        sized = {"width", "height"} if node["class_type"].startswith("Empty") else set()
        wanted = {"ckpt_name", "unet_name", "vae_name", "steps", "cfg", "seed", "noise_seed", "sampler_name", "scheduler"} | sized
        values = {key: inputs[key] for key in inputs if key in wanted} | values
        if "lora_name" in inputs:
            loras.append([inputs["lora_name"], inputs.get("strength_model", 1.0)])
        if "TextEncode" in node["class_type"] and isinstance(inputs.get("text"), str):
            texts.append(inputs["text"])
    return _flat(values) | {"loras": loras, "prompt": texts[0] if len(texts) == 1 else ""}
