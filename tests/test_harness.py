"""The models for lm-evaluation-harness and lmms-eval, against the harness's own model on the exported bundle."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT, random_model, running
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from chameleon.bundle import Bundle
from chameleon.convert.convert import convert
from chameleon.document import Document, Image, Text
from chameleon.errors import BadInput
from chameleon.evaluation.likelihood import Continuation, build_trees, log_likelihoods
from chameleon.evaluation.part import LocalModel
from chameleon.evaluation.run import evaluate_suites
from chameleon.evaluation.server_model import ServerModel
from chameleon.evaluation.suite import make_suite
from chameleon.evaluation.text_suite import TaskPart, TextSuite
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.sampling import GREEDY, IMAGE_SAMPLING, Sampling
from chameleon.tokenizers.image import ImageTokenizer
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import SentencePieceTokenizer
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
lm_eval = pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from transformers import AutoTokenizer, ChameleonForConditionalGeneration  # noqa: E402

from chameleon.evaluation.lm_eval_model import ChameleonLM  # noqa: E402

WORDS = ("orange", "heart", "style", "noto", "fox", "dog", "hand", "skin", "the", "lazy")
VQ = VQGANConfig(
    resolution=8,
    channels=32,
    multipliers=(1, 2),
    res_blocks=1,
    latent_channels=32,
    codebook_size=16,
    codebook_width=32,
    norm_groups=32,
)


@pytest.fixture(scope="module")
def folder(text_tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, its export for transformers, and tasks of all three kinds in files."""
    root = tmp_path_factory.mktemp("harness")
    torch.manual_seed(1)
    tokenizer = MixedTokenizer(text_tokenizer, ImageTokenizer(VQGAN(VQ)))
    network = random_model(tokenizer.vocabulary.size, context_length=128)
    characters = [index for index in range(len(text_tokenizer)) if len(text_tokenizer.decode_bytes([index])) == 1]
    v = tokenizer.vocabulary
    rare = [*(v.text_start + torch.tensor(characters)).tolist(), v.pad, v.bos, v.boi, v.eoi, v.sep]
    network.head.weight[rare] *= 0.01  # so that answers are whole words
    Bundle(network, tokenizer, "document").save(root / "bundle", torch.float32)
    convert(root / "bundle", root / "hf", "hf")
    rows = [
        {
            "question": f"{TEXT[index % 5]} {WORDS[index % 10]}",
            "choices": [f"{WORDS[(index + k) % 10]} {WORDS[(3 * index + k) % 10]}" for k in range(4)],
            "answer": index % 4,
        }
        for index in range(24)
    ]
    (root / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "texts.jsonl").write_text("\n".join(json.dumps({"text": text * 2}) for text in TEXT))
    common = "dataset_path: json\ntest_split: test\nfewshot_split: test\n"
    tasks = root / "tasks"
    tasks.mkdir()
    (tasks / "choices.yaml").write_text(
        f"task: local_choices\n{common}dataset_kwargs: {{data_files: {{test: {root}/choices.jsonl}}}}\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (tasks / "texts.yaml").write_text(
        f"task: local_texts\n{common}dataset_kwargs: {{data_files: {{test: {root}/texts.jsonl}}}}\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    (tasks / "answers.yaml").write_text(
        f"task: local_answers\n{common}dataset_kwargs: {{data_files: {{test: {root}/choices.jsonl}}}}\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[answer]}}'\n"
        'generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}\nmetric_list: [{metric: exact_match}]\n'
    )
    return root


@pytest.fixture(scope="module")
def ours(folder: Path) -> ChameleonLM:
    return ChameleonLM(str(folder / "bundle"), dtype="float32")


def hugging_face(folder: Path, *, add_bos_token: bool) -> HFLM:
    network = ChameleonForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    return HFLM(pretrained=network, tokenizer=tokenizer, batch_size=4, max_length=128, add_bos_token=add_bos_token)


def run(lm: Any, task: str, folder: Path, shots: int = 0) -> tuple[dict[str, float], list[Any]]:
    """Return the figures of a task and the responses to each sample."""
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    results = simple_evaluate(lm, tasks=[task], task_manager=manager, num_fewshot=shots, bootstrap_iters=0)
    figures = {name: value for name, value in results["results"][task].items() if isinstance(value, float)}
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return figures, [sample["filtered_resps"] for sample in samples]


def test_choices_equal_the_harnesss_own_model(folder: Path, ours: ChameleonLM) -> None:
    theirs = hugging_face(folder, add_bos_token=True)
    for shots in (0, 3):
        expected, their_responses = run(theirs, "local_choices", folder, shots)
        figures, responses = run(ours, "local_choices", folder, shots)
        assert figures == expected
        for got, wanted in zip(responses, their_responses, strict=True):
            for (a, greedy), (b, their_greedy) in zip(got, wanted, strict=True):
                assert a == pytest.approx(b, abs=1e-4) and greedy == their_greedy


def test_whole_texts_equal_the_harnesss_own_model(folder: Path, ours: ChameleonLM) -> None:
    expected, their_responses = run(hugging_face(folder, add_bos_token=False), "local_texts", folder)
    figures, responses = run(ours, "local_texts", folder)
    assert figures["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte,none"], abs=1e-5)
    for got, wanted in zip(responses, their_responses, strict=True):
        assert float(got[0]) == pytest.approx(float(wanted[0]), abs=1e-3)  # sums of up to 200 tokens, about -900


def test_answers_equal_the_harnesss_own_model(folder: Path, ours: ChameleonLM) -> None:
    _, their_responses = run(hugging_face(folder, add_bos_token=True), "local_answers", folder)
    _, responses = run(ours, "local_answers", folder)
    assert responses == their_responses
    assert any(response[0] for response in responses)


def test_the_server_gives_the_same_numbers(folder: Path, ours: ChameleonLM) -> None:
    with running(Chameleon(Bundle.load(folder / "bundle", dtype=torch.float32)), name="small") as url:
        through = ChameleonLM(model=ours.chameleon, server=url)
        for task in ("local_choices", "local_texts", "local_answers"):
            figures, responses = run(through, task, folder)
            expected, local = run(ours, task, folder)
            assert figures == pytest.approx(expected, abs=1e-5)
            if task == "local_answers":
                assert responses == local
        # The harness's own client sends no bos, as ours without it.
        without = ChameleonLM(model=ours.chameleon, add_bos_token=False)
        expected, local = run(without, "local_choices", folder)
        args = f"model=small,base_url={url}/v1/completions,tokenizer_backend=remote"
        figures, responses = run_by_name("local-completions", args, "local_choices", folder)
        assert figures == pytest.approx(expected, abs=1e-5)
        for got, wanted in zip(responses, local, strict=True):
            assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=1e-4)


def run_by_name(model: str, args: str, task: str, folder: Path) -> tuple[dict[str, float], list[Any]]:
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    results = simple_evaluate(model, args, tasks=[task], task_manager=manager, bootstrap_iters=0)
    figures = {name: value for name, value in results["results"][task].items() if isinstance(value, float)}
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return figures, [sample["filtered_resps"] for sample in samples]


def test_the_model_is_registered_with_the_harness(folder: Path) -> None:
    figures, _ = run_by_name("chameleon", f"pretrained={folder}/bundle,dtype=float32", "local_choices", folder)
    assert set(figures) >= {"acc,none", "acc_norm,none"}


def test_the_harnesss_command_knows_the_model(folder: Path) -> None:
    command = [sys.executable, "-m", "chameleon.evaluation.harness", "run", "--model", "chameleon", "--model_args"]
    command += [f"pretrained={folder}/bundle", "--tasks", "local_choices", "--include_path", str(folder / "tasks")]
    result = subprocess.run([*command, "--limit", "4"], capture_output=True, text=True, env={**os.environ})
    assert result.returncode == 0, result.stderr[-2000:]
    assert "local_choices" in result.stdout and "acc_norm" in result.stdout


def test_the_text_suite_runs_tasks_and_compares(folder: Path, tmp_path: Path) -> None:
    """The figures are the harness's, with intervals where they are means; samples are kept for paired tests."""
    model = LocalModel(Chameleon.load(folder / "bundle", dtype="float32"))
    settings = {"tasks": {"local_choices": 2, "local_texts": 0}, "include_path": str(folder / "tasks")}
    suite = make_suite("text", "text", settings, "test")
    card = evaluate_suites([suite], model, tmp_path / "out")
    assert card is not None
    expected, _ = run(ChameleonLM(model=model.model), "local_choices", folder, 2)
    part = card.content["suites"]["text"]["parts"]["local_choices"]
    assert part["figures"]["acc"]["value"] == expected["acc,none"]
    assert part["figures"]["acc"]["low"] <= expected["acc,none"] <= part["figures"]["acc"]["high"]
    assert len(part["samples"]) == 24 and all({"acc", "acc_norm"} <= set(row["scores"]) for row in part["samples"])
    assert part["method"]["num_fewshot"] == 2
    bits = card.content["suites"]["text"]["parts"]["local_texts"]["figures"]["bits_per_byte"]
    assert bits["low"] < bits["value"] < bits["high"]
    with pytest.raises(BadInput, match=r"text / nothing: the harness could not run the task"):
        evaluate_suites(
            [make_suite("text", "text", {**settings, "tasks": {"nothing": 0}}, "test")], model, tmp_path / "other"
        )


def test_tasks_with_two_filters_are_told_apart() -> None:
    """As gsm8k has them: each filter's figure is over its own samples; a figure of both would count documents twice."""
    rows = [(0, 1.0, 1.0), (1, 0.0, 1.0), (2, 0.0, 0.0), (3, 1.0, 1.0)]
    samples = [
        {"key": f"t {doc} {name}", "target": "x", "filter": name, "output": ["y"], "metrics": {"exact_match": value}}
        for doc, strict, flexible in rows
        for name, value in (("strict", strict), ("flexible", flexible))
    ]
    figures = {"exact_match,strict": 0.5, "exact_match,flexible": 0.75}
    part = TaskPart(TextSuite(), "t", 0)
    output = {"samples": {"t": samples}, "figures": {"t": figures}, "versions": {}, "documents": ""}
    scores = part.score(None, [], [output])  # type: ignore[arg-type]
    found = scores.all_figures([])
    assert {name: (of.value, of.count) for name, of in found.items()} == {name: (v, 4) for name, v in figures.items()}
    groups = {"g": {"exact_match,strict": 0.5}, "t": figures}
    grouped = TaskPart(TextSuite(), "g", 0)
    scores = grouped.score(None, [], [{**output, "figures": groups}])  # type: ignore[arg-type]
    assert scores.all_figures([])["exact_match,strict"].low is not None  # a group's figure over its tasks' samples


def test_a_prompt_needs_room(ours: ChameleonLM) -> None:
    with pytest.raises(BadInput, match="500 new tokens leave no room"):
        ours.prompt_ids("the fox", 500)
    assert len(ours.prompt_ids("the fox " * 100, 100)) == 28


# --- likelihoods in trees ---


def plain_log_likelihood(model: Chameleon, request: Continuation) -> tuple[float, bool]:
    """By a pass over the sequence alone, image codes left out of the softmax."""
    token_ids = torch.tensor([[*request.context, *request.continuation]])
    logits = model.logits(token_ids[:, :-1])[0].clone()
    logits[:, model.vocabulary.mask(image=True)] = -torch.inf
    start = len(request.context) - 1
    targets = token_ids[0, start + 1 :]
    return (
        -float(F.cross_entropy(logits[start:].double(), targets, reduction="sum")),
        bool((logits[start:].argmax(1) == targets).all()),
    )


@pytest.fixture(scope="module")
def small(folder: Path) -> Chameleon:
    return Chameleon(Bundle.load(folder / "bundle", dtype=torch.float32))


@settings(max_examples=25)
@given(data=st.data())
def test_trees_give_what_single_passes_give(small: Chameleon, data: st.DataObject) -> None:
    """Requests that share beginnings, are equal, or are the beginning of others."""
    first = small.vocabulary.text_start
    tokens = st.integers(first, first + 3)
    contexts = data.draw(st.lists(st.lists(tokens, max_size=6), min_size=1, max_size=3))
    requests = [
        Continuation([small.vocabulary.bos, *data.draw(st.sampled_from(contexts))], continuation)
        for continuation in data.draw(st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=8))
    ]
    for result, request in zip(log_likelihoods(small, requests), requests, strict=True):
        value, greedy = plain_log_likelihood(small, request)
        assert result.log_likelihood == pytest.approx(value, abs=2e-4) and result.is_greedy == greedy


def test_shared_beginnings_are_computed_once(small: Chameleon) -> None:
    v = small.vocabulary
    prefix = [v.bos, *range(v.text_start, v.text_start + 60)]
    requests = [Continuation(prefix, [v.text_start + index, v.text_start]) for index in range(20)]
    (tree,) = build_trees(requests)
    assert len(tree.token_ids) == 61 + 20  # the last token of each predicts nothing
    results = log_likelihoods(small, requests)
    for request, result in zip(requests, results, strict=True):
        assert result.log_likelihood == pytest.approx(plain_log_likelihood(small, request)[0], abs=2e-4)


def test_many_requests_take_several_passes_and_keep_their_order(small: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chameleon.evaluation.likelihood.TREE_TOKENS", 16)
    monkeypatch.setattr("chameleon.evaluation.likelihood.BATCH_TOKENS", {"cpu": 64})
    monkeypatch.setattr("chameleon.evaluation.likelihood.LOGIT_ROWS", 7)
    v = small.vocabulary
    requests = [
        Continuation(
            [v.bos, v.text_start + index % 7, v.text_start + index % 3], [v.text_start + index % 5] * (1 + index % 4)
        )
        for index in range(40)
    ]
    for result, request in zip(log_likelihoods(small, requests), requests, strict=True):
        assert result.log_likelihood == pytest.approx(plain_log_likelihood(small, request)[0], abs=2e-4)
    assert log_likelihoods(small, []) == []


def test_what_exceeds_the_context_loses_its_beginning(small: Chameleon) -> None:
    v = small.vocabulary
    long = [v.bos, *(v.text_start + index % 9 for index in range(300))]
    (result,) = log_likelihoods(small, [Continuation(long, [v.text_start])])
    kept = Continuation([v.bos, *long[-127:]], [v.text_start])
    assert result.log_likelihood == pytest.approx(plain_log_likelihood(small, kept)[0], abs=2e-4)


# --- a server's model ---


def test_suites_ask_a_server_as_they_ask_the_model(small: Chameleon) -> None:
    pictures = [PILImage.new("RGB", (8, 8), colour) for colour in ("red", "green", "navy")]
    prompts = [Document((Image(picture), Text("which?"))) for picture in pictures]
    local = LocalModel(small)
    with running(Chameleon(small.bundle), name="small") as url:
        server = ServerModel(url)
        assert server.describe()["bundle"] == small.bundle.fingerprint
        assert server.generate_texts(prompts, (), 6, GREEDY) == local.generate_texts(prompts, (), 6, GREEDY)
        sampling = Sampling(0.8, 0.9)
        drawn = [of.draw_batch(["a", "b"], seeds=[3, 4], guidance_scale=1.5, sampling=sampling) for of in (server, local)]
        assert [a.tobytes() for a in drawn[0]] == [b.tobytes() for b in drawn[1]]
        options: dict[str, Any] = {"max_new_tokens": 40, "max_images": 1, "guidance_scale": None, "seeds": [1, 2]}
        options |= {"text_sampling": sampling, "image_sampling": IMAGE_SAMPLING}
        documents = [of.generate_batch(prompts[:2], **options) for of in (server, local)]
        for a, b in zip(*documents, strict=True):
            assert [part.text if isinstance(part, Text) else None for part in a.parts] == [
                part.text if isinstance(part, Text) else None for part in b.parts
            ]
        with pytest.raises(BadInput, match="reconstruction needs the bundle; give --model"):
            server.local("reconstruction")
        with pytest.raises(BadInput, match="reads each picture once"):
            server.generate_texts(prompts, (), 6, GREEDY, views=2)
        with pytest.raises(BadInput, match="samples pictures in its own way"):
            server.generate_batch(prompts, **{**options, "image_sampling": Sampling(0.1)})
    with pytest.raises(BadInput, match=r"no answer .*is `chameleon serve` running there"):
        ServerModel("http://127.0.0.1:9")


# --- lmms-eval ---


@pytest.fixture
def lmm(small: Chameleon) -> Any:
    pytest.importorskip("lmms_eval")
    from chameleon.evaluation.lmms_eval_model import ChameleonLMM

    return ChameleonLMM(model=small)


class Asked:
    def __init__(self, *args: Any) -> None:
        self.args = args


def test_lmms_eval_finds_the_model_by_its_entry_point(lmm: Any) -> None:
    from lmms_eval.models import get_model

    assert get_model("chameleon").__name__ == "ChameleonLMM"


def test_lmms_eval_requests(lmm: Any, small: Chameleon) -> None:
    docs = [{"picture": PILImage.new("RGB", (8, 8), colour), "answer": "heart"} for colour in ("red", "blue")]
    lmm.task_dict = {"task": {"test": docs}}

    def visual(doc: dict[str, Any]) -> list[Any]:
        return [doc["picture"]]

    asked = [Asked("which?", {"max_new_tokens": 6, "until": ["\n"]}, visual, index, "task", "test") for index in (0, 1)]
    expected = small.answer_batch([(doc["picture"], "which?") for doc in docs], max_new_tokens=6)
    assert lmm.generate_until(asked) == [answer.partition("\n")[0].strip() for answer in expected]
    (result, _) = lmm.loglikelihood([Asked("which?", lambda doc: doc["answer"], visual, 0, "task", "test")])[0]
    context = small.prompts.token_ids(Document((Image(docs[0]["picture"]), Text("which?"))))
    request = Continuation(context, small.tokenizer.text_to_ids("heart"))
    assert result == pytest.approx(plain_log_likelihood(small, request)[0], abs=2e-4) and math.isfinite(result)
    between = lmm.prompt("is <image> a heart?", [docs[0]["picture"]])
    assert [type(part).__name__ for part in between.parts] == ["Text", "Image", "Text"]
    with pytest.raises(BadInput, match="pictures only"):
        lmm.prompt("what?", ["video.mp4"])
