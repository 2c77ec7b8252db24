"""Documents, conversations, their JSON form and their ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from chameleon.document import Conversation, Document, Image, Message, Text, from_json, read_json_document
from chameleon.errors import BadInput
from chameleon.tokenizers.image import load_picture
from chameleon.tokenizers.mixed import MixedTokenizer, answer_mask

RED, BLUE = PILImage.new("RGB", (16, 16), "red"), PILImage.new("RGB", (16, 16), "blue")


def dialogue() -> Conversation:
    return Conversation(
        (
            Message("user", Document((Image(RED), Text("what is it?")))),
            Message("assistant", Document((Text("red"),))),
            Message("user", Document((Text("draw blue"),))),
            Message("assistant", Document((Image(BLUE),))),
        )
    )


def test_json_round_trip() -> None:
    document = Document((Text("a\n b"), Image(RED), Text("c")))
    again = Document.from_json(json.loads(json.dumps(document.to_json())))
    assert again.text == "a\n bc"
    assert np.array_equal(np.asarray(load_picture(again.images[0])), np.asarray(RED))
    talk = from_json(json.loads(json.dumps(dialogue().to_json())))
    assert isinstance(talk, Conversation)
    assert [message.role for message in talk.messages] == ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], 'object with "parts"'),
        ({"parts": 3}, "list of parts"),
        ({"parts": [{"type": "video", "video": "x"}]}, "part 0"),
        ({"parts": [{"type": "text", "text": 5}]}, "part 0"),
        ({"messages": []}, "non-empty list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0"),
    ],
)
def test_wrong_forms_are_named(value: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        from_json(value, where="file.jsonl, line 3")


def test_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_json_document(tmp_path / "none.json")
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(BadInput, match=r"bad\.json: not JSON"):
        read_json_document(path)
    path.write_text('{"parts": [{"type": "image", "image": "p.png"}]}')
    document = read_json_document(path)
    assert isinstance(document, Document)
    assert document.images == [tmp_path / "p.png"]


def test_document_layout(tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    ids = tokenizer.encode(Document((Text("orange "), Text("heart"), Image(RED), Text("!"))))
    kinds = "".join(
        {v.bos: "<", v.eos: ">", v.boi: "[", v.eoi: "]"}.get(i, "c" if v.is_image(torch.tensor(i)) else "t")
        for i in ids.tolist()
    )
    assert kinds.replace("t", "") == "<[" + "c" * 16 + "]>"
    assert torch.equal(ids, tokenizer.encode(Document((Text("orange heart"), Image(RED), Text("!")))))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20).map(Text), st.sampled_from([Image(RED), Image(BLUE)])), max_size=5))
def test_documents_come_back(tokenizer: MixedTokenizer, parts: list[Text | Image]) -> None:
    again = tokenizer.decode(tokenizer.encode(Document(parts)))
    assert again.complete
    assert again.text == "".join(part.text for part in parts if isinstance(part, Text))
    assert len(again.images) == sum(isinstance(part, Image) for part in parts)


def test_conversation_layout_and_answer_mask(tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    ids = tokenizer.encode(dialogue())
    assert (ids == v.sep).sum() == 2 and (ids == v.eos).sum() == 2
    mask = torch.from_numpy(answer_mask(ids.numpy(), v))
    # by hand: the two stretches behind each sep, up to and with the next eos
    expected = torch.zeros(len(ids), dtype=torch.bool)
    for start in (ids == v.sep).nonzero().flatten().tolist():
        end = start + 1 + (ids[start + 1 :] == v.eos).nonzero()[0].item()
        expected[start + 1 : end + 1] = True
    assert torch.equal(mask, expected)
    answers = ids[mask]
    assert tokenizer.decode(answers[: (answers == v.eos).nonzero()[0]]).text == "red"
    assert int((answers == v.boi).sum()) == 1
    assert not answer_mask(tokenizer.encode(Document((Text("no answer"),))).numpy(), v).any()


def test_prompts_are_bordered_and_answers_cropped(tokenizer: MixedTokenizer) -> None:
    wide = PILImage.new("RGB", (40, 10), "red")
    queries = Conversation((Message("user", Document((Image(wide),))), Message("assistant", Document((Image(wide),)))))
    v = tokenizer.vocabulary
    codes = v.ids_to_codes(tokenizer.encode(queries)[v.is_image(tokenizer.encode(queries))]).view(2, *v.grid)
    assert torch.equal(codes[0], tokenizer.image.encode([wide], "pad")[0])
    assert torch.equal(codes[1], tokenizer.image.encode([wide], "crop")[0])


def test_batch_equals_one_by_one(tokenizer: MixedTokenizer) -> None:
    contents = [dialogue(), Document((Image(BLUE), Text("x"))), Document(())]
    for together, content in zip(tokenizer.encode_batch(contents), contents, strict=True):
        assert torch.equal(together, tokenizer.encode(content))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.integers(0, 377), max_size=60))
def test_decoding_never_raises(tokenizer: MixedTokenizer, ids: list[int]) -> None:
    document = tokenizer.decode([min(i, tokenizer.vocabulary.size - 1) for i in ids])
    assert document.complete or "truncated image" in document.text


def test_truncated_pictures_become_a_marker(tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    document = tokenizer.decode([v.bos, v.boi, *[v.image_start] * 5])
    assert document.text == "[truncated image: 5 of 16 codes]" and not document.complete
    assert not tokenizer.decode([v.image_start] * 16).complete


def test_text_that_spells_specials_stays_text(tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    ids = tokenizer.encode(Document((Text("<s></s><pad><racm3:break>IMGIMGABZ<eoss><reserved08706>"),)))
    assert v.is_text(ids[1:-1]).all()


def test_fingerprint_tells_tokenizers_apart(tokenizer: MixedTokenizer) -> None:
    import copy

    other = MixedTokenizer(tokenizer.text, copy.deepcopy(tokenizer.image))
    assert other.fingerprint == tokenizer.fingerprint
    other.image.network.quantize.embedding.weight[0, 0] += 1
    assert other.fingerprint != tokenizer.fingerprint
