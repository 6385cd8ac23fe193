"""The verbs that train: a YAML config, its keys overridden from the command line, and what it names looked at before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentpipe.checkpoints.registry import configs_folder
from latentpipe.cli import argument_checks, argument_parser, output_paths
from latentpipe.utils.errors import UserError, begin, near


def train_vae(arguments: list[str]) -> None:
    """Train a VAE from a YAML config; any key can be overridden, as in --optim.steps 500."""
    config = _config("train-vae", "TrainVAE", arguments)
    from latentpipe.train.vae.train import train_vae as run

    run(config)


def train_denoiser(arguments: list[str]) -> None:
    """Train UNet, text encoder and tokenizer on cached latents, from a YAML config."""
    config = _config("train-denoiser", "TrainDenoiser", arguments)
    from latentpipe.train.denoiser import train_denoiser as run

    run(config)


def train_lora(arguments: list[str]) -> None:
    """Train a LoRA on UNet, text encoder or VAE decoder from a folder of captioned pictures and a YAML config."""
    config = _config("train-lora", "TrainLora", arguments)
    from latentpipe.train.lora.train import train_lora as run

    run(config)


def _config(verb: str, schema_name: str, arguments: list[str]) -> Any:
    """The YAML config named first, with the overrides that follow it; what it names is looked at."""
    from latentpipe.train import config as configs

    schema = getattr(configs, schema_name)
    shipped = {path.stem: path for path in sorted(configs_folder().glob("*.yaml"))}
    if not arguments or arguments[0] in ("-h", "--help"):
        known = ", ".join(name for name, path in shipped.items() if path.read_text().startswith(f"# latentpipe {verb} "))
        print(f"usage: latentpipe {verb} CONFIG.yaml [--key.name value ...]\n\nShipped configs: {known}\n")
        print(f"'latentpipe {verb} CONFIG.yaml --help' lists every key with its value and meaning.")
        raise SystemExit(0)
    if arguments[0].startswith("-"):
        raise UserError(f"{verb}: the config comes first, as in 'latentpipe {verb} CONFIG.yaml {arguments[0]} ...'.")
    path = Path(arguments[0])
    if not path.exists():
        path = shipped.get(arguments[0], path)
    if not path.exists():
        raise UserError(
            f"{path}: no such config file. The shipped ones are listed by 'latentpipe ls configs'.{near(path.stem, shipped)}"
        )
    config = configs.load(path, schema)
    if {"-h", "--help"} & set(arguments):
        argument_parser.explain(f"latentpipe {verb} {arguments[0]}", schema, default=config)
    options = argument_parser.options_of_config(config)
    values, given = argument_parser.read(f"latentpipe {verb}", options, arguments[1:])
    raw = config.model_dump(mode="json")
    for name in given:
        _put(raw, name, values[name])
    found = configs.parse(raw, schema, " ".join(arguments)[:300])
    _check(found)
    begin(f"starting; checkpoints and figures go to {found.run.work}")
    return found


def _put(raw: dict[str, Any], name: str, value: Any) -> None:
    """An override in a config's plain values; words whose type the schema alone knows are read as YAML would read them."""
    from latentpipe.utils.reading import parse_yaml

    *groups, last = name.split(".")
    for group in groups:
        raw = raw[group]
    if isinstance(raw[last], dict):  # key value key value
        raw[last] = {key: parse_yaml(word) for key, word in zip(value[::2], value[1::2], strict=False)}
    elif isinstance(value, tuple):
        raw[last] = [parse_yaml(word) if isinstance(word, argument_parser.Word) else word for word in value]
    else:
        raw[last] = parse_yaml(value) if isinstance(value, argument_parser.Word) else value


def _check(config: Any) -> None:
    """UserError for a folder, file or name in a training config that there is not."""
    data, run = config.data, config.run
    output_paths.trained(run)
    for name in ("train", "validation"):
        if getattr(data, name, None) is not None:
            argument_checks.folder(f"data.{name}", getattr(data, name))
    if getattr(getattr(config, "prior", None), "train", None) is not None:
        argument_checks.folder("prior.train", config.prior.train)
    if getattr(data, "cache", None) is not None:
        argument_checks.latents("data.cache", data.cache)
    if getattr(data, "exclude", None) is not None:
        argument_checks.file("data.exclude", data.exclude)
    if getattr(data, "vae", None) is not None:
        argument_checks.vae("data.vae", data.vae)
    if isinstance(getattr(config, "model", None), Path):
        argument_checks.model("model", config.model)
    if getattr(config, "teacher", None) is not None:
        argument_checks.vae("teacher", config.teacher)
    if run.warm_start is not None and type(config).__name__ == "TrainVAE":
        argument_checks.vae("run.warm_start", run.warm_start)


def distil(
    model: str,
    /,
    pictures: Path,
    out: Path = Path("runs/turbo/turbo.safetensors"),
    config: str = "turbo",
    steps: int | None = None,
    guidance: float | None = None,
    training_steps: int | None = None,
    batch_size: int | None = None,
    resume: bool = False,
) -> None:
    """Train a LoRA that draws in few steps without guidance what the model draws with it ('generate --turbo').

    Args:
        model: Name or folder of the model (Stable Diffusion 1, 2 or XL).
        pictures: Folder of pictures with captions of the kind that the model draws.
        out: The LoRA to write; put it into $LATENTPIPE_HOME/lora. Checkpoints and sheets go beside it, into NAME-run.
        config: Name or file of the config of the rest, which 'latentpipe train-lora' reads.
        steps: Denoising steps that it is to be drawn with, in place of the config's.
        guidance: Guidance of the model that it learns to do without, likewise.
        training_steps: Steps of the training, likewise.
        batch_size: Pictures in each of them, likewise.
        resume: Go on from the newest checkpoint.
    """
    changes = {
        "--model": model, "--data.train": pictures, "--run.out": out, "--run.work": out.with_name(f"{out.stem}-run"),
        "--distillation.steps": steps, "--distillation.guidance": guidance, "--optim.steps": training_steps,
        "--optim.batch-size": batch_size,
    }  # fmt: skip
    words = [str(word) for flag, value in changes.items() if value is not None for word in (flag, value)]
    train_lora([config, *words, *["--run.resume"] * resume])


def train_embedded(
    hands: Path,
    work: Path = Path("runs/embedded"),
    vae: str = "emoji",
    start: str | None = "emoji",
    denoiser_steps: int | None = None,
    decoder_steps: int | None = None,
    tuning_steps: int | None = None,
    batch_size: int | None = None,
    decay: bool = True,
) -> None:
    """Train the whole chain of the embedded model: pictures, latents, denoiser, decoder. Given again, it goes on.

    Args:
        hands: Folder with several artists' sets, as for 'latentpipe emoji --hands'.
        work: Folder of all parts; the model ends up in WORK/model.
        vae: Name or folder of the VAE whose latents are kept.
        start: Name or folder of the model that the denoiser begins with; None: random weights.
        denoiser_steps: Steps of the denoiser, in place of the config's.
        decoder_steps: Steps of the decoder, in place of the config's.
        tuning_steps: Steps that the decoder then trains on what the denoiser predicts, likewise.
        batch_size: Pictures in each step of both, in place of the configs'.
        decay: Let the denoiser's rate fall over the last quarter; without, the run can be made longer later.
    """
    from latentpipe.train.embedded_model import train_chain

    print(train_chain(hands, work, configs_folder(), vae, start, denoiser_steps, decoder_steps, tuning_steps, batch_size, decay))
