"""The model `chameleon` of lm-evaluation-harness 0.4.13: a bundle, or one behind `chameleon serve`.

    python -m chameleon.evaluation.harness run --model chameleon --model_args pretrained=BUNDLE --tasks …

is the harness's own command with the model registered. Documents begin with `bos`, as in training; `add_bos_token=False`
leaves it out. Log-likelihoods are those of Hugging Face's Chameleon: over all tokens but image codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from chameleon.document import Conversation, Document, Message, Text
from chameleon.errors import BadInput
from chameleon.evaluation.likelihood import Continuation, Likelihood, log_likelihoods
from chameleon.evaluation.server_model import call_server
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import OutputConstraints
from chameleon.generation.request import Request
from chameleon.generation.sampling import Sampling
from chameleon.model.quantization import WeightFormat

MAX_NEW_TOKENS = 256
"""Of an answer whose task gives no limit, as in the harness."""
REQUESTS_AT_A_TIME = 4096
SERVER_CONCURRENCY = 8


@register_model("chameleon")
class ChameleonLM(TemplateLM):  # type: ignore[misc]
    """A bundle for lm-evaluation-harness. Log-likelihoods are computed in trees, answers by the engine."""

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        weight_format: WeightFormat | Literal["auto"] = "auto",
        max_length: int | None = None,
        add_bos_token: bool = True,
        conversation: bool | None = None,
        server: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        model: Chameleon | None = None,
    ) -> None:
        """pretrained: folder of a bundle; by default the shipped one. conversation: whether answers are those to messages
        rather than continuations of documents; by default as the bundle was trained. server: address of a
        `chameleon serve` whose bundle this is: it computes, and only the tokenizer is used here. batch_size: is not used;
        batches are as large as suits the device. model: one that is loaded already.
        """
        super().__init__()
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # the harness asks for cuda:0 unless it is told otherwise
        self.chameleon = model or Chameleon.load(
            pretrained, device=device or "cpu", dtype=dtype, weight_format=weight_format
        )
        self.add_bos_token, self.server = add_bos_token, server.rstrip("/") if server else None
        self.is_conversational = self.chameleon.prompts.is_conversational if conversation is None else conversation
        self._max_length = max_length or self.chameleon.model.config.context_length

    # --- tokens ---

    @property
    def eot_token_id(self) -> int:
        return self.chameleon.vocabulary.answer_end

    @property
    def prefix_token_id(self) -> int:
        return self.chameleon.vocabulary.bos

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        return f"chameleon-{self.chameleon.tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text, after `bos` unless that is switched off."""
        has_bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [*([self.prefix_token_id] if has_bos else []), *self.chameleon.tokenizer.text_to_ids(string)]

    # --- log-likelihoods ---

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        for start in range(0, len(requests), REQUESTS_AT_A_TIME):
            chosen = requests[start : start + REQUESTS_AT_A_TIME]
            scored = self.score([Continuation(context, continuation) for _, context, continuation in chosen])
            for (texts, _, _), result in zip(chosen, scored, strict=True):
                results.append((result.log_likelihood, result.is_greedy))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def score(self, requests: Sequence[Continuation]) -> list[Likelihood]:
        """Return the log-likelihoods of continuations, cut at the left to `max_length` tokens as the harness does."""
        fitted = []
        for context, continuation in requests:
            token_ids = [*context, *continuation][-(self.max_length + 1) :]
            start = max(1, len(token_ids) - len(continuation))
            fitted.append(Continuation(token_ids[:start], token_ids[start:]))
        return log_likelihoods(self.chameleon, fitted) if self.server is None else self.score_on_server(fitted)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, in disjoint windows where they are longer than the context."""
        counts, windows = [], []
        for request in requests:
            token_ids = self.tok_encode(request.args[0], add_special_tokens=False)
            of_text = list(
                map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        token_list=token_ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                    ),
                )
            )
            counts.append(len(of_text))
            windows += [Continuation(context, continuation) for context, continuation in of_text]
        scores = iter(self.score(windows))
        results = [sum(next(scores).log_likelihood for _ in range(count)) for count in counts]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    # --- answers ---

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return answers up to the first of the task's stop texts. All requests share one batch of the engine."""
        options = [GenerationOptions.from_task(request.args[1]) for request in requests]
        prompts = [
            self.prompt_ids(request.args[0], of.max_new_tokens) for request, of in zip(requests, options, strict=True)
        ]
        if self.server is not None:
            texts = self.generate_on_server(prompts, options)
        else:
            engine_requests = [
                Request(prompt, OutputConstraints(of.max_new_tokens), of.sampling, seed=0)
                for prompt, of in zip(prompts, options, strict=True)
            ]
            texts = [self.chameleon.decode(token_ids).text for token_ids in self.chameleon.engine.generate(engine_requests)]
        results = [of.cut(text) for text, of in zip(texts, options, strict=True)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result)
        return results

    def prompt_ids(self, text: str, max_new_tokens: int) -> tuple[int, ...]:
        """Return the token ids of a prompt, cut at the left so that the answer fits behind it."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise BadInput(
                f"{max_new_tokens} new tokens leave no room for a prompt in {self.max_length}",
                where="generation_kwargs",
                remedy="lower max_gen_toks",
            )
        if self.is_conversational:
            content = Conversation((Message("user", Document((Text(text),))),))
            token_ids = list(self.chameleon.prompts.token_ids(content))
        else:
            token_ids = self.tok_encode(text)
        if len(token_ids) <= room:
            return tuple(token_ids)
        return (*token_ids[:1], *token_ids[len(token_ids) - room + 1 :])[:room]

    # --- through a server ---

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the server's completion."""
        return call_server(self.server or "", "/v1/completions", body)

    def score_on_server(self, requests: Sequence[Continuation]) -> list[Likelihood]:
        def score(request: Continuation) -> Likelihood:
            token_ids, count = [*request.context, *request.continuation], len(request.continuation)
            answer = self.post({"prompt": token_ids, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0})
            logprobs = answer["choices"][0]["logprobs"]
            values, tops = logprobs["token_logprobs"][-count:], logprobs["top_logprobs"][-count:]
            greedy = all(value >= max(top.values()) for value, top in zip(values, tops, strict=True))
            return Likelihood(sum(values), greedy)

        with ThreadPoolExecutor(SERVER_CONCURRENCY) as pool:
            return list(pool.map(score, requests))

    def generate_on_server(self, prompts: Sequence[tuple[int, ...]], options: Sequence[GenerationOptions]) -> list[str]:
        def generate(pair: tuple[tuple[int, ...], GenerationOptions]) -> str:
            prompt, of = pair
            body = {"prompt": list(prompt), "max_tokens": of.max_new_tokens, "seed": 0}
            body |= {"temperature": of.sampling.temperature, "top_p": of.sampling.top_p, "top_k": of.sampling.top_k}
            body["repetition_penalty"] = 1.0
            return self.post(body)["choices"][0]["text"]

        with ThreadPoolExecutor(SERVER_CONCURRENCY) as pool:
            return list(pool.map(generate, zip(prompts, options, strict=True)))


class GenerationOptions:
    """How a task wants its answers generated."""

    def __init__(self, max_new_tokens: int, sampling: Sampling, stops: Sequence[str]) -> None:
        self.max_new_tokens, self.sampling, self.stops = max_new_tokens, sampling, stops

    @classmethod
    def from_task(cls, values: dict[str, Any]) -> GenerationOptions:
        """Read a task's `generation_kwargs`, in the names of Hugging Face's `generate`."""
        until = values.get("until") or []
        limit = int(values.get("max_gen_toks") or values.get("max_new_tokens") or MAX_NEW_TOKENS)
        temperature = float(values.get("temperature") or 0.0) if values.get("do_sample", True) else 0.0
        top_p, top_k = float(values.get("top_p") or 1.0), int(values.get("top_k") or 0)
        sampling = Sampling(temperature, top_p if temperature else 1.0, top_k if temperature else 0)
        return cls(limit, sampling, [until] if isinstance(until, str) else list(until))

    def cut(self, text: str) -> str:
        """Return a text up to the first stop text."""
        ends = [text.find(stop) for stop in self.stops if stop]
        return text[: min((end for end in ends if end >= 0), default=len(text))]
