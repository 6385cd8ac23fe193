"""A pytest plug-in: diffusers' own tests with a VAEStage in the place of every pipeline's VAE.

diffusers' tests are no part of this repository. In a checkout of diffusers, with this folder on PYTHONPATH:

    LATENTPIPE_ORACLE=stock python -m pytest -p oracle_plugin tests/pipelines/flux -q
    LATENTPIPE_ORACLE=stage python -m pytest -p oracle_plugin tests/pipelines/flux -q
    python oracle_plugin.py

The outcomes are appended to oracle-stock.tsv and oracle-stage.tsv in the working folder as they come; with the stage only those
tests run that pass on stock, and a line also says how often a test called the stage and which pipelines were refused it (they
keep their VAE). The last command lists the tests that pass on stock and fail with the stage. The few tokenizers and
text encoders that the tests fetch are replaced, on both sides, by tiny ones made here, so the tests run offline; a test that
needs any other download fails on both sides and does not count.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

MODE = os.environ.get("LATENTPIPE_ORACLE", "stage")
USED: dict[str, int] = {}  # by the test that runs: calls of the stage, refusals
PLACES = {mode: Path(os.environ.get("LATENTPIPE_ORACLE_DIR", ".")) / f"oracle-{mode}.tsv" for mode in ("stock", "stage")}


def pytest_configure(config: Any) -> None:
    """Before diffusers' tests are collected: the stand-ins, and the stage."""
    offline(Path(tempfile.mkdtemp(prefix="oracle-")))
    if MODE == "stage":
        put_in_place()


def put_in_place() -> None:
    """Whatever VAE a pipeline registers, it gets what `hosting.hosted` would give it."""
    from diffusers import DiffusionPipeline

    from latentpipe import UserError, VAEStage
    from latentpipe.pipelines import families, hosting

    call = VAEStage.call

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        USED["called"] = USED.get("called", 0) + 1
        return call(self, *args, **options)

    VAEStage.call = counted  # type: ignore[method-assign]
    register = DiffusionPipeline.register_modules

    def registered(self: Any, **parts: Any) -> None:
        name = families.facts(type(self)).autoencoder
        vae = parts.get(name)
        if vae is not None and not isinstance(vae, (tuple, list)):
            try:
                parts[name] = hosting.facade(type(self), families.stage_behind(type(self), vae), vae)
            except UserError as error:
                refused = f"refused {type(self).__name__}"
                USED[refused] = USED.get(refused, 0) + 1
                print(f"refused: {type(self).__name__}: {error}", file=sys.stderr)
        register(self, **parts)

    DiffusionPipeline.register_modules = registered


def offline(folder: Path) -> None:
    """Let the names that the tests fetch mean tiny models in `folder`."""
    import transformers

    places = {
        "hf-internal-testing/tiny-random-clip": clip_words(folder / "clip"),
        "hf-internal-testing/tiny-random-t5": t5(folder / "t5"),
        "hf-internal-testing/dummy-gemma": gemma_words(folder / "gemma"),
    }
    for cls in (
        transformers.PreTrainedTokenizerBase,
        transformers.PreTrainedModel,
        transformers.AutoTokenizer,
        transformers.AutoConfig,
    ):
        opened = cls.from_pretrained.__func__

        def from_pretrained(cls: type, name: Any, *args: Any, opened: Any = opened, **options: Any) -> Any:
            return opened(cls, places.get(name, name), *args, **options)

        cls.from_pretrained = classmethod(from_pretrained)


def clip_words(folder: Path) -> Path:
    """A CLIP tokenizer of single bytes, 514 tokens."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={name: at for at, name in enumerate(names)}, merges=[], model_max_length=77).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    """A T5 encoder, 32 wide, and a tokenizer of single letters."""
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        dropout_rate=0.1, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder)
    letters(folder, "T5TokenizerFast", 512)
    return folder


def gemma_words(folder: Path) -> Path:
    """A Gemma tokenizer of single letters."""
    letters(folder, "GemmaTokenizerFast", 300)
    return folder


def letters(folder: Path, cls: str, longest: int) -> None:
    """Save a tokenizer that reads every byte as one token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({name: at for at, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<bos>"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), model_max_length=longest, **special).save_pretrained(folder)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """With the stage: what passes on stock. On both sides: what has not been run yet."""
    done = outcomes(MODE)
    passed = {name for name, said in outcomes("stock").items() if said.startswith("passed")}
    kept = [item for item in items if item.nodeid not in done and (MODE == "stock" or item.nodeid in passed)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_setup() -> None:
    """Count anew."""
    USED.clear()


def pytest_runtest_logreport(report: Any) -> None:
    """One line for each test: its outcome, and the last line of what went wrong."""
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        said = report.longreprtext.splitlines() if report.outcome == "failed" else []
        errors = [line for line in said if line.startswith("E  ")] or said[-1:]
        used = "".join(f", {what} {n}" for what, n in USED.items())
        with PLACES[MODE].open("a") as log:
            log.write(f"{report.nodeid}\t{report.outcome} {report.duration:.0f} s{used} {' '.join(errors)[:600]}\n")


def outcomes(mode: str) -> dict[str, str]:
    """Test -> what was said of it."""
    lines = PLACES[mode].read_text().splitlines() if PLACES[mode].exists() else []
    return dict(line.split("\t", 1) for line in lines)


if __name__ == "__main__":
    stock, stage = outcomes("stock"), outcomes("stage")
    passed = [name for name, said in stock.items() if said.startswith("passed")]
    ran = [name for name in passed if name in stage]
    worse = {name: stage[name] for name in ran if not stage[name].startswith("passed")}
    print(f"{len(passed)} pass on stock; {len(ran)} of them were run with the stage, {len(ran) - len(worse)} passed")
    for name, said in worse.items():
        print(f"  {name}: {said}")
