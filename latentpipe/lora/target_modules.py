"""Named attachment points: which modules of which component an adapter goes on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import nn

from latentpipe.utils.errors import UserError

DENOISERS = ("unet", "transformer")
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
PREFIX = "text_model."

_ATTENTION = r"(.*\.)?(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|query|key|value|proj_attn|to_qkv)"
_TEXT = r"(.*\.)?(q_proj|k_proj|v_proj|out_proj|fc1|fc2|q|k|v|o|wi|wi_0|wi_1|wo)"

# name: components, pattern of the whole path, kind of module
SITES: dict[str, tuple[tuple[str, ...], str, tuple[type[nn.Module], ...]]] = {
    "unet.attention": (DENOISERS, _ATTENTION, (nn.Linear, nn.Conv2d)),
    "unet.conv": (DENOISERS, r".*", (nn.Conv2d,)),
    "unet.all": (DENOISERS, r".*", (nn.Linear, nn.Conv2d)),
    "text": (TEXT, _TEXT, (nn.Linear,)),
    "vae.encoder": (("vae",), r"encoder\..*|quant_conv", (nn.Linear, nn.Conv2d)),
    "vae.decoder": (("vae",), r"decoder\..*|post_quant_conv", (nn.Linear, nn.Conv2d)),
    "vae.attention": (("vae",), _ATTENTION, (nn.Linear, nn.Conv2d)),
    "vae.all": (("vae",), r".*", (nn.Linear, nn.Conv2d)),
}


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv2d of a component by its path, without ``text_model.`` and as if no adapter was attached.

    Convolutions in groups are left out: peft's layers for them cannot be merged.
    """
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, path: str) -> None:
        base = base_layer_of(module)
        if isinstance(base, nn.Linear | nn.Conv2d):
            if getattr(base, "groups", 1) == 1:
                found[path.removeprefix(PREFIX)] = base
            return
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


def base_layer_of(module: nn.Module) -> nn.Module:
    """The module that adapters are wrapped around; itself where there is none."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def select(component: str, model: nn.Module, sites: Sequence[str]) -> list[str]:
    """Paths of the modules that any of `sites` names, in the model's order; may be empty.

    A site is one of `SITES`, or a regular expression that is searched for in ``component.path``.
    """
    chosen: set[str] = set()
    modules = leaves(model)
    for site in sites:
        if site in SITES:
            components, pattern, kinds = SITES[site]
            if component in components:
                chosen |= {path for path, module in modules.items() if re.fullmatch(pattern, path) and isinstance(module, kinds)}
        else:
            expression = _compiled(site)
            chosen |= {path for path in modules if expression.search(f"{component}.{path}")}
    return [path for path in modules if path in chosen]


def select_all(components: Mapping[str, nn.Module], sites: Sequence[str]) -> dict[str, list[str]]:
    """The selected paths by component; UserError for a site that names no module of any of them."""
    if not sites:
        raise UserError(f"No site is given; expected some of {', '.join(SITES)}, or a regular expression.")
    for site in sites:
        if not any(select(name, model, [site]) for name, model in components.items()):
            near = difflib.get_close_matches(site, SITES, n=1)
            hint = f"did you mean '{near[0]}'?" if near and site not in SITES else f"named sites: {', '.join(SITES)}."
            raise UserError(f"The site '{site}' matches no Linear or Conv2d layer of {', '.join(components)}; {hint}")
    found = {name: select(name, model, sites) for name, model in components.items()}
    return {name: paths for name, paths in found.items() if paths}


def _compiled(site: str) -> re.Pattern[str]:
    try:
        return re.compile(site)
    except re.error as error:
        raise UserError(f"The site '{site}' is neither one of {', '.join(SITES)} nor a regular expression ({error}).") from None
