"""Speed of evaluation on this machine: captions, the suite `emoji`, and likelihoods beside lm-evaluation-harness's `hf`.

    python benchmarks/evaluation.py [--only captions emoji likelihood]

* `captions`: pictures a second of the shipped model, batches of 64.
* `emoji`: seconds of `chameleon evaluate emoji`, start and scoring included.
* `likelihood`: the same harness, tasks and weights in float32, by Hugging Face's model (batch sizes 1, 8 and 64, the best
  counts) and by ours: 400 questions with four choices, without and with five examples, and 65 texts. Figures of both sides
  and the largest difference of log-likelihoods are printed; then ours in the form that is the fastest here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from chameleon import Chameleon
from chameleon.bundle import Bundle
from chameleon.convert.convert import convert
from chameleon.data import emoji, labelled
from chameleon.tokenizers.image import ImageTokenizer
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.vqgan import VQGAN

BATCH_SIZES = (1, 8, 64)
NUM_QUESTIONS = 400


def captions() -> None:
    model = Chameleon.load()
    pictures = [entry.picture for entry in labelled.representatives(emoji.load("validation"))][:256]
    model.caption_batch(pictures[:8])
    start = time.perf_counter()
    for first in range(0, len(pictures), 64):
        model.caption_batch(pictures[first : first + 64])
    print(f"captions: {len(pictures) / (time.perf_counter() - start):.1f} pictures a second", flush=True)


def emoji_suite() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "chameleon.cli", "evaluate", "emoji", "--out", f"{folder}/out"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(f"emoji: {time.perf_counter() - start:.0f} s", flush=True)


def write_tasks(folder: Path) -> None:
    """Write the tasks and their data."""
    rng = random.Random(0)
    entries = [entry for entry in emoji.load("train") if entry.hexcode == entry.base]
    names = sorted({entry.name for entry in entries})
    rows = []
    for entry in rng.sample(entries, NUM_QUESTIONS):
        choices = [entry.name, *rng.sample([name for name in names if name != entry.name], 3)]
        rng.shuffle(choices)
        question = f"keywords: {', '.join(entry.tags)}. name:"
        rows.append({"question": question, "choices": choices, "answer": choices.index(entry.name)})
    documents = [*islice(emoji.words("validation"), 60), *islice(emoji.code("validation"), 5)]
    texts = [document.text for document in documents]
    for name, values in (("choices", rows), ("texts", [{"text": text} for text in texts])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    data = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {}}}}}\ntest_split: test\nfewshot_split: test\n"
    (folder / "choices.yaml").write_text(
        f"task: bench_choices\n{data.format(folder / 'choices.jsonl')}output_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    (folder / "texts.yaml").write_text(
        f"task: bench_texts\n{data.format(folder / 'texts.jsonl')}output_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: text\nmetric_list: [{metric: bits_per_byte}]\n"
    )


def exportable(folder: Path) -> Path:
    """Write the shipped model with an untrained image tokenizer that Hugging Face's format can hold; return its folder."""
    bundle = Bundle.load(dtype=torch.float32)
    network = VQGAN(replace(bundle.tokenizer.image.config, norm_groups=32))
    tokenizer = MixedTokenizer(bundle.tokenizer.text, ImageTokenizer(network))
    Bundle(bundle.model, tokenizer, bundle.prompting).save(folder / "bundle", torch.float32)
    convert(folder / "bundle", folder / "hf", "hf")
    return folder / "bundle"


def likelihood() -> None:
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer, ChameleonForConditionalGeneration

    from chameleon.evaluation.lm_eval_model import ChameleonLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder)
        bundle = exportable(folder)
        manager = TaskManager(include_path=name, include_defaults=False)
        ours = ChameleonLM(str(bundle), dtype="float32")
        network = ChameleonForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder / "hf")

        def timed(lm: Any, task: str, shots: int) -> tuple[float, dict[str, Any], list[float]]:
            start = time.perf_counter()
            results = simple_evaluate(lm, tasks=[task], task_manager=manager, num_fewshot=shots, bootstrap_iters=0)
            seconds = time.perf_counter() - start
            samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
            values = [value for sample in samples for value in flat(sample["filtered_resps"])]
            return seconds, results["results"][task], values

        fastest = ChameleonLM(str(bundle))
        for lm in (ours, fastest):
            timed(lm, "bench_choices", 0)  # data are read and compiled code is ready
        for task, shots, metric in (
            ("bench_choices", 0, "acc,none"),
            ("bench_choices", 5, "acc,none"),
            ("bench_texts", 0, "bits_per_byte,none"),
        ):
            theirs = {}
            for size in BATCH_SIZES:
                lm = HFLM(
                    pretrained=network,
                    tokenizer=tokenizer,
                    batch_size=size,
                    add_bos_token=task == "bench_choices",  # whole texts get it from the harness
                    max_length=512,
                )
                theirs[size] = timed(lm, task, shots)
            best = min(theirs, key=lambda size: theirs[size][0])
            seconds, figures, values = timed(ours, task, shots)
            fast_seconds, fast_figures, _ = timed(fastest, task, shots)
            difference = max(abs(a - b) for a, b in zip(values, theirs[best][2], strict=True))
            their_seconds, their_figures, _ = theirs[best]
            shown = " and ".join(f"{of[metric]:.6g}" for of in (their_figures, figures))
            print(
                f"likelihood, {task}, {shots}-shot: hf {their_seconds:.1f} s (batch size {best}), ours {seconds:.1f} s, "
                f"{their_seconds / seconds:.1f} times; {metric} {shown}; largest difference {difference:.1e}. "
                f"In {fastest.chameleon.engine.dtype}: {fast_seconds:.1f} s, {their_seconds / fast_seconds:.1f} times, "
                f"{fast_figures[metric]:.6g}",
                flush=True,
            )


def flat(responses: Any) -> list[float]:
    """Return the log-likelihoods of a sample's responses."""
    values = []
    for response in responses:
        values.append(float(response[0] if isinstance(response, (list, tuple)) else response))
    return values


PARTS: dict[str, Callable[[], None]] = {"captions": captions, "emoji": emoji_suite, "likelihood": likelihood}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    for part in parser.parse_args().only:
        PARTS[part]()


if __name__ == "__main__":
    main()
