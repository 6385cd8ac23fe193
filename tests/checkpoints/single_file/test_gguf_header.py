"""GGUF files by their headers, without the package gguf: what they are, what is damaged, what is refused."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import sized
import torch
import written
from gguf_written import by_hand, shapes

from latentpipe import UserError
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.places.glance import family
from latentpipe.checkpoints.places.tool_folders import Import, entries
from latentpipe.checkpoints.single_file.gather import Stated, open_file
from latentpipe.checkpoints.single_file.identify import identify
from latentpipe.cli.app import main
from latentpipe.utils.gguf_header import read_gguf

ROW = (3, 64)


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package gguf is not installed; what diffusers once found of it stays as it is."""
    import diffusers.quantizers.gguf.gguf_quantizer  # noqa: F401  # asks once, when it is imported

    monkeypatch.setitem(sys.modules, "gguf", None)


def test_without_the_package_quantized_weights_are_refused_and_plain_ones_open(
    made: Any, tmp_path: Path, no_package: None
) -> None:
    folder, config, file = made("flux")
    tensors = written.flux(load_pipeline(folder).transformer)
    stated = Stated(config=config, parts=(file,))
    data = {name: value.contiguous().numpy().tobytes() for name, value in tensors.items()}
    plain = by_hand(shapes(tensors, "F32"), tmp_path / "plain.gguf", data=data)
    ours, theirs = (load_pipeline(place, stated=given) for place, given in ((plain, stated), (folder, None)))
    assert all(torch.equal(value, theirs.transformer.state_dict()[name]) for name, value in ours.transformer.state_dict().items())
    packed = by_hand(shapes(tensors, "Q8_0"), tmp_path / "packed.gguf")
    assert identify(packed, config=True).quantization == "GGUF Q8_0"  # its header needs no package
    with pytest.raises(
        UserError, match=r"^\S+packed.gguf holds quantized weights in GGUF, .*pip install 'latentpipe\[gguf\]'\.$"
    ):
        load_pipeline(packed, stated=stated)


def test_a_file_of_true_size_is_known_by_names_and_shapes_whatever_it_is_called(tmp_path: Path) -> None:
    for name, architecture, channels in (("flux-dev", "flux", 64), ("sd3", "sd3", 16)):
        known = {own: tuple(getattr(value, "shape", value)) for own, value in sized.whole(name, channels).items()}
        whole = {own.removeprefix(written.UNET): shape for own, shape in known.items() if own.startswith(written.UNET)}
        kinds = {own: (shape, "Q8_0" if len(shape) == 2 and shape[1] % 32 == 0 else "F32") for own, shape in whole.items()}
        file = by_hand(kinds, tmp_path / f"{name}.safetensors", {"general.architecture": architecture})
        found = identify(file)
        assert (found.role, found.family, found.quantization) == ("transformer", name, "GGUF Q8_0")
        with pytest.raises(UserError, match=r"holds the transformer of a .* missing: vae, text_encoder.*--parts"):
            open_file(file)


LLAMA = {"token_embd.weight": (ROW, "Q8_0"), "blk.0.attn_q.weight": (ROW, "Q8_0"), "blk.0.ffn_up.weight": (ROW, "Q8_0")}
T5 = {"enc.blk.0.attn_q.weight": (ROW, "Q8_0"), "token_embd.weight": (ROW, "Q8_0")}
UNET = {"input_blocks.1.1.proj_in.weight": (ROW, "Q8_0"), "input_blocks.0.0.weight": ((320, 4, 3, 3), "F16")}
FLUX = {"double_blocks.0.img_attn.qkv.weight": (ROW, "Q8_0"), "img_in.weight": ((3072, 64), "Q8_0")}
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", LLAMA, "llama", r"looks like a model of another kind \(architecture 'llama'\)"),
    ("t5", T5, "t5encoder", r"architecture 't5encoder'"),
    ("unet", UNET, "sd1", r"holds a UNet \(architecture 'sd1'\)"),
    ("vae", {"decoder.conv_in.weight": ((8, 4, 3, 3), "F16")}, "vae", "it holds a VAE"),
    ("lora", {"lora_unet_x.lora_down.weight": (ROW, "F16")}, "flux", "holds a LoRA"),
    ("empty", {}, "flux", "of another kind"),
    ("type", FLUX | {"txt_in.weight": (ROW, 17)}, "flux", "txt_in.weight is quantized as IQ2_XS; read are F32, F16, "),
    ("new type", FLUX | {"txt_in.weight": (ROW, 77)}, "flux", "txt_in.weight is quantized as type 77"),
    ("chroma", FLUX | {"distilled_guidance_layer.x": (ROW, "F16")}, "flux", "another family: Chroma"),
    ("narrow", FLUX | {"img_in.weight": ((64, 64), "Q8_0")}, "flux", "64 wide"),
]


@pytest.mark.parametrize(("name", "tensors", "architecture", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_models_that_are_not_read_are_told_in_a_sentence(
    name: str, tensors: Any, architecture: str, said: str, tmp_path: Path
) -> None:
    file = by_hand(tensors, tmp_path / "model.gguf", {"general.architecture": architecture})
    with pytest.raises(UserError, match=said) as caught:
        open_file(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def damaged() -> dict[str, tuple[dict[str, Any], str]]:
    """What a header states wrongly, and what is said of it."""
    return {
        "version 1": ({"version": 1}, "its version is 1"),
        "big-endian": ({"version": 3 << 24}, "little-endian"),
        "many tensors": ({"count": 2**40}, "states 1,099,511,627,776 tensors"),
        "one tensor more": ({"count": 3}, "lies on another|ends within|dimensions"),
        "many entries": ({"keys": 2**60}, "entries of metadata"),
        "beyond the end": ({"offsets": {"img_in.weight": 2**40}}, "'img_in.weight' ends at byte"),
        "on another": ({"offsets": {"img_in.weight": 0}}, "lies on another tensor"),
        "between": ({"offsets": {"img_in.weight": 7}}, "no multiple of 32"),
        "rows": ({"of": {"img_in.weight": ((4, 33), 8)}}, "rows of 33; Q8_0 takes multiples of 32"),
        "a number": ({"of": {"img_in.weight": ((), 8)}}, "rows of 0"),
        "five dimensions": ({"of": {"img_in.weight": ((1, 1, 1, 1, 32), 8)}}, "has 5 dimensions"),
        "huge": ({"of": {"img_in.weight": ((2**41, 32), 8)}}, "rows or columns"),
        "alignment": ({"metadata": {"general.alignment": 12}}, "alignment is 12"),
        "alignment 0": ({"metadata": {"general.alignment": 0}}, "alignment is 0"),
        "alignment in words": ({"metadata": {"general.alignment": "32"}}, "alignment is 32"),
    }


@pytest.mark.parametrize("name", damaged())
def test_damaged_headers_are_refused(name: str, tmp_path: Path) -> None:
    wrong, said = damaged()[name]
    file = tmp_path / "model.gguf"
    tensors: dict[str, Any] = FLUX | wrong.pop("of", {})
    if name == "huge":
        by_hand(FLUX, file)
        file.write_bytes(file.read_bytes().replace(struct.pack("<QQ", 64, 3072), struct.pack("<QQ", 64, 2**41)))
    else:
        by_hand(tensors, file, **wrong)
    with pytest.raises(UserError, match=rf"not a complete GGUF file .*({said}).*Fetch or export it again\.$"):
        identify(file)
    assert family(file) == "damaged"


def test_a_file_that_was_cut_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = by_hand(FLUX, tmp_path / "model.gguf").read_bytes()
    for length in (4, 8, 20, 40, 60, 100, len(whole) // 2, len(whole) - 33):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a complete GGUF file"):
            read_gguf(tmp_path / "cut.gguf")


def test_two_tensors_of_one_name_and_metadata_of_every_type(tmp_path: Path) -> None:
    file = by_hand({"img_in.weigh1": (ROW, "F32"), "img_in.weigh2": (ROW, "F32")}, tmp_path / "model.gguf", {"x": "y" * 5000})
    assert read_gguf(file).metadata == {}  # a long text is passed over
    file.write_bytes(file.read_bytes().replace(b"weigh2", b"weigh1"))
    with pytest.raises(UserError, match=r"two of its tensors are named 'img_in.weigh1'"):
        read_gguf(file)
    key = struct.pack("<Q", 1) + b"k"
    scalars = b"".join(
        key + struct.pack("<I", kind) + bytes(size)
        for kind, size in ((0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 1), (10, 8), (11, 8), (12, 8))
    )
    listed = key + struct.pack("<IIQ", 9, 8, 2) + struct.pack("<Q", 1) + b"a" + struct.pack("<Q", 0)
    numbers = key + struct.pack("<IIQ", 9, 4, 3) + bytes(12)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 13) + scalars + listed + numbers)
    assert read_gguf(file).shapes == {}
    for bad in (struct.pack("<I", 13), struct.pack("<IIQ", 9, 9, 1), struct.pack("<IIQ", 9, 4, 2**50)):
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + bad + bytes(64))
        with pytest.raises(UserError, match=r"not known|values in a list"):
            read_gguf(file)


def test_verbs_that_take_no_gguf_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = by_hand(FLUX, tmp_path / "model.gguf")
    out = str(tmp_path / "out.safetensors")
    for verb in (
        ["generate", "x", "--vae", str(file), "--out", str(tmp_path / "out")],
        ["generate", "x", "--lora", str(file), "--out", str(tmp_path / "out")],
        ["convert", str(file), "--out", out],
        ["convert", str(file), "--to", "tensors", "--out", out],
        ["lora", "convert", str(file), "--out", out],
    ):
        assert main(verb) == 2, verb
        told = capsys.readouterr().err
        assert "is a GGUF file, which is read for the transformer of a model alone (--model)" in told, verb
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_transformer_among_the_parts_is_no_other_models(made: Any, tmp_path: Path) -> None:
    _, config, model = made("flux")
    for name, tensors, said in (("flux", FLUX, "a transformer in GGUF; give it with --model"), ("t5", T5, "nothing is read")):
        file = by_hand(tensors, tmp_path / f"{name}.gguf", {"general.architecture": name})
        with pytest.raises(UserError, match=rf"{name}.gguf .*{said}"):
            open_file(model, Stated(config=config, parts=(file,)))


def test_other_tools_folders_list_them(tmp_path: Path) -> None:
    for place in ("models/unet", "models/vae"):
        (tmp_path / place).mkdir(parents=True)
        by_hand(FLUX, tmp_path / place / "flux1-dev-Q8_0.gguf")
    (found,) = entries(Import("comfyui", tmp_path, "comfyui"))
    assert (found.kind, found.name, found.opens) == ("parts", "comfyui/flux1-dev-Q8_0", True)
    assert family(found.path) == "FLUX.1, GGUF Q8_0"
