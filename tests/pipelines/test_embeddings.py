"""Textual inversion: every layout, by name in the prompt, against diffusers' own loader; nothing of a pipeline changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_hosts
import torch
from safetensors.torch import save_file

from latentpipe import Engine, Finished, LatentPipeline, UserError, replay
from latentpipe.checkpoints.embedding import Embedding, read_embedding
from latentpipe.cli.app import main
from latentpipe.pipelines import prompt_weighting
from latentpipe.pipelines.embeddings import FIRST
from latentpipe.pipelines.metadata.recipe import a1111_text
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.io import content_hash

QUICK: dict[str, Any] = {"seed": 1, "num_inference_steps": 2}


def vectors(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pipe(model_folder: Path) -> LatentPipeline:
    """A tiny model, fresh for each test."""
    return LatentPipeline.from_pretrained(model_folder, device="cpu")


@pytest.fixture
def width(pipe: LatentPipeline) -> int:
    return int(pipe.host.text_encoder.config.hidden_size)


@pytest.fixture(scope="module")
def sdxl() -> Any:
    """A tiny SDXL with text, whose encoders have two widths."""
    pipe = tiny_hosts.complete("sdxl")
    parts = {"text_encoder_2": tiny_hosts.clip(True, 12), "unet": tiny_hosts.unet(
        4, 20, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12, transformer_layers_per_block=(1, 1),
    )}  # fmt: skip

    from latentpipe.pipelines import hosting

    return hosting.rebuild(pipe, **parts)


def install(home: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    path = home / "embeddings" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def states(pipe: LatentPipeline, prompt: str, negative: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """The text embeddings that a prompt is drawn from."""
    with pipe.embeddings.reading(prompt, negative) as host:
        spelled = [pipe.embeddings.spell(text) for text in (prompt, negative)]
        return prompt_weighting.encode(host, spelled[:1], True, spelled[1])  # type: ignore[return-value]


def by_diffusers(host: Any, tensor: torch.Tensor, token: str, prompt: str, negative: str = "") -> tuple[torch.Tensor, ...]:
    """As diffusers' loader has it, on copies: tokens in its own spelling (lower case, one for each vector)."""
    twin = copy.copy(host)
    own = {"tokenizer": copy.deepcopy(host.tokenizer), "text_encoder": copy.deepcopy(host.text_encoder)}
    vars(twin).update(own)
    twin.load_textual_inversion(tensor, token=token)
    with torch.no_grad():
        return twin.encode_prompt([prompt], "cpu", 1, True, [negative])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prompt", ["red {} circle", "{}", "red{}", "{} {} bar", "a ({}), blue"])
def test_the_text_encoder_reads_what_diffusers_lets_it_read(pipe: LatentPipeline, width: int, n: int, prompt: str) -> None:
    tensor = vectors(n, width)
    pipe.attach_embedding(Embedding("Easy", {"": {"": tensor}}))
    ours = states(pipe, prompt.format("<Easy>", "<easy>").replace("(", r"\(").replace(")", r"\)"), "no <EASY>")
    theirs = by_diffusers(pipe.host, tensor, "<easy>", prompt.format("<easy>", "<easy>"), "no <easy>")
    for own, oracle in zip(ours, theirs, strict=True):
        assert torch.equal(own, oracle)
    assert not torch.equal(ours[0], states(pipe, prompt.format("other", "other"))[0])


def test_sdxl_has_vectors_for_both_text_encoders(sdxl: Any) -> None:
    pair = {"clip_l": vectors(2, 8), "clip_g": vectors(2, 12, 1)}
    pipe = LatentPipeline(sdxl)
    pipe.attach_embedding(Embedding("big", {"": {"text_encoder": pair["clip_l"], "text_encoder_2": pair["clip_g"]}}))
    with pipe.embeddings.reading("<big>") as host:
        ours = host.encode_prompt(prompt=[pipe.embeddings.spell("a <Big> cat")], device="cpu", negative_prompt=["no"])
    twin = copy.deepcopy(sdxl)
    for end, key in (("", "clip_l"), ("_2", "clip_g")):
        parts = {"tokenizer": getattr(twin, f"tokenizer{end}"), "text_encoder": getattr(twin, f"text_encoder{end}")}
        twin.load_textual_inversion(pair[key], token="<big>", **parts)
        if end == "":
            twin.tokenizer_2 = copy.deepcopy(sdxl.tokenizer)
    with torch.no_grad():
        theirs = twin.encode_prompt(prompt=["a <big> cat"], device="cpu", negative_prompt=["no"])
    assert all(torch.equal(own, oracle) for own, oracle in zip(ours, theirs, strict=True))
    plain, with_it = (pipe(text, seed=1, num_inference_steps=1, size=(32, 32))[0] for text in ("a big cat", "a <big> cat"))
    assert with_it.recipe.embeddings == ["big"]
    assert plain.image.tobytes() == with_it.image.tobytes() or plain.recipe.embeddings == ["big"]


def test_a_text_encoder_meets_no_number_that_is_not_its_own(sdxl: Any) -> None:
    """transformers takes the largest number for the end where a config names token 2 as it, as SDXL's does."""
    seen: list[torch.Tensor] = []
    pipe = LatentPipeline(sdxl)
    pipe.attach_embedding(Embedding("big", {"": {"text_encoder": vectors(2, 8), "text_encoder_2": vectors(2, 12, 1)}}))
    layer = sdxl.text_encoder_2.get_input_embeddings()
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with pipe.embeddings.reading("<big>") as reader:
        reader.encode_prompt(prompt=[pipe.embeddings.spell("a <big> cat")], device="cpu", do_classifier_free_guidance=False)
    hook.remove()
    ids = sdxl.tokenizer_2("a ! ! cat", padding="max_length", max_length=24).input_ids
    ids[2:4] = [0, 0]
    assert seen[0].tolist() == [ids]


@pytest.mark.parametrize("weighed", ["(<easy>:1.5) circle", "red (<easy> bar:0.5)", "[<easy>] (red)"])
def test_weights_are_those_of_all_its_vectors(pipe: LatentPipeline, width: int, weighed: str) -> None:
    pipe.attach_embedding(Embedding("easy", {"": {"": vectors(3, width)}}))
    with pipe.embeddings.reading(weighed) as host:
        spelled = pipe.embeddings.spell(weighed)
        weights = prompt_weighting.token_weights(host, prompt_weighting.parse(spelled))
        ids = host.tokenizer(prompt_weighting.plain(spelled)).input_ids
    own = {weight for number, weight in zip(ids, weights.tolist(), strict=False) if number >= len(pipe.host.tokenizer)}
    stated = {"(": 1.5, "r": 0.5, "[": 1 / 1.1}[weighed[0]]
    assert [round(weight, 6) for weight in own] == [round(stated, 6)]
    assert sum(number >= len(pipe.host.tokenizer) for number in ids) == 3


def test_vectors_count_against_the_limit_and_a_cut_name_is_told(pipe: LatentPipeline, width: int) -> None:
    most = pipe.host.tokenizer.model_max_length - 2
    pipe.attach_embedding(Embedding("long", {"": {"": vectors(most, width)}}))
    assert pipe.truncated_text("<long>") == ""
    assert pipe.truncated_text("red <Long>") == "<long>"
    assert pipe.truncated_text("<long> red") == "red"
    assert pipe.truncated_text("<long> <long> red") == "<long> red"


def test_nothing_of_the_pipeline_changes(pipe: LatentPipeline, width: int) -> None:
    def facts() -> tuple[Any, ...]:
        encoder, tokenizer = pipe.host.text_encoder, pipe.host.tokenizer
        tokenizer.backend_tokenizer.no_truncation()  # what the last call asked for is kept there
        tokenizer.backend_tokenizer.no_padding()
        hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in encoder.modules())
        tokens = tokenizer.backend_tokenizer.to_str()
        return content_hash(encoder.state_dict()), tokens, len(tokenizer), hooks, encoder.config.to_dict()

    before, plain = facts(), pipe("red circle", **QUICK)[0]
    pipe.attach_embedding(Embedding("easy", {"": {"": vectors(3, width)}}))
    drawn = pipe("red <easy>", **QUICK)[0]
    assert facts() == before
    assert drawn.image.tobytes() != plain.image.tobytes()
    assert pipe("red circle", **QUICK)[0].image.tobytes() == plain.image.tobytes()
    pipe.detach_embedding("EASY")
    assert facts() == before
    with pytest.raises(UserError, match="attached: none"):
        pipe.detach_embedding("easy")


LAYOUTS: dict[str, Any] = {
    "A1111": lambda t: {"emb_params": t},
    "A1111, in full": lambda t: {"string_to_param.*": t},
    "star": lambda t: {"*": t},
    "diffusers": lambda t: {"<easy-token>": t},
    "one encoder": lambda t: {"clip_l": t},
    "one vector": lambda t: {"emb_params": t[0]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_same(pipe: LatentPipeline, width: int, tmp_path: Path, layout: str) -> None:
    tensor = vectors(1, width)
    save_file(LAYOUTS[layout](tensor), tmp_path / "Easy.safetensors")
    one = pipe.attach_embedding(tmp_path / "Easy.safetensors")
    assert (one.name, one.length) == ("Easy", 1)
    oracle = by_diffusers(pipe.host, tensor, "<easy>", "red <easy>")[0]
    assert torch.equal(states(pipe, "red <easy>")[0], oracle)
    if layout == "diffusers":
        assert torch.equal(states(pipe, "red <easy-token>")[0], oracle)
    if layout in ("A1111", "star"):
        assert one.hash == Embedding("other", {"": {"": tensor}}).hash


def test_a_pickle_goes_through_convert(pipe: LatentPipeline, width: int, tmp_path: Path) -> None:
    tensor = vectors(2, width)
    old = {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": "easy", "step": 3}
    torch.save(old, tmp_path / "easy.pt")
    with pytest.raises(UserError, match=r"is a pickle.*latentpipe convert"):
        pipe.attach_embedding(tmp_path / "easy.pt")
    assert main(["convert", str(tmp_path / "easy.pt"), "--out", str(tmp_path / "easy.safetensors")]) == 0
    pipe.attach_embedding(tmp_path / "easy.safetensors")
    assert torch.equal(states(pipe, "red <easy>")[0], by_diffusers(pipe.host, tensor, "<easy>", "red <easy>")[0])


def test_a_file_of_several_tokens_has_a_word_for_each(pipe: LatentPipeline, width: int, tmp_path: Path) -> None:
    save_file({"<s0>": vectors(1, width), "<s1>": vectors(2, width, 1)}, tmp_path / "both.safetensors")
    one = pipe.attach_embedding(tmp_path / "both.safetensors")
    assert one.length == 3
    assert torch.equal(states(pipe, "red <s0><s1>")[0], states(pipe, "red <both>")[0])
    assert not torch.equal(states(pipe, "red <s0>")[0], states(pipe, "red <s1>")[0])


def test_an_installed_one_is_opened_by_its_name_in_any_case_and_for_that_call_alone(
    pipe: LatentPipeline, width: int, own_home: Path, tmp_path: Path
) -> None:
    install(own_home, "style/EasyNegative", {"emb_params": vectors(3, width)})
    drawn = pipe("red circle", negative_prompt="<easynegative>", **QUICK)[0]
    assert pipe.embeddings.on == {}
    assert drawn.recipe.embeddings == ["easynegative"]
    assert drawn.recipe.hashes["embedding:easynegative"] == Embedding("x", {"": {"": vectors(3, width)}}).hash
    assert drawn.image.tobytes() != pipe("red circle", negative_prompt="easynegative", **QUICK)[0].image.tobytes()
    assert "Negative prompt: easynegative\n" in a1111_text(drawn.recipe)
    assert 'TI hashes: "easynegative: ' in a1111_text(drawn.recipe) or "TI hashes: easynegative: " in a1111_text(drawn.recipe)
    drawn.save(tmp_path / "x.png")
    again = replay(tmp_path / "x.png", pipe_folder(pipe), device="cpu")
    assert again.difference == 0
    assert "embeddings" not in json.loads(pipe("red", **QUICK)[0].recipe.model_dump_json())


def pipe_folder(pipe: LatentPipeline) -> Path:
    return Path(pipe.host.config._name_or_path)


def test_replay_takes_a_file_that_is_not_installed_and_refuses_another(
    model_folder: Path, width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"emb_params": vectors(2, width)}, tmp_path / "mine.safetensors")
    save_file({"emb_params": vectors(2, width, 1)}, tmp_path / "other.safetensors")
    out = tmp_path / "x.png"
    base = ["--model", str(model_folder), "--device", "cpu"]
    draw = ["generate", "red, mine, blue", *base, "--steps", "2", "--seed", "3", "--out", str(out)]
    assert main([*draw, "--embedding", str(tmp_path / "mine.safetensors")]) == 0
    assert "mine: 2 vectors" in capsys.readouterr().err
    assert main(["replay", str(out), *base]) == 2
    assert "No embedding 'mine' is installed" in capsys.readouterr().err
    assert main(["replay", str(out), *base, "--embedding", f"mine={tmp_path / 'other.safetensors'}"]) == 2
    assert "embedding:mine is" in capsys.readouterr().err
    assert main(["replay", str(out), *base, "--embedding", f"mine={tmp_path / 'mine.safetensors'}"]) == 0
    assert "identical" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "mine.safetensors")]) == 0
    assert json.loads(capsys.readouterr().out)["vectors"] == 2


def test_a_plain_name_counts_as_a_word_of_its_own_and_only_where_it_is_attached(
    pipe: LatentPipeline, width: int, own_home: Path
) -> None:
    install(own_home, "bad-hands-5", {"emb_params": vectors(2, width)})
    pipe("red bad-hands-5", **QUICK)
    pipe.attach_embedding("bad-hands-5")
    tagged = pipe.embeddings.tagged
    assert tagged("a Bad-Hands-5, bad-hands-55 (bad-hands-5:1.2)") == "a <Bad-Hands-5>, bad-hands-55 (<bad-hands-5>:1.2)"
    assert tagged("<bad-hands-5> <x bad-hands-5>") == "<bad-hands-5> <x bad-hands-5>"
    drawn = pipe("red bad-hands-5", **QUICK)[0]
    assert drawn.recipe.prompt == "red <bad-hands-5>"
    pipe.detach_embedding()
    events = list(Engine(pipe).run("red bad-hands-5", embeddings=["bad-hands-5"], **QUICK))
    assert isinstance(events[-1], Finished)
    assert events[-1].pictures[0].image.tobytes() == drawn.image.tobytes()
    assert pipe.embeddings.on == {}


def test_what_names_nothing_or_is_not_named_is_told(pipe: LatentPipeline, width: int) -> None:
    with pytest.warns(LatentpipeWarning, match="<nothing> names no embedding"):
        pipe("red <nothing>", **QUICK)
    pipe.attach_embedding(Embedding("easy", {"": {"": vectors(1, width)}}))
    with pytest.warns(LatentpipeWarning, match="'easy' is attached, and no prompt names it"):
        pipe("red", **QUICK)
    with pytest.raises(UserError, match="U\\+100001, a private character"):
        pipe(f"red <easy> {chr(FIRST + 1)}", **QUICK)


def test_a_wrong_width_is_refused_with_both(pipe: LatentPipeline, width: int, sdxl: Any) -> None:
    with pytest.raises(UserError, match=f"vectors of width {width + 1}, and this model's text encoder reads {width}"):
        pipe.attach_embedding(Embedding("easy", {"": {"": vectors(1, width + 1)}}))
    pair = Embedding("big", {"": {"text_encoder": vectors(1, 8), "text_encoder_2": vectors(1, 12)}})
    with pytest.raises(UserError, match=f"width 8 and 12, and this model's text encoder reads {width}"):
        pipe.attach_embedding(pair)
    with pytest.raises(UserError, match="width 8, and this model's text encoders read 8 and 12"):
        LatentPipeline(sdxl).attach_embedding(Embedding("easy", {"": {"": vectors(1, 8)}}))
    with pytest.raises(UserError, match=r"FLUX.1 takes no embeddings"):
        LatentPipeline(tiny_hosts.complete("flux")).attach_embedding(pair)
    assert pipe.embeddings.on == {}


def test_two_of_one_name_are_refused(pipe: LatentPipeline, width: int) -> None:
    one = Embedding("Easy", {"": {"": vectors(1, width)}})
    pipe.attach_embedding(one)
    with pytest.raises(UserError, match="'Easy' is attached already, and <easy> stands for it"):
        pipe.attach_embedding(Embedding("EASY", {"": {"": vectors(2, width)}}))
    pipe.attach_embedding(Embedding("EASY", {"": {"": vectors(2, width)}}), name="two")
    assert sorted(pipe.embeddings.on) == ["Easy", "two"]


BROKEN: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "model": ({f"a.{i}": torch.ones(2, 2) for i in range(65)}, "no textual inversion embedding"),
    "picture": ({"conv": torch.ones(2, 2, 3, 3)}, "no textual inversion embedding"),
    "widths": ({"a": torch.ones(2, 4), "b": torch.ones(2, 5)}, "4 and 5 numbers wide"),
    "counts": ({"clip_l": torch.ones(2, 4), "clip_g": torch.ones(3, 5)}, "2 and 3 vectors"),
    "twice": ({"emb_params": torch.ones(2, 4), "*": torch.ones(2, 4)}, "twice"),
    "mixed": ({"clip_l": torch.ones(2, 4), "<a>": torch.ones(2, 4)}, "mixes the layouts"),
    "numbers": ({"emb_params": torch.ones(2, 4, dtype=torch.int64)}, "expected vectors of floats"),
    "infinite": ({"emb_params": torch.full((2, 4), float("inf"))}, "not finite"),
    "many": ({"emb_params": torch.ones(1025, 1)}, "1,025 vectors"),
    "empty": ({"emb_params": torch.ones(0, 4)}, "expected vectors"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_no_embedding_is_refused(tmp_path: Path, broken: str) -> None:
    tensors, sentence = BROKEN[broken]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=sentence):
        read_embedding(tmp_path / "x.safetensors")


def test_those_of_other_tools_are_found_by_their_names(
    pipe: LatentPipeline, width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ComfyUI" / "models" / "embeddings" / "negative"
    folder.mkdir(parents=True)
    save_file({"emb_params": vectors(3, width)}, folder / "Bad.safetensors")
    assert main(["import", str(tmp_path / "ComfyUI"), "--from", "comfyui"]) == 0
    drawn = pipe("red <bad>", **QUICK)[0]
    assert drawn.recipe.embeddings == ["bad"]
    assert pipe.attach_embedding("comfyui/negative/Bad", name="bad").length == 3
    assert main(["inspect", "bad"]) == 0
    assert json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["vectors"] == 3
