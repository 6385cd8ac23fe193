"""Keys of LoRA files taken apart: which module a tensor belongs to, and which part of its update it is."""

from __future__ import annotations

import re

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
ROLES = {
    "lora_A": "lora_A",
    "lora_down": "lora_A",
    "down": "lora_A",
    "lora_B": "lora_B",
    "lora_up": "lora_B",
    "up": "lora_B",
    "lora_mid": "lora_mid",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "lora_magnitude_vector",
} | {name: name for name in LOHA + LOKR}

# ``lora_A.weight`` and, with the adapter's name as in a live model, ``lora_A.default.weight``
_PAIR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora_mid)(?:\.[^.]+)?\.weight")
_OLD = re.compile(r"(.+?)(_lora|\.lora|\.lora_linear_layer)\.(down\.weight|up\.weight|alpha)")
_SINGLE = re.compile(
    rf"(.+)\.(alpha|dora_scale|lora_magnitude_vector|{'|'.join(sorted(LOHA + LOKR, key=len, reverse=True))})"
    r"(?:\.[^.]+)?(?:\.weight)?"
)


def take_apart(key: str) -> tuple[str, str] | None:
    """Stem and role of a key, None for one of no adapter.

    Roles are peft's parameter names, and "alpha", "dora_scale" (kohya's magnitudes), "lora_mid" (LoCon's third factor).
    The stem of diffusers' oldest keys (``to_q_lora.down.weight``) ends with "@old".
    """
    if found := _OLD.fullmatch(key):
        role = found[3].removesuffix(".weight")
        return found[1] + ("@old" if found[2] == "_lora" else ""), ROLES[role]
    found = _PAIR.fullmatch(key) or _SINGLE.fullmatch(key)
    return (found[1], ROLES[found[2]]) if found else None
