"""What other libraries log: kept from the user while ours speaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from latentpipe.utils.deferred_imports import active, has_run


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of diffusers and transformers (torchvision is missing, ...) from the user."""
    from diffusers.utils import logging as diffusers_logging

    modules: list[Any] = [diffusers_logging]
    if has_run("transformers") or not active():  # what is put off says nothing
        from transformers.utils import logging as transformers_logging

        modules.append(transformers_logging)
    before = [(module, module.get_verbosity(), module.is_progress_bar_enabled()) for module in modules]
    for module, _, _ in before:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level, bars in before:
            module.set_verbosity(level)
            if bars:
                module.enable_progress_bar()
