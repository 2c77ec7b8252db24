"""Pictures of the page for docs/, with the shipped model: python benchmarks/page_picture.py (playwright, chromium)."""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from serving import server

DOCS = Path(__file__).parent.parent / "docs"


def done(page: Page) -> None:
    page.locator("#status", has_text="Done.").wait_for(timeout=60_000)


def main() -> None:
    with server() as (url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 640})
        page.goto(url)
        page.wait_for_selector("body[data-ready]")
        page.select_option("#chat-modalities", "image")
        page.fill("#message", "red heart")
        page.click("text=Send")
        done(page)
        page.click("#messages >> text=Look inside")
        done(page)
        page.locator(".codes button").nth(28).focus()
        page.locator("#attention-note").wait_for()
        page.locator("h1").scroll_into_view_if_needed()
        page.screenshot(path=DOCS / "page.png")
        page.click("#tab-draw")
        page.fill("#draw-prompt", "red heart")
        page.click("#draw-form .main")
        done(page)
        page.screenshot(path=DOCS / "page_draw.png")
        browser.close()


if __name__ == "__main__":
    main()
