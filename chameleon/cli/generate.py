"""Verbs that generate: caption, answer, draw, generate."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from chameleon.cli.options import (
    Verbs,
    add_model_options,
    add_sampling_options,
    check_image_path,
    load_model,
    sampling_from,
)
from chameleon.cli.output import print_progress, print_result
from chameleon.errors import BadInput


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add("caption", caption, "Caption images.")
    parser.add_argument("image", nargs="+")
    parser.add_argument(
        "--example",
        nargs=2,
        action="append",
        default=[],
        metavar=("IMAGE", "CAPTION"),
        help="few-shot example; may be repeated",
    )
    add_views_option(parser)
    add_model_options(parser)
    add_sampling_options(parser, max_new_tokens=0)

    parser = verbs.add("answer", answer, "Answer a question about an image.")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument(
        "--example",
        nargs=3,
        action="append",
        default=[],
        metavar=("IMAGE", "QUESTION", "ANSWER"),
        help="few-shot example; may be repeated",
    )
    add_views_option(parser)
    add_model_options(parser)
    add_sampling_options(parser, max_new_tokens=0)

    parser = verbs.add("draw", draw, "Draw images from a prompt, or variations or completions of an image.")
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--out", required=True, metavar="FILE", help="image file to write")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="images, as a grid (default: 1)")
    parser.add_argument("--best", type=int, metavar="K", help="keep the K images for which the prompt is most likely")
    parser.add_argument("--vary", metavar="IMAGE", help="draw variations of this image")
    parser.add_argument("--complete", metavar="IMAGE", help="keep the upper part of this image and draw the rest")
    parser.add_argument(
        "--paint",
        metavar="MASK",
        help="draw a part of --picture anew: where this image is transparent, or, if it is nowhere, where it is not black",
    )
    parser.add_argument("--picture", metavar="IMAGE", help="the picture to paint (default: MASK itself)")
    parser.add_argument("--candidates", type=int, default=1, help="continuations of which the fittest is kept (default: 1)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of painting; later ones redraw rows (default: 1)")
    parser.add_argument("--edit", metavar="IMAGE", help="draw this image as the prompt, an instruction, changes it")
    parser.add_argument(
        "--keep", type=float, help="fraction of the image that is kept (default: 0.3 to vary, 0.5 to complete)"
    )
    parser.add_argument(
        "--guidance-scale", type=float, help="classifier-free guidance; 1 is none (default: the model's own, usually 1.25)"
    )
    parser.add_argument("--size", metavar="WxH", help="width and height in pixels, where the model draws several")
    add_model_options(parser)
    add_sampling_options(parser)

    parser = verbs.add("generate", generate, "Continue a document or conversation in JSON.")
    parser.add_argument("document", metavar="DOCUMENT.json")
    parser.add_argument("--out", metavar="DIR", help="folder for a page with the output and its images")
    parser.add_argument("--page", default="markdown", help="markdown or html (default: markdown)")
    parser.add_argument(
        "--max-images", type=int, help="images at most (default: 1, or 0 for a bundle without image decoder)"
    )
    parser.add_argument("--max-text-tokens", type=int, help="tokens of each run of text at most")
    parser.add_argument("--format", metavar="text,image,…", help="the parts to generate (default: the model chooses)")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        nargs="+",
        metavar="SCALE",
        help="of images: one scale, or an image scale and a full scale",
    )
    add_model_options(parser)
    add_sampling_options(parser, max_new_tokens=256)


def add_views_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--views",
        type=int,
        default=1,
        metavar="N",
        help="read the image N times, a little shifted and scaled, and go by the mean: N times the work (default: 1)",
    )


def caption(arguments: argparse.Namespace) -> None:
    from chameleon.generation.sampling import GREEDY

    captions = load_model(arguments).caption_batch(
        arguments.image,
        examples=arguments.example,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling_from(arguments, GREEDY),
        seeds=range(arguments.seed, arguments.seed + len(arguments.image)),
        views=arguments.views,
    )
    rows = [{"image": image, "caption": text} for image, text in zip(arguments.image, captions, strict=True)]
    lines = [row["caption"] if len(rows) == 1 else f"{row['image']}\t{row['caption']}" for row in rows]
    print_result(arguments, rows, "\n".join(lines))


def answer(arguments: argparse.Namespace) -> None:
    from chameleon.generation.sampling import GREEDY

    sampling = sampling_from(arguments, GREEDY)
    text = load_model(arguments).answer(
        arguments.image,
        arguments.question,
        examples=arguments.example,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seed=arguments.seed,
        views=arguments.views,
    )
    print_result(arguments, {"image": arguments.image, "question": arguments.question, "answer": text}, text)


def draw(arguments: argparse.Namespace) -> None:
    from chameleon.document_view import image_grid
    from chameleon.files import atomic_file
    from chameleon.tokenizers.fitting import parse_size

    out = Path(arguments.out)
    check_draw_options(arguments, out)
    model = load_model(arguments)
    num_images, keep = arguments.num_images, arguments.keep
    size = None if arguments.size is None else parse_size(arguments.size)
    common: dict[str, Any] = {
        "seed": arguments.seed,
        "guidance_scale": arguments.guidance_scale,
        "sampling": sampling_from(arguments, model.edit_sampling if arguments.edit else model.image_sampling),
    }
    if arguments.paint:
        picture, mask = read_painting(arguments.picture, arguments.paint)
        images = model.paint(
            picture,
            mask,
            arguments.prompt or "",
            num_images,
            candidates=arguments.candidates,
            rounds=arguments.rounds,
            **common,
        )
    elif arguments.edit:
        images = model.edit(arguments.edit, arguments.prompt, num_images, size=size, **common)
    elif arguments.vary:
        keep = 0.3 if keep is None else keep
        images = model.variations(arguments.vary, num_images, keep=keep, prompt=arguments.prompt, **common)
    elif arguments.complete:
        keep, prompt = 0.5 if keep is None else keep, arguments.prompt or ""
        images = model.complete(arguments.complete, keep=keep, prompt=prompt, num_images=num_images, **common)
    else:
        images = model.draw_samples(arguments.prompt, num_images, size=size, **common)
    stride = arguments.candidates if arguments.paint else 1
    seeds = [arguments.seed + index * stride for index in range(num_images)]
    if arguments.best:
        order = model.rank(images, arguments.prompt)[: arguments.best]
        images, seeds = [images[index] for index in order], [seeds[index] for index in order]
    with atomic_file(out) as partial:
        image_grid(images).save(partial)
    print_result(arguments, {"prompt": arguments.prompt, "out": str(out), "seeds": seeds}, str(out))


def read_painting(picture: str | None, mask: str) -> tuple[Any, Any]:
    """Return the picture to paint, and the mask of it, white where it is drawn anew."""
    import numpy as np
    from PIL import Image as PILImage
    from PIL import ImageOps

    from chameleon.tokenizers.image import ImageFile, load_picture

    opened = ImageFile(mask).opened
    load_picture(mask)  # refuses what is damaged
    alpha = np.asarray(ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A"))
    if (alpha < 255).any():
        marked = alpha < 255
    elif picture is None:
        raise BadInput("nothing is transparent", where=mask, remedy="give the picture with --picture")
    else:
        marked = np.asarray(load_picture(mask).convert("L")) > 0
    return load_picture(picture or mask), PILImage.fromarray(np.where(marked, 255, 0).astype(np.uint8))


def check_draw_options(arguments: argparse.Namespace, out: Path) -> None:
    """Raise `BadInput` for options that contradict each other, before the model is loaded."""
    check_image_path(out)
    if arguments.num_images < 1:
        raise BadInput("expected 1 or more", where=f"--num-images {arguments.num_images}")
    changes = ("vary", "complete", "paint", "edit")
    given = [name for name in changes if getattr(arguments, name) is not None]
    if len(given) > 1:
        raise BadInput(f"give --{given[0]} or --{given[1]}, not both", where="draw")
    if arguments.prompt is None and (not given or given == ["edit"]):
        needed = "an instruction" if given else "a prompt, --vary, --complete or --paint"
        raise BadInput("nothing to draw", where="draw", remedy=f"give {needed}")
    for name in ("candidates", "rounds", "picture"):
        if getattr(arguments, name) not in (None, 1) and given != ["paint"]:
            raise BadInput("goes with --paint", where=f"--{name}")
    if arguments.keep is not None and not (arguments.vary or arguments.complete):
        raise BadInput("goes with --vary or --complete", where="--keep")
    if arguments.size is not None:
        from chameleon.tokenizers.fitting import parse_size

        parse_size(arguments.size)
        if given and given != ["edit"]:
            raise BadInput(f"--{given[0]} draws in the picture's own shape", where="--size")
    if arguments.best is not None and not 1 <= arguments.best <= arguments.num_images:
        raise BadInput(f"expected 1 to {arguments.num_images}, the number drawn", where=f"--best {arguments.best}")
    if arguments.best and arguments.prompt is None:
        raise BadInput("--best ranks images by a prompt", where="draw", remedy="give one")


def generate(arguments: argparse.Namespace) -> None:
    from chameleon.document import Document, Image, read_json_document
    from chameleon.document_view import PAGES, TerminalView, write_page
    from chameleon.files import atomic_update
    from chameleon.generation.streaming import PartialImage
    from chameleon.tokenizers.mixed import merge_texts

    content = read_json_document(Path(arguments.document))
    if arguments.page not in PAGES:
        raise BadInput(f"no page format {arguments.page!r}", where="--page", remedy=f"use {' or '.join(PAGES)}")
    scales = arguments.guidance_scale
    if scales is not None and len(scales) > 2:
        raise BadInput("expected one scale, or an image scale and a full scale", where="--guidance-scale")
    model = load_model(arguments)
    view = None if arguments.json else TerminalView()
    shows_images = view is not None and view.renderable_of is not None
    stream = model.stream(
        content,
        max_new_tokens=arguments.max_new_tokens,
        max_images=arguments.max_images,
        max_text_tokens=arguments.max_text_tokens,
        format=None if arguments.format is None else [part for part in arguments.format.split(",") if part],
        guidance_scale=None if scales is None else scales[0] if len(scales) == 1 else tuple(scales),
        text_sampling=sampling_from(arguments, model.text_sampling),
        image_sampling=replace(sampling_from(arguments, model.image_sampling), repetition_penalty=1.0),
        seed=arguments.seed,
        preview_every_n_rows=1 if shows_images else 0,
    )
    parts: list[Any] = []
    with atomic_update(Path(arguments.out)) if arguments.out else nullcontext() as folder:
        try:
            for part in stream:
                if not isinstance(part, PartialImage):
                    parts.append(part)
                if view is not None:
                    view.show(part)
        finally:
            if view is not None:
                view.close()
        output = Document(tuple(merge_texts(parts)))
        if view is not None:
            print()
        if folder is not None:
            page_name, image_names = write_page(folder, output.parts, arguments.page)
    if folder is not None:
        names = iter(image_names)
        stored = [Image(Path(arguments.out) / next(names)) if isinstance(p, Image) else p for p in output.parts]
        output = Document(tuple(stored))
        print_progress(f"written to {Path(arguments.out) / page_name}")
    elif output.images and view is not None and not shows_images:
        print_progress("images were not kept; --out DIR keeps them")
    if view is None:
        print_result(arguments, output.to_json(), "")
