"""The generation engine: its speed beside Hugging Face's `generate` and a three-row loop in the manner of the original,
drafts of codes, admission of requests, and what weight formats cost in likelihood.

All sides of a part run in one process on the same weights, round by round in turn; results are ratios of the medians. Run
with nothing else running:

    python benchmarks/generation.py [--rounds 5] [--device cpu] [--only PART …]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from hugging_face import config_of, state_of
from speed import Side, seconds, times_of
from torch import Tensor
from transformers import ChameleonForConditionalGeneration, DynamicCache, TopPLogitsWarper

from chameleon.data import emoji, labelled
from chameleon.device import fast_bfloat16
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import OutputConstraints
from chameleon.generation.engine import Engine
from chameleon.generation.guidance import three_way, two_way
from chameleon.generation.image_requests import Drawing, image_request
from chameleon.generation.prefix_index import PrefixIndex
from chameleon.generation.request import Request
from chameleon.generation.sampling import GREEDY, IMAGE_SAMPLING, Sampling
from chameleon.model.config import named_size
from chameleon.model.fastest_format import WeightForm
from chameleon.model.quantization import BLOCK_MATRICES, convert_weights
from chameleon.model.transformer import Transformer
from chameleon.vocabulary import Vocabulary

PROMPT, NEW = 32, 64


def compare(name: str, sides: dict[str, Side], work: float, unit: str, options: Any) -> dict[str, Any]:
    """Medians of all sides over the rounds, after one round that is not counted, and their ratios to the first."""
    times = times_of(sides, options)
    first = statistics.median(next(iter(times.values())))
    result: dict[str, Any] = {"unit": unit}
    for side, values in times.items():
        median = statistics.median(values)
        result[side] = {
            "median": work / median,
            "range": [work / max(values), work / min(values)],
            "ratio": first / median,
        }
        print(f"{name:22} {side:28} {work / median:9.4g} {unit:9} {first / median:.2f}×", file=sys.stderr, flush=True)
    return result


# --- the models ------------------------------------------------------------------------------------------------------


def models(options: Any) -> tuple[Vocabulary, Transformer, Any]:
    """Ours, 12 layers × 768 with 16,384 ids, in float32, and Hugging Face's with the same weights in its best dtype."""
    vocabulary = Vocabulary.build(image_codes=8186, text_pieces=8192, grid=(32, 32))
    ours = Transformer(named_size("base", vocab_size=vocabulary.size, context_length=4096))
    ours.init_weights()
    ours = ours.eval().requires_grad_(False)
    ours.head.weight[vocabulary.eos] = 0  # nothing ends early
    config = config_of(ours.config, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
    theirs = ChameleonForConditionalGeneration(config).eval().requires_grad_(False)
    state = {f"model.{name}": value for name, value in state_of(ours).items()} | {"lm_head.weight": ours.head.weight}
    pictures = {name: value for name, value in theirs.state_dict().items() if "vqmodel." in name}  # not asked here
    theirs.load_state_dict(state | pictures)
    return vocabulary, ours.to(options.device), theirs.to(options.device, best_dtype(options))


def best_dtype(options: Any) -> torch.dtype:
    """The dtype in which plain products are fastest."""
    return torch.bfloat16 if fast_bfloat16(options.device) else torch.float32


def engine_of(model: Transformer, vocabulary: Vocabulary, form: WeightForm, *, compile: bool = False) -> Engine:
    mine = copy.deepcopy(model).to(getattr(torch, form.dtype))
    convert_weights(mine, form.weight_format)
    return Engine(mine, vocabulary, weight_format=form.weight_format, compile=compile)


def forms_of(options: Any) -> dict[str, tuple[WeightForm, bool]]:
    """The forms that are compared: name → form, and whether the decode step is compiled."""
    dtype = str(best_dtype(options)).removeprefix("torch.")
    if options.device.type != "cpu":
        return {
            "plain": (WeightForm(dtype, "plain"), False),
            "compiled": (WeightForm(dtype, "plain"), True),
            "int8": (WeightForm(dtype, "int8"), False),
            "int4": (WeightForm(dtype, "int4"), False),
        }
    forms: dict[str, tuple[WeightForm, bool]] = {
        "packed": (WeightForm(dtype, "packed"), False),
        "float16": (WeightForm("float32", "float16"), False),
        "int8": (WeightForm("float32", "int8"), False),
    }
    if dtype == "bfloat16":
        forms["int4"] = (WeightForm(dtype, "int4"), False)
    return forms | {f"{name}, compiled": (form, True) for name, (form, _) in forms.items()}


def engines(options: Any, model: Transformer, vocabulary: Vocabulary) -> dict[str, Engine]:
    """The ways to run a model that are compared."""
    return {
        f"ours, {name}": engine_of(model, vocabulary, form, compile=compile)
        for name, (form, compile) in forms_of(options).items()
        if not options.ways or name in options.ways
    }


def fresh(engine: Engine, requests: Sequence[Request], length: int) -> Side:
    """Return a call that prefills the prompts anew; the memory of the cache stays."""

    def call() -> None:
        engine.manager.index = PrefixIndex()
        assert all(len(ids) == length for ids in engine.generate(requests))

    return call


def matrices(block: Any) -> list[Any]:
    """The linear layers of a block."""
    return [getattr(part, name) for part in (block.attention, block.ffn) for name in BLOCK_MATRICES if hasattr(part, name)]


def product_seconds(model: Transformer, vocabulary: Vocabulary, form: WeightForm, batch: int) -> float:
    """The least time that the products of a step take: all matrices once, and the head's rows for text."""
    dtype = getattr(torch, form.dtype)
    mine = copy.deepcopy(model).to(dtype)
    convert_weights(mine, form.weight_format)
    layers = [layer for block in mine.blocks for layer in matrices(block)]
    layers += Engine(mine, vocabulary, weight_format=form.weight_format).decoder.heads.text.layers
    widths = [layer.weight.shape[1] for block in model.blocks for layer in matrices(block)]
    widths += [model.config.width] * (len(layers) - len(widths))
    inputs = [torch.randn(batch, width, dtype=dtype, device=model.head.weight.device) for width in widths]

    @torch.inference_mode()
    def products() -> None:
        for layer, value in zip(layers, inputs, strict=True):
            layer(value)

    return min(seconds(products, model.head.weight.device) for _ in range(30))


# --- parts -----------------------------------------------------------------------------------------------------------


def decoding(options: Any) -> dict[str, Any]:
    """64 new ids after prompts of 32, greedy, whole calls: prompts, cache, rules and sampling included."""
    vocabulary, ours, theirs = models(options)
    ways = engines(options, ours, vocabulary)
    results: dict[str, Any] = {}
    for batch in (1, 8):
        prompts = torch.randint(vocabulary.text_start, vocabulary.size, (batch, PROMPT), device=options.device)
        requests = [Request(tuple(prompt), OutputConstraints(NEW), text_sampling=GREEDY) for prompt in prompts.tolist()]

        def their_side(prompts: Tensor = prompts) -> None:
            mask = torch.ones_like(prompts)
            made = theirs.generate(
                input_ids=prompts, attention_mask=mask, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
            )
            assert made.shape[1] == PROMPT + NEW

        sides: dict[str, Side] = {"Hugging Face": their_side}
        sides |= {name: fresh(engine, requests, NEW) for name, engine in ways.items()}
        results[str(batch)] = compare(f"decoding, batch {batch}", sides, batch * NEW, "ids/s", options)
    results["of the products"] = products_share(options, ours, vocabulary, ways)
    return results


def products_share(options: Any, ours: Transformer, vocabulary: Vocabulary, ways: dict[str, Engine]) -> dict[str, Any]:
    """The time of a step behind the first, and what its products alone take in the same run."""
    results: dict[str, Any] = {}
    for batch in (1, 8):
        prompts = torch.randint(vocabulary.text_start, vocabulary.size, (batch, PROMPT)).tolist()
        short, whole = (
            [Request(tuple(prompt), OutputConstraints(new), text_sampling=GREEDY) for prompt in prompts] for new in (1, NEW)
        )
        for name, (form, _) in forms_of(options).items():
            if (engine := ways.get(f"ours, {name}")) is None:
                continue
            least = product_seconds(ours, vocabulary, form, batch)
            one, all_ = (
                statistics.median(seconds(fresh(engine, requests, new), options.device) for _ in range(options.rounds))
                for requests, new in ((short, 1), (whole, NEW))
            )
            step = (all_ - one) / (NEW - 1)
            results[f"{name}, batch {batch}"] = {"seconds": step, "products": least, "share": least / step}
            print(
                f"batch {batch}, {name}: {step * 1e3:.2f} ms a step, its products {least * 1e3:.2f}, {least / step:.0%}",
                file=sys.stderr,
                flush=True,
            )
    return results


def first(options: Any) -> dict[str, Any]:
    """The first id behind a prompt of 1,024."""
    vocabulary, ours, theirs = models(options)
    prompt = torch.randint(vocabulary.text_start, vocabulary.size, (1, 1024), device=options.device)
    request = [Request(tuple(prompt[0].tolist()), OutputConstraints(1), text_sampling=GREEDY)]

    def their_side() -> None:
        theirs.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=1)

    ways = engines(options, ours, vocabulary)
    sides: dict[str, Side] = {"Hugging Face": their_side}
    sides |= {name: fresh(engine, request, 1) for name, engine in ways.items() if "compiled" not in name}
    return compare("first of 1,024", sides, 1, "calls/s", options)


def guided(options: Any) -> dict[str, Any]:
    """A picture of 1,024 codes with three-way guidance behind a picture and 16 ids of text; and with two-way guidance.

    The loop is in the manner of the original: full prompt, picture alone and nothing as three rows of one batch, each
    padded to the longest, all logits of all rows at each step, combined, all but codes masked, temperature, top-p by
    sorting, `multinomial`, one look of the host an id.
    """
    vocabulary, ours, theirs = models(options)
    v = vocabulary
    codes = (torch.randint(0, v.num_image_codes, (math.prod(v.grid),)) + v.image_start).tolist()
    text = torch.randint(v.text_start, v.size, (16,)).tolist()
    full, image, nothing = [v.bos, v.boi, *codes, v.eoi, *text, v.sep], [v.bos, v.boi, *codes, v.eoi, v.sep], [v.bos, v.sep]
    sampling = Sampling(0.7, 0.9)
    one = OutputConstraints(v.dialect.length(v.grid), format=("image",))
    request = [Request(tuple(full), one, image_sampling=sampling, guidance=three_way(image, nothing, 1.2, 3.0))]
    short = [Request((v.bos, *text, v.sep), one, image_sampling=sampling, guidance=two_way(nothing, 3.0))]
    masked = ~v.mask(image=True).to(options.device)

    def loop(prompts: Sequence[list[int]], weights: Sequence[float]) -> Side:
        @torch.inference_mode()
        def call() -> None:
            longest = max(map(len, prompts)) + 1
            rows = [[v.pad] * (longest - 1 - len(prompt)) + [*prompt, v.boi] for prompt in prompts]
            ids = torch.tensor(rows, device=options.device)
            mask = (ids != v.pad).long()
            cache, warper, made = DynamicCache(), TopPLogitsWarper(sampling.top_p), []
            scales = torch.tensor(weights, device=options.device).unsqueeze(1)
            for _ in range(math.prod(v.grid)):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                out = theirs(
                    input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
                )
                logits = (out.logits[:, -1].float() * scales).sum(0, keepdim=True).masked_fill(masked, -torch.inf)
                shares = warper(None, logits / sampling.temperature).softmax(-1)
                token = torch.multinomial(shares, 1)
                made.append(token.item())
                ids = token.expand(len(prompts), 1)
                mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), dim=1)
            assert len(made) == math.prod(v.grid)

        return call

    ways = engines(options, ours, vocabulary)
    weights = three_way([], [], 1.2, 3.0).weights
    three: dict[str, Side] = {"loop, three rows": loop([full, image, nothing], weights)}
    three |= {name: fresh(engine, request, v.dialect.length(v.grid)) for name, engine in ways.items()}
    three_rows = loop([[v.bos, *text, v.sep], nothing, nothing], weights)
    two: dict[str, Side] = {"loop, three rows": three_rows}
    two |= {name: fresh(engine, short, v.dialect.length(v.grid)) for name, engine in ways.items()}
    return {
        "three-way, behind a picture": compare("picture, three-way", three, 1, "pictures/s", options),
        "two-way, behind text": compare("picture, two-way", two, 1, "pictures/s", options),
    }


def prompts_of(count: int) -> list[str]:
    entries = labelled.representatives(emoji.load("validation"), seed=0)
    return [entry.caption for entry in entries[:count]]


def drafts(options: Any) -> dict[str, Any]:
    """Codes accepted a pass, and pictures a second, with drafts of 1 to 16: the shipped model, one picture at a time.

    The same seeds draw the same codes with every draft length but for rounding; the share of codes that differ is given.
    """
    prompts = prompts_of(options.pictures)
    result: dict[str, Any] = {}
    draft_lengths = (1, 2, 3, 4, 8, 16)
    models = {
        draft_length: Chameleon.load(device=str(options.device), draft_length=draft_length)
        for draft_length in draft_lengths
    }
    for kind, sampling in {"as released": IMAGE_SAMPLING, "temperature 1": Sampling(1.0, 1.0), "greedy": GREEDY}.items():
        for guidance in (1.0, 3.0):
            made: dict[int, list[list[int]]] = {}

            def draw(
                draft_length: int, sampling: Sampling = sampling, guidance: float = guidance, made: Any = made
            ) -> None:
                model = models[draft_length]
                model.engine.manager.index = PrefixIndex()
                model.engine.decoder.num_forward_passes = 0
                requests = drawings(model, prompts, sampling, guidance)
                made[draft_length] = [model.engine.generate([request])[0] for request in requests]

            name = f"{kind}, guidance {guidance:g}"
            sides: dict[str, Side] = {
                f"draft of {draft_length}": partial(draw, draft_length) for draft_length in draft_lengths
            }
            entry = compare(name, sides, len(prompts), "pictures/s", options)
            for draft_length, model in models.items():
                accepted = len(prompts) * math.prod(model.vocabulary.grid) / model.engine.decoder.num_forward_passes
                alone, together = torch.tensor(made[1]), torch.tensor(made[draft_length])
                differ = float((alone != together).double().mean())
                entry[f"draft of {draft_length}"] |= {"codes a pass": accepted, "codes that differ": differ}
                print(f"{name}: draft of {draft_length}: {accepted:.2f} codes a pass, {differ:.1%} differ", file=sys.stderr)
            result[name] = entry
    return result


def drawings(model: Chameleon, prompts: Sequence[str], sampling: Sampling, guidance: float) -> list[Request]:
    """A picture for each prompt, seeds 0, 1, 2 …"""
    return [
        image_request(
            model.prompts, prompt, Drawing(model.vocabulary.grid), seed=seed, guidance_scale=guidance, sampling=sampling
        )
        for seed, prompt in enumerate(prompts)
    ]


def weight_formats(options: Any) -> dict[str, Any]:
    """Nats an id of the validation set in each weight format: captions behind pictures, and pictures behind text.

    Through the engine's own slices of the head, each among the ids that may come.
    """
    result: dict[str, Any] = {}
    entries = labelled.representatives(emoji.load("validation"), seed=0)[: options.documents]
    forms = [WeightForm("float32", "plain"), *(form for form, compile in forms_of(options).values() if not compile)]
    for form in dict.fromkeys(forms):
        model = Chameleon.load(device=str(options.device), dtype=form.dtype, weight_format=form.weight_format)
        v, heads = model.vocabulary, model.engine.decoder.heads
        sums = {"text": [0.0, 0], "image": [0.0, 0]}
        for entry in entries:
            picture = model.encode_picture(entry.picture).code_ids
            words = model.tokenizer.text_to_ids(entry.caption)
            block = [v.boi, *picture, v.eoi]
            for kind, head, ids, start in (
                ("text", heads.text, [v.bos, *block, v.sep, *words, v.eos], len(block) + 2),
                ("image", heads.codes, [v.bos, *words, v.sep, v.boi, *picture], len(words) + 3),
            ):
                with torch.inference_mode():
                    hidden = model.model(torch.tensor([ids[:-1]], device=options.device))[0, start - 1 :]
                    shares = head.logits(hidden).log_softmax(-1)
                    columns = torch.searchsorted(head.token_ids, torch.tensor(ids[start:], device=options.device))
                    sums[kind][0] -= float(shares.gather(1, columns.unsqueeze(1)).sum())
                    sums[kind][1] += len(columns)
        values = {kind: total / count for kind, (total, count) in sums.items()}
        values["all"] = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
        result[str(form)] = values
        plain = result[str(forms[0])]
        shown = ", ".join(f"{kind} {value:.4f} ({value / plain[kind] - 1:+.3%})" for kind, value in values.items())
        print(f"{form!s:26} nats an id: {shown}", file=sys.stderr, flush=True)
    return result


def admission(options: Any) -> dict[str, Any]:
    """The longest cached prefix of a prompt of 4,096 tokens among 32 slots: the index, and a loop over the slots."""
    stream = random.Random(0)
    shared = [stream.randrange(65536) for _ in range(4000)]
    slots = [[*shared, *(stream.randrange(65536) for _ in range(96))] for _ in range(32)]
    prompt = [*shared, *(stream.randrange(65536) for _ in range(96))]
    index = PrefixIndex()
    for slot, token_ids in enumerate(slots):
        index.set(slot, token_ids)

    def loop() -> int:
        best = 0
        for token_ids in slots:
            count = 0
            for one, other in zip(token_ids, prompt, strict=True):
                if one != other:
                    break
                count += 1
            best = max(best, count)
        return best

    assert max(index.shared_lengths(prompt, 4095).values()) == loop() >= 4000
    sides: dict[str, Side] = {"loop over all slots": loop, "index": lambda: index.shared_lengths(prompt, 4095)}
    return compare("admission", sides, 1, "calls/s", options)


def batches(options: Any) -> dict[str, Any]:
    """Share of requests that come out otherwise in a batch, or with drafts, than alone; and what exact generation costs."""
    result: dict[str, Any] = {}
    forms = {name: form for name, (form, compile) in forms_of(options).items() if not compile and name != "int4"}
    prompts = prompts_of(48)
    for name, form in forms.items():
        for exact in (False, True):
            load = partial(
                Chameleon.load, device=str(options.device), dtype=form.dtype, weight_format=form.weight_format, exact=exact
            )
            model, drafting = load(), load(draft_length=4)
            for kind, sampling in (
                ("drawings, as released", IMAGE_SAMPLING),
                ("drawings, temperature 1", Sampling(1.0, 1.0)),
            ):
                requests = drawings(model, prompts, sampling, 1.5)
                times = []
                outputs: list[list[list[int]]] = []
                for engine, size in ((model.engine, 1), (model.engine, len(requests)), (drafting.engine, len(requests))):
                    start, output = time.perf_counter(), []
                    for first in range(0, len(requests), size):
                        engine.clear()
                        output += engine.generate(requests[first : first + size])
                    times.append(time.perf_counter() - start)
                    outputs.append(output)
                alone, *others = outputs
                shares = [sum(a != b for a, b in zip(alone, other, strict=True)) / len(alone) for other in others]
                key = f"{name}{', exact' if exact else ''}: {kind}"
                result[key] = {"batch": shares[0], "drafts": shares[1], "alone_s": times[0], "together_s": times[1]}
                print(
                    f"{key}: {shares[0]:.1%} differ in a batch, {shares[1]:.1%} with drafts; "
                    f"one at a time {times[0]:.2f} s, all together {times[1]:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return result


PARTS = {part.__name__: part for part in (decoding, first, guided, drafts, admission, weight_formats, batches)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ways", nargs="*", help="ours to compare: packed, 'int4, compiled' … (default: all)")
    parser.add_argument("--pictures", type=int, default=12, help="of the part drafts")
    parser.add_argument("--documents", type=int, default=300, help="of the part weight_formats")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name in options.only:
        result[name] = PARTS[name](options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
