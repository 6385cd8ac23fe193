"""LoRA files of random keys, shapes and metadata: each is read, or refused in a sentence that names it."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from file_parts import values
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from latentpipe.lora.adapter import Lora
from latentpipe.lora.state_dict.io import read_lora, write_lora
from latentpipe.utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::latentpipe.utils.errors.LatentpipeWarning")

STARTS = ["unet.", "lora_unet_", "base_model.model.", "text_encoder.", "lora_te2_", "unet:0", "unet:4", "conv_in", "to_q_"]
MIDDLES = ["", "conv_in", "x.to_out"]
ENDS = """
    .lora_down.weight .lora_up.weight .lora_A.weight .lora_B.x.weight .alpha .dora_scale .lora_mid.weight .hada_w1_a .hada_w1_b
    .hada_w2_a .hada_w2_b .hada_t1 .lokr_w1 .lokr_w2 .lokr_w2_a .lokr_w2_b .lokr_t2 _lora.down.weight _lora.up.weight
    :up :down .lora_magnitude_vector
"""
WORDS = """
    unet.r r lora_alpha unet.alpha rank_pattern alpha_pattern conv_in target_modules use_rslora lora_unet_conv_in unet.conv_in
    rank alpha rslora whole path component unet ^x .*
"""
TOLD = ["", "", "lora_adapter_metadata", "latentpipe.layers", "latentpipe.component", "ss_network_dim", "latentpipe.base"]

words = st.sampled_from(WORDS.split())
plain = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=5)
flat = st.dictionaries(words, plain, max_size=4)
stored = plain | flat | st.dictionaries(words, flat | plain | st.lists(words, max_size=3), max_size=4)
sizes = st.lists(st.integers(0, 3), max_size=4)
random_names = st.tuples(st.sampled_from(STARTS), st.sampled_from(MIDDLES), st.sampled_from(ENDS.split())).map("".join)


@st.composite
def tensors(draw: Any) -> dict[str, list[int]]:
    """Shapes by name: some that fit each other, and some of any kind."""
    stem = draw(st.sampled_from(STARTS)) + draw(st.sampled_from(MIDDLES[1:]))
    whole: dict[str, list[int]] = draw(
        st.sampled_from(
            [
                {},
                {"lora_down.weight": [2, 3], "lora_up.weight": [3, 2]},
                {"lora_A.weight": [2, 3, 1, 1], "lora_B.weight": [3, 2, 1, 1]},
                {"lokr_w1": [2, 2], "lokr_w2": [3, 3]},
                {"hada_w1_a": [3, 2], "hada_w1_b": [2, 3], "hada_w2_a": [3, 2], "hada_w2_b": [2, 3]},
            ]
        )
    )
    return {f"{stem}.{end}": shape for end, shape in whole.items()} | draw(st.dictionaries(random_names, sizes, max_size=4))


def read(path: Path, base: bool) -> Lora | str:
    """The adapter, or the sentence."""
    try:
        return read_lora(path, {"unet": ["conv_in", "down_blocks.0.to_q"]} if base else None)
    except UserError as error:
        return str(error)


@settings(max_examples=300)
@given(tensors(), st.dictionaries(st.sampled_from(TOLD), stored, max_size=3), st.booleans())
def test_whatever_a_file_says_it_is_read_or_refused(shapes: dict[str, Any], told: dict[str, Any], base: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file({name: values(*shape) for name, shape in shapes.items()}, path, {key: json.dumps(v) for key, v in told.items()})
        found = read(path, base)
        if isinstance(found, str):
            assert found.startswith(str(path))
            return
        assert all(layer.rank > 0 and math.isfinite(layer.scale) for _, _, layer in found.layers())
        with contextlib.suppress(UserError):
            write_lora(found, Path(folder) / "b.safetensors", "kohya")
        if (Path(folder) / "b.safetensors").exists():
            assert read_lora(Path(folder) / "b.safetensors").hash == found.hash
