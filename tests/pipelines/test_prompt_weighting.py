"""Prompt weights: what is read, which tokens it reaches, and that nothing moves where every weight is 1."""

from __future__ import annotations

import copy
import re
import time
import warnings
from itertools import pairwise
from typing import Any

import pytest
import tiny_hosts
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.registry import find_model
from latentpipe.pipelines import families as hosts
from latentpipe.pipelines import hosting
from latentpipe.pipelines.prompt_weighting import MEAN_FLOOR, encode, parse, plain, refuse, token_weights
from latentpipe.utils.errors import LatentpipeWarning, UserError

Pieces = list[tuple[str, float]]


# --- reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("red apple", [("red apple", 1)]),
        ("(red) apple", [("red", 1.1), (" apple", 1)]),
        ("[red] apple", [("red", 1 / 1.1), (" apple", 1)]),
        ("(red:1.5) apple", [("red", 1.5), (" apple", 1)]),
        ("a ( red : 1.5 )b", [("a ", 1), (" red ", 1.5), ("b", 1)]),
        ("(a (b) c:.5)", [("a ", 0.5), ("b", 0.55), (" c", 0.5)]),
        ("((a) [b]:2)", [("a", 2.2), (" ", 2), ("b", 2 / 1.1)]),
        ("[(red)] apple", [("red apple", 1)]),
        ("((([[[red]]]))) apple", [("red apple", 1)]),
        ("(red:0)(blue:+5.)", [("red", 0), ("blue", 5)]),
        ("[[(red:6)]]", [("red", 6 / 1.21)]),
        ("(10:30:1.2)", [("10:30", 1.2)]),
        ("(a:b: c d)", [("a:b: c d", 1.1)]),
        ("(a:(b))", [("a:", 1.1), ("b", 1.21)]),
        ("( sad :-)", [(" sad :-", 1.1)]),
        ("()[](:3)", []),
        (r"\(red\) \[x\] \\", [(r"(red) [x] " + "\\", 1)]),
        (r"(a\):1.3) \n", [("a)", 1.3), (r" \n", 1)]),
        (r"(a\\:1.3)", [("a\\", 1.3)]),
        ("a) b( c] [d", [("a) b( c] [d", 1)]),
        ("(a (b)", [("(a ", 1), ("b", 1.1)]),
        ("(a [b) c]", [("a [b", 1.1), (" c]", 1)]),
        ("[a (b] c)", [("a (b", 1 / 1.1), (" c)", 1)]),
    ],
)
def test_marks_are_read_as_a1111_writes_them(prompt: str, pieces: Pieces) -> None:
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])
    assert plain(prompt) == "".join(text for text, _ in pieces)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("(red:5.1)", "'(red:5.1)' in the prompt comes to a weight of 5.1; expected 0 to 5"),
        ("a (red:-1) b", "'(red:-1)' in the prompt comes to a weight of -1"),
        ("((red:4.9))", "'(red:4.9)' in the prompt comes to a weight of 5.39"),
        ("((red:1e999):0)", "comes to a weight of nan"),
        ("(" * 17 + "red" + ")" * 17, "comes to a weight of 5.05"),
        ("(red:high)", "'high' is no number"),
        ("(red:1,2)", "'1,2' is no number"),
        ("(red:nan)", "'nan' is no number"),
        ("(red:١)", "'١' is no number"),
        ("[red:blue:0.5]", "cannot change while a picture is drawn"),
        ("[red|blue]", "cannot change while a picture is drawn"),
        ("[(red:2)|blue]", "cannot change while a picture is drawn"),
    ],
)
def test_what_cannot_be_a_weight_is_told(prompt: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        parse(prompt)


def escaped(text: str) -> str:
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


texts = st.text(alphabet="ab ()[]\\,é", min_size=1, max_size=6)
trees = st.recursive(
    texts,
    lambda inner: st.tuples(st.sampled_from(["(", "[", "0.5", "1", "1.25", "0"]), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=8,
)


def written(tree: Any) -> str:
    """A tree of texts and groups as it is typed."""
    if isinstance(tree, str):
        return escaped(tree)
    mark, inner = tree
    text = "".join(map(written, inner))
    return {"(": f"({text})", "[": f"[{text}]"}.get(mark, f"({text}:{mark})")


def characters(tree: Any, weight: float = 1.0) -> Pieces:
    """The characters of a tree with their weights, by walking down it."""
    if isinstance(tree, str):
        return [(letter, weight) for letter in tree]
    mark, inner = tree
    weight *= {"(": 1.1, "[": 1 / 1.1}[mark] if mark in "([" else float(mark)
    return [pair for each in inner for pair in characters(each, weight)]


@given(st.lists(trees, max_size=4))
def test_what_is_written_is_read_back(forest: list[Any]) -> None:
    prompt = "".join(map(written, forest))
    wanted = [pair for tree in forest for pair in characters(tree)]
    found = [(letter, weight) for text, weight in parse(prompt) for letter in text]
    assert [letter for letter, _ in found] == [letter for letter, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted], abs=1e-9)
    assert plain(prompt) == "".join(letter for letter, _ in wanted)


@given(st.text(max_size=40))
@example("\\")
@example("(:)")
def test_escaped_text_is_itself(text: str) -> None:
    assert plain(escaped(text)) == text
    assert parse(escaped(text)) == ([(text, 1.0)] if text else [])
    if not re.search(r"[()\[\]\\]", text):
        assert plain(text) == text


@given(st.text(alphabet="ab()[]\\:12. |-", max_size=30))
def test_any_text_is_read_or_told(prompt: str) -> None:
    try:
        pieces = parse(prompt)
    except UserError:
        return
    assert all(text and 0 <= weight <= 5 for text, weight in pieces)
    assert all(one[1] != two[1] for one, two in pairwise(pieces))
    rest = iter(prompt)
    assert all(letter in rest for letter in plain(prompt))  # in order, and nothing is made up


def test_deep_nesting_is_read_at_once() -> None:
    begun = time.perf_counter()
    assert plain("[" * 9000 + "x" + "]" * 9000) == "x"
    assert plain("(" * 9000 + "x" + "]" * 9000) == "(" * 9000 + "x" + "]" * 9000
    assert time.perf_counter() - begun < 5


# --- encoding -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji() -> Any:
    """The embedded model's pipeline; its embeddings have a mean near 0."""
    return load_pipeline(find_model("emoji"), torch.float32)


@pytest.fixture(scope="module")
def tiny(emoji: Any) -> Any:
    """Stable Diffusion 1 with a random text encoder whose embeddings have a mean, as those of the real one."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = emoji.tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, **sizes, **ids)
    model = CLIPTextModel(config).eval()
    with torch.no_grad():
        model.get_parameter("final_layer_norm.bias").fill_(-0.3)
    return hosting.rebuild(tiny_hosts.sd15(), text_encoder=model, tokenizer=tokenizer)


@pytest.fixture(params=["tiny", "emoji"])
def host(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def own(host: Any, texts: list[str], negative: str | None = None) -> Any:
    """The host's own embeddings."""
    against = None if negative is None else [negative] * len(texts)
    return host.encode_prompt(texts, host.device, 1, negative is not None, against)


def by_hand(host: Any, pieces: Pieces) -> torch.Tensor:
    """Each piece tokenized by itself, its tokens' embeddings multiplied, and the mean (or else the size) restored."""
    length = host.tokenizer.model_max_length
    weights = [1.0]
    for text, weight in pieces:
        weights += [weight] * len(host.tokenizer(text, add_special_tokens=False).input_ids)
    weights = weights[: length - 1]
    weights += [1.0] * (length - len(weights))
    before = own(host, ["".join(text for text, _ in pieces)])[0][0].double()
    after = torch.stack([weight * row for weight, row in zip(weights, before, strict=True)])
    if host.text_encoder.config.hidden_size == 8:
        return after * before.mean() / after.mean()
    return after * before.square().mean().sqrt() / after.square().mean().sqrt()


def test_the_two_hosts_take_the_two_ways(tiny: Any, emoji: Any) -> None:
    for host, steady in ((tiny, True), (emoji, False)):
        rows = own(host, ["red apple", "cat", "woman dark skin tone", "face with tears of joy"])[0]
        share = rows.mean((1, 2)).abs() / rows.square().mean((1, 2)).sqrt()
        assert bool((share > 5 * MEAN_FLOOR).all() if steady else (share < MEAN_FLOOR / 2).all())


@pytest.mark.parametrize("guided", [True, False])
def test_weight_one_is_the_hosts_own_to_the_bit(host: Any, guided: bool) -> None:
    prompts = ["red apple", "(red:1) apple", "[(red)] apple", r"red \(apple\)", "", "many " * 40 + "(words:1.0)"]
    texts = ["red apple", "red apple", "red apple", "red (apple)", "", "many " * 40 + "words"]
    positive, negative = encode(host, prompts, guided, "([blurry]:1.1)" if guided else "")
    wanted, against = own(host, texts, "blurry") if guided else own(host, texts)
    assert torch.equal(positive, wanted)
    assert (negative is None and against is None) if not guided else torch.equal(negative, against)


def test_weights_are_those_of_a_loop_by_hand(host: Any) -> None:
    prompts = ["(red:1.5) apple", "red ((apple))", "[woman] (technologist:0) dark skin (tone:3)", "plain words"]
    positive, negative = encode(host, prompts, True, "(bad:2) [blue]")
    assert negative is not None
    for row, prompt in zip(positive, prompts, strict=True):
        torch.testing.assert_close(row, by_hand(host, parse(prompt)).float(), rtol=1e-4, atol=1e-5)
        if "(" in prompt:
            assert (row - own(host, [plain(prompt)])[0][0]).abs().max() > 0.05
    assert torch.equal(positive[3], own(host, [plain(prompt) for prompt in prompts])[0][3])
    for row in negative:
        torch.testing.assert_close(row, by_hand(host, parse("(bad:2) [blue]")).float(), rtol=1e-4, atol=1e-5)


words = st.text(alphabet="abcRED1é😀中文,.!'´&", min_size=1, max_size=8) | st.sampled_from(
    ["woman", "café", "cafe\u0301", "ÀB", "it's", "<|endoftext|>", "\u200d", "👩🏽‍💻", "ﬁ", "İ", "ß"]
)


weighed = st.lists(st.tuples(words, st.sampled_from([0.5, 1.0, 1.25, 2.0])), max_size=12)


@given(pieces=weighed, gap=st.sampled_from([" ", "  ", "\n"]))
def test_every_token_has_the_weight_of_its_piece(emoji: Any, pieces: Pieces, gap: str) -> None:
    tokenizer = emoji.tokenizer
    parts = [tokenizer(text, add_special_tokens=False).input_ids for text, _ in pieces]
    whole = tokenizer(gap.join(text for text, _ in pieces), add_special_tokens=False).input_ids
    assert whole == [token for part in parts for token in part]
    wanted = [1.0, *(weight for part, (_, weight) in zip(parts, pieces, strict=True) for _ in part)]
    wanted = (wanted[: tokenizer.model_max_length - 1] + [1.0] * tokenizer.model_max_length)[: tokenizer.model_max_length]
    prompt = gap.join(f"({escaped(text)}:{weight})" for text, weight in pieces)
    assert token_weights(emoji, parse(prompt)).tolist() == wanted


def test_a_token_across_two_pieces_has_the_mean(emoji: Any) -> None:
    assert len(emoji.tokenizer("apple", add_special_tokens=False).input_ids) == 1
    assert token_weights(emoji, parse("red (app:1.5)le")).tolist()[:4] == pytest.approx([1, 1, 1.3, 1])


def test_what_is_cut_has_no_weight(tiny: Any) -> None:
    prompt = "red " * 30
    assert torch.equal(encode(tiny, [prompt + "(apple:3)"], False, "")[0], own(tiny, [prompt + "apple"])[0])
    moved = encode(tiny, ["(red:2) " + prompt], False, "")[0]
    torch.testing.assert_close(moved[0], by_hand(tiny, parse("(red:2) " + prompt)).float(), rtol=1e-4, atol=1e-5)


def test_a_mean_near_nothing_turns_no_sign_around(emoji: Any) -> None:
    """The mean alone would multiply this prompt by -3.5, and by another number at each weight."""
    before = own(emoji, ["face with tears of joy"])[0][0]
    steps = []
    for weight in (1.0, 1.5, 3.0, 5.0):
        after = encode(emoji, [f"(face with tears of joy:{weight})"], False, "")[0][0]
        assert bool((torch.cosine_similarity(before, after, dim=1) > 0.999).all())
        torch.testing.assert_close(after.square().mean(), before.square().mean())
        steps.append(float(after[1].norm() / after[0].norm()))
    assert steps == pytest.approx([steps[0] * weight for weight in (1.0, 1.5, 3.0, 5.0)], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_finite(tiny: Any, dtype: torch.dtype) -> None:
    host = hosting.rebuild(tiny, text_encoder=copy.deepcopy(tiny.text_encoder).to(dtype))
    positive, negative = encode(host, ["(red:5) apple", "apple"], True, "(blue:0)")
    assert negative is not None
    assert positive.dtype == negative.dtype == dtype
    assert bool(positive.isfinite().all() & negative.isfinite().all())
    assert torch.equal(positive[1], own(host, ["red apple", "apple"])[0][1])
    full = encode(tiny, ["(red:5) apple", "apple"], False, "")[0]
    torch.testing.assert_close(positive.float(), full, rtol=0.1, atol=0.1)


def test_learned_words_of_several_vectors(tiny: Any) -> None:
    host = hosting.rebuild(tiny, text_encoder=copy.deepcopy(tiny.text_encoder), tokenizer=copy.deepcopy(tiny.tokenizer))
    host.load_textual_inversion(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), token="<style>")
    assert token_weights(host, parse("a (<style>:1.5) cat")).tolist()[:7] == [1, 1, 1.5, 1.5, 1.5, 1, 1]
    assert torch.equal(encode(host, ["a (<style>:1) cat"], False, "")[0], own(host, ["a <style> cat"])[0])


def test_a_weight_moves_the_embedded_models_picture(emoji: Any) -> None:
    noise = torch.Generator()

    def latents(prompt: str) -> torch.Tensor:
        positive, negative = encode(emoji, [prompt], True, "")
        return emoji(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=noise.manual_seed(7),
            output_type="latent",
        ).images

    emoji.set_progress_bar_config(disable=True)
    without = latents("red apple")
    assert torch.equal(latents("(red:1.0) apple"), without)
    moved = [(latents(f"(red:{weight}) apple") - without).abs().mean() for weight in (1.1, 1.5, 0)]
    assert bool(torch.stack(moved).isfinite().all())
    assert 1e-3 < moved[0] < moved[1]
    assert moved[2] > moved[0]


# --- other families -------------------------------------------------------------------------------------------


def test_classic_hosts_take_weights_and_tell_bad_ones(tiny: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse(tiny, "(red:1.5) [apple]")
    with pytest.raises(UserError, match="no number"):
        refuse(tiny, "(red:high)")


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_other_families_take_brackets_as_text_and_no_weights(name: str) -> None:
    host = tiny_hosts.BUILDERS[name]()
    with pytest.raises(
        UserError, match=re.escape(f"{hosts.family_of(host).name} takes no prompt weights, and '(red:1.5)' in the")
    ):
        refuse(host, "a (red:1.5) apple")
    for prompt in ("(red) apple", "[red:blue:0.5]", "in 16:9 (16:9)", "(flag:Norway)", r"\(red\)"):
        with pytest.warns(LatentpipeWarning, match="plain text"):
            refuse(host, prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in ("red apple, 16:9", "a) b ( c", "a \\ b", ""):
            refuse(host, prompt)
