"""The page as a person uses it, in a real Chromium. Answers are given ones, computed as ever."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from m2lite import Model
from tests.serve.browser import Pace, Visit, chromium, expect, is_required, lacking
from tests.serve.conftest import Served, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow  # it starts a browser

PHONE = {"width": 360, "height": 740}
THOUGHT = "I weigh it.\n</think>\n\n"
WORDS = " ".join(f"word{n}" for n in range(120)) + "."
HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2"> **bold** <b>tag</b>

[bad](javascript:window.hacked=3) [data](data:text/html,x) [good](https://example.org/a)
<https://example.org/b> <svg onload=alert(1)>

```<img-src=x>
<script>window.hacked = 4</script>
```

| <i>head</i> | b |
|---|---|
| <img src=x onerror=window.hacked=5> | `<b>` |
"""
FUNCTION = "def f(x):\n    return '<' + x"
CODE = f"Here:\n\n```python\n{FUNCTION}\n```\n\n1. one\n   - inner\n2. two\n\n## Title\n\n*em* and `code`"
WIDE = "x" * 400 + "\n\n```\n" + "y" * 400 + "\n```\n\n|" + "z" * 90 + "|" + "z" * 90 + "|\n|---|---|\n|1|2|\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    why = lacking()
    if why:
        (pytest.fail if is_required() else pytest.skip)(why)
    with chromium() as found:
        yield found


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser, tiny: Model) -> Iterator[Open]:
    """Visit a server that says `text`, or what the model draws; nothing may be complained of but what is said."""
    tiny.loop.forget()
    with ExitStack() as stack:
        visits = list[Visit]()

        def start(text: str | None = None, served: dict[str, Any] | None = None, **options: Any) -> Visit:
            ids = None if text is None else tiny.tokenizer.encode(f"{THOUGHT}{text}[e~[", control=True)
            found = stack.enter_context(serving(tiny, script=lambda _: ids, **(served or {})))
            visits.append(Visit(browser, found, stack, **options))
            return visits[-1]

        yield start
        assert [each for visit in visits for each in visit.complaints] == []


@pytest.fixture
def pace(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pace]:
    found = Pace(tiny, monkeypatch)
    yield found
    found.go_on()


def test_text_comes_as_it_is_said(visit: Open, pace: Pace) -> None:
    page = (found := visit(WORDS)).page
    found.ask()
    begun = pace.until_text(page, ".answer .content")
    assert WORDS.startswith(begun.rstrip()) and len(begun) < len(WORDS)
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator(".answer footer")).to_be_hidden()
    expect(page.locator("#speed")).to_contain_text(re.compile(r"\d"))
    pace.go_on()
    expect(page.locator(".answer .content")).to_have_text(WORDS)
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#status")).to_have_text("The answer is complete.")


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(visit: Open, pace: Pace, how: str) -> None:
    """What has come stays, the server computes no more, and the next question knows of it."""
    page = (found := visit(WORDS)).page
    found.ask()
    pace.until_text(page, ".answer .content")
    page.locator("#stop").click() if how == "button" else page.keyboard.press("Escape")
    expect(page.locator(".answer .note")).to_have_text("You stopped this answer.")
    expect(page.locator("#question")).to_be_focused()
    pace.go_on()
    while found.server_metrics().get("cancelled") != 1:
        page.wait_for_timeout(20)
    kept = page.locator(".answer .content").inner_text().rstrip()
    assert kept and WORDS.startswith(kept) and kept != WORDS
    with page.expect_request("**/v1/chat/completions") as asked:
        found.answered("Go on")
    messages = asked.value.post_data_json["messages"]
    assert [each["role"] for each in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"].rstrip() == kept and messages[1]["reasoning_content"] == "I weigh it."


def test_stop_before_anything_is_said(visit: Open, pace: Pace) -> None:
    """That answer is no part of the conversation."""
    page = (found := visit("Now.")).page
    found.ask("First")
    expect(page.locator(".waiting")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".answer .note")).to_have_text("You stopped this answer.")
    pace.go_on()
    with page.expect_request("**/v1/chat/completions") as asked:
        assert found.answered("Second") == "Now."
    assert [(each["role"], each["content"]) for each in asked.value.post_data_json["messages"]] == [
        ("user", "First"),
        ("user", "Second"),
    ]


def test_again(visit: Open) -> None:
    """Another answer takes the place of the last one, with other random numbers."""
    page = (found := visit()).page
    found.answered("Tell me a story.")
    for n in (1, 2):
        with page.expect_request("**/v1/chat/completions") as asked:
            page.get_by_role("button", name="Regenerate").click()
        body = asked.value.post_data_json
        assert [each["content"] for each in body["messages"]] == ["Tell me a story."] and body["seed"] >= 0, n
        expect(page.locator(".answer footer")).to_be_visible()
        expect(page.locator(".answer")).to_have_count(1)
    assert found.server_metrics() == {"stop": 3}


def test_thinking_is_folded(visit: Open, pace: Pace) -> None:
    page = (found := visit("Done.")).page
    found.ask()
    pace.go()
    expect(page.locator(".thinking summary")).to_have_text("Thinking…")
    pace.go_on()
    expect(page.locator(".answer .content")).to_have_text("Done.")
    expect(page.locator(".thinking .text")).to_be_hidden()
    expect(page.locator(".thinking summary")).to_have_text(re.compile(r"Thought for [\d.]+ s"))
    page.locator(".thinking summary").click()
    expect(page.locator(".thinking .text")).to_have_text("I weigh it.")


def test_without_thinking(visit: Open) -> None:
    page = (found := visit()).page
    page.locator("#thinks").uncheck()
    with page.expect_request("**/v1/chat/completions") as asked:
        found.answered()
    assert asked.value.post_data_json["reasoning_effort"] == "none"
    assert page.locator(".thinking").is_hidden()


def test_markdown_and_copied_code(visit: Open) -> None:
    page = (found := visit(CODE, permissions=["clipboard-read", "clipboard-write"])).page
    found.answered()
    answer = page.locator(".answer .content")
    expect(answer.locator("figcaption span")).to_have_text("python")
    assert answer.locator("pre code").inner_text() == FUNCTION
    assert answer.locator("ol > li").count() == 2 and answer.locator("ol > li ul > li").inner_text() == "inner"
    assert answer.locator("h4").inner_text() == "Title" and answer.locator("em").inner_text() == "em"
    assert answer.locator("p code").inner_text() == "code"
    for place, text in (("figcaption", FUNCTION), ("footer", CODE)):
        button = page.locator(f".answer {place} .copy")
        button.click()
        expect(button).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == text


def test_nothing_that_is_said_becomes_part_of_the_page(visit: Open) -> None:
    page = (found := visit(HOSTILE)).page
    text = found.answered("<img src=x onerror=window.hacked=6>")
    assert '<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">' in text
    assert "<b>tag</b>" in text and "<script>window.hacked = 4</script>" in text and "<i>head</i>" in text
    assert page.locator(".user").inner_text() == "<img src=x onerror=window.hacked=6>"
    assert page.locator("article :is(script, img, svg, b, i, iframe)").count() == 0
    assert page.locator("article strong").inner_text() == "bold"
    links = page.locator("article a")
    assert [links.nth(n).get_attribute("href") for n in range(links.count())] == [
        "https://example.org/a",
        "https://example.org/b",
    ]
    assert links.first.get_attribute("rel") == "noopener noreferrer"
    assert page.evaluate("window.hacked") is None


def test_the_policy_is_in_force(visit: Open) -> None:
    """Even if the page had a hole, nothing would run, and nothing would be sent elsewhere."""
    found = visit()
    tried = (
        """() => { try { document.body.innerHTML = "<b>x</b>"; return "set"; } catch (error) { return error.name; } }"""
    )
    assert found.page.evaluate(tried) == "TypeError"
    assert found.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)") == "TypeError"
    assert len(found.complaints) >= 2 and all(
        "Content Security Policy" in each or "TrustedHTML" in each for each in found.complaints
    )
    found.complaints.clear()


def touched(served: Served, text: str) -> tuple[set[int], dict[str, Any]]:
    """Cells, layer by layer, that the answer to a question touches."""
    body = {"messages": [{"role": "user", "content": text}], "return_experts": True}
    whole = served.http.post("/v1/chat/completions", json=body).json()
    shape = whole["m2lite_experts"]
    ids = np.array([list(b64decode(each)) for each in whole["choices"][0]["experts"]])
    layers = np.arange(shape["n_layers"]).repeat(shape["n_used"])
    return set((ids + shape["n_experts"] * layers).ravel().tolist()), shape


CELLS = """(shape) => {
  const canvas = document.getElementById("grid"), context = canvas.getContext("2d"), found = [];
  const [w, h] = [canvas.width / shape.n_experts, canvas.height / shape.n_layers];
  for (let y = 0; y < shape.n_layers; y++) for (let x = 0; x < shape.n_experts; x++)
    found.push(context.getImageData(Math.floor((x + 0.4) * w), Math.floor((y + 0.4) * h), 1, 1).data.join());
  return found;
}"""


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_the_experts_of_an_answer_light_up(visit: Open, motion: str) -> None:
    page = (found := visit(served={"seed": 5}, reduced_motion=motion)).page
    expect(page.locator("#touched")).to_contain_text("8 of 64 experts in each of 4 layers")
    empty = page.evaluate(CELLS, {"n_layers": 4, "n_experts": 64})
    assert len(set(empty)) == 1
    found.answered("What is the capital of France?")
    cells, shape = touched(found.served, "What is the capital of France?")
    expect(page.locator("#touched")).to_contain_text(f"{len(cells)} of 256 touched")
    shown = page.evaluate(CELLS, shape)
    assert {i for i, color in enumerate(shown) if color != empty[0]} == cells
    assert len(set(shown)) > 3  # by how often
    expect(page.locator("#most li")).to_have_count(5)
    page.locator("#grid").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#readout")).to_have_text(re.compile(r"Layer 0, expert 0: \d+ of \d+ tokens"))


def test_a_question_before_the_server_has_said_what_it_is(visit: Open) -> None:
    """The answer itself tells how many experts there are."""
    page = (found := visit("Now.", held="/props")).page
    found.answered()
    expect(page.locator("#touched")).to_contain_text("of 256 touched")
    expect(page.locator("#most li")).to_have_count(5)
    told = page.locator("#touched").inner_text()
    found.release()
    expect(page.locator("#context")).to_contain_text("tokens of context")
    assert page.locator("#touched").inner_text() == told


def test_a_second_question_reuses_the_first(visit: Open) -> None:
    page = (found := visit("One.")).page
    found.answered()
    expect(page.locator("#reused")).to_have_text(re.compile(r"^0 of \d+$"))
    expect(page.locator("#bytes")).to_have_text(re.compile("^Nothing"))
    found.answered("And two?")
    text = page.locator("#reused").inner_text()
    cached, total = (int(each.replace(",", "")) for each in re.findall(r"[\d,]+", text))
    assert 0 < cached < total
    expect(page.locator(".answer").last.locator(".cost")).to_contain_text(f"{cached} reused")
    page.locator(".answer").first.get_by_role("button", name="Show experts").click()
    expect(page.locator("#reused")).to_have_text(re.compile(r"^0 of "))


def test_keyboard(visit: Open) -> None:
    page = (found := visit("Good.")).page
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.locator("#question").input_value() == "one\ntwo" and page.locator("article").count() == 0
    page.keyboard.press("Enter")
    expect(page.locator(".answer footer")).to_be_visible()
    assert page.locator(".user").inner_text() == "one\ntwo"
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Enter")  # with nothing to send
    assert page.locator("article").count() == 2
    reached = list[str]()
    page.locator("#new").focus()
    for _ in range(11):
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
            )
        )
        page.keyboard.press("Tab")
    assert reached == [
        "new", "panel-toggle", "theme", "log", "SUMMARY", "copy", "again", "touched", "question", "thinks", "send",
    ]  # fmt: skip
    found.page.evaluate("document.activeElement.blur()")


def test_a_phone(visit: Open) -> None:
    """Nothing is wider than the screen, and the figures can be had."""
    page = (found := visit(WIDE, viewport=PHONE, has_touch=True, is_mobile=True)).page
    found.answered("w" * 300)

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.evaluate("document.getElementById('log').scrollWidth") <= PHONE["width"]
        box = page.locator("#send").bounding_box()
        assert (
            box is not None
            and box["x"] + box["width"] <= PHONE["width"]
            and box["y"] + box["height"] <= PHONE["height"]
        )

    expect(page.locator("#panel")).to_be_hidden()
    expect(page.locator("#strip")).to_have_text(re.compile(r"tokens/s\s+\d+ experts"))
    check()
    page.get_by_role("button", name="Experts", exact=True).tap()
    expect(page.locator("#panel")).to_be_visible()
    expect(page.locator("#grid")).to_be_visible()
    check()


def brightness(page: Page) -> float:
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3


def test_dark_and_light(visit: Open) -> None:
    page = visit(color_scheme="dark").page
    assert brightness(page) < 60
    page.emulate_media(color_scheme="light")
    assert brightness(page) > 200
    button = page.locator("#theme")
    button.click()
    assert button.get_attribute("aria-label") == "Theme: dark" and brightness(page) < 60
    page.reload()
    assert brightness(page) < 60
    button.click()
    page.emulate_media(color_scheme="dark")
    assert button.get_attribute("aria-label") == "Theme: light" and brightness(page) > 200


def test_a_key_is_asked_for(visit: Open) -> None:
    page = (found := visit("In.", served={"api_keys": ("secret",)})).page
    expect(page.locator("#key-dialog")).to_be_visible()
    for key in ("wrong", "a b"):
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
    expect(page.locator("#key-why")).to_contain_text("without a space")
    page.locator("#key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator("#model")).to_contain_text("m2-tiny")
    assert found.answered() == "In."
    assert page.evaluate("[sessionStorage.getItem('m2lite-key'), localStorage.length, document.cookie]") == [
        "secret",
        0,
        "",
    ]
    assert any("401" in each for each in found.complaints)  # Chromium says so of any answer that is no 200
    found.complaints.clear()


def test_what_goes_wrong_is_said(visit: Open) -> None:
    """In the server's words, and the chat goes on."""
    page = (found := visit("Fine.")).page
    page.route("**/v1/chat/completions", lambda route: route.abort())
    found.answered()
    expect(page.locator(".note")).to_contain_text("cannot be reached")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".answer .content")).to_have_text("Fine.")
    found.answered("x " * 40_000)
    expect(page.locator(".note").last).to_contain_text("Shorten it.")
    page.locator("#new").click()
    assert found.answered() == "Fine."
    found.complaints.clear()


def test_a_reload_keeps_the_chat_and_a_new_one_does_not(visit: Open) -> None:
    page = (found := visit("Kept **well**.")).page
    found.answered("Remember")
    page.reload()
    expect(page.locator(".answer strong")).to_have_text("well")
    assert page.locator(".user").inner_text() == "Remember"
    with page.expect_request("**/v1/chat/completions") as asked:
        found.answered("More")
    assert [each["content"] for each in asked.value.post_data_json["messages"]] == [
        "Remember",
        "Kept **well**.",
        "More",
    ]
    page.locator("#new").click()
    expect(page.locator("#welcome")).to_be_visible()
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
    assert page.locator("article").count() == 0
