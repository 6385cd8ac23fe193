"""What a denoiser predicts, and whether its noise schedule ends without any signal: told by a file, or assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.single_file.parts import Contents, Part
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import read_tensors
from latentpipe.utils.reading import read_yaml

KINDS = {"epsilon": ("epsilon", False), "v": ("v_prediction", False), "v-zsnr": ("v_prediction", True)}
BESIDE = "beside the file"
SD2_MARK = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
SD2_SPREAD = 0.09  # of that bias: above it the published models of Stable Diffusion 2 predict v, below it noise
_SD2_DIFFUSERS = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"


@dataclass(frozen=True)
class Prediction:
    """What a denoiser predicts.

    kind    diffusers' prediction_type: "epsilon", "v_prediction", or "flow"
    zero    whether the schedule ends at zero signal (zero terminal SNR)
    source  where that is known from, in words
    """

    kind: str
    zero: bool
    source: str

    @property
    def beside(self) -> str:
        """The name of `KINDS` that a YAML file beside the model says, which is no part of it; empty where another source does."""
        names = {both: name for name, both in KINDS.items()}
        return names.get((self.kind, self.zero), "") if self.source.endswith(BESIDE) else ""

    def scheduler(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A scheduler's config with this prediction in it."""
        if self.kind == "flow":
            return dict(config)
        found = {**config, "prediction_type": self.kind}
        if self.zero:
            if config.get("_class_name") == "PNDMScheduler":  # has no zero terminal SNR
                plain = {name: value for name, value in found.items() if name != "skip_prk_steps"}
                found = {**plain, "_class_name": "DDIMScheduler", "clip_sample": False}
            found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return found


def stated(name: str) -> Prediction:
    """The prediction that a person states; UserError lists what there is."""
    if name not in KINDS:
        raise UserError(
            f"prediction is '{name}'; expected one of {', '.join(KINDS)} (zsnr: zero terminal signal-to-noise ratio)."
        )
    return Prediction(*KINDS[name], "stated")


def predicted(family: str, path: Path, found: Contents, metadata: Mapping[str, str]) -> Prediction:
    """What the denoiser of a file predicts: by marker keys, the YAML beside it, its metadata; else as its family does.

    UserError for a prediction that is not drawn with here (EDM), and for a YAML file that is none.
    """
    if family.startswith(("flux", "sd3")):
        return Prediction("flow", False, "flow matching, as all of its family")
    return _marked(path, found) or _beside(path) or _by_metadata(metadata) or _usual(family, found.parts["denoiser"])


def _marked(path: Path, found: Contents) -> Prediction | None:
    edm = sorted(name for name in found.markers if name.startswith("edm_"))
    if edm:
        what = "Playground 2.5" if "edm_mean" in edm else "CosXL"
        raise UserError(
            f"{path}: its key {edm[0]} says that it predicts in the EDM frame (as {what}), which is not drawn with here."
        )
    if "v_pred" in found.markers or "ztsnr" in found.markers:
        keys = " and ".join(sorted(found.markers & {"v_pred", "ztsnr"}))
        kind = "v_prediction" if "v_pred" in found.markers else "epsilon"
        return Prediction(kind, "ztsnr" in found.markers, f"marker keys of the file: {keys}")
    return None


def _beside(path: Path) -> Prediction | None:
    """By the YAML file of the same name, as A1111 reads it: LDM's ``parameterization``, or sgm's scaling."""
    place = next((place for end in (".yaml", ".yml") if (place := path.with_suffix(end)).is_file()), None)
    if place is None:
        return None
    config = read_yaml(place, "a model's YAML config")
    params = config.get("model", {}) if isinstance(config, dict) else {}
    params = params.get("params") if isinstance(params, dict) else None
    if not isinstance(params, dict):
        raise UserError(f"{place}: no model's config (it has no model: params:); mend it, or take it from beside {path.name}.")
    scaling = str(params.get("denoiser_config", ""))
    v = params.get("parameterization") == "v" or "VScaling" in scaling
    zero = bool(params.get("zsnr") or params.get("ztsnr") or params.get("rescale_betas_zero_snr"))
    return Prediction("v_prediction" if v else "epsilon", zero, f"{place.name} {BESIDE}")


def _by_metadata(metadata: Mapping[str, str]) -> Prediction | None:
    zero = metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        word = metadata.get(key, "").lower()
        if word in ("v", "v_prediction", "epsilon", "eps"):
            return Prediction("v_prediction" if word.startswith("v") else "epsilon", zero, f"metadata of the file: {key}")
    if (word := metadata.get("ss_v_parameterization", "").lower()) in ("true", "false"):
        return Prediction("v_prediction" if word == "true" else "epsilon", zero, "metadata of the file: ss_v_parameterization")
    return None


def _usual(family: str, denoiser: Part) -> Prediction:
    """As most models of a family; Stable Diffusion 2 has both, which one bias tells apart (after ComfyUI)."""
    first = next((name for name in ("input_blocks.0.0.weight", "conv_in.weight") if name in denoiser.shapes), "")
    if family == "sd2" and first and denoiser.shapes[first][1] == 4:
        own = next((name for name in (SD2_MARK, _SD2_DIFFUSERS) if name in denoiser.names), None)
        if own is not None:
            bias = next(iter(read_tensors(denoiser.path, [denoiser.names[own]]).values())).float()
            spread = float(bias.std(correction=0))
            kind = "v_prediction" if spread > SD2_SPREAD else "epsilon"
            return Prediction(kind, False, f"weights: the std of {own} is {spread:.3g} ({SD2_SPREAD} parts the published models)")
    return Prediction("epsilon", False, "assumed, as most models of its family")
