"""A text side without transformers: it computes what transformers computes, to the bit, and refuses what it does not know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentpipe import LatentPipeline
from latentpipe.checkpoints import pipeline_io
from latentpipe.checkpoints.embedding import Embedding
from latentpipe.checkpoints.plain_text import PlainTextEncoder, PlainTokenizer, plain_text
from latentpipe.checkpoints.registry import find_model

MODEL = find_model("emoji")
INDEX = json.loads((MODEL / "model_index.json").read_text())
TEXTS = [
    "red apple", "", " ", "a cat's hat, don't", "RED  Apple\tand\nmore", "naïve Ünïcode \u00e9 e\u0301", "日本 🍎 emoji",
    "<|startoftext|> said <|endoftext|>", "12345 (x:1.2)", "word " * 40, "</w> ,.;!?",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "quick_gelu", "eos_token_id": 2},
        {"hidden_size": 48, "num_attention_heads": 3, "layer_norm_eps": 1e-3, "num_hidden_layers": 1},
    ],
)
def test_encoder_is_that_of_transformers_bit_for_bit(changes: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPTextConfig(
        **{**sizes, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "gelu", **changes}
    )
    theirs = CLIPTextModel(config).to(dtype).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # far from the small ones of a new network
    ours = PlainTextEncoder(config.to_dict()).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    for length in (1, 5, 12):
        ids = torch.randint(0, 64, (3, length))
        with torch.no_grad():
            expected, found = theirs(ids), ours(ids)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert ours.dtype == dtype
    assert ours.device.type == "cpu"


def test_tokenizer_is_that_of_transformers() -> None:
    theirs = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    ours = PlainTokenizer(MODEL / "tokenizer", theirs.model_max_length)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder
    whole: dict[str, Any] = {"padding": "max_length", "max_length": 24, "truncation": True, "return_tensors": "pt"}
    for _ in range(2):  # a call leaves nothing behind
        for options in (whole, {"padding": "longest", "return_tensors": "pt"}):
            expected, found = theirs(TEXTS, **options), ours(TEXTS, **options)
            assert torch.equal(found.input_ids, expected.input_ids)
            assert torch.equal(found.attention_mask, expected.attention_mask)
        for text in TEXTS:
            expected = theirs(text, add_special_tokens=False, verbose=False).input_ids
            assert ours(text, add_special_tokens=False, verbose=False).input_ids == expected
            assert ours.decode(expected) == theirs.decode(expected)
            assert ours.tokenize(text) == theirs.tokenize(text)
            spans = {"padding": "max_length", "max_length": 24, "truncation": True, "return_offsets_mapping": True}
            assert ours(text, **spans).offset_mapping == theirs(text, **spans).offset_mapping
    for one in (theirs, ours):
        one.add_tokens([AddedToken(chr(0x100000 + at), normalized=False) for at in range(2)])
    named = "a \U00100001 of \U00100000"
    assert ours(named).input_ids == theirs(named).input_ids
    assert ours.convert_tokens_to_ids([*"\U00100000\U00100001"]) == theirs.convert_tokens_to_ids([*"\U00100000\U00100001"])
    rows = theirs(TEXTS, **whole).input_ids
    assert ours.batch_decode(rows) == theirs.batch_decode(rows)


def _draws(lora: bool = False) -> tuple[Any, list[Image.Image]]:
    pipe = LatentPipeline.from_pretrained("emoji")
    if lora:
        pipe.attach_lora("flat", 0.8)
        vectors = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
        pipe.attach_embedding(Embedding("thing", {"thing": {"": vectors}}))
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}
    drawn = pipe("a (red:1.3) apple with <thing>" if lora else "a (red:1.3) apple with stars", n=2, seed=7, **settings)
    begun = pipe(
        "red <thing>" if lora else "red apple", seed=1, negative_prompt="green", image=drawn[0].image, strength=0.9, **settings
    )
    return pipe, [picture.image for picture in [*drawn, *begun]]


@pytest.mark.parametrize("lora", [False, True])
def test_pictures_are_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    expected = _draws(lora)[1]
    monkeypatch.setattr(pipeline_io, "active", lambda: True)
    pipe, found = _draws(lora)
    assert isinstance(pipe.host.text_encoder, PlainTextEncoder)
    assert [image.tobytes() for image in found] == [image.tobytes() for image in expected]


def test_a_pipeline_that_is_saved_has_the_text_side_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_io, "active", lambda: True)
    assert isinstance(pipeline_io.load_pipeline(MODEL).text_encoder, CLIPTextModel)


def test_long_prompts_are_cut_at_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a red apple and a green pear " * 6
    expected = LatentPipeline.from_pretrained("emoji").truncated_text(text)
    monkeypatch.setattr(pipeline_io, "active", lambda: True)
    assert LatentPipeline.from_pretrained("emoji").truncated_text(text) == expected != ""


def _set(place: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        content = json.loads((model / place).read_text())
        change(content)
        (model / place).write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        _set("text_encoder/config.json", lambda content: content.update(hidden_act="relu")),
        _set("text_encoder/config.json", lambda content: content.update(use_attention_mask=True)),
        _set("text_encoder/config.json", lambda content: content.update(model_type="clip")),
        _set("text_encoder/config.json", lambda content: content.pop("eos_token_id")),
        _set("tokenizer/tokenizer_config.json", lambda content: content.update(tokenizer_class="GPT2Tokenizer")),
        _set("tokenizer/tokenizer_config.json", lambda content: content.update(do_lower_case=False)),
        _set("tokenizer/tokenizer_config.json", lambda content: content.update(model_max_length=1e30)),
        _set("tokenizer/tokenizer.json", lambda content: content.update(normalizer=None)),
        _set("tokenizer/tokenizer.json", lambda content: content.update(decoder=None)),
        _set("tokenizer/tokenizer.json", lambda content: content["model"].update(end_of_word_suffix="")),
        _set("tokenizer/tokenizer.json", lambda content: content["model"]["vocab"].pop("<|endoftext|>")),
        _set("tokenizer/tokenizer.json", lambda content: content["post_processor"].update(trim_offsets=True)),
        _set("tokenizer/tokenizer.json", lambda content: content["added_tokens"].append({"id": 9, "content": "new"})),
        lambda model: (model / "tokenizer" / "added_tokens.json").write_text("{}"),
        lambda model: (model / "tokenizer" / "tokenizer.json").unlink(),
    ],
)
def test_what_is_not_known_goes_to_transformers(tmp_path: Path, edit: Callable[[Path], Any]) -> None:
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
        for file in (MODEL / part).glob("*.json"):
            shutil.copy(file, tmp_path / part / file.name)
    assert plain_text(tmp_path, INDEX) is not None
    edit(tmp_path)
    assert plain_text(tmp_path, INDEX) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "StableDiffusionImg2ImgPipeline"},
        {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
        {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]},
        {"feature_extractor": ["transformers", "CLIPImageProcessor"]},
        {"scheduler": ["mine", "DDIMScheduler"]},
        {"scheduler": None},
        {"unet": 3},
    ],
)
def test_other_pipelines_are_opened_by_diffusers(changes: dict[str, Any]) -> None:
    assert plain_text(MODEL, INDEX) == 24
    assert plain_text(MODEL, {**INDEX, **changes}) is None
