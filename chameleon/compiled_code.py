"""Where PyTorch keeps the code that it compiles."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from chameleon.device import processor_name
from chameleon.files import cache_folder


def keep_compiled_code() -> None:
    """Keep compiled code in the cache folder, by processor, unless TORCHINDUCTOR_CACHE_DIR says where.

    PyTorch's own cache does not tell apart which instructions it may use, and the wrong ones compute NaN. PyTorch sets that
    variable itself, to torchinductor_USER in the folder of temporary files, when it first needs it.
    """
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    if folder == Path() or (folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith("torchinductor_")):
        processor = hashlib.sha256(processor_name().encode()).hexdigest()[:12]
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "compiled" / processor)
