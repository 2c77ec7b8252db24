"""The command `chameleon VERB`. Progress goes to stderr, results to stdout; `--json` makes results machine-readable.

Wrong input ends with exit code 2 and one line that says what was wrong, where, and what to do; `--debug` shows the
traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from chameleon.errors import BadInput

if TYPE_CHECKING:
    from chameleon.data.token_shards import TokenShard
    from chameleon.data.tokenize import Report, Status, Watch
    from chameleon.generation.sampling import Sampling
    from chameleon.tokenizers.mixed import MixedTokenizer


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def is_first() -> bool:
    """Whether this is the first of several processes that train together: it speaks for all.

    torchrun and SLURM number them all; Lightning numbers nodes and those it starts on one.
    """
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


SPEAKS = is_first()


def say(text: str) -> None:
    """Progress, to stderr."""
    if SPEAKS:
        print(text, file=sys.stderr, flush=True)


def show(arguments: argparse.Namespace, value: Any, text: str) -> None:
    """A result, to stdout: `value` as JSON with --json, else `text`."""
    if SPEAKS:
        print(json.dumps(value, ensure_ascii=False) if arguments.json else text, flush=True)


def counter(part: str, done: int, total: int) -> None:
    say(f"{part}: {done} of {total}")


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """SIGTERM ends the block as an interrupt does, so that what was half written is removed then too."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt  # itself: where a shell has started the command with `&`, SIGINT is ignored

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- using a model ---------------------------------------------------------------------------------------------------


def load_model(arguments: argparse.Namespace) -> Any:
    from chameleon.generation.chameleon import Chameleon

    return Chameleon.load(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        weights=arguments.weights,
        window=arguments.window,
        compiled=arguments.compile,
    )


def sampling_of(arguments: argparse.Namespace, default: Sampling) -> Sampling:
    """`default` with what the command line says."""
    given = {key: getattr(arguments, key, None) for key in ("temperature", "top_p", "top_k", "repetition_penalty")}
    return replace(default, **{key: value for key, value in given.items() if value is not None})


def caption(arguments: argparse.Namespace) -> None:
    from chameleon.generation.sampling import GREEDY

    model = load_model(arguments)
    texts = model.caption_batch(
        arguments.image,
        examples=arguments.example,
        max_new=arguments.max_new,
        sampling=sampling_of(arguments, GREEDY),
        seed=arguments.seed,
    )
    rows = [{"image": image, "caption": text} for image, text in zip(arguments.image, texts, strict=True)]
    lines = [row["caption"] if len(rows) == 1 else f"{row['image']}\t{row['caption']}" for row in rows]
    show(arguments, rows, "\n".join(lines))


def answer(arguments: argparse.Namespace) -> None:
    from chameleon.generation.sampling import GREEDY

    sampling = sampling_of(arguments, GREEDY)
    text = load_model(arguments).answer(
        arguments.image,
        arguments.question,
        examples=arguments.example,
        max_new=arguments.max_new,
        sampling=sampling,
        seed=arguments.seed,
    )
    show(arguments, {"image": arguments.image, "question": arguments.question, "answer": text}, text)


def draw(arguments: argparse.Namespace) -> None:
    from chameleon.document_view import as_grid
    from chameleon.generation.engine import IMAGE_SAMPLING

    out = Path(arguments.out)
    check_picture_path(out)
    if arguments.number < 1:
        raise BadInput("expected 1 or more", where=f"--number {arguments.number}")
    if arguments.like and arguments.complete:
        raise BadInput("give --like or --complete, not both", where="draw")
    if arguments.prompt is None and not (arguments.like or arguments.complete):
        raise BadInput("nothing says what to draw", where="draw", remedy="give a prompt, --like or --complete")
    if arguments.best is not None and not 1 <= arguments.best <= arguments.number:
        raise BadInput(f"expected 1 to {arguments.number}, the number drawn", where=f"--best {arguments.best}")
    if arguments.best and arguments.prompt is None:
        raise BadInput("--best asks how well pictures fit a prompt", where="draw", remedy="give one")
    model = load_model(arguments)
    common: dict[str, Any] = {
        "seed": arguments.seed,
        "guidance": arguments.guidance,
        "sampling": sampling_of(arguments, IMAGE_SAMPLING),
    }
    count = arguments.number
    if arguments.like:
        pictures = model.variations(arguments.like, count, likeness=arguments.likeness, prompt=arguments.prompt, **common)
    elif arguments.complete:
        prompt = arguments.prompt or ""
        pictures = model.complete(arguments.complete, upper=arguments.upper, prompt=prompt, count=count, **common)
    else:
        pictures = model.samples(arguments.prompt, count, **common)
    seeds = list(range(arguments.seed, arguments.seed + count))
    if arguments.best:
        order = model.rank(pictures, arguments.prompt)[: arguments.best]
        pictures, seeds = [pictures[place] for place in order], [seeds[place] for place in order]
    save_picture(as_grid(pictures), out)
    show(arguments, {"prompt": arguments.prompt, "out": str(out), "seeds": seeds}, str(out))


def check_picture_path(path: Path) -> None:
    from PIL import Image as PILImage

    if PILImage.registered_extensions().get(path.suffix.lower()) not in PILImage.SAVE:
        raise BadInput("not a picture's ending", where=path, remedy="use .png, .webp or .jpg")
    if not path.parent.is_dir():
        raise BadInput("no such folder", where=path.parent, remedy="make it first")


def save_picture(picture: Any, path: Path) -> None:
    with written_file(path) as partial:
        picture.save(partial)


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` when the block ends well, so that a failure leaves what was there."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise BadInput(f"could not be written ({error})", where=path) from None
    finally:
        partial.unlink(missing_ok=True)


def generate(arguments: argparse.Namespace) -> None:
    from chameleon.document import Document, Image, read_json_document
    from chameleon.document_view import PAGES, TerminalView, write_page
    from chameleon.files import written_into
    from chameleon.generation.engine import IMAGE_SAMPLING, TEXT_SAMPLING
    from chameleon.generation.streaming import Forming
    from chameleon.tokenizers.mixed import merged

    content = read_json_document(Path(arguments.document))
    if arguments.page not in PAGES:
        raise BadInput(f"no page {arguments.page!r}", where="--page", remedy=f"use {' or '.join(PAGES)}")
    scales = arguments.guidance
    if scales is not None and len(scales) > 2:
        raise BadInput("one scale, or one of pictures and one of the full prompt", where="--guidance")
    model = load_model(arguments)
    view = None if arguments.json else TerminalView()
    parts: list[Any] = []
    stream = model.stream(
        content,
        max_new=arguments.max_new,
        max_images=arguments.max_images,
        max_text=arguments.max_text,
        format=None if arguments.format is None else [part for part in arguments.format.split(",") if part],
        guidance=None if scales is None else scales[0] if len(scales) == 1 else tuple(scales),
        text=sampling_of(arguments, TEXT_SAMPLING),
        image=replace(sampling_of(arguments, IMAGE_SAMPLING), repetition_penalty=1.0),
        seed=arguments.seed,
        previews=1 if view is not None and view.draws is not None else 0,
    )
    with written_into(Path(arguments.out)) if arguments.out else nullcontext() as folder:
        try:
            for part in stream:
                if not isinstance(part, Forming):
                    parts.append(part)
                if view is not None:
                    view.show(part)
        finally:
            if view is not None:
                view.close()
        made = Document(tuple(merged(parts)))
        if view is not None:
            print()
        if folder is not None:
            page, names = write_page(folder, made.parts, arguments.page)
    if folder is not None:
        files = iter(names)
        kept = [Image(Path(arguments.out) / next(files)) if isinstance(p, Image) else p for p in made.parts]
        made = Document(tuple(kept))
        say(f"written to {Path(arguments.out) / page}")
    elif made.images and view is not None and view.draws is None:
        say("pictures were not kept; --out DIR keeps them")
    if view is None:
        show(arguments, made.to_json(), "")


def evaluate(arguments: argparse.Namespace) -> None:
    from chameleon.evaluation.emoji import PARTS
    from chameleon.evaluation.emoji import evaluate as run

    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        raise BadInput(f"no part {sorted(unknown)[0]!r}", where="--parts", remedy=f"use {', '.join(PARTS)}")
    figures = run(
        load_model(arguments),
        concepts=arguments.concepts,
        drawings=arguments.drawings,
        seed=arguments.seed,
        parts=arguments.parts or PARTS,
        progress=counter,
    )
    show(arguments, figures, table(figures))


def table(figures: dict[str, Any]) -> str:
    """Nested figures as lines of `name  value`."""
    flat: list[tuple[str, float]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix} / {key}" if prefix else key, inner)
        else:
            flat.append((prefix, value))

    walk("", figures)
    width = max((len(name) for name, _ in flat), default=0)
    return "\n".join(f"{name:<{width}}  {value:.4g}" for name, value in flat)


def info(arguments: argparse.Namespace) -> None:
    from chameleon.bundle import PROVENANCE_FILE, SHIPPED
    from chameleon.files import RECORD

    folder = Path(arguments.folder) if arguments.folder else SHIPPED
    if (folder / RECORD).is_file():
        info_of_run(arguments, folder)
        return
    if (folder / PROVENANCE_FILE).is_file():
        if arguments.check or arguments.show is not None or arguments.html:
            raise BadInput("--check, --show and --html are for token shards", where=folder)
        described = describe_bundle(folder)
        show(arguments, described, as_lines(described))
    else:
        info_of_shards(arguments, folder)


def info_of_run(arguments: argparse.Namespace, folder: Path) -> None:
    from chameleon.run_view import describe as describe_run
    from chameleon.run_view import draw_curves

    if arguments.check or arguments.show is not None or arguments.html:
        raise BadInput("--check, --show and --html are for token shards", where=folder)
    described = describe_run(folder)
    curves = Path(arguments.curves) if arguments.curves else folder / "curves.png"
    check_picture_path(curves)
    with written_file(curves) as path:
        draw_curves(folder, path)
    described["curves"] = str(curves)
    lists = {key: described[key] for key in ("checkpoints", "events")}
    text = as_lines({key: value for key, value in described.items() if key not in lists})
    for key, values in lists.items():
        text += "".join(f"\n{key if not number else '':<22}{value}" for number, value in enumerate(values))
    show(arguments, described, text)


def info_of_shards(arguments: argparse.Namespace, folder: Path) -> None:
    from chameleon.data.token_shards import open_shards, shard_folders
    from chameleon.shard_view import as_line, as_page, chosen, describe

    if arguments.check:
        places = shard_folders(folder)
        damaged = [error for place in places if (error := damage_of(place)) is not None]
        for line in damaged:
            say(line)
        if damaged:
            raise BadInput(
                f"{len(damaged)} of {len(places)} shards are damaged", where=folder, remedy="tokenize them again"
            )
    shards = open_shards(folder)
    described = describe_shards(shards)
    if arguments.check:
        described["checked"] = "checksums, offsets and ids are good"
    text = as_lines(described)
    if arguments.show is not None and arguments.show < 1:
        raise BadInput("expected 1 or more", where=f"--show {arguments.show}")
    if arguments.show is not None or arguments.html:
        tokenizer = tokenizer_of(arguments)
        shards = open_shards(folder, tokenizer.fingerprint)
        documents = chosen(shards, 20 if arguments.show is None else arguments.show)
        if arguments.html:
            with written_file(Path(arguments.html)) as path:
                path.write_text(as_page(documents, tokenizer, folder.name), encoding="utf-8")
            described["page"] = arguments.html
            text += f"\n{'page':<22}{arguments.html}"
        else:
            described["shown"] = [describe(*place, tokenizer) for place in documents]
            text = "\n\n".join((text, *map(as_line, described["shown"])))
    show(arguments, described, text)


def tokenizer_of(arguments: argparse.Namespace) -> MixedTokenizer:
    """The tokenizers of --model or --tokenizers; with neither, the shipped ones."""
    from chameleon.bundle import Bundle
    from chameleon.tokenizers.mixed import MixedTokenizer

    if arguments.tokenizers and arguments.model:
        raise BadInput("give --model or --tokenizers, not both", where=arguments.verb)
    if arguments.tokenizers:
        return MixedTokenizer.load(Path(arguments.tokenizers))
    return Bundle.load(arguments.model).tokenizer


def as_lines(described: dict[str, Any]) -> str:
    width = max(22, *(len(key) + 2 for key in described))
    return "\n".join(f"{key:<{width}}{value}" for key, value in described.items())


def damage_of(folder: Path) -> str | None:
    """What is wrong with a token shard, or None."""
    from chameleon.data.token_shards import TokenShard

    try:
        TokenShard(folder).verify()
    except BadInput as error:
        return str(error)
    return None


def plan(arguments: argparse.Namespace) -> None:
    from chameleon.plan import DEVICES, Setup, make_plan, named_device

    chosen = [arguments.device] if arguments.device else list(DEVICES)
    for name in chosen:
        named_device(name)
    config, recipe = what_to_plan(arguments.what)
    given = {key: getattr(arguments, key) for key in ("devices", "utilisation")}
    for key in ("rows", "context", "precision", "optimizer", "sharding", "checkpointing"):
        value = getattr(arguments, key)
        given[key] = recipe[key] if value is None else value
    found = make_plan(config, Setup(**given))

    def table(title: str, part: Any) -> list[str]:
        rows = [(name.replace("_", " "), size) for name, size in [*vars(part).items(), ("together", part.total)]]
        return [title, *(f"  {name:<18}{size / 1e9:>10.3f} GB" for name, size in rows)]

    lines = [f"{arguments.what}: {config.parameters / 1e9:.3f} billion parameters"]
    lines += table("training, a device", found.training) + table("running in 16 bits", found.running)
    lines.append(f"{found.flops_per_token / 1e9:.2f} GFLOP for a token of training, a third of it for one that is read")
    for name in chosen:
        spare, speed = found.spare(name), found.tokens_per_second(name)
        fits = f"fits, {spare / 1e9:.1f} GB to spare" if spare >= 0 else f"does not fit, {-spare / 1e9:.1f} GB too much"
        days = f", {found.days(name, arguments.tokens):,.2f} days" if arguments.tokens and spare >= 0 else ""
        lines.append(f"  {name:<10}{fits:<34}{speed:>12,.0f} tokens/s{days}" if spare >= 0 else f"  {name:<10}{fits}")
    show(arguments, found.to_json(arguments.tokens), "\n".join(lines))


def what_to_plan(name: str) -> tuple[Any, dict[str, Any]]:
    """The model of a named size or a recipe, and what the recipe says of rows, context, precision and optimiser."""
    from chameleon.bundle import CONFIG_FILE
    from chameleon.files import read_json
    from chameleon.model.config import SIZES, ModelConfig, named_size
    from chameleon.train.recipe import PretrainRecipe, find_recipe, read_recipe

    if name in SIZES:
        config = SIZES[name]
        usual = {"precision": "bf16-mixed", "optimizer": "adamw", "sharding": "none", "checkpointing": "none"}
        return config, {"rows": 1, "context": config.context, **usual}
    try:
        find_recipe(name)
    except BadInput as error:
        raise BadInput("no such recipe or size", where=name, remedy=f"a size is one of {', '.join(SIZES)}") from error
    recipe = read_recipe(PretrainRecipe, name)
    if recipe.bundle is not None and (recipe.size is None or Path(recipe.bundle).is_dir()):
        path = Path(recipe.bundle) / CONFIG_FILE
        config = ModelConfig.from_json(read_json(path).get("model", {}), where=path)
    else:
        config = named_size(recipe.size or "mini", **recipe.model)
        if recipe.tokenizers is not None and Path(recipe.tokenizers).is_dir():
            from chameleon.tokenizers.mixed import MixedTokenizer

            config = replace(config, vocab_size=MixedTokenizer.load(Path(recipe.tokenizers)).vocabulary.size)
        else:
            missing = "bundle is" if recipe.bundle is not None else "tokenizers are"
            say(f"{name}: its {missing} not made yet; {config.vocab_size} ids are assumed")
    return config, {
        "rows": recipe.micro_rows or recipe.rows,
        "context": recipe.context or config.context,
        "precision": recipe.run.precision,
        "optimizer": recipe.optimizer.kind,
        "sharding": recipe.run.sharding,
        "checkpointing": recipe.checkpointing,
    }


def convert(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from chameleon.convert.convert import convert as run

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task("")

    def begin(total: int) -> None:
        bar.update(task, total=total)
        bar.start()

    with terminated_cleanly():
        found = run(
            arguments.source,
            arguments.target,
            arguments.to,
            model_dir=arguments.model_dir,
            tokenizer=arguments.tokenizer,
            shards=arguments.shards,
            prompting=arguments.prompting,
            progress=lambda count: bar.advance(task, count),
            begin=begin,
        )
    bar.stop()
    for note in found["notes"]:
        say(note)
    if not found["decoder"]:
        say("without a decoder" + ("" if arguments.to == "hf" else ", so it cannot draw; --tokenizer adds one"))
    text = f"{found['out']}: {found['parameters'] / 1e9:.3f} billion parameters, {found['vocabulary']} ids"
    show(arguments, found, text)


def describe_bundle(folder: Path) -> dict[str, Any]:
    from chameleon.bundle import Bundle

    bundle = Bundle.load(folder)
    shape, image = bundle.model.config, bundle.tokenizer.image.config
    return {
        "bundle": str(folder),
        "parameters": shape.parameters,
        "layers × width": f"{shape.layers} × {shape.width}",
        "heads / kv heads": f"{shape.heads} / {shape.kv_heads}",
        "context": shape.context,
        "vocabulary": bundle.vocabulary.size,
        "text pieces": bundle.vocabulary.text_count,
        "image codes": bundle.vocabulary.image_count,
        "picture": f"{image.resolution} pixels, {image.grid[0]}×{image.grid[1]} codes",
        "prompting": bundle.prompting,
        "tokenizers": bundle.tokenizer.fingerprint[:12],
        "megabytes": round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1),
    }


def describe_shards(shards: Sequence[TokenShard]) -> dict[str, Any]:
    modalities: dict[str, int] = {}
    for shard in shards:
        for name, count in shard.description["by_modality"].items():
            modalities[name] = modalities.get(name, 0) + count
    return {
        "shards": len(shards),
        "documents": sum(map(len, shards)),
        "tokens": sum(shard.tokens for shard in shards),
        "pictures": sum(shard.description["images"] for shard in shards),
        "variants": max(shard.variants for shard in shards),
        **{f"tokens of {name}": count for name, count in modalities.items()},
        "tokenizers": ", ".join(sorted({shard.description["fingerprint"][:12] for shard in shards})),
    }


# --- making a model --------------------------------------------------------------------------------------------------


def say_skipped(report: Report) -> None:
    """Names the first samples that were passed over, and says how many there were."""
    for line in report.examples:
        say(f"skipped: {line}")
    if report.skipped:
        say(f"skipped {sum(report.skipped.values())} in all")


def fit_text(arguments: argparse.Namespace) -> None:
    from chameleon.data.sources import texts_of
    from chameleon.data.tokenize import Report
    from chameleon.tokenizers.text import SentencePieceTokenizer
    from chameleon.vocabulary import SPECIALS

    out = Path(arguments.out)
    report = Report()
    pieces = arguments.pieces
    if arguments.vocab_size is not None:
        pieces = arguments.vocab_size - arguments.image_codes - len(SPECIALS)
        if pieces < 1:
            raise BadInput(
                f"{arguments.image_codes} image codes and {len(SPECIALS)} specials leave no room for text",
                where=f"--vocab-size {arguments.vocab_size}",
                remedy="ask for more",
            )
    tokenizer = SentencePieceTokenizer.fit(
        texts_of(arguments.source, report.skip),
        pieces,
        sample_bytes=arguments.sample_mb << 20,
        seed=arguments.seed,
    )
    tokenizer.save(out)
    say_skipped(report)
    path = out / tokenizer.FILE
    show(arguments, {"out": str(path), "pieces": len(tokenizer)}, f"{path}: {len(tokenizer)} pieces")


def fit_image(arguments: argparse.Namespace) -> None:
    from chameleon.data.tokenize import Report
    from chameleon.train.image_tokenizer import fit_image as run
    from chameleon.train.recipe import FitImageRecipe, read_recipe

    recipe = read_recipe(FitImageRecipe, arguments.config, arguments.override)
    take_resuming(arguments, recipe.run)
    report = Report()
    _, figures = run(recipe, report.skip)
    say_skipped(report)
    show(arguments, {"out": recipe.run.out, **figures}, f"{recipe.run.out}\n{table(figures)}")


@contextmanager
def watching_tokenize() -> Iterator[Watch]:
    """Shows how far tokenizing is: a line that changes on a terminal, else a new one every ten seconds."""
    import time

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    on_terminal, last = sys.stderr.isatty(), 0.0

    def line(status: Status) -> str:
        each = max(status.seconds, 1e-9)
        left = f", {status.left:,.0f} s left" if status.left is not None else ""
        return (
            f"{status.shards} of {status.shards_in_all} shards, {status.documents:,} documents, "
            f"{status.skipped:,} skipped, {status.pictures / each:,.1f} pictures/s, "
            f"{status.tokens / each:,.0f} tokens/s{left}"
        )

    with Live(console=Console(stderr=True), transient=True) if on_terminal and SPEAKS else nullcontext() as live:

        def watch(status: Status) -> None:
            nonlocal last
            if live is not None:
                live.update(Text(line(status)))
            elif time.monotonic() - last >= 10 or status.shards == status.shards_in_all:
                say(line(status))
                last = time.monotonic()

        yield watch


def tokenize(arguments: argparse.Namespace) -> None:
    from chameleon.data.ray_engine import ray_engine
    from chameleon.data.tokenize import TokenizeOptions, local
    from chameleon.data.tokenize import tokenize as run
    from chameleon.tensor_files import check_device
    from chameleon.train.recipe import read_recipe

    if arguments.workers < 0 or (arguments.actors is not None and arguments.actors < 1):
        raise BadInput("--workers is 0 or more, --actors 1 or more", where="tokenize")
    if arguments.engine == "local" and (arguments.actors is not None or arguments.ray_address is not None):
        raise BadInput("--actors and --ray-address are for --engine ray", where="tokenize")
    check_device(arguments.device)
    options = read_recipe(TokenizeOptions, arguments.config, arguments.set)
    tokenizer = tokenizer_of(arguments)
    if arguments.engine == "ray":
        engine = ray_engine(arguments.ray_address, actors=arguments.actors, device=arguments.device)
    else:
        engine = local
        tokenizer.image.network.to(arguments.device)
    with terminated_cleanly(), watching_tokenize() as watch:
        report = run(
            arguments.source,
            tokenizer,
            Path(arguments.out),
            options=options,
            engine=engine,
            workers=arguments.workers,
            strict=arguments.strict,
            watch=watch,
        )
    say_skipped(report)
    for name in report.others:
        say(f"also in {arguments.out}, made of other sources: {name}")
    value = report.to_json()
    show(
        arguments,
        value,
        "\n".join(
            f"{key:<16}{value[key]}" for key in ("documents_in", "documents_out", "skipped", "tokens", "duplicate_share")
        ),
    )
    if not report.documents_out:
        say(f"chameleon tokenize: of {report.documents_in} samples none is left")
        raise SystemExit(3)
    if report.skipped_share > arguments.max_skipped:
        say(f"chameleon tokenize: {report.skipped_share:.1%} was skipped, more than --max-skipped {arguments.max_skipped}")
        raise SystemExit(3)


def take_resuming(arguments: argparse.Namespace, run: Any) -> None:
    run.resume |= arguments.resume
    run.force |= arguments.force


def run_training(arguments: argparse.Namespace) -> None:
    from chameleon.train.recipe import FinetuneRecipe, PretrainRecipe, TrainRecipe, read_recipe
    from chameleon.train.run import train

    kind: type[TrainRecipe] = PretrainRecipe if arguments.verb == "pretrain" else FinetuneRecipe
    recipe = read_recipe(kind, arguments.config, arguments.override)
    take_resuming(arguments, recipe.run)
    _, figures = train(recipe)
    out = f"{recipe.run.out}/bundle"
    show(arguments, {"out": out, **figures}, f"{out}\n{table(figures)}")


def demo(arguments: argparse.Namespace) -> None:
    from chameleon.demo import run_road

    page = run_road(arguments.recipe, Path(arguments.out), say=say)
    show(arguments, {"page": str(page)}, str(page))


# --- the parser ------------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(
        prog="chameleon", description="Text and pictures as one sequence of tokens: train such models, and use them."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)

    def verb(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Parser:
        sub: Parser = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="results as JSON")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        return sub

    def model_options(sub: Parser) -> None:
        sub.add_argument("--model", metavar="BUNDLE", help="a bundle's folder; left out, the shipped one")
        sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: cpu)")
        sub.add_argument(
            "--dtype", default="auto", help="bfloat16, float32, float16 (default: bfloat16 where that is fast)"
        )
        sub.add_argument(
            "--weights",
            default="auto",
            help="plain, packed, int8, int4 (default: packed for bfloat16 on CPUs, else plain)",
        )
        sub.add_argument("--window", type=int, default=1, help="codes of a picture decoded at once (default: 1)")
        sub.add_argument("--compile", action="store_true", help="compile what makes an id at a time: a minute, then faster")
        sub.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")

    def tokenizer_options(sub: Parser) -> None:
        sub.add_argument("--model", metavar="BUNDLE", help="bundle whose tokenizers are used; left out, the shipped one")
        sub.add_argument("--tokenizers", metavar="DIR", help="folder with both tokenizers, instead of --model")

    def sampling_options(sub: Parser, max_new: int) -> None:
        sub.add_argument("--temperature", type=float, help="0 is greedy")
        sub.add_argument("--top-p", type=float, help="mass of the nucleus, 1 keeps all")
        sub.add_argument("--top-k", type=int, help="keep this many ids, 0 keeps all")
        if max_new:
            sub.add_argument("--repetition-penalty", type=float, help="on text met before, 1 is none")
            sub.add_argument("--max-new", type=int, default=max_new, help=f"ids at most (default: {max_new})")

    def recipe_options(sub: Parser) -> None:
        sub.add_argument("--config", required=True, metavar="RECIPE", help="a YAML file or the name of a shipped recipe")
        sub.add_argument("override", nargs="*", metavar="key=value", help="keys of the recipe to change")

    def resuming_options(sub: Parser) -> None:
        sub.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in run.out")
        sub.add_argument(
            "--force", action="store_true", help="go on though keys have changed that make another run, or memory is short"
        )

    sub = verb("demo", demo, "The whole road on the embedded set, and a gallery page.")
    sub.add_argument("--recipe", default="demo", help="demo (minutes) or emoji (the shipped model, hours)")
    sub.add_argument("--out", default="runs/demo", help="folder of the run (default: runs/demo)")

    sub = verb("fit-text", fit_text, "Fits the text tokenizer.")
    sub.add_argument("source", nargs="+", help="sources of text")
    size = sub.add_mutually_exclusive_group(required=True)
    size.add_argument("--vocab-size", type=int, help="how many ids there are in all: image codes, specials and text pieces")
    size.add_argument("--pieces", type=int, help="how many text pieces, the 256 bytes included")
    sub.add_argument("--image-codes", type=int, default=8192, help="image codes that --vocab-size counts (default: 8192)")
    sub.add_argument("--out", required=True, help="folder for text_tokenizer.model")
    sub.add_argument("--sample-mb", type=int, default=64, help="text to learn from, in MiB at most (default: 64)")
    sub.add_argument("--seed", type=int, default=0)

    sub = verb("fit-image", fit_image, "Trains the image tokenizer.")
    recipe_options(sub)
    resuming_options(sub)

    sub = verb("tokenize", tokenize, "Turns sources into token shards.")
    sub.add_argument("source", nargs="+", help="files, patterns, KIND:PATTERN, or emoji:TASK")
    tokenizer_options(sub)
    sub.add_argument("--out", required=True, help="folder for the token shards")
    sub.add_argument("--strict", action="store_true", help="stop at the first sample that cannot be used")
    sub.add_argument("--config", metavar="OPTIONS", help="a YAML file of filters, variants …")
    sub.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="one of them, such as filters.min_side=256"
    )
    sub.add_argument("--workers", type=int, default=0, help="processes that open pictures and split text (default: 0)")
    sub.add_argument("--device", default="cpu", help="where pictures are encoded (default: cpu)")
    sub.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster")
    sub.add_argument("--ray-address", metavar="HOST:PORT", help="an existing cluster; left out, one is started here")
    sub.add_argument("--actors", type=int, help="Ray actors (default: one a GPU, or one a CPU)")
    sub.add_argument("--max-skipped", type=float, default=0.05, help="share that makes the exit code 3 (default: 0.05)")

    for name, text in (("pretrain", "Trains a model on documents."), ("finetune", "Tunes a model on conversations.")):
        sub = verb(name, run_training, text)
        recipe_options(sub)
        resuming_options(sub)

    sub = verb("caption", caption, "Says what pictures show.")
    sub.add_argument("image", nargs="+")
    sub.add_argument(
        "--example",
        nargs=2,
        action="append",
        default=[],
        metavar=("IMAGE", "CAPTION"),
        help="one to go by; may be repeated",
    )
    model_options(sub)
    sampling_options(sub, 30)

    sub = verb("answer", answer, "Answers a question about a picture.")
    sub.add_argument("image")
    sub.add_argument("question")
    sub.add_argument(
        "--example",
        nargs=3,
        action="append",
        default=[],
        metavar=("IMAGE", "QUESTION", "ANSWER"),
        help="one to go by; may be repeated",
    )
    model_options(sub)
    sampling_options(sub, 30)

    sub = verb("draw", draw, "Draws pictures: by a prompt, like another, or the rest of one.")
    sub.add_argument("prompt", nargs="?")
    sub.add_argument("--out", required=True, metavar="FILE", help="the picture's file")
    sub.add_argument("--number", type=int, default=1, metavar="N", help="pictures, as a grid (default: 1)")
    sub.add_argument("--best", type=int, metavar="K", help="keep the K after which the model finds the prompt likeliest")
    sub.add_argument("--like", metavar="IMAGE", help="vary this picture")
    sub.add_argument("--likeness", type=float, default=0.3, help="share of its codes that stay (default: 0.3)")
    sub.add_argument("--complete", metavar="IMAGE", help="keep the upper part of this picture and draw the rest")
    sub.add_argument("--upper", type=float, default=0.5, help="how much of it (default: 0.5)")
    sub.add_argument("--guidance", type=float, default=1.5, help="scale of guidance, 1 is none (default: 1.5)")
    model_options(sub)
    sampling_options(sub, 0)

    sub = verb("generate", generate, "Continues a document or conversation in JSON.")
    sub.add_argument("document", metavar="DOCUMENT.json")
    sub.add_argument("--out", metavar="DIR", help="folder for a page of what was made, with its pictures")
    sub.add_argument("--page", default="markdown", help="markdown or html (default: markdown)")
    sub.add_argument("--max-images", type=int, help="pictures at most (default: 1, or 0 for a bundle without decoder)")
    sub.add_argument("--max-text", type=int, help="ids of one run of text at most")
    sub.add_argument("--format", metavar="text,image,…", help="the parts to make (default: the model chooses)")
    sub.add_argument(
        "--guidance", type=float, nargs="+", metavar="SCALE", help="of pictures; or two: of the prompt's pictures, of all"
    )
    model_options(sub)
    sampling_options(sub, 256)

    sub = verb("evaluate", evaluate, "Measures a model on the embedded set's held-out styles.")
    sub.add_argument("--parts", nargs="*", default=[], help="reconstruction, captions, questions, drawings, likelihood")
    sub.add_argument("--concepts", type=int, help="a subset of this many concepts")
    sub.add_argument("--drawings", type=int, default=200, help="how many drawings (default: 200)")
    model_options(sub)

    sub = verb("plan", plan, "Memory, speed and days for a model on a number of devices.")
    sub.add_argument("what", metavar="SIZE|RECIPE", help="a named size (7b, 34b …), or a recipe")
    sub.add_argument("--rows", type=int, help="rows of one pass on a device (default: the recipe's, else 1)")
    sub.add_argument("--context", type=int, help="ids a row (default: the recipe's, else the model's)")
    sub.add_argument("--precision", help="bf16-mixed, bf16-true, 16-mixed, 16-true, 32-true (default: the recipe's)")
    sub.add_argument("--optimizer", help="adamw or muon (default: the recipe's)")
    sub.add_argument("--sharding", help="none, ddp or fsdp (default: the recipe's, else none)")
    sub.add_argument(
        "--checkpointing", help="none, selective or full: what is computed again (default: the recipe's, else none)"
    )
    sub.add_argument("--devices", type=int, default=1, help="how many (default: 1)")
    sub.add_argument("--device", help="one kind of device (default: a table of them)")
    sub.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached (default: 0.4)")
    sub.add_argument("--tokens", type=float, help="tokens to train on, for the number of days")

    sub = verb("convert", convert, "Weights from one format to another: a bundle, Meta's, Hugging Face's.")
    sub.add_argument("source", metavar="SRC", help="folder in any of the three formats, told apart by its files")
    sub.add_argument("target", metavar="DST", help="a new folder")
    sub.add_argument("--to", required=True, choices=("bundle", "hf", "meta"), help="the format to write")
    sub.add_argument("--model-dir", metavar="NAME", help="which of several models in Meta's format below SRC")
    sub.add_argument("--tokenizer", metavar="DIR", help="Meta's tokenizer folder, for what SRC lacks: its decoder, say")
    sub.add_argument("--shards", type=int, help="files of Meta's weights (default: as many as they came in)")
    sub.add_argument("--prompting", choices=("conversation", "document"), help="default: conversation, or the bundle's own")

    sub = verb("info", info, "Says what a bundle, a run or a folder of token shards holds.")
    sub.add_argument("folder", nargs="?", help="left out, the shipped bundle")
    sub.add_argument("--show", type=int, metavar="N", help="of token shards, show N documents spread over all")
    sub.add_argument("--html", metavar="FILE", help="show them on a page, with pictures, and masks in colour")
    sub.add_argument("--curves", metavar="FILE", help="of a run, where its curves go (default: RUN/curves.png)")
    sub.add_argument("--check", action="store_true", help="verify checksums, offsets and ids of token shards")
    tokenizer_options(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; exits with 2 for wrong input, 130 for an interrupt."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "override") and all("=" in text and text[0] != "-" for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.override += rest  # keys that stand behind an option
    try:
        arguments.run(arguments)
    except BadInput as error:
        if arguments.debug:
            raise
        say(f"chameleon {arguments.verb}: {error}")
        raise SystemExit(2) from None
    except OSError as error:
        if arguments.debug or not error.strerror:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        say(f"chameleon {arguments.verb}: {where}{error.strerror}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
