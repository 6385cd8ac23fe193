"""Single files that are damaged, mixed, quantized or odd: opened rightly, or refused in a sentence that names what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from written import UNET, VAE, Tensors, write

from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.checkpoints.single_file.identify import identify
from latentpipe.utils.errors import UserError

TEXT = "cond_stage_model.transformer.text_model."
XL_TEXT = "conditioner.embedders.1.model."
T5 = "text_encoders.t5xxl.transformer."


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    """The tensors but those whose names match."""
    return lambda tensors: {name: value for name, value in tensors.items() if not re.search(pattern, name)}


def with_(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """The tensors, one of them changed."""
    return lambda tensors: {own: change(value) if own == name else value for own, value in tensors.items()}


def beside(**more: Any) -> Callable[[Tensors], Tensors]:
    """The tensors and others."""
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in more.items()}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    """The tensors under other names."""
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def cut(value: torch.Tensor) -> torch.Tensor:
    """A tensor without its last row."""
    return value[:-1]


NAN = float("nan")
DAMAGED: list[tuple[str, str, Callable[[Tensors], Tensors], str]] = [
    # missing
    ("sd1", "no entrance", without(r"input_blocks\.0\.0\.weight"), r"no input_blocks\.0\.0\.weight"),
    ("sd1", "no bias", without(r"input_blocks\.0\.0\.bias"), r"its unet does not fit .*missing conv_in\.bias"),
    ("sd1", "no exit", without(r"diffusion_model\.out\.2"), r"missing conv_out\.weight"),
    ("sd1", "no level", without(r"input_blocks\.3\."), "its unet does not fit .*missing down_blocks"),
    ("sd1", "no middle", without(r"middle_block\.1\."), r"missing mid_block\.attentions"),
    ("sd1", "no time", without(r"time_embed\.0"), r"missing time_embedding\.linear_1"),
    ("sd1", "no text layer", without(r"encoder\.layers\.1\."), r"its text_encoder does not fit .*missing encoder\.layers\.1"),
    ("sd1", "no words", without("token_embedding"), "its text_encoder does not fit .*token_embedding"),
    ("sd1", "no positions", without("position_embedding"), "position_embedding"),
    ("sd1", "no decoder", without(r"first_stage_model\.decoder"), "its vae does not fit AutoencoderKL: missing"),
    ("sd1", "no quant conv", without(r"first_stage_model\.quant_conv"), r"missing quant_conv"),
    ("sd1", "no text encoder", without("cond_stage_model"), "holds the unet and vae of .*missing: text_encoder"),
    ("sd1", "no vae", without("first_stage_model"), "missing: vae"),
    ("sd1", "no denoiser", without("diffusion_model"), "holds a text encoder .clip_l. and a VAE and no denoiser"),
    ("sd1", "vae alone", without("diffusion_model|cond_stage"), "holds a VAE and no denoiser.* Give it with --vae"),
    ("sd1", "text alone", without("diffusion_model|first_stage"), "holds a text encoder"),
    ("sdxl", "no label", without(r"label_emb\.0\.0\.weight"), r"add_embedding|label_emb"),
    ("sdxl", "half a label", without(r"label_emb\.0\.2\.bias"), r"label_emb\.0\.2\.bias"),
    ("sdxl", "no first encoder", without(r"embedders\.0"), "missing: text_encoder"),
    ("sdxl", "no second encoder", without(r"embedders\.1"), "missing: text_encoder_2"),
    ("sdxl", "no projection", without(r"text_projection"), r"text_encoder_2 does not fit .*missing text_projection"),
    (
        "sdxl",
        "no stacked matrix",
        without(r"resblocks\.0\.attn\.in_proj_weight"),
        r"missing .*layers\.0\.self_attn\.[qkv]_proj\.weight",
    ),
    ("sd2", "no open clip layer", without(r"resblocks\.1\."), r"missing encoder\.layers\.1"),
    (
        "sd3",
        "no block",
        without(r"joint_blocks\.0\.x_block\.attn\.qkv\.weight"),
        r"missing transformer_blocks\.0\.attn\.to_q\.weight",
    ),
    ("sd3", "no positions", without(r"diffusion_model\.pos_embed"), r"missing pos_embed\.pos_embed"),
    ("sd3", "no clip_g", without("clip_g"), "missing: text_encoder_2"),
    (
        "flux",
        "no double block",
        without(r"double_blocks\.0\.img_mlp\.0\.weight"),
        r"missing transformer_blocks\.0\.ff\.net\.0\.proj\.weight",
    ),
    (
        "flux",
        "no single block",
        without(r"single_blocks\.0\.linear1\.weight"),
        r"missing single_transformer_blocks\.0\.attn\.to_q\.weight",
    ),
    ("flux", "no t5", without("t5xxl"), "missing: text_encoder_2"),
    ("flux", "no t5 layer", without(r"t5xxl.*layer\.0\.SelfAttention\.q"), "text_encoder_2 does not fit .*missing encoder"),
    # misshapen
    (
        "sd1",
        "narrow entrance",
        with_(f"{UNET}input_blocks.0.0.weight", cut),
        r"conv_in\.weight is \(7, 4, 3, 3\), expected \(8, 4, 3, 3\)",
    ),
    (
        "sd1",
        "nine channels",
        with_(f"{UNET}input_blocks.0.0.weight", lambda w: w.repeat(1, 3, 1, 1)[:, :9]),
        r"conv_in\.weight is \(8, 9, 3, 3\)",
    ),
    ("sd1", "fewer words", with_(f"{TEXT}embeddings.token_embedding.weight", cut), r"token_embedding\.weight is \(3999, 8\)"),
    ("sd1", "narrow vae", with_(f"{VAE}decoder.conv_in.weight", cut), r"decoder\.conv_in\.weight is"),
    ("sdxl", "narrow projection", with_(f"{XL_TEXT}text_projection", cut), r"text_projection\.weight is \(12, 11\)"),
    (
        "flux",
        "narrow stack",
        with_(f"{UNET}single_blocks.0.linear1.weight", cut),
        r"single_transformer_blocks\.0\.proj_mlp\.weight is",
    ),
    # too much
    (
        "sd1",
        "extra in the unet",
        beside(model__diffusion_model__extra__weight=torch.ones(3)),
        r"its unet does not fit .*extra extra\.weight",
    ),
    (
        "sd1",
        "extra in the vae",
        beside(first_stage_model__extra__weight=torch.ones(3)),
        r"its vae does not fit .*extra extra\.weight",
    ),
    (
        "sd1",
        "extra in the text",
        beside(cond_stage_model__transformer__more=torch.ones(3)),
        r"its text_encoder does not fit .*extra more",
    ),
    ("sd1", "two unets", beside(diffusion_model__input_blocks__0__0__weight=torch.ones(8, 4, 3, 3)), "two networks of one kind"),
    ("sd1", "a lora inside", beside(lora_unet_mid_block__lora_down__weight=torch.ones(4, 8)), "holds a LoRA"),
    # values
    (
        "sd1",
        "nan",
        with_(f"{UNET}out.2.bias", lambda value: value.half() * NAN),
        r"conv_out\.bias holds values that are not finite",
    ),
    ("sd1", "integers", with_(f"{UNET}out.2.weight", lambda value: value.to(torch.int8)), "stored as I8"),
    (
        "sd1",
        "an integer bias",
        with_(f"{UNET}out.2.bias", lambda value: value.to(torch.int16)),
        "is stored as int16, expected a float",
    ),
    (
        "sd1",
        "four bits",
        lambda tensors: tensors | {f"{UNET}out.2.weight.quant_state.bitsandbytes__nf4": torch.ones(3).byte()},
        r"bitsandbytes .nf4.",
    ),
    ("sd1", "blocks", beside(model__diffusion_model__out__2__weight_scale_2=torch.ones(())), "quantized in blocks"),
]


@pytest.mark.parametrize(("name", "damage", "change", "said"), DAMAGED, ids=[f"{row[0]}-{row[1]}" for row in DAMAGED])
def test_a_damaged_file_is_refused_in_a_sentence(
    name: str, damage: str, change: Callable[[Tensors], Tensors], said: str, made: Any, tmp_path: Path
) -> None:
    _, config, good = made(name)
    file = write(change(load_file(good)), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=said) as raised:
        load_pipeline(file, stated=Stated(config=config))
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unet": None}, "'unet' is None; expected a library and a class"),
        ({"unet": ["diffusers"]}, "expected a library and a class"),
        ({"unet": [["diffusers"], "UNet2DConditionModel"]}, "expected a library and a class"),
        ({"unet": ["diffusers", None]}, "expected a library and a class"),
        ({"tokenizer": True}, "'tokenizer' is True; expected a library and a class"),
        ({"unet": "left out"}, "names no unet, of which a StableDiffusionPipeline is made"),
    ],
)
def test_a_damaged_index_of_a_config_folder_is_refused(made: Any, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    _, config, file = made("sd1")
    index = json.loads((config / "model_index.json").read_text()) | change
    index = {name: value for name, value in index.items() if value != "left out"}
    place = Path(shutil.copytree(config, tmp_path / "config"))
    (place / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=said) as raised:
        load_pipeline(file, stated=Stated(config=place))
    assert str(place) in str(raised.value)


WHOLE: list[tuple[str, str, Callable[[Tensors], Tensors]]] = [
    (
        "sd1",
        "averages beside",
        lambda tensors: (
            tensors | {f"model_ema.{name.replace('.', '')}": torch.ones(2) for name in tensors if name.startswith(UNET)}
        ),
    ),
    (
        "sd1",
        "a schedule beside",
        beside(betas=torch.ones(9), alphas_cumprod=torch.ones(9), global_step=torch.tensor(5), logvar=torch.ones(4)),
    ),
    ("sd1", "a loss beside", beside(first_stage_model__loss__logvar=torch.ones(()), loss__x=torch.ones(2))),
    ("sd1", "an unknown key beside", beside(something__else=torch.ones(3))),
    ("sd1", "without text_model", renamed("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")),
    ("sd1", "vae of comfy", renamed("first_stage_model.", "vae.")),
    ("sd1", "positions as floats", with_("cond_stage_model.transformer.text_model.embeddings.position_ids", torch.Tensor.float)),
    (
        "sdxl",
        "sigmas beside",
        beside(denoiser__sigmas=torch.ones(9), conditioner__embedders__1__model__attn_mask=torch.ones(2, 2)),
    ),
    (
        "sd3",
        "t5's words twice",
        lambda tensors: tensors | {f"{T5}encoder.embed_tokens.weight": tensors[f"{T5}shared.weight"].clone()},
    ),
    ("flux", "logit scale beside", beside(text_encoders__clip_l__logit_scale=torch.tensor(4.6))),
]


@pytest.mark.parametrize(("name", "oddity", "change"), WHOLE, ids=[f"{row[0]}-{row[1]}" for row in WHOLE])
def test_what_training_and_programs_leave_is_passed_by(
    name: str, oddity: str, change: Callable[[Tensors], Tensors], made: Any, tmp_path: Path
) -> None:
    folder, config, good = made(name)
    pipe = load_pipeline(write(change(load_file(good)), tmp_path / "model.safetensors"), stated=Stated(config=config))
    assert same(pipe, load_pipeline(folder))


def same(one: Any, other: Any) -> bool:
    """Whether two pipelines have the same weights."""
    parts = [part for part, network in other.components.items() if isinstance(network, torch.nn.Module)]
    states = [(getattr(one, part).state_dict(), getattr(other, part).state_dict()) for part in parts]
    return all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine) for mine, theirs in states
    )


def test_t5_is_left_out_of_stable_diffusion_3(made: Any, tmp_path: Path) -> None:
    _, config, good = made("sd3")
    file = write(without("t5xxl")(load_file(good)), tmp_path / "model.safetensors")
    pipe = load_pipeline(file, stated=Stated(config=config))
    assert (pipe.text_encoder_3, pipe.tokenizer_3) == (None, None)


# --- dtypes and quantization --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_the_dtype_of_the_file(dtype: torch.dtype, made: Any, tmp_path: Path) -> None:
    _, config, good = made("sd1")
    file = write(load_file(good), tmp_path / "model.safetensors", dtype)
    pipe = load_pipeline(file, None, Stated(config=config))
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {dtype}
    assert {value.dtype for value in load_pipeline(file, stated=Stated(config=config)).unet.parameters()} == {torch.float32}


def test_mixed_precision_becomes_one_dtype(made: Any, tmp_path: Path) -> None:
    folder, config, good = made("sd1")
    tensors = {
        name: value.half() if value.ndim > 1 and name.startswith(UNET) else value for name, value in load_file(good).items()
    }
    file = write(tensors, tmp_path / "model.safetensors")
    pipe = load_pipeline(file, None, Stated(config=config))
    assert {value.dtype for value in pipe.unet.parameters()} == {torch.float16}
    assert {value.dtype for value in pipe.vae.parameters()} == {torch.float32}
    whole = load_pipeline(folder).unet.state_dict()
    for name, value in load_pipeline(file, stated=Stated(config=config)).unet.state_dict().items():
        assert torch.equal(value, whole[name].half().float() if value.ndim > 1 else whole[name])


@pytest.mark.parametrize(("scale", "drop"), [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
@pytest.mark.parametrize("rows", [False, True])
def test_scaled_fp8_is_multiplied_out(scale: str, drop: str, rows: bool, made: Any, tmp_path: Path) -> None:
    _, config, good = made("flux")
    tensors = load_file(good)
    name = f"{UNET}double_blocks.0.img_mlp.0"
    weight = tensors[f"{name}.weight"]
    factor = (weight.abs().amax(1) if rows else weight.abs().max()) / 448
    small = (weight / (factor[:, None] if rows else factor)).to(torch.float8_e4m3fn)
    tensors |= {
        f"{name}.weight": small,
        f"{name}.{scale}": factor,
        f"{name}.{drop}": torch.ones(()),
        f"{UNET}scaled_fp8": torch.ones(0).to(small.dtype),
    }
    file = write(tensors, tmp_path / "model.safetensors")
    assert identify(file, config=True).quantization == "scaled fp8 (e4m3)"
    found = load_pipeline(file, stated=Stated(config=config)).transformer.transformer_blocks[0].ff.net[0].proj.weight
    expected = (small.float() * (factor[:, None] if rows else factor)).bfloat16().float()
    assert torch.equal(found, expected)
    assert (found - weight).abs().max() < 0.1 * weight.abs().max()  # the scale is not forgotten


def test_plain_fp8_becomes_bf16(made: Any, tmp_path: Path) -> None:
    _, config, good = made("flux")
    tensors = {name: value.to(torch.float8_e4m3fn) if name.startswith(UNET) else value for name, value in load_file(good).items()}
    file = write(tensors, tmp_path / "model.safetensors")
    assert identify(file, config=True).quantization == "fp8 (e4m3)"
    assert load_pipeline(file, None, Stated(config=config)).transformer.dtype == torch.bfloat16


def test_a_scale_that_is_not_finite_is_refused(made: Any, tmp_path: Path) -> None:
    _, config, good = made("flux")
    tensors, name = load_file(good), f"{UNET}double_blocks.0.img_mlp.0"
    tensors |= {f"{name}.weight": tensors[f"{name}.weight"].to(torch.float8_e4m3fn), f"{name}.scale_weight": torch.tensor(NAN)}
    with pytest.raises(UserError, match=r"scale_weight has 1 values; expected one finite number"):
        load_pipeline(write(tensors, tmp_path / "model.safetensors"), stated=Stated(config=config))


# --- parts that complete each other -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_parts_of_several_files_complete_each_other(name: str, made: Any, tmp_path: Path) -> None:
    folder, config, good = made(name)
    tensors = load_file(good)
    denoiser = write(
        {own.removeprefix(UNET): value for own, value in tensors.items() if own.startswith(UNET)},
        tmp_path / "denoiser.safetensors",
    )
    rest = write(without("diffusion_model")(tensors), tmp_path / "rest.sft")
    vae = write(
        {
            re.sub(r"^(first_stage_model|vae)\.", "", own): value
            for own, value in tensors.items()
            if re.match("first_stage|vae", own)
        },
        tmp_path / "v",
    )
    texts = write(without("diffusion_model|first_stage|^vae")(tensors), tmp_path / "texts.safetensors")
    whole = load_pipeline(folder)
    for parts in ((rest,), (vae, texts), (folder,)):
        assert same(load_pipeline(denoiser, stated=Stated(config=config, parts=parts)), whole)
    assert same(load_pipeline(denoiser, stated=Stated(config=folder)), whole)
    with pytest.raises(UserError, match=rf"missing: vae. Looked for in {denoiser}, {texts}, {config}/vae. .*--parts"):
        load_pipeline(denoiser, stated=Stated(config=config, parts=(texts,)))


def test_bare_text_encoders_go_where_their_width_fits(made: Any, tmp_path: Path) -> None:
    folder, config, good = made("sdxl")
    tensors = load_file(good)
    prefixes = ("conditioner.embedders.0.transformer.", XL_TEXT)
    files = [
        write(
            {own.removeprefix(prefix): value for own, value in tensors.items() if own.startswith(prefix)},
            tmp_path / f"{number}.safetensors",
        )
        for number, prefix in enumerate(prefixes)
    ]
    rest = write(without("conditioner")(tensors), tmp_path / "rest.safetensors")
    assert same(load_pipeline(rest, stated=Stated(config=config, parts=(files[1], files[0]))), load_pipeline(folder))


def test_a_lora_is_no_part(made: Any, tmp_path: Path) -> None:
    _, config, good = made("sd1")
    lora = write({"lora_unet_mid_block.lora_down.weight": torch.ones(4, 8)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="holds a LoRA"):
        load_pipeline(good, stated=Stated(config=config, parts=(lora,)))


def test_a_config_folder_has_to_be_one(made: Any, tmp_path: Path) -> None:
    _, config, good = made("sd1")
    with pytest.raises(UserError, match=r"no model_index\.json"):
        load_pipeline(good, stated=Stated(config=tmp_path))
    with pytest.raises(UserError, match=r"is not known here.*--config"):
        load_pipeline(good)
    copy = Path(shutil.copytree(config, tmp_path / "config"))
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UserError, match="no tokenizer/"):
        load_pipeline(good, stated=Stated(config=copy))
    (copy / "unet" / "config.json").write_text(
        '{"_class_name": "UNet2DConditionModel", "block_out_channels": [60000, 60000, 60000, 60000]}'
    )
    with pytest.raises(UserError, match="its config does not describe this unet"):
        load_pipeline(good, stated=Stated(config=copy))
