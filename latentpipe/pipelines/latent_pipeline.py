"""LatentPipeline: prompt -> latents (host) -> images (VAEStage) -> pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentpipe.checkpoints.embedding import Embedding
from latentpipe.checkpoints.in_memory import Computed, hashes_in_memory
from latentpipe.checkpoints.model_files import read_preview
from latentpipe.checkpoints.pipeline_io import former_hash, hashes
from latentpipe.checkpoints.registry import find_model, name_of
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.checkpoints.tensor_source import CARD_FILE
from latentpipe.checkpoints.vae_io import PREVIEW_FILE
from latentpipe.compatibility.measure import comparable
from latentpipe.lora.adapter import Lora
from latentpipe.lora.matching import MatchReport
from latentpipe.lora.merge import Weight
from latentpipe.lora.metadata import drawn_with
from latentpipe.lora.prompt_tags import note_negative, partial_tags, split_tags, without_tags
from latentpipe.pipelines import prompt_notes, vocabulary
from latentpipe.pipelines.batches import drawn
from latentpipe.pipelines.denoise import check_family, check_host, denoise, native_size, size_unit
from latentpipe.pipelines.embeddings import EmbeddingManager
from latentpipe.pipelines.families import expected_latents
from latentpipe.pipelines.hosting import finish
from latentpipe.pipelines.lora_manager import LoraManager
from latentpipe.pipelines.metadata import recipe as recipes
from latentpipe.pipelines.opening import check_arguments, host_from
from latentpipe.pipelines.picture import Picture, preview_by, recipe_of, stated_in_recipe
from latentpipe.pipelines.sampling import OnStep, Settings, check_settings, drawn_seed, settings_of
from latentpipe.pipelines.swap import as_given, host_stage
from latentpipe.pipelines.turbo import find_turbo
from latentpipe.pipelines.vae_choice import fields_with_vae
from latentpipe.pipelines.verdict_cache import refuse_other_shape
from latentpipe.pipelines.vocabulary import known_words
from latentpipe.utils.errors import UserError, counted, expect
from latentpipe.utils.images import to_pixels
from latentpipe.utils.io import read_json
from latentpipe.utils.threads import run_in_thread
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.protocol import Stage


@dataclass
class LatentPipeline:
    """A diffusers pipeline of a known family (`latentpipe.pipelines.families`) whose pictures are encoded and decoded by a stage.

    host     the pipeline; it draws latents and is never changed, but while LoRA adapters are attached
    stage    encodes and decodes; default: the host's own VAE
    hashes   content hash of each part that makes the pictures (left out: computed from the weights in memory when they are first
             asked for); `base`: of the parts that the host came with in its files
    words    those that the model was trained on, where its card lists them
    stated   what was stated on the model's single file, as a recipe keeps it
    defaults  settings that are drawn with where a call gives none, over those of `Settings`
    former   the hash that a part had in recipes and LoRA files of before; None where it had no other
    """

    host: Any
    stage: Stage = None  # type: ignore[assignment]  # the host's own, from __post_init__ on
    name: str = "model"
    vae_name: str | None = None
    adapter_name: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    preview_map: dict[str, list] | None = None
    words: frozenset[str] = field(default=frozenset(), repr=False)
    stated: recipes.StatedModel | None = field(default=None, repr=False)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    former: Callable[[str], str | None] = field(default=lambda part: None, repr=False, compare=False)
    loras: LoraManager = field(init=False, repr=False, compare=False)
    embeddings: EmbeddingManager = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_host(self.host)
        self.stage = self.stage or host_stage(self.host)
        channels, downscale = expected_latents(self.host)
        if not comparable((channels, downscale), (self.stage.space.channels, self.stage.space.downscale)):
            raise UserError(
                f"VAE {self.vae_name or 'given'} makes {self.stage.space.channels}-channel latents at "
                f"1/{self.stage.space.downscale} size; this denoiser takes {counted(channels, 'channel')} at 1/{downscale}. "
                "Choose a VAE of the same space ('latentpipe ls vae --fits MODEL' lists them), or train a denoiser for this one."
            )
        self.base = self.base or self.hashes
        self.loras = LoraManager(self.host, self.stage, self.base, self.hashes.get("vae"), self.former)
        self.embeddings = EmbeddingManager(self.host, self.loras)
        if not self.hashes:
            self.hashes = Computed(partial(hashes_in_memory, self.host, self.stage))

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "emoji",
        vae: str | Path | None = None,
        device: str | None = None,
        dtype: str = "fp32",
        adapter: str | Path | None = None,
        force: bool = False,
        stated: Stated | None = None,
        offload: str = "none",
        turbo: bool = False,
    ) -> LatentPipeline:
        """Open a model by name, folder or single file (offline).

        vae      name, folder or file of another VAE to decode with; UserError with the verdict where it does not fit
        device   "cpu", "cuda", "mps"; None: the best that is present
        dtype    "fp32", "bf16" or "fp16"; "stored": as the file has it; "auto": bf16 where the device has units for it, else
                 fp32, and less where that does not fit into memory (`chosen_dtype`)
        offload  "none"; on CUDA "model" or "sequential": parts, or layers, are there only while they compute
        adapter  name or file of an adapter to that VAE (`latentpipe fit-adapter`)
        force    decode with `vae` whatever the verdict, as long as the shapes agree
        stated   what a single file does not say itself: family, prediction, configs, other parts (`Stated`)
        turbo    draw in few steps without guidance, by the installed LoRA that was distilled from this model (`attach_turbo`)
        """
        device = check_arguments(model, vae, adapter, device, dtype, offload)
        folder = find_model(model)
        whole = stated is None or not (stated.parts or stated.config)  # else its VAE may be another file's
        if vae is not None and adapter is None and whole:
            refuse_other_shape(folder, vae)  # before anything is read

        def opened() -> LatentPipeline:
            host = host_from(folder, device, dtype, offload, stated)
            card = read_json(folder / CARD_FILE) if (folder / CARD_FILE).is_file() else {}
            own = read_preview(folder / "vae" / PREVIEW_FILE, LatentSpace.of(host.vae).channels)
            kept = stated_in_recipe(folder, stated)
            pipe = cls(
                host,
                name=name_of(folder),
                hashes=hashes(folder, stated),
                preview_map=own,
                words=known_words(card),
                stated=kept,
                former=partial(former_hash, folder, stated),
            )
            pipe = pipe if vae is None else pipe.with_vae(vae, folder, adapter, force)
            if turbo:
                pipe.attach_turbo()
            return pipe

        return run_in_thread(opened)

    def with_vae(self, vae: str | Path, folder: Path, adapter: str | Path | None = None, force: bool = False) -> LatentPipeline:
        """The same denoiser around another VAE, which an adapter or a verdict vouches for; `folder` is the model's."""
        return replace(self, **fields_with_vae(self, vae, folder, adapter, force))

    def with_stage(self, stage: Stage) -> LatentPipeline:
        """The same denoiser around a stage that was opened elsewhere; UserError while LoRA is attached. See `swap_vae`."""
        if names := ", ".join(self.loras.weights):
            raise UserError(f"LoRA is attached ({names}); take it off first (detach_lora), then swap the VAE.")
        return replace(self, stage=stage, **as_given(stage, self.hashes))

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the denoiser was trained at."""
        return native_size(self.host, self.stage)

    def __call__(
        self, prompt: str, n: int = 1, seed: int | None = None, on_step: OnStep | None = None, **settings: Any
    ) -> list[Picture]:
        """Draw `n` pictures of a prompt; picture i has the seed `seed` + i (None: a random one).

        ``<lora:NAME:WEIGHT>`` in the prompt switches on an installed adapter for this call; with ``:partial``, one that fits so.
        ``<NAME>`` in the prompt or the negative prompt stands for an attached or installed embedding (textual inversion).

        on_step(Step)  is called after each step; returning True stops there and keeps the partial pictures
        settings       the fields of `Settings`
        """
        expect("prompt", prompt, str, "one text (n draws several pictures of it)")
        (text, tagged), partial = split_tags(prompt), partial_tags(prompt)
        chosen = self.check(settings_of({**self.defaults, **settings}))
        note_negative(chosen.negative_prompt)
        with self.loras.more(tagged, partial):
            text, negative = self.embeddings.tagged(text), self.embeddings.tagged(chosen.negative_prompt)
            with self.embeddings.more(self.embeddings.named_in(text, negative)):
                return self.literal(text, n, seed, on_step, replace(chosen, negative_prompt=negative))

    def literal(self, prompt: str, n: int, seed: int | None, on_step: OnStep | None, chosen: Settings) -> list[Picture]:
        """As a call, with checked settings and a prompt as a recipe has it: no tag of it opens a file."""
        seed = drawn_seed(n, seed)
        images, notes, stopped = drawn(self, [prompt] * n, list(range(seed, seed + n)), on_step, chosen)
        base = recipe_of(self, prompt, seed, n, chosen, stopped)
        own = [base.model_copy(update={"seed": seed + i, "batch_index": i}) for i in range(len(images))]
        return [Picture(image, recipe, notes[prompt]) for image, recipe in zip(images, own, strict=True)]

    def several(self, pictures: Sequence[tuple[str, int]], on_step: OnStep | None = None, **settings: Any) -> list[Picture]:
        """A picture of each prompt and seed, in one batch, each with a recipe of its own; all say the same of LoRA adapters."""
        chosen = self.check(settings_of({**self.defaults, **settings}))
        note_negative(chosen.negative_prompt)
        with self.loras.more(split_tags(pictures[0][0])[1], partial_tags(pictures[0][0])):
            prompts = [self.embeddings.tagged(split_tags(prompt)[0]) for prompt, _ in pictures]
            chosen = replace(chosen, negative_prompt=self.embeddings.tagged(chosen.negative_prompt))
            with self.embeddings.more(self.embeddings.named_in(*prompts, chosen.negative_prompt)):
                images, notes, stopped = drawn(self, prompts, [seed for _, seed in pictures], on_step, chosen)
                one = zip(prompts, pictures, strict=True)
                own = [recipe_of(self, prompt, seed, 1, chosen, stopped) for prompt, (_, seed) in one]
        return [Picture(image, recipe, notes[prompt]) for image, recipe, prompt in zip(images, own, prompts, strict=True)]

    def attach_lora(
        self,
        lora: str | Path | Lora,
        weight: Weight = 1.0,
        *,
        name: str | None = None,
        partial: bool = False,
        force: bool = False,
    ) -> MatchReport:
        """Open an adapter (name, file or `Lora`), prove that it fits and moves something, and switch it on beside the others.

        weight   a number, or numbers by component and block (`latentpipe.lora.fusion.LoraFuser.set`)
        partial  take a file that fits in part; what is left out stands in the report
        force    take one that names another base, or that changes the VAE's latents

        UserError where no layer fits; the pipeline is then as it was before.
        """
        return self.loras.attach(lora, weight, name, partial, force)

    def attach_turbo(self) -> MatchReport:
        """Attach the installed LoRA that was distilled from this model, and draw as it was made for; UserError without one."""
        lora = self.loras.open(find_turbo(self.name, self.base))
        report = self.attach_lora(lora)
        self.defaults = drawn_with(lora)
        return report

    def set_lora(self, weights: Mapping[str, Weight], fuse: bool = True, method: str = "sum", partial: bool = False) -> None:
        """Switch on exactly these adapters with these weights, by name; see `LoraFuser.set`, `attach_lora`."""
        self.loras.set(weights, fuse, method, weights if partial else ())

    def detach_lora(self, name: str | None = None) -> None:
        """Take off one adapter (None: all); the weights are then what they were, to the byte."""
        self.loras.forget(name)

    def attach_embedding(self, embedding: str | Path | Embedding, *, name: str | None = None) -> Embedding:
        """Open a textual inversion (name, file or `Embedding`), so that prompts may name it, as ``<NAME>`` or as a plain word.

        name  what prompts call it, in whatever case; None: the file's name. The tokens that its file names stand for it too

        UserError with both widths where it was made for other text encoders. Tokenizers and text encoders stay as they are.
        """
        return self.embeddings.attach(embedding, name)

    def detach_embedding(self, name: str | None = None) -> None:
        """Take off one embedding (None: all)."""
        self.embeddings.forget(name)

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, on_step: OnStep | None = None
    ) -> list[Image.Image]:
        """One picture for each prompt and seed, in one batch; the straight line."""
        with torch.no_grad():
            latents = self.denoise(prompts, seeds, settings, on_step)  # B C h w
            images = self.stage.decode(latents.to(self.stage.dtype))  # B 3 H W, [-1, 1]
            return to_pixels(finish(self.host, images, {"use_resolution_binning": False}))

    def denoise(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, on_step: OnStep | None = None
    ) -> torch.Tensor:
        """Prompts to latents (B C h w) through the host; noise comes from one CPU generator for each seed."""
        self.loras.check_free()
        settings = settings if settings.size else replace(settings, size=self.native_size)
        with self.embeddings.reading(*prompts, settings.negative_prompt) as host:
            spelled = [self.embeddings.spell(prompt) for prompt in prompts]
            settings = replace(settings, negative_prompt=self.embeddings.spell(settings.negative_prompt))
            return denoise(host, self.stage, spelled, seeds, settings, on_step)

    def check(self, settings: Settings) -> Settings:
        """The settings with the size filled in; UserError says what is wrong, a warning says what is unusual."""
        check_family(self.host, settings)
        return check_settings(settings, self.native_size, size_unit(self.host, self.stage))

    def truncated_text(self, prompt: str) -> str:
        """The end of a prompt that is too long for the text encoder to read; empty when all of it is read."""
        return prompt_notes.truncated_text(self.host, self.embeddings, prompt)

    def unknown_words(self, prompt: str) -> dict[str, str]:
        """The words of a prompt that the model was never trained on, each with the nearest that it knows ("" where none is near).

        Empty where the model's card lists no words. Trigger words of the adapters that are on are known.
        """
        return prompt_notes.never_seen(self.embeddings, prompt, self.words and self.words | self.loras.words)

    def notes_on(self, prompt: str, what: str = "prompt") -> list[str]:
        """What the text encoder cannot make use of in a prompt, in sentences."""
        found = [vocabulary.sentence(self.unknown_words(prompt), self.words, what)]
        if what == "prompt" and not without_tags(prompt).strip():
            found.append("the prompt is empty: what is drawn is chance")
        if cut := self.truncated_text(prompt):
            found.append(prompt_notes.too_long(self.host, what, cut))
        return [note for note in found if note]

    def preview(self, latents: torch.Tensor, side: int = 256) -> Image.Image | None:
        """A quick picture of the first latents by the VAE's linear latent-to-RGB map; None where it has no map."""
        return None if self.preview_map is None else preview_by(self.preview_map, latents[0], side)
