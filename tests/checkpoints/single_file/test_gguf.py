"""Quantized transformers in GGUF: diffusers' values bit for bit, the picture of the folder, and a sentence for all else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hosts
import torch
import written
from gguf_written import quantized
from PIL import Image
from safetensors.torch import save_file
from test_single_file import draw

from latentpipe import LatentPipeline, UserError
from latentpipe.checkpoints.pipeline_io import hashes, load_pipeline
from latentpipe.checkpoints.single_file.gather import Stated, open_file
from latentpipe.checkpoints.single_file.gguf_tensors import SCALES, finite_scales, holds_packed, unpacked
from latentpipe.checkpoints.single_file.opening import part_tensors
from latentpipe.cli.app import main
from latentpipe.pipelines.memory_need import layout_of
from latentpipe.utils.gguf_header import FLOATS, TYPES, read_gguf

pytest.importorskip("gguf", reason="needs the package gguf: pip install 'latentpipe[gguf]'")


def three() -> Any:
    """Stable Diffusion 3, wide enough for rows of 32."""
    from diffusers import SD3Transformer2DModel

    from latentpipe.pipelines import hosting

    pipe = written.three()
    config = dict(pipe.transformer.config) | {"num_attention_heads": 4, "caption_projection_dim": 32, "num_layers": 2}
    torch.manual_seed(1)
    return hosting.rebuild(pipe, transformer=SD3Transformer2DModel.from_config(config).eval())


FAMILIES = {
    "flux": (lambda: tiny_hosts.complete("flux"), written.of_flux, written.flux),
    "sd3": (three, written.of_sd3, written.sd3),
}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a family: a tiny pipeline, its folder without weights, and one file with all but its transformer."""
    known: dict[str, tuple[Any, Path, Path]] = {}

    def make(family: str) -> tuple[Any, Path, Path]:
        if family not in known:
            place = tmp_path_factory.mktemp(family)
            build, whole, _ = FAMILIES[family]
            pipe = build()
            pipe.save_pretrained(place / "folder")
            shutil.copytree(place / "folder", place / "config", ignore=shutil.ignore_patterns("*.safetensors"))
            rest = {name: value for name, value in whole(pipe).items() if not name.startswith(written.UNET)}
            known[family] = pipe, place / "config", written.write(rest, place / "rest.safetensors")
        return known[family]

    return make


def values_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF file by diffusers' own reader and dequantizer."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return {name: dequantize_gguf_tensor(value) for name, value in load_gguf_checkpoint(path).items()}


@pytest.mark.parametrize(
    ("family", "kind"), [("flux", "Q8_0"), ("flux", "Q4_0"), ("flux", "F16"), ("sd3", "Q8_0"), ("sd3", "BF16")]
)
def test_values_are_those_of_diffusers_and_the_picture_is_that_of_the_folder(
    family: str, kind: str, pipes: Any, tmp_path: Path
) -> None:
    pipe, config, rest = pipes(family)
    own = quantized(pipe.transformer.state_dict(), tmp_path / "own.gguf", kind)
    theirs = quantized(FAMILIES[family][2](pipe.transformer), tmp_path / "theirs.gguf", kind)
    stated = Stated(config=config, parts=(rest,))
    opened = load_pipeline(theirs, stated=stated)
    assert holds_packed(opened.transformer) == (kind not in ("F16", "BF16"))
    wanted = {name: value.float() for name, value in values_of(own).items()}
    mine = {name: unpacked(value).float() for name, value in opened.transformer.state_dict().items()}
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    assert hashes(own, stated)["transformer"] == hashes(theirs, stated)["transformer"]

    from diffusers import DiffusionPipeline

    state = dict(pipe.transformer.state_dict())
    assert not all(torch.equal(state[name], wanted[name]) for name in wanted)  # something was rounded
    try:
        pipe.transformer.load_state_dict(wanted)
        pipe.save_pretrained(tmp_path / "folder")
    finally:
        pipe.transformer.load_state_dict(state)
    folder = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert np.array_equal(draw(opened), draw(folder))


UNWRITTEN = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL")


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random blocks of a type that the package cannot write; their scales are small."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (rows, columns // values * size), dtype=np.uint8)
    for at in SCALES[kind]:
        scale = random.uniform(1e-4, 2e-4, data.size // size).astype(np.float16)
        data.reshape(-1, size)[:, at : at + 2] = scale[:, None].view(np.uint8)
    return data


@pytest.mark.parametrize("kind", UNWRITTEN)
def test_blocks_that_the_package_cannot_write_are_read_as_it_reads_them(kind: str, pipes: Any, tmp_path: Path) -> None:
    """Queries, keys and values lie in one matrix in the file: rows are taken apart without touching a block."""
    import gguf

    pipe, config, rest = pipes("flux")
    columns = 32 if kind == "IQ4_NL" else 256  # of the matrix, and of a block
    tensors = written.flux(pipe.transformer)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "flux")
    name = "double_blocks.0.img_attn.qkv.weight"
    data = blocks(kind, 96, columns)
    for own, value in tensors.items():
        if own == name:
            writer.add_tensor(own, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(own, value.detach().numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    opened = open_file(tmp_path / "model.gguf", Stated(config=config, parts=(rest,)))
    assert opened.identity.quantization == f"GGUF {kind}"
    found = part_tensors(opened, "transformer")
    mine = [unpacked(found[f"transformer_blocks.0.attn.to_{which}.weight"]).float() for which in "qkv"]
    assert all(finite_scales(found[f"transformer_blocks.0.attn.to_{which}.weight"]) for which in "qkv")
    whole = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert torch.allclose(torch.cat(mine), torch.from_numpy(whole), rtol=2**-9, atol=2**-9 * float(np.abs(whole).max()))
    if columns > 32:  # it does not fit this model
        with pytest.raises(UserError, match=r"attn.to_q.weight is \(32, 256\), expected \(32, 32\)"):
            load_pipeline(tmp_path / "model.gguf", stated=Stated(config=config, parts=(rest,)))


def test_the_types_that_are_read_are_those_of_diffusers() -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    names = {name for name, *_ in TYPES.values()}
    assert names == {kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES} | set(FLOATS)
    for number, (name, values, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (number, values, size) == (kind.value, *gguf.GGML_QUANT_SIZES[kind])


@pytest.fixture(scope="module")
def packed(pipes: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stated]:
    """FLUX.1's transformer in Q8_0, and what completes it."""
    pipe, config, rest = pipes("flux")
    file = quantized(written.flux(pipe.transformer), tmp_path_factory.mktemp("packed") / "model.gguf", "Q8_0")
    return file, Stated(config=config, parts=(rest,))


def test_generate_and_replay_take_a_quantized_model(
    packed: tuple[Path, Stated], pipes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, stated = packed
    given = ["--model", str(file), "--config", str(stated.config), "--parts", str(stated.parts[0])]
    drawn = ["generate", "red apple", "--steps", "2", "--seed", "3", "--size", "32", *given]
    assert main([*drawn, "--out", str(tmp_path / "one.png")]) == 0
    assert main(["replay", str(tmp_path / "one.png"), *given]) == 0
    other = quantized(written.flux(pipes("flux")[0].transformer), tmp_path / "other.gguf", "Q5_0")
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "one.png"), "--model", str(other), *given[2:]]) == 2
    assert "transformer is" in capsys.readouterr().err
    for kind in ("bf16", "stored"):
        assert main([*drawn, "--dtype", kind, "--out", str(tmp_path / f"{kind}.png")]) == 0
    same = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("one", "stored", "bf16")]
    assert np.array_equal(same[0], same[1])  # the other parts are stored in fp32
    assert not np.array_equal(same[0], same[2])


def test_weights_stay_quantized_and_memory_counts_them_so(packed: tuple[Path, Stated]) -> None:
    file, stated = packed
    transformer = load_pipeline(file, torch.bfloat16, stated).transformer
    rows = transformer.transformer_blocks[0].attn.to_q.weight
    assert (rows.dtype, tuple(rows.shape)) == (torch.uint8, (32, 34))
    assert rows.as_tensor().untyped_storage().nbytes() == file.stat().st_size  # mapped, not copied
    layout = layout_of(file, stated)
    kept = {name: value for name, value in transformer.state_dict().items() if value.dtype == torch.uint8}
    assert layout.packed == sum(value.numel() for value in kept.values())
    assert layout.numbers["transformer"] == sum(value.numel() for value in transformer.state_dict().values()) - layout.packed


@pytest.mark.parametrize("kind", SCALES)
def test_scales_that_are_not_finite_are_seen(kind: str) -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFParameter

    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    places = []
    for at in range(0, size - 1, 2):  # an infinity at each even place of the second of three blocks of zeros
        data = torch.zeros(1, 3 * size, dtype=torch.uint8)
        data[0, size + at + 1] = 0x7C
        value = GGUFParameter(data, quant_type=gguf.GGMLQuantizationType[kind])
        assert finite_scales(value) == bool(unpacked(value).isfinite().all())
        places += [] if finite_scales(value) else [at]
    assert tuple(places) == SCALES[kind]


def test_a_file_with_such_scales_is_refused(packed: tuple[Path, Stated], tmp_path: Path) -> None:
    file, stated = packed
    data = bytearray(file.read_bytes())
    first, _ = read_gguf(file).places["double_blocks.0.img_attn.qkv.weight"]
    data[first : first + 2] = b"\x00\x7e"
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"attn.to_q.weight holds scales that are not finite"):
        load_pipeline(tmp_path / "model.gguf", stated=stated)


def test_lora_and_saving_are_refused(packed: tuple[Path, Stated], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, stated = packed
    up, down = torch.ones(32, 2), torch.ones(2, 32)
    own = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{own}.lora_A.weight": down, f"{own}.lora_B.weight": up}, tmp_path / "flat.safetensors")
    pipe = LatentPipeline.from_pretrained(file, device="cpu", stated=stated)
    with pytest.raises(UserError, match=r"The transformer is quantized \(GGUF\), and LoRA 'flat' needs weights to add to"):
        pipe.attach_lora(tmp_path / "flat.safetensors")
    assert not pipe.loras.weights
    swap = ["swap", "--model", str(file), "--config", str(stated.config), "--parts", str(stated.parts[0])]
    vae = Path(str(stated.config)).parent / "folder" / "vae"
    assert main([*swap, "--vae", str(vae), "--out", str(tmp_path / "out")]) == 2
    assert "diffusers writes no folder of such weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ls_and_inspect_tell_the_quantization(
    packed: tuple[Path, Stated], own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, stated = packed
    (own_home / "models").mkdir()
    place = Path(shutil.copy(file, own_home / "models" / "flat.gguf"))
    assert main(["ls"]) == 0
    told = capsys.readouterr().out
    assert f"model   flat                {place}  (FLUX.1, GGUF Q8_0)\n" in told
    assert told.count("flat.gguf") == 1  # it holds no VAE
    assert main(["inspect", "flat", "--config", str(stated.config), "--parts", str(stated.parts[0])]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["role"], facts["quantization"], facts["opens_as"]) == ("transformer", "GGUF Q8_0", "FluxPipeline")
    assert facts["dtype"] == "F32, Q8_0"
