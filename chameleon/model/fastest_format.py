"""Which dtype and weight format is fastest on this processor, measured once and kept in the cache folder.

Candidates change a model's likelihoods by less than 0.1%: packed bfloat16, packed float32, and float16 weights under
float32. Each multiplies the same matrices with 1, 8 and 256 tokens; the fastest one takes the least time for a prompt of
1,024 tokens and 256 new ones, half of the requests alone and half of them eight at a time.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from chameleon.device import fast_bfloat16, has_fbgemm, is_apple_gpu, processor_name, supports_packed_bfloat16
from chameleon.errors import BadInput
from chameleon.files import atomic_file, cache_folder, write_json
from chameleon.model.quantization import WeightFormat, make_linear

TOKENS = (1, 8, 256)
"""Tokens of the products that are timed."""
PROMPT_LENGTH, NEW_TOKENS = 1024, 256
NUM_MATRICES, ROWS, COLUMNS = 8, 2048, 1024
"""64 MiB in float32, more than most caches hold."""
TRIES = 5
TABLE_FILE = "weight_formats.json"


class WeightForm(NamedTuple):
    """A dtype of activations, norms and cache, and a format of the matrices."""

    dtype: str
    weight_format: WeightFormat

    def __str__(self) -> str:
        return f"{self.weight_format} weights, {self.dtype}"


def choose_weight_form(dtype: str, weight_format: WeightFormat | Literal["auto"], device: str) -> WeightForm:
    """Return the form to load a model in, where dtype, weight format or both may be "auto". See `Chameleon.load`."""
    if torch.device(device).type != "cpu" or weight_format == "int4":
        if dtype == "auto":
            is_fast = fast_bfloat16(device) and not is_apple_gpu(device)
            dtype = "bfloat16" if is_fast or weight_format in ("int8", "int4") else "float32"
        return WeightForm(dtype, "plain" if weight_format == "auto" else weight_format)
    if weight_format == "auto":
        lossless_only = dtype != "auto"
        forms = [form for form in candidates() if dtype in ("auto", form.dtype)]
        forms = [form for form in forms if not (lossless_only and form.weight_format == "float16")]
        return fastest(forms) if forms else WeightForm(dtype, "plain")
    if dtype == "auto":
        if weight_format in ("plain", "packed"):
            dtype = "bfloat16" if fast_bfloat16() else "float32"
        else:
            dtype = "float32" if has_fbgemm() else "bfloat16"
    return WeightForm(dtype, weight_format)


def candidates() -> list[WeightForm]:
    """Return the forms that can be compared on this processor."""
    forms = [WeightForm("float32", "plain")]
    if torch.backends.mkldnn.is_available():
        forms.append(WeightForm("float32", "packed"))
    if has_fbgemm():
        forms.append(WeightForm("float32", "float16"))
    if supports_packed_bfloat16():
        forms.append(WeightForm("bfloat16", "packed"))
    return forms


def fastest(forms: Sequence[WeightForm]) -> WeightForm:
    """Return the fastest of some candidates; nothing is measured where there is no choice."""
    return forms[0] if len(forms) == 1 else min(forms, key=lambda form: request_seconds(format_table()[str(form)]))


def request_seconds(times: Sequence[float]) -> float:
    """Return the seconds that the products of a request take, from the times of `TOKENS`."""
    alone, eight, many = times
    return PROMPT_LENGTH * many / TOKENS[-1] + NEW_TOKENS * (alone + eight / 8) / 2


@functools.cache
def format_table() -> dict[str, list[float]]:
    """Return form → seconds of the products with each of `TOKENS`; measured where the cache folder has none yet.

    The times are those of this processor, number of threads and version of PyTorch.
    """
    path = cache_folder() / TABLE_FILE
    key = ", ".join((processor_name(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"))
    names = {str(form) for form in candidates()}
    tables = read_tables(path)
    if set(tables.get(key, {})) != names:
        tables[key] = measure()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial:  # another process may read it
                write_json(partial, tables)
        except (OSError, BadInput):  # it is measured again next time
            pass
    return tables[key]


def read_tables(path: Path) -> dict[str, dict[str, list[float]]]:
    """Return the tables of a file; none where it is missing or damaged."""
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
        for table in tables.values():
            assert all(len(times) == len(TOKENS) and min(times) > 0 for times in table.values())
    except (OSError, ValueError, AttributeError, TypeError, AssertionError):
        return {}
    return dict(tables)


@torch.inference_mode()
def measure() -> dict[str, list[float]]:
    """Time the products of all candidates in turn: the shortest of several tries."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(ROWS, COLUMNS, generator=generator) * 0.02 for _ in range(NUM_MATRICES)]
    inputs = [torch.randn(count, COLUMNS, generator=generator) for count in TOKENS]
    forms = candidates()
    dtypes = [getattr(torch, form.dtype) for form in forms]
    layers = [
        [make_linear(weight.to(dtype), form.weight_format) for weight in weights]
        for form, dtype in zip(forms, dtypes, strict=True)
    ]
    table = {str(form): [float("inf")] * len(TOKENS) for form in forms}
    for _ in range(TRIES):
        for form, dtype, of_form in zip(forms, dtypes, layers, strict=True):
            for index, x in enumerate(inputs):
                start = time.perf_counter()
                for layer in of_form:
                    layer(x.to(dtype))
                times = table[str(form)]
                times[index] = min(times[index], time.perf_counter() - start)
    return table
