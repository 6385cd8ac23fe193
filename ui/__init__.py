"""The interface in a browser. What gradio reads of the environment is settled here, before it is imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")  # gradio makes a table of so many events after each of them
for _name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
    # nothing here goes beyond the loopback, which no proxy leads to; and a proxy of a kind that needs a package (SOCKS) would
    # fail the import
    del os.environ[_name]
if "GRADIO_TEMP_DIR" not in os.environ:
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="latentpipe-ui-")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
