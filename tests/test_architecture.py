"""The shape of the code, over its syntax tree."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "latentpipe"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
TREES = {name: ast.parse(path.read_text()) for name, path in zip(NAMES, FILES, strict=True)}

# A room imports from those above it; a module from those before it in its own room, and from its own package.
ROOMS = {
    "utils": """
        atomic defaults deferred_imports errors setting_names cancellation logging out_of_memory progress signals system
        threads yaml_loader
        reading images io gguf_header worker_process workers cluster
    """,
    "vae": """
        entropy_model latent_space offload precision probe_images tiny tiling.feature_map tiling.support tiling.tiled
        memory memory_policy stage protocol
    """,
    "checkpoints": """
        places.hub_cache places.invoke places.tool_folders places.glance pickles.child pickles.unpickle
        hub.choose hub.client hub.fetch hub.pull hub.importing
        config_ranges components fp16_rescale identify instantiate infer_config ldm_keys registry taesd_keys pickled text_names
        tensor_source model_files vae_file convert single_file.parts single_file.unet single_file.families
        single_file.prediction embedding single_file.refusals single_file.identify single_file.tokenizers single_file.configs
        single_file.gather single_file.tables single_file.gguf_tensors single_file.tensors single_file.opening single_file.hashes
        single_file.folders single_file.describe single_file.vae vae_io fp16 plain_text pipeline_io in_memory
    """,
    "compatibility": """
        latent_adapter measure verdict
    """,
    "lora": """
        adapter metadata merge prompt_tags state_dict.keys state_dict.cloneofsimo
        state_dict.kohya state_dict.layers state_dict.peft_config state_dict.io state_dict.describe target_modules injection delta
        extract matching fusion
    """,
    "pipelines": """
        facade family_table families hosting metadata.stated metadata.guides metadata.recipe metadata.third_party
        prompt_weighting sampling
        conditioning denoise batches embeddings lora_manager metadata.reader picture swap save_swapped verdict_cache
        vae_choice turbo vocabulary prompt_notes
        memory_need opening chains latent_pipeline
    """,
    "engine": """
        jobs engine replay pipeline_cache studio xy_grid.axes xy_grid.sheet xy_grid.plot
    """,
    "data": """
        defects emoji emoji_sets emoji_hands emoji_bank emoji_hands_bank factor_shapes listing image_folder
        image_set latent_cache shapes streaming tables sources shard_manifest shard_worker shards sharded_latents
    """,
    "evaluate": """
        metrics.emoji_words metrics.frechet metrics.inception metrics.posterior metrics.spectrum metrics.ssim
        metrics.train_emoji_words metrics.weights metrics.features metrics.lpips health diagnosis protocol
        metrics.latents preprocessing report.axes report.svg speed statistics results accumulator crew artists
        report.text comparison reconstruction report.crops report.figures report.html compare_vaes style_adherence
        prompt_adherence vae_lab
    """,
    "train": """
        checkpoint config.base config.denoiser config.lora config.vae distributed latent_adapter lora.data
        lora.prompts losses picture_changes progress run_dir spike_guard optimizer state loop
        text_encoder vae.adversarial vae.augment vae.equivariance vae.kl vae.training_pass vae.microbatch vae.model vae.perceptual
        vae.rate vae.objective vae.trainable weighted_order denoiser lora.loss lora.flow lora.parameters lora.export
        lora.distillation lora.train vae.denoiser_outputs vae.distillation vae.export vae.train embedded_model
    """,
    "explore": """
        anomaly.conformal anomaly.heatmap anomaly.detector clips codec.bd_rate codec.container codec.frequency_tables
        codec.wavefront codec.adaptive_model codec.static_model codec.codec codec.fit directions attributes
        disentanglement interpolate prior sample smoothness traverse edit inpaint playground
    """,
    "cli": """
        argument_checks argument_parser codec common completion anomaly data edit evaluate explore fit_adapter hub lora inspect
        output_paths prompt_file replayed controls argument_rules generate grid train ui vae app
    """,
}
MODULES = [f"{room}.{module}" for room, modules in ROOMS.items() for module in modules.split()]
RANK = {name: rank for rank, name in enumerate(["version", *MODULES])}
ABOVE_ENGINE = set(list(ROOMS)[list(ROOMS).index("engine") + 1 :])
BELOW_25_LINES = {  # and why
    "version": "setuptools reads it alone",
    "utils.defaults": "numbers that the command line needs before torch is imported",
    "utils.progress": "one type that every room may take",
}
EXEMPT = {"latentpipe/__init__.py", "latentpipe/__main__.py"}
SERVES = {"guard", "login", "serving", "request_checks"}  # of the front end: what stands between the network and gradio
SERVING = {"fastapi", "starlette", "uvicorn"}  # what gradio itself is served by
PUBLIC = {
    "Comparison",
    "Diagnosis",
    "Evaluation",
    "Verdict",
    "check_swap",
    "compare_vaes",
    "diagnose_vae",
    "encode_folder",
    "encode_shards",
    "EncodedShards",
    "evaluate_vae",
    "find_model",
    "load_vae",
    "train_denoiser",
    "train_lora",
    "train_vae",
    "fit_adapter",
    "swap_vae",
    "Engine",
    "Finished",
    "LatentPipeline",
    "LatentSpace",
    "Picture",
    "Recipe",
    "Replay",
    "Settings",
    "Stage",
    "StepDone",
    "VAEStage",
}


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and full name of everything a module imports, inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def module(name: str) -> str:
    """The listed module that a file or a dotted name lies in, as "vae.stage"; of a package, the package."""
    parts = name.replace("/", ".").removesuffix(".py").removesuffix(".__init__").split(".")[1:]
    return next((".".join(parts[:size]) for size in range(len(parts), 0, -1) if ".".join(parts[:size]) in RANK), ".".join(parts))


def test_the_list_names_every_module() -> None:
    assert sorted(module(name) for name in NAMES if name not in EXEMPT and not name.endswith("__init__.py")) == sorted(RANK)


def test_the_root_holds_rooms_alone() -> None:
    shown = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert shown == set(ROOMS) | {"__init__.py", "__main__.py", "version.py", "py.typed", "ui", "configs", "embedded"}
    assert len(ROOMS) <= 12


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXEMPT and not name.endswith("__init__.py")])
def test_imports_go_down_the_list(name: str) -> None:
    own = module(name)
    for line, target in imported(TREES[name]):
        if target.split(".")[0] != "latentpipe":
            continue
        other = module(target)
        if target.split(".")[1] == "ui":  # the front end lies on top; one verb starts it
            assert own == "cli.ui", f"{name}:{line} imports {target}"
            continue
        if target.split(".")[1] in PUBLIC | {"replay", "UserError"}:  # the public names, lazily, of the package itself
            assert own.split(".")[0] in ABOVE_ENGINE, f"{name}:{line} imports {target}"
            continue
        if other.startswith("train.config"):  # the package carries the names of its modules
            other = "train.config.base" if own.startswith("train.config") else "train.config.vae"
        assert other in RANK, f"{name}:{line} imports {target}, which the list does not name"
        assert RANK[other] < RANK[own], f"{name}:{line} imports {target}, which comes later"


@pytest.mark.parametrize("name", NAMES)
def test_no_private_name_crosses_modules(name: str) -> None:
    for line, target in imported(TREES[name]):
        last = target.split(".")[-1]
        private = target.startswith("latentpipe.") and last.startswith("_") and not last.startswith("__")
        assert not private, f"{name}:{line} imports {target}"


def test_no_module_is_too_small_to_be_found() -> None:
    lines = {module(name): len((ROOT / name).read_text().splitlines()) for name in NAMES if module(name) in RANK}
    assert {name for name, count in lines.items() if count < 25} == set(BELOW_25_LINES)


SAME_IN_EVERY_TAB = {"build"}  # of the page: what lays a tab out


@pytest.mark.parametrize("room", [*ROOMS, "ui"])
def test_public_names_are_unique_in_a_room(room: str) -> None:
    """Of functions, classes and types; a constant in capitals is its module's own."""
    folder = ROOT / "ui" if room == "ui" else PACKAGE / room
    homes: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = [node.name]
            for name in names:
                if not name.startswith("_") and not name.isupper():
                    homes.setdefault(name, []).append(path.relative_to(folder).as_posix())
    several = {name: places for name, places in homes.items() if len(places) > 1}
    assert {name: places for name, places in several.items() if room != "ui" or name not in SAME_IN_EVERY_TAB} == {}


def test_there_are_no_cycles_within_a_room() -> None:
    edges: dict[str, set[str]] = {}
    for name in NAMES:
        module = name.replace("/", ".").removesuffix(".py")
        edges[module] = {
            other.replace("/", ".").removesuffix(".py")
            for _, target in imported(TREES[name])
            for other in NAMES
            if name not in EXEMPT
            and other not in EXEMPT
            and f"{target}.".startswith(other.replace("/", ".").removesuffix(".py") + ".")
        } - {module}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in edges[module]:
                visit(other, [*path, module])
            done.add(module)

    for module in edges:
        visit(module, [])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_unsafe_or_foreign_is_imported_or_called(name: str) -> None:
    for line, target in imported(TREES[name]):
        root = target.split(".")[0]
        assert root not in {"gradio", "torchvision", "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}, (
            f"{name}:{line}"
        )
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "compile", "__import__", "os.system", "yaml.load"}, f"{name}:{node.lineno} {called}"
        if called == "torch.load":
            safe = [word.value for word in node.keywords if word.arg == "weights_only"]
            assert safe, f"{name}:{node.lineno}"
            assert ast.unparse(safe[0]) == "True", f"{name}:{node.lineno}"
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert keywords.get("shell") != "True", f"{name}:{node.lineno}"
        assert keywords.get("trust_remote_code") != "True", f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_stay_short(name: str) -> None:
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= 300, f"{name} has {lines} lines"
    limit = 90 if name.startswith("latentpipe/train/") else 50
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= limit, f"{name}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("name", NAMES)
def test_everything_public_is_explained(name: str) -> None:
    tree = TREES[name]
    if not name.endswith("__init__.py") or tree.body:
        assert ast.get_docstring(tree), f"{name} has no docstring"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    inside = [node for owner in classes if not owner.name.startswith("_") for node in owner.body]
    for node in [*tree.body, *inside]:
        if any(ast.unparse(mark) == "overload" for mark in getattr(node, "decorator_list", ())):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if node in inside and node.name == "forward" and not ast.get_docstring(node):
                pytest.fail(f"{name}:{node.lineno} forward has no docstring")
            assert ast.get_docstring(node), f"{name}:{node.lineno} {node.name} has no docstring"


@pytest.mark.parametrize("path", sorted((ROOT / "ui").glob("*.py")), ids=lambda path: path.stem)
def test_the_front_end_is_blocks_and_callbacks(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    assert len(path.read_text().splitlines()) <= 300
    allowed = {"gradio", "latentpipe", "PIL"} | (SERVING if path.stem in SERVES else set())
    for line, target in imported(tree):
        root = target.split(".")[0]
        assert root in allowed | sys.stdlib_module_names, f"{path.name}:{line} imports {target}"
        assert root not in {"pickle", "marshal", "shelve", "subprocess"}, f"{path.name}:{line} imports {target}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{path.name}:{node.lineno} {node.name} has {length} lines"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"eval", "exec", "compile", "__import__", "os.system"}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}:{node.lineno} {node.name} has no docstring"


def test_no_sentence_is_cut_off() -> None:
    """An f-string alone in a line is the rest of a message that lost its parentheses."""
    for name in NAMES:
        for node in ast.walk(TREES[name]):
            alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.JoinedStr)
            assert not alone, f"{name}:{getattr(node, 'lineno', 0)}"


def test_factors_are_typed_in_one_place_only() -> None:
    for name in NAMES:
        if name != "latentpipe/vae/latent_space.py":
            assert not re.search(r"0\.18215|0\.13025", (ROOT / name).read_text()), name


def test_only_the_stage_calls_the_autoencoder() -> None:
    for name in NAMES:
        if name == "latentpipe/vae/stage.py":
            continue
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"encode", "decode"}:
                owner = ast.unparse(node.func.value)
                assert not owner.endswith("vae"), f"{name}:{node.lineno} calls {owner}.{node.func.attr}"


def test_only_the_space_reads_the_factors() -> None:
    for name in NAMES:
        if name in {"latentpipe/vae/latent_space.py", "latentpipe/vae/stage.py"}:
            continue
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}, f"{name}:{node.lineno}"


def test_the_public_names_exist() -> None:
    import latentpipe

    assert sorted(latentpipe.__all__) == latentpipe.__all__
    for name in latentpipe.__all__:
        assert getattr(latentpipe, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = latentpipe.nonsense  # type: ignore[attr-defined]


OWN_READERS = {
    "json.load": {"latentpipe/utils/reading.py"},
    "json.loads": {"latentpipe/utils/reading.py"},
    "yaml.safe_load": set(),
    "Image.open": {"latentpipe/utils/images.py"},
}


@pytest.mark.parametrize("name", NAMES + [f"ui/{path.name}" for path in sorted((ROOT / "ui").glob("*.py"))])
def test_files_are_read_within_limits(name: str) -> None:
    """One way in for JSON, YAML and pictures: `utils.reading` and `utils.images.picture_file`."""
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in OWN_READERS:
            assert name in OWN_READERS[called], f"{name}:{node.lineno} calls {called}"
