"""Names of a UNet: LDM's -> diffusers', by diffusers' own converter, which moves tensors about and makes none."""

from __future__ import annotations

from latentpipe.checkpoints.single_file.parts import Part

PREFIX = "model.diffusion_model."


def diffusers_names(part: Part, layers: int = 2) -> dict[str, str]:
    """diffusers' name -> the part's own name of each tensor; those that the converter leaves out stay under their own names.

    layers  layers_per_block of the UNet: 2 in every published one
    """
    if part.layout != "ldm":
        return {name: name for name in part.names}
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    embedding = {"addition_embed_type": "text_time"} if "label_emb.0.0.weight" in part.names else {}
    for name in ("label_emb.0.0.weight", "label_emb.0.0.bias", "label_emb.0.2.weight", "label_emb.0.2.bias"):
        if embedding:
            part.shape(name)  # the converter fails without
    moved = convert_ldm_unet_checkpoint({PREFIX + name: name for name in part.names}, {"layers_per_block": layers, **embedding})
    found = {mine: own for mine, own in moved.items() if own is not None}
    taken = set(found.values())
    return found | {name: name for name in part.names if name not in taken}
