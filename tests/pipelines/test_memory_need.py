"""What drawing will take, against the weights there are and measured peaks of passes; the precision that follows."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny_hosts
import torch

from latentpipe import LatentPipeline, UserError
from latentpipe.cli.app import main
from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.pipelines import memory_need
from latentpipe.pipelines.memory_need import GIB, Need, chosen_dtype, family_layout, layout_of, need_of
from latentpipe.pipelines.opening import offloaded
from latentpipe.utils.errors import LatentpipeWarning

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
UNET = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": [64, 128], "layers_per_block": 1, "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 8, "sample_size": 64,
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 64,
    "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 64, "axes_dims_rope": [16, 24, 24],
    "guidance_embeds": True,
}  # fmt: skip
OWN = 24 * 2**20  # bytes that the libraries of matrix products take for themselves, whatever the model
MEASURE = """
import ctypes, json, sys
import torch, diffusers

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

torch.set_num_threads(1)
torch.set_grad_enabled(False)
trim = ctypes.CDLL(None).malloc_trim
cls, config, shapes = json.loads(sys.argv[1])
model = getattr(diffusers, cls).from_config(config).eval()
given = {name: torch.rand(shape) for name, shape in shapes.items()}
peaks = []
for _ in range(3):
    trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    model(**given, return_dict=False)
    peaks.append(status("VmHWM") - before)
print(min(peaks[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("cls", ["UNet2DConditionModel", "FluxTransformer2DModel"])
def test_a_pass_takes_what_is_predicted(cls: str) -> None:
    n, side = 2, 64
    if cls == "UNet2DConditionModel":
        config: dict[str, Any] = UNET
        shapes = {"sample": [2 * n, 4, side, side], "timestep": [2 * n], "encoder_hidden_states": [2 * n, 77, 64]}
    else:
        config, tokens = FLUX, (side // 2) ** 2
        shapes = {"hidden_states": [n, tokens, 64], "encoder_hidden_states": [n, 512, 64], "pooled_projections": [n, 64]}
        shapes |= {"timestep": [n], "img_ids": [tokens, 3], "txt_ids": [512, 3], "guidance": [n]}
    predicted = memory_need._pass((cls, config), torch.float32, "cpu", n, side, side)
    command = [sys.executable, "-c", MEASURE, json.dumps([cls, config, shapes])]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert 0.75 * measured - OWN < predicted < 1.35 * measured, (predicted / 2**20, measured / 2**20)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "sana"])
def test_the_weights_are_those_of_the_open_model(tmp_path: Path, name: str) -> None:
    pipe = tiny_hosts.complete(name)
    pipe.save_pretrained(tmp_path / name)
    need = need_of(layout_of(tmp_path / name), name, torch.float32, CPU)
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    tensors = {weight.data_ptr(): weight.nbytes for part in networks for weight in part.state_dict().values()}
    assert need.weights == sum(tensors.values())
    assert need.working > 0
    half = need_of(layout_of(tmp_path / name), name, torch.bfloat16, CPU)
    assert half.weights * 2 == need.weights
    assert half.working < need.working


@pytest.mark.slow
def test_the_families_that_ship_have_their_true_sizes() -> None:
    numbers = family_layout("sdxl").numbers
    assert (numbers["unet"], numbers["vae"]) == (2_567_463_684, 83_653_863)
    need = need_of(family_layout("sdxl"), "SDXL", torch.float16, CPU, (1024, 1024), free=23 * GIB)
    assert str(need) == f"SDXL at 1024 px: {need.total / GIB:.1f} of 23.0 GiB"
    assert need.fits
    assert need.rows is None
    little = need_of(family_layout("sdxl"), "SDXL", torch.float16, CPU, (1024, 1024), free=int(7.5 * GIB))
    assert little.rows  # in bands
    assert little.working < need.working


def test_a_denoiser_with_other_inputs_is_counted_by_its_weights() -> None:
    for odd in ({"class_embed_type": "projection"}, {"addition_embed_type": "image"}, {"encoder_hid_dim_type": "image_proj"}):
        assert memory_need._pass(("UNet2DConditionModel", UNET | odd), torch.float32, "cpu", 1, 8, 8) == 0


def test_a_need_is_one_sentence() -> None:
    assert str(Need("a", (64, 64), 10 * 2**20, 2**20, GIB)) == "a at 64 px: 11 MiB of 1.0 GiB"
    assert str(Need("b", (64, 96), 3 * GIB, GIB, 2 * GIB)) == "b at 64 x 96 px: 4.0 of 2.0 GiB, which is too much"


def test_auto_takes_less_where_it_does_not_fit_and_says_so(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(model_folder)
    for units, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(memory_need, "has_bf16_units", lambda _, units=units: units)
        with warnings.catch_warnings():
            warnings.simplefilter("error", LatentpipeWarning)
            assert chosen_dtype(model_folder, CPU) == wanted
    needs = {kind: need_of(layout, "x", kind, CPU).total for kind in (torch.float32, torch.bfloat16, None)}
    assert needs[torch.float32] > needs[torch.bfloat16]
    with pytest.warns(LatentpipeWarning, match=r"in fp32; the weights are taken in bf16"):
        assert chosen_dtype(model_folder, CPU, free=needs[torch.bfloat16]) == torch.bfloat16
    with pytest.warns(LatentpipeWarning, match="which is too much in fp32; the weights are taken as stored"):
        assert chosen_dtype(model_folder, CPU, free=1000) is None
    monkeypatch.setattr(memory_need, "has_bf16_units", lambda _: True)
    assert LatentPipeline.from_pretrained(model_folder, device="cpu", dtype="auto").host.unet.dtype == torch.bfloat16
    assert LatentPipeline.from_pretrained(model_folder, device="cpu", dtype="stored").host.unet.dtype == torch.float16


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_hooks_that_move_weights_change_no_picture(model_folder: Path, how: str) -> None:
    """With the CPU as the place to compute, so that the hooks run on any machine."""
    pipe = LatentPipeline.from_pretrained(model_folder, device="cpu")
    plain = pipe("red circle", seed=1, num_inference_steps=2)[0]
    if how == "model":
        offloaded(pipe.host, "cpu", how)
    else:  # as diffusers does it, which takes no CPU for a GPU here
        for part in (pipe.host.text_encoder, pipe.host.unet, pipe.host.vae):
            accelerate.cpu_offload(part, torch.device("cpu"))
    moved = LatentPipeline(pipe.host, hashes=dict(pipe.hashes), name=pipe.name)
    drawn = moved("red circle", seed=1, num_inference_steps=2)[0]
    assert drawn.image.tobytes() == plain.image.tobytes()
    assert drawn.recipe.machine.device.startswith("cpu")
    if how == "sequential":
        lora = Lora({"unet": {"x": LoraLayer("lora", {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}, 1, 1.0)}})
        with pytest.raises(UserError, match="take offload 'model'"):
            moved.attach_lora(lora)


def test_offload_is_for_a_gpu(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="the device is cpu, so leave it out"):
        LatentPipeline.from_pretrained(model_folder, device="cpu", offload="model")
    assert main(["generate", "red", "--model", str(model_folder), "--device", "cpu", "--offload", "sequential"]) == 2
    assert "leave it out" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected one of none, model, sequential"):
        LatentPipeline.from_pretrained(model_folder, offload="disk")


def test_env_says_what_fits(installed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory_need, "SHOWN", {"sd1": ("SD 1.5", 512)})
    assert main(["env", "--fits"]) == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert [text.split(":")[0] for text in fits["families"]] == ["SD 1.5 at 512 px"]
    assert any(text.startswith(f"{installed} at 16 px: ") for text in fits["models"])
