"""The model `chameleon` of lmms-eval 0.7, found by its entry point `lmms_eval.models`.

python -m lmms_eval --model chameleon --model_args pretrained=BUNDLE --tasks …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.model import lmms

from chameleon.document import Document, Image, Text
from chameleon.errors import BadInput
from chameleon.evaluation.likelihood import Continuation, log_likelihoods
from chameleon.evaluation.lm_eval_model import GenerationOptions
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import OutputConstraints
from chameleon.generation.request import Request

IMAGE_MARK = "<image>"
"""Where a task's text wants its next picture; pictures without a mark come before the text."""


def manifest() -> Any:
    """Return the `ModelManifest` of this model."""
    from lmms_eval.models.registry_v2 import ModelManifest  # whose package loads all entry points when it is imported

    return ModelManifest("chameleon", simple_class_path=f"{__name__}.ChameleonLMM")


class ChameleonLMM(lmms):  # type: ignore[misc]
    """A bundle for lmms-eval: all requests of a task share one batch of the engine."""

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int | str | None = None,
        model: Chameleon | None = None,
        **kwargs: Any,
    ) -> None:
        """pretrained: folder of a bundle; by default the shipped one. batch_size: is not used. model: a loaded one."""
        super().__init__()
        if kwargs:
            raise BadInput(f"no option {sorted(kwargs)[0]!r}", where="model_args", remedy="use pretrained, device, dtype")
        self.chameleon = model or Chameleon.load(pretrained, device=device or "cpu", dtype=dtype)

    def prompt(self, context: str, visuals: Sequence[Any]) -> Document:
        """Return the document of a task's text and pictures. Raise `BadInput` for videos and sound."""
        for visual in visuals:
            if not hasattr(visual, "convert"):
                raise BadInput(f"{type(visual).__name__} instead of a picture", where="lmms-eval", remedy="pictures only")
        if context.count(IMAGE_MARK) != len(visuals):
            return Document((*(Image(visual) for visual in visuals), Text(context)))
        parts: list[Text | Image] = []
        for index, text in enumerate(context.split(IMAGE_MARK)):
            parts += [Text(text)] if text else []
            parts += [Image(visuals[index])] if index < len(visuals) else []
        return Document(tuple(parts))

    def visuals_of(self, doc_to_visual: Callable[[Any], Any] | None, doc: Any) -> list[Any]:
        return list(doc_to_visual(doc) or []) if doc_to_visual is not None else []

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return answers up to the first of the task's stop texts."""
        engine_requests, options = [], []
        for request in requests:
            context, values, doc_to_visual, doc_id, task, split = request.args
            visuals = self.visuals_of(doc_to_visual, self.task_dict[task][split][doc_id])
            of = GenerationOptions.from_task(values)
            prompt = self.chameleon.prompts.token_ids(self.prompt(context, visuals))
            engine_requests.append(Request(prompt, OutputConstraints(of.max_new_tokens), of.sampling, seed=0))
            options.append(of)
        generated = self.chameleon.engine.generate(engine_requests)
        return [
            of.cut(self.chameleon.decode(token_ids).text).strip() for of, token_ids in zip(options, generated, strict=True)
        ]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each target after its text and pictures, and whether it is the greedy answer."""
        continuations = []
        for request in requests:
            context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(doc)
            prompt = self.chameleon.prompts.token_ids(self.prompt(context, self.visuals_of(doc_to_visual, doc)))
            continuations.append(Continuation(prompt, self.chameleon.tokenizer.text_to_ids(target)))
        return [(of.log_likelihood, of.is_greedy) for of in log_likelihoods(self.chameleon, continuations)]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise BadInput("tasks of several rounds are not supported", where="lmms-eval")
