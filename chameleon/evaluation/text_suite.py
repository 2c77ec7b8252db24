"""Text tasks of lm-evaluation-harness as a suite. Each task is a part and one batch: an evaluation goes on task by task."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from chameleon.errors import BadInput
from chameleon.evaluation.part import EvaluatedModel, Item, Output, Part, Scores
from chameleon.evaluation.statistics import Figure, Metric, Term, value_of
from chameleon.evaluation.suite import existing_folder, fingerprint_of

PAPER_TASKS = {
    "piqa": 0,
    "social_iqa": 0,
    "hellaswag": 0,
    "winogrande": 0,
    "arc_easy": 0,
    "arc_challenge": 0,
    "openbookqa": 0,
    "boolq": 0,
    "gsm8k": 8,
    "minerva_math": 4,
    "mmlu": 5,
}
"""The tasks of the paper's table 6 by their names in the harness, with its numbers of examples (arXiv 2405.09818, 5.1)."""


@dataclass
class TextSuite:
    """Settings of text tasks."""

    tasks: dict[str, int] = field(default_factory=lambda: dict(PAPER_TASKS))
    """Task or group of the harness → number of examples in its prompt."""
    include_path: str = ""
    """Folder with task files of your own, in the harness's form; they name their data by path."""
    limit: int = 0
    """Samples of each task; 0 is all."""
    online: bool = False
    """Whether the harness may download the data of its own tasks. Without it they are read from Hugging Face's cache."""
    seed: int = 1234
    """Of the choice of examples."""
    add_bos_token: bool = True
    conversation: bool | None = None
    """Whether answers are those to messages; by default as the bundle was trained."""

    def build_parts(self) -> list[Part]:
        """Return a part for each task."""
        if importlib.util.find_spec("lm_eval") is None:
            raise BadInput("lm-eval is not installed", where="text", remedy="pip install 'open-chameleon[lm-eval]'")
        if self.include_path:
            existing_folder(self.include_path, "a folder with task files")
        return [TaskPart(self, name, shots) for name, shots in self.tasks.items()]

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of the task files. Each part's method has the version and configuration of its task."""
        if not self.include_path:
            return {}
        return {"include_path": fingerprint_of(sorted(Path(self.include_path).glob("**/*.y*ml")))}


class TaskPart:
    """One task or group: a single item, whose output is what the harness gives."""

    batch_size = 1

    def __init__(self, suite: TextSuite, task: str, shots: int) -> None:
        self.suite, self.name, self.shots = suite, task, shots
        self.method: dict[str, Any] = {"num_fewshot": shots}

    def items(self) -> list[Item]:
        return [Item(self.name)]

    @cached_property
    def manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        if self.suite.include_path:
            own = TaskManager(include_path=self.suite.include_path, include_defaults=False)
            if self.name in own.all_tasks:
                return own  # the harness's own tasks need not be indexed, which takes seconds
        return TaskManager(include_path=self.suite.include_path or None)

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        if not self.suite.online:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        from lm_eval import simple_evaluate

        from chameleon.evaluation.lm_eval_model import ChameleonLM

        source = model.describe().get("server")
        adapter = ChameleonLM(
            model=model.local("text tasks"),
            server=source,
            add_bos_token=self.suite.add_bos_token,
            conversation=self.suite.conversation,
        )
        try:
            results = simple_evaluate(
                adapter,
                tasks=[self.name],
                task_manager=self.manager,
                num_fewshot=self.shots,
                limit=self.suite.limit or None,
                bootstrap_iters=0,
                fewshot_random_seed=self.suite.seed,
                random_seed=self.suite.seed,
            )
        except BadInput:
            raise
        except (ValueError, KeyError, OSError, ConnectionError) as error:
            raise BadInput(
                f"the harness could not run the task ({error})",
                where=f"text / {self.name}",
                remedy="is its name right, and are its data in Hugging Face's cache? online=true may download them",
            ) from None
        assert results is not None
        samples = {
            task: [
                {
                    "key": f"{task} {sample['doc_id']} {sample.get('filter', 'none')}",
                    "target": str(sample["target"]),
                    "filter": sample.get("filter", "none"),
                    "output": [str(response) for response in sample["filtered_resps"]],
                    "metrics": {name: jsonable(sample[name]) for name in sample.get("metrics", ()) if name in sample},
                }
                for sample in of_task
            ]
            for task, of_task in results["samples"].items()
        }
        figures = {
            task: {
                metric.removesuffix(",none"): value
                for metric, value in values.items()
                if isinstance(value, float) and "stderr" not in metric
            }
            for task, values in results["results"].items()
        }
        versions = {task: str(version) for task, version in results.get("versions", {}).items()}
        documents = hashlib.sha256(
            "".join(sample["doc_hash"] for of_task in results["samples"].values() for sample in of_task).encode()
        ).hexdigest()[:12]
        return [{"samples": samples, "figures": figures, "versions": versions, "documents": documents}]

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        """Return the harness's figures. Those of sums over samples get an interval, and can be compared in pairs."""
        (output,) = outputs
        self.method |= {"versions": output["versions"], "documents": output["documents"]}
        scores = Scores([], {}, items=[], outputs=[])
        rows: dict[str, list[dict[str, Term]]] = {}
        for task, samples in output["samples"].items():
            rows[task] = [{} for _ in samples]
            scores.items += [Item(sample["key"], expected=sample["target"]) for sample in samples]
            scores.outputs += [sample["output"] for sample in samples]
        for task, values in output["figures"].items():
            covered = [task] if task in rows else list(rows)  # a group is over all the tasks that ran
            for metric, value in values.items():
                name = metric if task == self.name else f"{task}, {metric}"
                key, _, wanted_filter = metric.partition(",")
                chosen = [
                    (row, sample["metrics"][key])
                    for of_task in covered
                    for row, sample in zip(rows[of_task], output["samples"][of_task], strict=True)
                    if key in sample["metrics"] and sample["filter"] == (wanted_filter or "none")
                ]
                found = terms_of(key, [number for _, number in chosen], value)
                if found is None:
                    scores.figures[name] = Figure(value, count=len(chosen), higher_is_better=not is_cost(name))
                    continue
                scores.metrics[name], terms = found
                for (row, _), term in zip(chosen, terms, strict=True):
                    row[name] = term
        scores.of_items = [row for of_task in rows.values() for row in of_task]
        return scores


def terms_of(metric: str, values: Sequence[Any], figure: float) -> tuple[Metric, list[Term]] | None:
    """Return a metric and its samples' terms, if they give the harness's figure; None if it is another function of them."""
    if not values:
        return None
    is_pair = all(isinstance(value, list) and len(value) == 2 for value in values)
    candidates: list[tuple[Metric, list[Term]]] = []
    if all(isinstance(value, (int, float)) for value in values):
        is_share = all(value in (0, 1) for value in values)
        candidates.append((Metric(higher_is_better=not is_cost(metric), is_share=is_share), [float(v) for v in values]))
    elif is_pair and metric == "bits_per_byte":
        terms: list[Term] = [(-nats / math.log(2), float(count)) for nats, count in values]
        candidates.append((Metric(higher_is_better=False, is_share=False), terms))
    elif is_pair and is_cost(metric):
        terms = [(-nats, float(count)) for nats, count in values]
        candidates.append((Metric("perplexity", higher_is_better=False, is_share=False), terms))
    for candidate, of_samples in candidates:
        if math.isclose(value_of(candidate, of_samples), figure, rel_tol=1e-9, abs_tol=1e-12):
            return candidate, of_samples
    return None


def is_cost(name: str) -> bool:
    return any(word in name for word in ("perplexity", "bits_per_byte"))


def jsonable(value: Any) -> Any:
    """Return a metric of a sample as JSON."""
    if isinstance(value, (list, tuple)):
        return [jsonable(element) for element in value]
    if hasattr(value, "item"):
        return value.item()
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
