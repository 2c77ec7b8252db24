"""The page in a browser: Debian's or Ubuntu's chromium, without a window. Skipped with a message where there is none."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_model
from PIL import Image as PILImage

from chameleon.bundle import Bundle
from chameleon.document import Conversation, Document, Image, Message, Text
from chameleon.generation.chameleon import Chameleon
from chameleon.tokenizers.mixed import MixedTokenizer

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")

from test_serve import noise, png, running, same  # noqa: E402


@pytest.fixture(scope="module")
def model(tokenizer: MixedTokenizer) -> Chameleon:
    network = random_model(tokenizer.vocabulary.size, context_length=256)
    return Chameleon(Bundle(network, tokenizer, "conversation"))


@pytest.fixture(scope="module")
def address(model: Chameleon) -> Iterator[str]:
    with running(model, name="small") as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """An open page; at the end nothing was loaded from elsewhere and nothing was reported in its console."""
    context = browser.new_context(accept_downloads=True)
    page, problems, requests = context.new_page(), [], []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    open_page(page, address)
    yield page
    context.close()
    assert not problems
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)


def open_page(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("body[data-ready]")


def wait_until_done(page: Any) -> None:
    page.locator("#status", has_text="Done.").wait_for(timeout=60_000)


def picture_of(image: Any) -> PILImage.Image:
    data = image.get_attribute("src").partition(",")[2]
    return PILImage.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_a_conversation_with_pictures_in_and_out(page: Any, model: Chameleon, tmp_path: Path) -> None:
    picture = noise(4)
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(picture)})
    page.locator("#attachments img").wait_for()
    page.fill("#chat-seed", "5")
    page.fill("#chat-max-tokens", "60")
    page.fill("#message", "orange heart")
    page.press("#message", "Enter")
    wait_until_done(page)
    content = Conversation([Message("user", Document((Image(picture), Text("orange heart"))))])
    expected = model.generate(content, max_new_tokens=60, max_images=4, seed=5)
    answer = page.locator("#messages li.assistant")
    shown = [part.text_content() for part in answer.locator("p").all()]
    assert "".join(shown) == expected.text
    assert [
        same(picture_of(image), want) for image, want in zip(answer.locator("img").all(), expected.images, strict=True)
    ] == [True] * len(expected.images)
    page.click("#chat-again")  # another seed
    wait_until_done(page)
    other = model.generate(content, max_new_tokens=60, max_images=4, seed=6)
    assert "".join(part.text_content() for part in page.locator("li.assistant p").all()) == other.text
    page.click("text=Edit")
    assert page.input_value("#message") == "orange heart" and page.locator("#attachments img").count() == 1
    page.click("#attachments button")
    assert page.locator("#attachments img").count() == 0


def test_a_link_reproduces_a_conversation_and_exports_hold_it(page: Any, address: str) -> None:
    page.fill("#chat-seed", "9")
    page.fill("#chat-max-tokens", "20")
    page.fill("#message", "waving hand <b>")
    page.click("text=Send")
    wait_until_done(page)
    answer = page.locator("li.assistant").text_content()
    page.locator(".copy-link").first.click()
    page.locator("#status", has_text="link").wait_for()
    link = page.url
    with page.expect_download() as as_json:
        page.click("#export-json")
    saved = json.loads(Path(as_json.value.path()).read_text())
    assert saved["messages"][0]["content"] == [{"type": "text", "text": "waving hand <b>"}]
    assert saved["settings"]["seed"] == 9
    with page.expect_download() as as_html:
        page.click("#export-html")
    html = Path(as_html.value.path()).read_text()
    assert "waving hand &lt;b&gt;" in html and "<script" not in html
    page.goto("about:blank")
    open_page(page, link)
    wait_until_done(page)
    assert page.locator("li.assistant").text_content() == answer
    page.goto("about:blank")
    open_page(page, f"{address}/#nonsense")
    assert "damaged" in page.locator("#status").text_content()


def test_an_answer_can_be_stopped(page: Any, model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    step = model.engine.run_step
    monkeypatch.setattr(model.engine, "run_step", lambda *arguments: (time.sleep(0.1), step(*arguments)))
    page.fill("#chat-max-tokens", "200")
    page.fill("#message", "fox")
    page.click("text=Send")
    page.locator("li.assistant p, li.assistant img").first.wait_for()
    page.click("#chat-stop")
    page.locator("#status", has_text="Stopped.").wait_for()
    end = time.monotonic() + 10
    while not model.engine.is_idle and time.monotonic() < end:
        time.sleep(0.05)
    assert model.engine.is_idle


def test_drawing_marks_the_likeliest_and_painting_changes_what_was_brushed(page: Any, model: Chameleon) -> None:
    page.click("#tab-draw")
    page.fill("#draw-prompt", "orange heart")
    page.fill("#draw-n", "4")
    page.fill("#draw-seed", "3")
    page.click("#draw-form .main")
    wait_until_done(page)
    expected = [model.draw("orange heart", seed=seed) for seed in range(3, 7)]
    images = [picture_of(image) for image in page.locator("#grid img").all()]
    assert all(same(one, other) for one, other in zip(images, expected, strict=True))
    best = model.rank(expected, "orange heart")[0]
    assert [("likeliest" in text) for text in page.locator("#grid .seed").all_text_contents()] == [
        index == best for index in range(4)
    ]
    page.locator("#grid button").nth(1).click()
    page.fill("#brush", "2")
    canvas = page.locator("#canvas")
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    page.fill("#paint-prompt", "noto")
    page.click("#paint")
    wait_until_done(page)
    painted = [np.asarray(picture_of(image)) for image in page.locator("#grid img").all()]
    rows, columns = np.mgrid[0:16, 0:16] + 0.5
    brushed = (rows - 8) ** 2 + (columns - 8) ** 2 <= 4.5  # the brush, and a little for the place of the pointer
    for result in painted:
        assert (result[~brushed] == np.asarray(expected[1])[~brushed]).all()
    mask = (rows - 8) ** 2 + (columns - 8) ** 2 <= 4
    marked = PILImage.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    assert same(PILImage.fromarray(painted[0]), model.paint(expected[1], marked, "noto", seed=3)[0])


def test_painting_works_by_keyboard(page: Any) -> None:
    page.click("#tab-draw")
    page.fill("#draw-n", "1")
    page.press("#draw-prompt", "Enter")
    wait_until_done(page)
    page.locator("#grid button").first.press("Enter")
    page.locator("#easel").wait_for()
    page.focus("#canvas")
    before = page.locator("#canvas").screenshot()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    assert page.locator("#canvas").screenshot() != before
    page.click("#clear-mask")
    page.click("#paint")
    assert "Brush over" in page.locator("#status").text_content()


def test_looking_inside_shows_what_the_model_thought(page: Any, model: Chameleon) -> None:
    page.click("#tab-draw")
    page.fill("#draw-n", "1")
    page.fill("#draw-seed", "2")
    page.click("#draw-form .main")
    wait_until_done(page)
    page.locator("#grid button").first.click()
    page.click("#inside-picture")
    wait_until_done(page)
    assert page.locator(".codes button").count() == 16
    assert page.locator("#tokens .token").count() == len(model.prompts.token_ids(Document((Text("red heart"),)))) + 2
    page.locator(".codes button").nth(5).focus()
    page.locator("#attention-note").wait_for()
    detail = page.locator("#detail").text_content()
    assert re.search(r"probability0\.\d+|probability\d", detail) and "entropy" in detail and "likeliest" in detail
    code = int(re.search(r"<code (\d+)>", detail)[1])  # type: ignore[index]
    page.locator(f'#detail img[alt="Codebook entry {code}"]').wait_for()
    labels = [node.get_attribute("aria-label") for node in page.locator(".codes button").all()]
    same_code = [label.endswith(f"<code {code}>") for label in labels]
    is_marked = [
        bool({"same", "chosen"} & set((node.get_attribute("class") or "").split()))
        for node in page.locator(".codes button").all()
    ]
    assert is_marked == same_code
    heat = [node.evaluate("node => node.style.background") for node in page.locator(".codes button").all()]
    assert sum("rgb" in value for value in heat) >= 5  # those before it and itself
    page.select_option("#head", "1")
    assert "head 1" in page.locator("#attention-note").text_content()
    page.select_option("#layer", "0")
    page.locator("#attention-note", has_text="Layer 0").wait_for()


def test_tabs_work_by_keyboard_and_every_control_has_a_name(page: Any) -> None:
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    assert page.locator("#draw").is_visible() and not page.locator("#chat").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.locator("#inside").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.locator("#chat").is_visible()
    for tab in ("chat", "draw", "inside"):
        page.click(f"#tab-{tab}")
        for control in page.locator("button:visible, input:visible, select:visible, textarea:visible").all():
            name = control.evaluate("node => node.labels?.[0]?.textContent || node.textContent || node.ariaLabel")
            assert name.strip(), control.evaluate("node => node.outerHTML")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_has_contrast_in_light_and_dark(browser: Any, address: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    open_page(page, address)
    for tab in ("draw", "inside", "chat"):
        page.click(f"#tab-{tab}")
        assert page.locator("html").evaluate("node => node.scrollWidth") <= 360
    for selector in ("body", "#model", ".main:visible", "#tab-chat"):
        front, back = (
            page.locator(selector).first.evaluate(
                "(node, key) => { for (let at = node; at; at = at.parentElement) { const value = getComputedStyle(at)[key];"
                " if (value !== 'rgba(0, 0, 0, 0)') return value; } }",
                key,
            )
            for key in ("color", "backgroundColor")
        )
        assert contrast(front, back) >= 4.5, (selector, front, back)
    context.close()


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two CSS colours (WCAG 2.2)."""
    luminances = []
    for colour in (one, other):
        values = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_a_server_with_keys_asks_for_one(browser: Any, model: Chameleon) -> None:
    from chameleon.serve.settings import ApiKey

    with running(Chameleon(model.bundle), keys=[ApiKey("secret-key")]) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        page.locator("#key-dialog").wait_for()
        page.fill("#key", "secret-key")
        page.press("#key", "Enter")
        page.wait_for_selector("body[data-ready]")
        context.close()
