"""Verbs that inspect and plan: info, plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon.cli.options import Verbs, add_tokenizer_options, check_image_path, load_tokenizer
from chameleon.cli.output import aligned_lines, print_error, print_progress, print_result
from chameleon.errors import BadInput

if TYPE_CHECKING:
    from chameleon.data.token_shards import TokenShard
    from chameleon.model.config import ModelConfig
    from chameleon.tokenizers.mixed import MixedTokenizer

DEFAULT_DOCUMENTS_SHOWN = 20


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add("plan", plan, "Plan memory, speed and days of training a model on a number of devices.")
    parser.add_argument("what", metavar="SIZE|RECIPE", help="a named size (7b, 34b …), or a recipe")
    parser.add_argument("--micro-batch-size", type=int, help="rows of a pass on a device (default: the recipe's, else 1)")
    parser.add_argument("--context-length", type=int, help="tokens of a row (default: the recipe's, else the model's)")
    parser.add_argument("--precision", help="bf16-mixed, bf16-true, 16-mixed, 16-true, 32-true (default: the recipe's)")
    parser.add_argument("--optimizer", help="adamw or muon (default: the recipe's)")
    parser.add_argument("--data-parallel", help="none, ddp or fsdp (default: the recipe's, else none)")
    parser.add_argument(
        "--tensor-parallel-size", type=int, help="devices that split each matrix (default: the recipe's, else 1)"
    )
    parser.add_argument("--micro-batches", type=int, help="micro-batches of a step (default: 1)")
    parser.add_argument("--gradient-sync", help="micro_batch or step (default: the recipe's)")
    parser.add_argument("--activation-checkpointing", help="none, selective or full (default: the recipe's, else none)")
    parser.add_argument("--devices", type=int, help="number of devices (default: as few as the setup allows)")
    parser.add_argument("--device", help="one kind of device (default: a table of them)")
    parser.add_argument(
        "--utilization", type=float, default=0.4, help="share of the devices' peak that is reached (default: 0.4)"
    )
    parser.add_argument("--tokens", type=float, help="tokens to train on, for the number of days")

    parser = verbs.add("info", info, "Show what a bundle, a run or a folder of token shards contains.")
    parser.add_argument("folder", nargs="?", help="default: the shipped bundle")
    parser.add_argument("--show", type=int, metavar="N", help="of token shards: show N documents, evenly spaced")
    parser.add_argument("--html", metavar="FILE", help="of token shards: show them on a page, with images and loss masks")
    parser.add_argument("--curves", metavar="FILE", help="of a run: file for its curves (default: RUN/curves.png)")
    parser.add_argument("--check", action="store_true", help="of token shards: verify checksums, offsets and token ids")
    add_tokenizer_options(parser)


# --- info ------------------------------------------------------------------------------------------------------------


def info(arguments: argparse.Namespace) -> None:
    from chameleon.bundle import PROVENANCE_FILE, SHIPPED
    from chameleon.files import RUN_FILE

    folder = Path(arguments.folder) if arguments.folder else SHIPPED
    is_run, is_bundle = (folder / RUN_FILE).is_file(), (folder / PROVENANCE_FILE).is_file()
    if (is_run or is_bundle) and (arguments.check or arguments.show is not None or arguments.html):
        raise BadInput("--check, --show and --html are for token shards", where=folder)
    if arguments.curves and not is_run:
        raise BadInput("--curves is for runs", where=folder)
    if is_run:
        show_run(arguments, folder)
    elif is_bundle:
        description = describe_bundle(folder)
        print_result(arguments, description, aligned_lines(description))
    else:
        show_shards(arguments, folder)


def show_run(arguments: argparse.Namespace, folder: Path) -> None:
    from chameleon.files import atomic_file
    from chameleon.run_view import describe, plot_curves

    description = describe(folder)
    curves = Path(arguments.curves) if arguments.curves else folder / "curves.png"
    check_image_path(curves)
    figure = plot_curves(folder)
    with atomic_file(curves) as partial:
        figure.savefig(partial, dpi=110)
    description["curves"] = str(curves)
    lists = {key: description[key] for key in ("checkpoints", "events")}
    text = aligned_lines({key: value for key, value in description.items() if key not in lists})
    for key, values in lists.items():
        text += "".join(f"\n{key if index == 0 else '':<22}{value}" for index, value in enumerate(values))
    print_result(arguments, description, text)


def describe_bundle(folder: Path) -> dict[str, Any]:
    from chameleon.bundle import read_header
    from chameleon.model.fastest_format import choose_weight_form
    from chameleon.tokenizers.mixed import MixedTokenizer

    header = read_header(folder, verify=False)  # the model's weights are not read
    model, tokenizer = header.model, MixedTokenizer.load(folder, header.vocabulary)
    return {
        "bundle": str(folder),
        "parameters": model.parameters,
        "layers × width": f"{model.layers} × {model.width}",
        "heads / kv heads": f"{model.heads} / {model.kv_heads}",
        "context length": model.context_length,
        "vocabulary size": header.vocabulary.size,
        "text pieces": header.vocabulary.num_text_pieces,
        "image codes": header.vocabulary.num_image_codes,
        "image": describe_images(tokenizer),
        "prompting": header.prompting,
        "fastest here": str(choose_weight_form("auto", "auto", "cpu")),
        "tokenizers": tokenizer.fingerprint[:12],
        "megabytes": round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1),
    }


def describe_images(tokenizer: MixedTokenizer) -> str:
    """Return the size of the images in pixels and codes, and how many shapes there are."""
    dialect, fitter = tokenizer.vocabulary.dialect, tokenizer.fitter
    usual = "{}×{} pixels, {}×{} codes".format(*fitter.size_of(dialect.grid), dialect.grid[1], dialect.grid[0])
    if len(dialect.grids) == 1:
        return usual
    first, last = (fitter.size_of(grid) for grid in (dialect.grids[0], dialect.grids[-1]))
    return f"{len(dialect.grids)} shapes from {first[0]}×{first[1]} to {last[0]}×{last[1]} pixels; a square: {usual}"


def show_shards(arguments: argparse.Namespace, folder: Path) -> None:
    from chameleon.data.token_shards import open_shards
    from chameleon.files import atomic_file
    from chameleon.shard_view import as_line, as_page, describe, evenly_spaced_documents

    if arguments.show is not None and arguments.show < 1:
        raise BadInput("expected 1 or more", where=f"--show {arguments.show}")
    if arguments.check:
        check_shards(folder)
    shards = open_shards(folder)
    description = describe_shards(shards)
    if arguments.check:
        description["checked"] = "checksums, offsets and token ids are valid"
    text = aligned_lines(description)
    if arguments.show is not None or arguments.html:
        tokenizer = load_tokenizer(arguments)
        shards = open_shards(folder, tokenizer.fingerprint)
        documents = evenly_spaced_documents(shards, arguments.show or DEFAULT_DOCUMENTS_SHOWN)
        if arguments.html:
            with atomic_file(Path(arguments.html)) as partial:
                partial.write_text(as_page(documents, tokenizer, folder.name), encoding="utf-8")
            description["page"] = arguments.html
            text += f"\n{'page':<22}{arguments.html}"
        else:
            description["shown"] = [describe(shard, index, tokenizer) for shard, index in documents]
            text = "\n\n".join((text, *map(as_line, description["shown"])))
    print_result(arguments, description, text)


def check_shards(folder: Path) -> None:
    """Verify all shards and name every damaged one. Raise `BadInput` where there is any."""
    from chameleon.data.token_shards import TokenShard, shard_folders, verify_shards

    folders = shard_folders(folder)
    num_damaged = 0
    for path in folders:
        try:
            verify_shards([TokenShard(path)], again=True)
        except BadInput as error:
            num_damaged += 1
            print_error("info", str(error))
    if num_damaged:
        raise BadInput(f"{num_damaged} of {len(folders)} shards are damaged", where=folder, remedy="tokenize them again")


def describe_shards(shards: Sequence[TokenShard]) -> dict[str, Any]:
    by_modality: dict[str, int] = {}
    for shard in shards:
        for name, count in shard.description["by_modality"].items():
            by_modality[name] = by_modality.get(name, 0) + count
    return {
        "shards": len(shards),
        "documents": sum(map(len, shards)),
        "tokens": sum(shard.tokens for shard in shards),
        "images": sum(shard.description["images"] for shard in shards),
        "variants": max(shard.variants for shard in shards),
        **{f"{name} tokens": count for name, count in by_modality.items()},
        "tokenizers": ", ".join(sorted({shard.description["fingerprint"][:12] for shard in shards})),
    }


# --- plan ------------------------------------------------------------------------------------------------------------


def plan(arguments: argparse.Namespace) -> None:
    from chameleon.plan import DEVICES, TrainingSetup, device_specs, plan_training

    devices = [arguments.device] if arguments.device else list(DEVICES)
    for name in devices:
        device_specs(name)
    config, setup = model_and_setup(arguments.what)
    for key in setup:
        if getattr(arguments, key) is not None:
            setup[key] = getattr(arguments, key)
    num_devices = setup["tensor_parallel_size"] if arguments.devices is None else arguments.devices
    setup |= {"devices": num_devices, "utilization": arguments.utilization}
    result = plan_training(config, TrainingSetup(**setup))

    def memory_table(title: str, memory: Any) -> list[str]:
        rows = [(name.replace("_", " "), size) for name, size in [*vars(memory).items(), ("total", memory.total)]]
        return [title, *(f"  {name:<18}{size / 1e9:>10.3f} GB" for name, size in rows)]

    lines = [f"{arguments.what}: {config.parameters / 1e9:.3f} billion parameters"]
    lines += memory_table("training, per device", result.training)
    lines += memory_table("inference in 16 bits", result.inference)
    lines.append(f"{result.flops_per_token / 1e9:.2f} GFLOP per token of training, a third of it for inference")
    if num_devices > 1:
        lines.append(
            f"a device sends {result.network_bytes() / 1e9:.2f} GB of parameters and gradients a step, and "
            f"{result.link_bytes() / 1e9:.2f} GB of hidden states to those that split the model with it"
        )
    for name in devices:
        spare, speed = result.spare_bytes(name), result.tokens_per_second(name)
        seconds = result.seconds_of_step(name)
        if spare < 0:
            lines.append(f"  {name:<10}does not fit, {-spare / 1e9:.1f} GB too much")
            continue
        days = f", {result.days(name, arguments.tokens):,.2f} days" if arguments.tokens else ""
        fits = f"fits, {spare / 1e9:.1f} GB to spare"
        limit = ""
        if num_devices > 1:
            limit = f", products {seconds.products:.2f} s, network {seconds.network:.2f} s, links {seconds.link:.2f} s"
            limit += ": the network is the limit" if seconds.limit == "network" else ""
        lines.append(f"  {name:<10}{fits:<34}{speed:>12,.0f} tokens/s{days}{limit}")
    print_result(arguments, result.to_json(devices, arguments.tokens), "\n".join(lines))


def model_and_setup(name: str) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the model of a named size or a recipe, and its default training setup."""
    from chameleon.bundle import CONFIG_FILE
    from chameleon.files import read_json
    from chameleon.model.config import SIZES, ModelConfig, named_size
    from chameleon.train.recipe import PretrainRecipe, find_recipe, read_recipe

    if name in SIZES:
        config = SIZES[name]
        return config, {
            "micro_batch_size": 1,
            "micro_batches": 1,
            "context_length": config.context_length,
            "precision": "bf16-mixed",
            "optimizer": "adamw",
            "data_parallel": "none",
            "tensor_parallel_size": 1,
            "gradient_sync": "micro_batch",
            "activation_checkpointing": "none",
        }
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

            vocabulary = MixedTokenizer.load(Path(recipe.tokenizers)).vocabulary
            config = replace(config, vocab_size=vocabulary.size)
        else:
            missing = "bundle does" if recipe.bundle is not None else "tokenizers do"
            print_progress(f"{name}: its {missing} not exist yet; a vocabulary of {config.vocab_size} is assumed")
    return config, {
        "micro_batch_size": recipe.micro_batch_size or recipe.global_batch_size,
        "micro_batches": 1,
        "context_length": recipe.context_length or config.context_length,
        "precision": recipe.run.precision,
        "optimizer": recipe.optimizer.kind,
        "data_parallel": recipe.run.data_parallel,
        "tensor_parallel_size": recipe.run.tensor_parallel_size,
        "gradient_sync": recipe.gradient_sync,
        "activation_checkpointing": recipe.activation_checkpointing,
    }
