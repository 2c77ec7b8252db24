"""Running suites: batches go to the model, outputs to a journal, and figures to a scorecard.

Several processes, started by torchrun or srun as for training, share the batches of a folder: process r of n takes the
batches r, r + n, …, so the figures do not depend on n. They need a file system that all see, and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from chameleon.bundle import package_version
from chameleon.document import Document, Image
from chameleon.errors import BadInput
from chameleon.evaluation.journal import Journal, to_json
from chameleon.evaluation.part import EvaluatedModel, Item, Part
from chameleon.evaluation.scorecard import Scorecard, command_line, environment
from chameleon.evaluation.scorecard_page import write_page
from chameleon.evaluation.suite import NamedSuite
from chameleon.files import atomic_file, read_json, write_json
from chameleon.progress import format_duration
from chameleon.tokenizers.image import load_picture

HEADER_FILE = "evaluation.json"
"""What the outputs in a folder were made with; other settings need another folder."""
POLL_SECONDS, HEADER_SECONDS = 0.5, 600.0
WAIT_SECONDS = 3600.0
"""Without a new batch, after which the first process gives up waiting for the others."""
Status = Callable[[str], None]


def process_rank() -> tuple[int, int]:
    """Return (rank, number of processes) that a launcher gave this process: torchrun, or srun for a job's step."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def evaluate_suites(
    suites: Sequence[NamedSuite],
    model: EvaluatedModel,
    out: Path,
    *,
    source: str = "",
    options: dict[str, Any] | None = None,
    status: Status = lambda _: None,
) -> Scorecard | None:
    """Run suites, and write the scorecard and its page to `out`; the first process returns it, the others None.

    source: where the model came from. options: those that it was loaded with, kept for repeating. status: called with a
    line of progress. What an earlier, interrupted call with the same settings left in `out` is used. Raises `BadInput`
    where `out` holds an evaluation with other settings.
    """
    rank, world = process_rank()
    start = time.monotonic()
    parts = {suite.name: suite.settings.build_parts() for suite in suites}
    data = {suite.name: suite.settings.fingerprints() for suite in suites}
    described = model.describe()
    header = {
        "model": {key: value for key, value in described.items() if key != "server"},  # it may move
        "version": package_version(),
        "suites": {s.name: {"kind": s.kind, "settings": s.plain_settings(), "data": data[s.name]} for s in suites},
    }
    check_header(out, header, rank)
    results: dict[str, Any] = {}
    for suite in suites:
        content: dict[str, Any] = {"kind": suite.kind, "settings": suite.plain_settings(), "data": data[suite.name]}
        content["parts"] = {}
        for index, part in enumerate(parts[suite.name]):
            result = run_part(suite.name, part, model, out, (rank - index) % world, rank, world, status)
            if rank == 0:
                content["parts"][part.name] = result
        results[suite.name] = content
    if rank:
        return None
    card = Scorecard(
        {
            "format": 1,
            "command": command_line(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.monotonic() - start, 1),
            "model": {"source": source, **described},
            "options": options or {},
            "environment": environment(),
            "suites": results,
        }
    )
    card.write(out)
    write_page(card, out)
    return card


def check_header(out: Path, header: dict[str, Any], rank: int) -> None:
    """Write the header into a new folder; raise `BadInput` where the folder has another one."""
    path = out / HEADER_FILE
    if rank:
        deadline = time.monotonic() + HEADER_SECONDS
        while not (path.is_file() and read_json(path) == header):
            if time.monotonic() > deadline:
                raise BadInput("the first process has not begun this evaluation", where=path)
            time.sleep(POLL_SECONDS)
        return
    if path.is_file():
        present = read_json(path)
        if present != header:
            raise BadInput(
                f"holds outputs of another evaluation, {first_difference(present, header)}",
                where=out,
                remedy="give another --out, or remove the folder",
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise BadInput("not empty, and no evaluation", where=out, remedy="give another --out")
    with atomic_file(path) as partial:
        write_json(partial, header)


def first_difference(present: Any, wanted: Any, name: str = "") -> str:
    """Return a description of the first key whose values differ."""
    if isinstance(present, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys((*present, *wanted)):
            if present.get(key) != wanted.get(key):
                return first_difference(present.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    return f"whose {name} is {present!r}, not {wanted!r}"


def run_part(
    suite: str, part: Part, model: EvaluatedModel, out: Path, first: int, rank: int, world: int, status: Status
) -> dict[str, Any] | None:
    """Run a part's missing batches; on the first process wait for the others, score, and return the part's content.

    first: the batch that this process begins with; it goes on in steps of `world`.
    """
    items = list(part.items())
    if not items:
        raise BadInput("no samples", where=f"{suite} / {part.name}", remedy="are the files those of the suite?")
    check_keys(items, f"{suite} / {part.name}")
    journal = Journal(out, suite, part.name, rank)
    num_batches = -(-len(items) // part.batch_size)
    present = journal.batches()
    mine = [batch for batch in range(first, num_batches, world) if batch not in present]
    start = time.monotonic()
    for count, batch in enumerate(mine):
        done = min(len(items), (len(present) + count * world) * part.batch_size)
        left = (time.monotonic() - start) / count * (len(mine) - count) if count else None
        time_left = f", {format_duration(left)} left" if left is not None else ""
        status(f"{suite} / {part.name}: {done} of {len(items)}{time_left}")
        chosen = items[batch * part.batch_size : (batch + 1) * part.batch_size]
        outputs = part.run(model, chosen, batch * part.batch_size)
        journal.append(batch, [item.key for item in chosen], outputs)
    if rank:
        return None
    wait_for_others(journal, num_batches, f"{suite} / {part.name}", status)
    status(f"{suite} / {part.name}: scoring {len(items)}")
    outputs = journal.outputs()
    scores = part.score(model, items, outputs)
    save = input_saver(out)
    samples = [
        {
            "key": item.key,
            "prompt": to_json(readable(item.prompt), save),
            "expected": to_json(item.expected, save),
            "output": output,
            **({"group": item.group} if item.group is not None else {}),
            **({"category": item.category} if item.category else {}),
            "scores": terms,
        }
        for item, output, terms in zip(
            scores.items or items, scores.outputs or journal.raw_outputs(), scores.of_items, strict=True
        )
    ]
    return {
        "method": getattr(part, "method", {}),
        "figures": {name: figure.to_json() for name, figure in scores.all_figures(items).items()},
        "metrics": {name: asdict(metric) for name, metric in scores.metrics.items()},
        "samples": samples,
    }


def wait_for_others(journal: Journal, num_batches: int, where: str, status: Status) -> None:
    """Wait until all batches are there. Raise `BadInput` where none has come for long: a process has died."""
    num_present, deadline = -1, 0.0
    while (count := len(journal.batches())) < num_batches:
        if count > num_present:
            num_present, deadline = count, time.monotonic() + WAIT_SECONDS
        elif time.monotonic() > deadline:
            missing = num_batches - count
            raise BadInput(
                f"{missing} batches of other processes are missing", where=where, remedy="start all of them again"
            )
        status(f"{where}: waiting for {num_batches - count} batches of other processes")
        time.sleep(POLL_SECONDS)


def check_keys(items: Sequence[Item], where: str) -> None:
    """Raise `BadInput` where two items have one key."""
    seen: set[str] = set()
    for item in items:
        if item.key in seen:
            raise BadInput(f"two samples have the key {item.key!r}", where=where, remedy="make the keys unique")
        seen.add(item.key)


def readable(prompt: Any) -> Any:
    """Return a prompt whose picture files are named by their full paths, not copied."""
    if isinstance(prompt, Path):
        return {"file": str(prompt.resolve())}
    if isinstance(prompt, Document):
        return [readable(part.image) if isinstance(part, Image) else part.text for part in prompt.parts]
    return prompt


def input_saver(out: Path) -> Callable[[PILImage.Image], str]:
    """Return a function that writes a picture of a prompt, once, and returns its path in `out`."""

    def save(picture: PILImage.Image) -> str:
        picture = load_picture(picture)
        digest = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
        name = Path("images", "inputs", f"{digest}.png")
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if not (out / name).is_file():
            with atomic_file(out / name) as partial:
                picture.save(partial, "PNG")
        return str(name)

    return save
