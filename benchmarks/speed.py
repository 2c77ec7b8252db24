"""Speed of training, image encoding and text encoding beside what one would take instead.

Both sides run in one process on the same ids or bytes, round by round in turn, so that whatever the machine does in
between falls on both; results are ratios of the medians. Where the two differ in what they do, each part says so.
Run with nothing else running:

    python benchmarks/speed.py [--rounds 5] [--device cpu] [--only training text …]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from hugging_face import config_of
from torch import Tensor
from transformers import ChameleonForConditionalGeneration, ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

from chameleon.allocator import keep_freed_memory
from chameleon.bundle import Bundle
from chameleon.data import emoji
from chameleon.data.mixture import PackedBatch, PackedSource, SourceConfig
from chameleon.data.token_shards import write_shard
from chameleon.device import fast_bfloat16, matmul_peak
from chameleon.model.config import named_size
from chameleon.model.document_attention import document_groups
from chameleon.model.loss import chunked_cross_entropy
from chameleon.model.transformer import ScaledDotProductAttention, Transformer, block_diagonal_causal_mask
from chameleon.plan import flops_per_token
from chameleon.tokenizers.text import SentencePieceTokenizer
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig
from chameleon.train.optimizer import OptimizerConfig, build_optimizers
from chameleon.vocabulary import Vocabulary

PIECES, CODES = 8192, 8186  # with the specials 16,384 ids
ROWS, LENGTH = 4, 512
Side = Callable[[], object]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(side: Side, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    side()
    synchronize(device)
    return time.perf_counter() - started


def times_of(sides: dict[str, Side], options: Any) -> dict[str, list[float]]:
    """Seconds of each side, round by round in turn, after one round that is not counted."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds + 1):
        for side in list(sides) if number % 2 else list(sides)[::-1]:
            taken = seconds(sides[side], options.device)
            if number:
                times[side].append(taken)
    return times


def compare(name: str, ours: Side, theirs: Side | None, work: float, unit: str, options: Any) -> dict[str, Any]:
    """Medians of both sides over the rounds, after one round each that is not counted. `work`: units a call does."""
    sides = {"ours": ours, **({"theirs": theirs} if theirs is not None else {})}
    times = times_of(sides, options)
    result: dict[str, Any] = {"unit": unit}
    for side, values in times.items():
        result[side] = work / statistics.median(values)
        result[f"{side}_range"] = [work / max(values), work / min(values)]
    if theirs is not None:
        result["ratio"] = result["ours"] / result["theirs"]
    shown = (f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float))
    print(f"{name:24}", *shown, unit, file=sys.stderr, flush=True)  # stdout is the JSON of all
    return result


# --- the two models --------------------------------------------------------------------------------------------------


def our_model(vocabulary: Vocabulary, options: Any) -> Transformer:
    model = Transformer(named_size("base", vocab_size=vocabulary.size, context_length=1024))
    model.init_weights()
    return model.to(options.device)


def their_model(vocabulary: Vocabulary, options: Any) -> Any:
    """Hugging Face's model of the same shape."""
    shape = named_size("base", vocab_size=vocabulary.size, context_length=1024)
    config = config_of(shape, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
    return ChameleonForConditionalGeneration(config).to(options.device)


def training(vocabulary: Vocabulary, options: Any) -> dict[str, Any]:
    """A step of 4×512 ids: forward, loss, backward, clipping, AdamW over float32 weights; bf16 autocast where that is fast.

    Ours as training has it: blocks compiled (`compile: true`), memory kept between steps (`keep_freed_memory`), packed rows
    whose attention stays inside documents (two a row), weighted targets, z-loss, logits in chunks. Theirs in the usual
    loop: eager, its own loss over whole logits, one causal document a row; and once more with memory kept as well.
    """
    result = in_turn("training step", ("ours", "theirs", "theirs, memory kept"), ROWS * LENGTH, options)
    result["ratio, memory kept on both sides"] = result["ours"] / result["theirs, memory kept"]
    flops = flops_per_token(named_size("base", vocab_size=vocabulary.size, context_length=1024), LENGTH // 2)
    peak = matmul_peak(options.device, torch.bfloat16 if fast_bfloat16(options.device) else torch.float32)
    for side in ("ours", "theirs"):
        result[f"{side}_share_of_matmul_peak"] = result[side] * flops / peak
    return result


def in_turn(name: str, sides: Sequence[str], work: float, options: Any) -> dict[str, Any]:
    """Medians of the sides of a part, each a process of its own that is asked for its calls in turn."""
    running = {side: SideProcess(name, side, options) for side in sides}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, process in running.items():
            times[side].append(process.call())
    for process in running.values():
        process.close()
    result: dict[str, Any] = {"unit": "tokens/s"}
    for side, values in times.items():
        result[side] = work / statistics.median(values)
        result[f"{side}_range"] = [work / max(values), work / min(values)]
    result["ratio"] = result["ours"] / result[next(side for side in sides if side.startswith("theirs"))]
    shown = (f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float))
    print(f"{name:24}", *shown, file=sys.stderr, flush=True)
    return result


class SideProcess:
    """One side of a part in a process that waits to be asked."""

    def __init__(self, name: str, side: str, options: Any) -> None:
        command = [sys.executable, __file__, "--serve", name, side, "--device", str(options.device)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self) -> float:
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())

    def call(self) -> float:
        """Seconds of a call."""
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(name: str, side: str, vocabulary: Vocabulary, options: Any) -> None:
    """Makes a call for each line of stdin, and says its seconds on stdout; three before the first are not counted."""
    if side.startswith("ours") or side.endswith("memory kept"):
        keep_freed_memory()
    if name == "training step":
        call = our_step(vocabulary, options) if side == "ours" else their_step(vocabulary, options)
    else:
        size = name.split(",")[0]
        compiled = side.endswith("compiled")
        call = (
            our_documents(size, options, compiled=compiled) if side.startswith("ours") else their_documents(size, options)
        )
    for _ in range(3):
        call()
    print(0.0, flush=True)
    for _ in sys.stdin:
        print(seconds(call, options.device), flush=True)


def our_step(vocabulary: Vocabulary, options: Any) -> Side:
    model = our_model(vocabulary, options)
    for block in model.blocks:
        block.compile()
    optimizers = build_optimizers(model, OptimizerConfig())
    ids = torch.randint(vocabulary.text_start, vocabulary.size, (ROWS, LENGTH + 1), device=options.device)
    documents = (torch.arange(LENGTH, device=options.device) >= LENGTH // 2).long().expand(ROWS, LENGTH)
    positions = torch.arange(LENGTH, device=options.device).remainder(LENGTH // 2).expand(ROWS, LENGTH)
    weights = torch.full((ROWS * LENGTH,), 1 / (ROWS * LENGTH), device=options.device)

    def step() -> None:
        with mixed_precision(options):
            hidden = in_product_dtype(model(ids[:, :-1], positions, block_diagonal_causal_mask(documents)), options)
            result = chunked_cross_entropy(hidden.flatten(0, 1), model.head.weight, ids[:, 1:].flatten(), weights)
        finish(model, optimizers, result.loss)

    return step


def their_step(vocabulary: Vocabulary, options: Any) -> Side:
    model = their_model(vocabulary, options)
    model.model.vqmodel.requires_grad_(False)
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)]
    ids = torch.randint(vocabulary.text_start, vocabulary.size, (ROWS, LENGTH), device=options.device)

    def step() -> None:
        with mixed_precision(options):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        finish(model, optimizers, loss)

    return step


def mixed_precision(options: Any) -> torch.autocast:
    """bf16 autocast where bfloat16 is fast, for both sides; else none."""
    return torch.autocast(options.device.type, torch.bfloat16, enabled=fast_bfloat16(options.device))


def in_product_dtype(hidden: Tensor, options: Any) -> Tensor:
    """Hidden states in the dtype of products, as training hands them to the loss."""
    return hidden.bfloat16() if fast_bfloat16(options.device) else hidden


def finish(model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], loss: Tensor) -> None:
    """Backward pass, clipping and the optimisers' step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def tiny(vocabulary: Vocabulary, options: Any) -> dict[str, Any]:
    """The size `tiny` on documents of the embedded set, each side on the same ids: ids of documents a second, no padding.

    Ours as a recipe has it: rows of 256 ids packed full, bf16 autocast, the loss in chunks, memory kept; and once more with
    its blocks compiled. The plain loop pads 16 documents drawn at random to the longest of them, in float32 with whole
    logits and PyTorch's own loss, which leaves padding out.
    """
    _, batches = documents_of("tiny")
    work = sum(len(document) - 1 for batch in batches for document in batch)
    result = in_turn("tiny, ids of documents", ("ours", "ours, compiled", "theirs"), work, options)
    result["ratio, compiled"] = result["ours, compiled"] / result["theirs"]
    return result


def base(vocabulary: Vocabulary, options: Any) -> dict[str, Any]:
    """The size of `training`, 12 × 768, on the first 48 of the same documents, beside Hugging Face's padded loop.

    Theirs is eager, with attention mask and labels that leave padding out, batches of 16 documents drawn at random; both
    sides in the dtype that is fast, with memory kept.
    """
    _, batches = documents_of("base")
    work = sum(len(document) - 1 for batch in batches for document in batch)
    sides = ("ours", "ours, compiled", "theirs, memory kept")
    result = in_turn("base, ids of documents", sides, work, options)
    result["ratio, compiled"] = result["ours, compiled"] / result["theirs, memory kept"]
    return result


def documents_of(size: str) -> tuple[Vocabulary, list[list[Tensor]]]:
    """Batches of 16 documents each: words, code, and pictures with a few words."""
    tokenizer = Bundle.load().tokenizer
    v = tokenizer.vocabulary
    torch.manual_seed(0)
    documents = [*itertools.islice(emoji.words("train"), 500), *emoji.code("train", 100_000)]
    ids = [tokenizer.encode(document)[:257] for document in documents]
    for words in range(500):  # pairs, whose codes are random: that changes no speed
        codes = torch.randint(0, v.num_image_codes, (v.dialect.length(v.grid) - 2,)) + v.image_start
        text = torch.randint(v.text_start, v.size, (1 + words % 12,))
        ids.append(torch.cat([torch.tensor([v.bos, v.boi]), codes, torch.tensor([v.eoi]), text, torch.tensor([v.eos])]))
    order = torch.randperm(len(ids)).tolist()
    return v, [[ids[place] for place in order[start : start + 16]] for start in range(0, len(order) - 15, 16)][
        : 40 if size == "tiny" else 3
    ]


def our_documents(size: str, options: Any, *, compiled: bool) -> Side:
    v, batches = documents_of(size)
    rows = packed_rows([document for batch in batches for document in batch], 256, v)
    model = Transformer(named_size(size, vocab_size=v.size)).to(options.device)
    model.init_weights()
    for block in model.blocks if compiled else []:
        block.attention.sdpa.forward = torch.compiler.disable(block.attention.sdpa.forward)  # as training has it on CPUs
        block.compile()
    optimizers = build_optimizers(model, OptimizerConfig())

    def call() -> None:
        for batch in rows:
            weights = (batch.loss_weights / batch.loss_weights.sum()).flatten()
            with mixed_precision(options):
                on_cpu = options.device.type == "cpu"
                mask = (document_groups if on_cpu else block_diagonal_causal_mask)(batch.document_ids)
                hidden = in_product_dtype(model(batch.input_ids, batch.positions, mask), options)
                result = chunked_cross_entropy(hidden.flatten(0, 1), model.head.weight, batch.targets.flatten(), weights)
            finish(model, optimizers, result.loss)

    return call


def their_documents(size: str, options: Any) -> Side:
    v, batches = documents_of(size)
    shape = named_size(size, vocab_size=v.size)
    if size == "tiny":
        model: Any = Transformer(shape).to(options.device)
        model.init_weights()
    else:
        config = config_of(shape, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
        model = ChameleonForConditionalGeneration(config).to(options.device)
        model.model.vqmodel.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def call() -> None:
        for batch in batches:
            whole = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
            if size == "tiny":
                logits = model.logits(model(whole[:, :-1].clamp(min=0)))
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten())
            else:
                with mixed_precision(options):
                    mask = (whole >= 0).long()
                    inputs = whole.clamp(min=0)
                    loss = model(input_ids=inputs, attention_mask=mask, labels=whole, use_cache=False).loss
            finish(model, [optimizer], loss)

    return call


def packed_rows(documents: list[Tensor], context_length: int, vocabulary: Vocabulary, rows: int = 16) -> list[PackedBatch]:
    """Batches of rows that hold the documents, packed as training packs them."""
    with tempfile.TemporaryDirectory() as folder:
        with write_shard(Path(folder) / "shard", "none", vocabulary) as writer:
            for document in documents:
                writer.add(document)
        source = PackedSource(SourceConfig(folder), context_length, vocabulary, None)
        found = [source.row(number, 0, 0) for number in range(len(source))]
    return [
        PackedBatch(*map(torch.stack, zip(*found[start : start + rows], strict=True)))
        for start in range(0, len(found), rows)
    ]


def attention(vocabulary: Vocabulary, options: Any) -> dict[str, Any]:
    """Attention of 16 rows of 512 tokens packed with the documents above, 6 heads of 64, forward and backward.

    Ours lets each document attend by itself (`attention: documents`), theirs is PyTorch's attention with a dense mask.
    """
    v, batches = documents_of("tiny")
    batch = packed_rows([document for batch in batches for document in batch], 512, v)[0]
    result = {}
    for dtype in (torch.bfloat16, torch.float32) if fast_bfloat16(options.device) else (torch.float32,):
        q, k, gradient, value = (torch.randn(16, 6, 512, 64, dtype=dtype, device=options.device) for _ in range(4))
        inputs = [part.requires_grad_() for part in (q, k, value)]

        def side(mask_of: Callable[[Tensor], Any], inputs: Any = inputs, gradient: Tensor = gradient) -> None:
            output = ScaledDotProductAttention()(*inputs, mask_of(batch.document_ids))
            torch.autograd.grad(output, inputs, gradient)

        name = f"attention, {str(dtype).removeprefix('torch.')}"
        sides = (partial(side, document_groups), partial(side, block_diagonal_causal_mask))
        result[name] = compare(name, *sides, 16 * 512, "tokens/s", options)
    return result


def loss(vocabulary: Vocabulary, options: Any) -> dict[str, Any]:
    """Peak memory of the loss and its gradients beyond its inputs, 4,096 and 8,192 rows of 768, 65,536 ids, bf16.

    Plain: whole logits, upcast as the original does, `cross_entropy`. Each side in a process of its own.
    """
    result = {}
    for rows in (4096, 8192):
        for side in ("plain", "chunked"):
            command = [sys.executable, __file__, "--loss-peak", side, str(rows)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result[f"{side}_{rows}_mib"] = float(done.stdout)
        result[f"share_{rows}"] = result[f"chunked_{rows}_mib"] / result[f"plain_{rows}_mib"]
    print("loss, peak memory", result, file=sys.stderr, flush=True)
    return result


def loss_peak(side: str, rows: int) -> float:
    """MiB that the peak of the resident set grows by."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, 768).bfloat16().requires_grad_()
    head = torch.randn(65536, 768).mul_(0.02).requires_grad_()
    targets, weights = torch.randint(0, 65536, (rows,)), torch.full((rows,), 1 / rows)
    (hidden[:8] @ head.bfloat16()[:8].t()).sum().backward()  # gradients and kernels are there
    before = peak_kib()
    if side == "chunked":
        chunked_cross_entropy(hidden, head, targets, weights).loss.backward()
    else:
        logits = (hidden @ head.bfloat16().t()).float()
        torch.nn.functional.cross_entropy(logits, targets).backward()
    return (peak_kib() - before) / 1024


def peak_kib() -> int:
    """This process's own peak of the resident set; getrusage would count that of the process which started it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def images(vocabulary: Vocabulary, options: Any) -> dict[str, Any]:
    """Encoding and decoding with the released channels at 256 px, one picture, float32; theirs has no decoder."""
    config = VQGANConfig(resolution=256)
    ours = VQGAN(config).eval().requires_grad_(False).to(options.device)
    theirs = ChameleonVQVAE(ChameleonVQVAEConfig(resolution=256)).eval().requires_grad_(False).to(options.device)
    picture = torch.rand(1, 3, 256, 256, device=options.device) * 2 - 1
    codes = ours.encode(picture)

    def their_side() -> None:
        with torch.no_grad():
            theirs.encode(picture)

    return {
        "encode": compare("image encode", lambda: ours.encode(picture), their_side, 1, "pictures/s", options),
        "decode": compare("image decode", lambda: ours.decode(codes), None, 1, "pictures/s", options),
    }


def text(vocabulary: Vocabulary, options: Any) -> dict[str, Any]:
    """BPE of 4096 pieces learned from the same bytes, encoding 2 MB of code and words, one thread each.

    Ours through `TextTokenizer.encode`, a document at a time as tokenising does, its checks included; theirs
    `Tokenizer.encode` of the byte-level BPE that Hugging Face's `tokenizers` builds, which splits into words first and
    also gives offsets.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    documents = [d.text for d in emoji.code("train", 1_500_000)] + [d.text for d in emoji.words("train")][:5000]
    ours = SentencePieceTokenizer.fit(documents, 4096)
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    )
    size = sum(len(document.encode()) for document in documents) / 1e6
    assert all(theirs.decode(theirs.encode(d).ids) == d == ours.decode(ours.encode(d)) for d in documents[:20])
    result = compare(
        "text encode",
        lambda: [ours.encode(document) for document in documents],
        lambda: [theirs.encode(document).ids for document in documents],
        size,
        "MB/s",
        options,
    )
    result["bytes_per_id"] = {
        "ours": size * 1e6 / sum(len(ours.encode(d)) for d in documents),
        "theirs": size * 1e6 / sum(len(theirs.encode(d).ids) for d in documents),
    }
    return result


def memory_peak(device: torch.device) -> float:
    """Bytes a second of reading: the best of a few sums over half a gigabyte."""
    values = torch.ones(2**27, device=device)
    return values.numel() * 4 / min(seconds(values.sum, device) for _ in range(6))


def ceilings(vocabulary: Vocabulary, options: Any) -> dict[str, float]:
    """What the machine can do: large bf16 and float32 products, and reading memory."""
    result = {
        "matmul_bf16_tflops": matmul_peak(options.device) / 1e12,
        "matmul_fp32_tflops": matmul_peak(options.device, torch.float32) / 1e12,
        "memory_read_gb_per_s": memory_peak(options.device) / 1e9,
    }
    return result


PARTS = {part.__name__: part for part in (ceilings, training, base, tiny, attention, loss, images, text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--loss-peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.loss_peak:
        print(loss_peak(options.loss_peak[0], int(options.loss_peak[1])))
        return
    torch.manual_seed(0)
    vocabulary = Vocabulary.build(image_codes=CODES, text_pieces=PIECES, grid=(32, 32))
    if options.serve:
        serve(*options.serve, vocabulary, options)
        return
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vocabulary": vocabulary.size,
    }
    for name in options.only:
        result[name] = PARTS[name](vocabulary, options)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
