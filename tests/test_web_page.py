"""The web page: what its source may hold; and in a real browser, talking, keys, a phone, the live panel."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import served
from browsing import Gated, Open, ask, done, said
from scripted import scripted, told

from gptfast.chat import conversation
from gptfast.serve.page import PAGE, read_page
from train import prepare

pytest_plugins = ["browsing"]

# ---- the source ------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "markup from text": r"(inner|outer|AdjacentH|setH)H?TML|document\.write|DOMParser|createContextualFragment|srcdoc",
    "code from text": r"\beval\b|new Function|Function\(|import\(|javascript:|set(Timeout|Interval)\(\s*[\"'`]",
    "something from elsewhere": r"https?://(?!www\.w3\.org/2000/svg)[\w.]|@import|url\(|//cdn",
}
VOID = {"meta", "link", "input", "path", "rect", "circle", "use", "br"}


class Markup(HTMLParser):
    """Elements with their attributes, and the texts of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, str]] = []
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.inline.append((self._open, data))


def offences(page: str) -> list[str]:
    """What a page may not hold: handlers and styles in attributes, markup or code made of text, and addresses."""
    found = [f"{name}: {m.group()}" for name, pattern in FORBIDDEN.items() for m in re.finditer(pattern, page)]
    for tag, attributes in Markup(page).elements:
        found += [f"{tag} {name}" for name in attributes if name.startswith("on") or name in ("style", "src", "action")]
        target = attributes.get("href")
        if target is not None and not target.startswith(("#", "data:image/svg+xml,")):
            found.append(f"{tag} href={target}")
    return found


def test_the_source_holds_no_way_in() -> None:
    assert offences(PAGE.read_text(encoding="utf-8")) == []
    planted = [
        "<p onclick=f()>", "<p style='x'>", "<script src=x></script>", "<a href=/x>",
        "<script>a.innerHTML = b</script>", "<script>a.insertAdjacentHTML('x', b)</script>",
        "<script>eval(a)</script>", "<script>setTimeout('f()', 1)</script>", "<script>fetch('https://a.b')</script>",
        "<style>a{background:url(x)}</style>", "<form action=x>", "<a href='javascript:f()'>",
    ]  # fmt: skip
    assert all(offences(page) for page in planted)


def test_the_policy_allows_this_script_and_this_style_alone() -> None:
    page, policy = read_page()
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    wanted: dict[str, list[str]] = {"script": [], "style": []}
    for kind, code in Markup(page.decode()).inline:
        wanted[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'")
    assert len(wanted["script"]) == 2 and len(wanted["style"]) == 1
    assert directives["script-src"].split() == wanted["script"] and directives["style-src"].split() == wanted["style"]
    assert directives["default-src"] == "'none'" and directives["connect-src"] == "'self'"
    assert directives["require-trusted-types-for"] == "'script'" and directives["trusted-types"] == "'none'"
    assert directives["frame-ancestors"] == directives["base-uri"] == directives["form-action"] == "'none'"
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy


def test_the_skeleton_is_whole() -> None:
    """Every id that the script asks for is there once, every picture too, and every control has a name."""
    page = PAGE.read_text(encoding="utf-8")
    markup = Markup(page)
    ids = [attributes["id"] for _, attributes in markup.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    script = markup.inline[-1][1]
    assert set(re.findall(r"\$\(\"([\w-]+)\"\)", script)) <= set(ids)
    pictures = set(re.findall(r"(?:iconButton|icon)\(\"(\w+)\"", script)) | set(re.findall(r"#i-(\w+)", page))
    assert {f"i-{name}" for name in pictures} <= set(ids) and len(pictures) > 10
    labelled = {attributes.get("for") for tag, attributes in markup.elements if tag == "label"}
    for tag, attributes in markup.elements:
        if tag in ("input", "textarea") and "hidden" not in attributes:
            assert "aria-label" in attributes or attributes.get("id") in labelled, attributes
        if tag == "button" and attributes.get("class") == "icon-button" and attributes["id"] != "theme":
            assert attributes.get("aria-label"), attributes


# ---- in a browser ----------------------------------------------------------------------------------------------------


def test_an_answer_grows_before_the_eyes(opened: Open) -> None:
    """Piece by piece, tools as they run, Markdown as it completes; cut anywhere on its way, inside letters too."""
    answer = Gated("It is **bo", "ld** 日本🙂. ", ("python", "12*7"), ("python_output", "84"), "So 84.")
    model, page = opened(answer, cuts=3)
    ask(page, "What is\n12*7?")
    page.wait_for_selector("article.growing")
    assert page.get_attribute("#send", "aria-label") == "Stop"
    for shown in ("It is **bo", "It is bold 日本🙂.", "12*7", "84", "So 84."):
        answer.gate.release()
        page.wait_for_function(
            "shown => document.querySelector('article.assistant').innerText.includes(shown)", arg=shown
        )
    done(page)
    assert page.locator(".md strong").inner_text() == "bold"
    assert page.locator(".tool .call").inner_text() == "12*7" and page.locator(".tool .output").inner_text() == "84"
    assert "5 tokens" in page.locator("article.assistant .figures").inner_text()
    assert page.locator("#title").inner_text() == "What is" and page.input_value("#words") == ""
    (request,) = model.requests
    assert request["messages"] == [{"role": "user", "content": "What is\n12*7?"}]
    assert (request["temperature"], request["top_k"], request["max_tokens"], request["stream"]) == (0.8, 50, 512, True)
    ask(page, "And?")
    answer.gate.release(9)
    done(page)
    parts = [
        {"type": "text", "text": "It is **bold** 日本🙂. "}, {"type": "python", "text": "12*7"},
        {"type": "python_output", "text": "84"}, {"type": "text", "text": "So 84."},
    ]  # fmt: skip
    assert model.requests[1]["messages"][1] == {"role": "assistant", "content": parts}


def counted() -> Callable[..., Any]:
    number = itertools.count(1)
    return lambda messages: [f"answer {next(number)} to ", messages[-1]["content"]]


def test_edit_regenerate_and_the_branches_they_begin(opened: Open) -> None:
    model, page = opened(counted())
    for words in ("one", "two"):
        ask(page, words)
        done(page)
    assert said(page) == ["one", "answer 1 to one", "two", "answer 2 to two"]
    first = page.locator("article.user").first
    first.hover()
    first.get_by_label("Edit, and go on from here").click()
    page.locator(".editor textarea").fill("uno")
    page.keyboard.press("Enter")
    done(page)
    assert said(page) == ["uno", "answer 3 to uno"]
    assert model.requests[-1]["messages"] == [{"role": "user", "content": "uno"}]
    page.locator("article.assistant").get_by_label("Another answer").click()
    done(page)
    assert (
        said(page) == ["uno", "answer 4 to uno"] and page.locator("article.assistant .versions").inner_text() == "2/2"
    )
    assert model.requests[-1]["messages"] == [{"role": "user", "content": "uno"}]
    page.locator("article.assistant").get_by_label("Earlier version").click()
    assert said(page) == ["uno", "answer 3 to uno"]
    page.locator("article.user").get_by_label("Earlier version").click()
    assert said(page) == ["one", "answer 1 to one", "two", "answer 2 to two"]
    ask(page, "three")
    done(page)
    contents = [message["content"] for message in model.requests[-1]["messages"]]
    assert contents == ["one", "answer 1 to one", "two", "answer 2 to two", "three"]
    page.locator("article.user").last.hover()
    page.locator("article.user").last.get_by_label("Edit").click()
    page.keyboard.press("Escape")  # nothing happens
    assert said(page)[-2:] == ["three", "answer 5 to three"]


def sing(messages: list[dict[str, Any]]) -> Iterator[Any]:
    while True:
        yield from ("la ", 0.01)


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_answer_and_tells_the_server(opened: Open, how: str) -> None:
    model, page = opened(sing)
    ask(page, "sing")
    page.wait_for_function("() => document.querySelector('article.assistant').innerText.includes('la la la')")
    if how == "button":
        page.click("#send")
    else:
        page.keyboard.press("Escape")
    done(page)
    assert "stopped" in page.locator("article.assistant .figures").inner_text() and "la la la" in said(page)[1]
    for _ in range(200):
        if model.gone:
            break
        page.wait_for_timeout(50)
    assert model.gone == 1
    assert page.evaluate("JSON.parse(localStorage['gptfast.conversations'])[0].messages[1].state") == "stopped"


def test_who_scrolls_up_is_left_there(opened: Open) -> None:
    answer = Gated("line  \n\n" * 60, "more\n\n" * 20, "end")
    _, page = opened(answer)
    ask(page, "sing")
    answer.gate.release()
    scroll = page.locator("#scroll")
    page.wait_for_function("() => document.querySelector('#scroll').scrollTop > 500")  # it follows what grows
    scroll.evaluate("one => { one.scrollTop = 100 }")
    page.wait_for_selector("#down:visible")
    answer.gate.release(9)
    done(page)
    page.click("#down")
    page.wait_for_selector("#down:not(:visible)", state="hidden")
    assert scroll.evaluate("one => one.scrollHeight - one.scrollTop - one.clientHeight") < 80


def test_a_reload_loses_nothing(opened: Open) -> None:
    gated = Gated("half an ", "answer")
    model, page = opened(gated)
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.3")
    page.press("#temperature", "Tab")
    page.click("#theme")
    ask(page, "first")
    gated.gate.release()
    page.wait_for_function("() => document.querySelector('article.assistant').innerText.includes('half an')")
    page.reload()
    assert (
        said(page) == ["first", "half an"] and "interrupted" in page.locator("article.assistant .figures").inner_text()
    )
    assert page.input_value("#system") == "Be brief." and page.input_value("#temperature") == "0.3"
    assert page.get_attribute("html", "data-theme") == "light"
    gated.gate.release(9)
    page.locator("article.assistant").get_by_label("Another answer").click()
    done(page)
    assert said(page)[1] == "half an answer" and model.requests[1]["temperature"] == 0.3
    assert model.requests[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.fill("#words", "not sent yet")
    page.click("#new")
    page.reload()
    assert said(page) == [] and page.input_value("#words") == "not sent yet"
    page.locator("#list .open").nth(1).click()
    assert said(page) == ["first", "half an answer"]


STORED = ['{"a": 1}', "[1, null, {}]", '[{"messages": [{"id": 1}, {"id": "a", "role": "x"}]}]', "{", "null"]
STORE = """value => {
  const names = ["conversations", "settings", "theme", "current", "draft", "panel", "system"];
  for (const name of names) localStorage[`gptfast.${name}`] = value;
  Storage.prototype.setItem = () => {}; // or the page would store what it has as it leaves
}"""


@pytest.mark.parametrize("stored", STORED)
def test_whatever_is_stored_the_page_starts(opened: Open, stored: str) -> None:
    _, page = opened()
    page.evaluate(STORE, stored)
    page.reload()
    ask(page, "hello")
    done(page)
    assert said(page) == ["hello", "Hello there."]


def test_export_is_what_training_reads_and_import_brings_it_back(opened: Open, tmp_path: Path) -> None:
    _, page = opened(
        lambda messages: ["It is ", ("python", "6*7"), ("python_output", "42"), f"so {len(messages)} 日本"]
    )
    page.fill("#system", "Be brief.")
    for words in ("one", "two"):
        ask(page, words)
        done(page)
    page.click("#new")
    page.fill("#system", "")
    ask(page, "other")
    done(page)
    with page.expect_download() as caught:
        page.click("#export-all")
    caught.value.save_as(tmp_path / "all.jsonl")
    found = list(conversation.read(tmp_path / "all.jsonl"))
    assert [len(messages) for messages in found] == [2, 5] and found[1][0]["content"] == "Be brief."
    assert found[1][2]["content"][1:3] == [{"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"}]
    prepare.main(["chat", f"--source={tmp_path / 'all.jsonl'}"])
    with page.expect_download() as caught:
        page.click("#export")
    caught.value.save_as(tmp_path / "one.jsonl")
    assert list(conversation.read(tmp_path / "one.jsonl")) == found[:1]
    _, page = opened()  # another browser
    page.set_input_files("#file", tmp_path / "all.jsonl")
    page.wait_for_function("() => document.querySelectorAll('#list li').length >= 2")
    assert {"one", "other"} <= set(page.locator("#list .title").all_inner_texts())
    (tmp_path / "bad.jsonl").write_text('[{"role": "user", "content": "a"}]\n[{"role": "assistant", "content": "b"}]\n')
    count = page.locator("#list li").count()
    page.set_input_files("#file", tmp_path / "bad.jsonl")
    page.wait_for_function("() => document.querySelector('#toast').innerText.includes('line 2')")
    assert "Nothing was imported" in page.inner_text("#toast") and page.locator("#list li").count() == count


def test_what_the_server_refuses(opened: Open) -> None:
    """A full queue is waited for, a token asked for, what no longer fits left out, and all else told."""
    model, page = opened(counted())
    for words in ("one", "two"):
        ask(page, words)
        done(page)
    model.refusals = [(429, {"message": "the server is full: 64 requests wait already; x"}, {"Retry-After": "1"})]
    ask(page, "three")
    page.wait_for_selector("text=the server is full: 64 requests wait already; trying again in")
    done(page)
    assert said(page)[-1] == "answer 3 to three" and page.locator(".trouble").count() == 0
    context = {"message": "the prompt has 300 tokens", "code": "context_length_exceeded"}
    model.refusals = [(400, context, {}), (400, context, {})]
    ask(page, "four")
    done(page)
    assert [message["content"] for message in model.requests[-1]["messages"]] == ["three", "answer 3 to three", "four"]
    assert page.locator(".seam + article").inner_text().startswith("three")
    model.refusals = [(400, {"message": "temperature: <b>too warm</b>"}, {})]
    ask(page, "five")
    done(page)
    assert page.locator(".trouble span").inner_text() == "temperature: <b>too warm</b>"
    page.click("text=Try again")
    done(page)
    assert said(page)[-1] == "answer 5 to five" and page.locator(".trouble, .versions").count() == 0
    model.refusals = [(400, {"message": "no"}, {})]
    ask(page, "lost")
    done(page)
    ask(page, "found")
    done(page)
    with page.expect_download() as caught:
        page.click("#export")
    exported = json.loads(Path(caught.value.path()).read_text())["messages"]
    for messages in (model.requests[-1]["messages"], exported):  # what nothing came of is neither told nor kept
        assert "lost" not in [message["content"] for message in messages]
    assert exported[-1] == {"role": "assistant", "content": "answer 6 to found"}
    model.refusals = [(401, {"message": "give the server's token"}, {})]
    ask(page, "six")
    page.wait_for_selector("#token:focus")
    page.keyboard.type("a-secret-of-ours")
    page.keyboard.press("Enter")
    page.get_by_text("Try again").last.click()
    done(page)
    assert model.tokens[-1] == "Bearer a-secret-of-ours" and said(page)[-1] == "answer 7 to six"
    model.answer = lambda messages: ["half ", {"error": {"message": "the engine failed"}}]
    ask(page, "seven")
    done(page)
    assert said(page)[-1] == "half" and page.locator(".trouble span").last.inner_text() == "the engine failed"
    model.close()
    ask(page, "eight")
    done(page)
    assert "does not answer" in page.locator(".trouble span").last.inner_text()
    page.wait_for_selector(".dot.down")


def test_the_live_panel(opened: Open) -> None:
    model, page = opened()
    page.wait_for_selector(".dot.up")
    shown = page.inner_text("#panel")
    for fact in (
        "1,235",
        "21 ms",
        "3 of 8",
        "2 of 64",
        "700 of 2,048",
        "61.3 %",
        "NVIDIA H200",
        "bfloat16",
        "calculator",
    ):
        assert fact in shown, fact
    assert page.locator("#slots .busy").count() == 3 and page.locator("#slots i").count() == 8
    page.click("text=Kernels in use")
    assert page.locator("#kernels").inner_text().split() == [
        "attention",
        "triton",
        "rmsnorm",
        "triton",
        "rotary",
        "reference",
    ]
    model.stats = {"slots": 2, "busy": 0, "mbu": None, "ttft_ms_p50": None, "tokens_per_s": None, "model": "<b>x</b>"}
    page.wait_for_function("() => document.querySelector('#busy').innerText === '0 of 2'")
    assert (
        page.inner_text("#mbu") == page.inner_text("#first-token") == "n/a" and page.inner_text("#about") == "<b>x</b>"
    )
    model.stats = {"kernels": None, "tools": None, "slots": "many", "busy": -1e9}
    page.wait_for_function("() => document.querySelector('#device').innerText === 'n/a'")


def test_the_page_and_the_server_agree(browser: Any) -> None:
    """The real server, with a model that says what it is told: tools, branches, the panel, and the context's end."""
    chat = served.chat()
    long = [f"{n} " + "Hello there, what is it? 12345 " * 4 for n in range(4)]
    script = {text: told(chat, "xyz " * 9, f"{n}") for n, text in enumerate(long)}
    script["hello"] = told(chat, "It is ", ("python", "12*7"), ("python_output", "84"), "**84**.")
    with served.serving(scripted(chat, script, slots=3, block_size=256)) as server:
        page = browser.new_page()
        page.goto(server.url)
        ask(page, "hello")
        done(page)
        assert page.locator(".tool").inner_text().split() == ["TOOL", "12*7", "84"]
        assert page.locator(".md strong").inner_text() == "84"
        page.locator("article.assistant").get_by_label("Another answer").click()
        done(page)
        assert page.locator("article.assistant .versions").inner_text() == "2/2"
        assert "tokens · " in page.locator("article.assistant .figures").inner_text()
        for n, text in enumerate(long):
            ask(page, text.strip() + " ")
            done(page)
            assert said(page)[-1].endswith(str(n)) and page.locator(".trouble").count() == 0
        assert page.locator(".seam").count() == 1
        page.wait_for_function("() => document.querySelector('#busy').innerText === '0 of 3'")
        assert "tiny" in page.inner_text("#about") and "256 tokens of context" in page.inner_text("#about")
        page.close()
        assert served.is_idle(server)


# ---- themes, keys, a phone

CONTRAST = """pairs => {
  const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return pairs.map(([text, ground]) => {
    const a = light(getComputedStyle(document.querySelector(text)).color);
    const b = light(getComputedStyle(document.querySelector(ground)).backgroundColor);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""
HAS_RING = """() => {
  const box = document.activeElement.closest(".box"), one = document.activeElement;
  const accent = getComputedStyle(document.querySelector(".dot.up")).backgroundColor;
  return one === document.body || getComputedStyle(one).outlineStyle !== "none"
    || (box !== null && getComputedStyle(box).borderColor === accent);
}"""
TOO_SMALL = """all => all.filter((one) => one.offsetWidth && Math.min(one.offsetWidth, one.offsetHeight) < 24)
  .map((one) => one.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(opened: Open, scheme: str) -> None:
    """WCAG's contrast of 4.5 for all text, faint text included; and the choice overrides the system's."""
    _, page = opened(lambda messages: ["[x](https://a.example) `c`\n```py\nif 1: 'a' # b\n```"], color_scheme=scheme)
    ask(page, "hello")
    done(page)
    page.wait_for_selector(".dot.up")
    pairs = [
        [".md p", "main"], [".md a", "main"], [".md .host", "main"], ["article.user .body", "article.user .body"],
        [".figures", "main"], [".about", "main"], [".hint", "main"], [".facts dt", "#panel"],
            [".field small", "#panel"],
        [".fence .bar", ".fence"], [".fence .k", ".fence"], [".fence .s", ".fence"], [".fence .n", ".fence"],
        [".fence .c", ".fence"], [".when", ".current"], ["#send", "#send"],
    ]  # fmt: skip
    ratios = page.evaluate(CONTRAST, pairs)
    assert all(ratio >= 4.5 for ratio in ratios), [(p, r) for p, r in zip(pairs, ratios, strict=True) if r < 4.5]
    dark = "getComputedStyle(document.querySelector('main')).backgroundColor === 'rgb(23, 25, 28)'"
    assert page.evaluate(dark) == (scheme == "dark")
    while page.get_attribute("html", "data-theme") != ("light" if scheme == "dark" else "dark"):
        page.click("#theme")
    assert page.evaluate(dark) == (scheme == "light")


def test_all_of_it_by_keyboard(opened: Open) -> None:
    _, page = opened(counted())
    keyboard = page.keyboard
    keyboard.type("one")  # the box has the focus from the start
    keyboard.press("Shift+Enter")
    keyboard.type("more")
    keyboard.press("Enter")
    done(page)
    assert said(page)[0] == "one\nmore"
    keyboard.press("ArrowUp")
    page.wait_for_selector(".editor textarea:focus")
    keyboard.press("End")
    keyboard.type("!")
    keyboard.press("Enter")
    done(page)
    assert said(page)[0] == "one\nmore!" and page.locator("#words:focus").count() == 1
    keyboard.press("Alt+r")
    done(page)
    assert said(page)[1].startswith("answer 3")
    keyboard.press("Alt+n")
    assert said(page) == []
    keyboard.press("Alt+p")
    assert page.locator("body.wide").count() == 1
    keyboard.press("Alt+p")
    page.locator("#new").focus()
    keyboard.press("?")
    page.wait_for_selector("#help[open]")
    keyboard.press("Escape")
    assert page.locator("#help[open]").count() == 0
    keyboard.press("/")
    assert page.locator("#words:focus").count() == 1 and page.input_value("#words") == ""
    page.reload()
    page.wait_for_selector(".dot.up")
    page.evaluate("() => { document.body.tabIndex = -1; document.body.focus(); }")  # as at the top of the page
    reached, rings = [], []
    for _ in range(40):
        keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        rings.append(page.evaluate(HAS_RING))
    assert {"new", "open", "import", "export-all", "theme", "keys", "words", "temperature", "system"} <= set(reached)
    assert reached[0] == "skip" and all(rings), list(zip(reached, rings, strict=True))


def test_on_a_phone(opened: Open) -> None:
    """Nothing is wider than the screen, and what is beside it on a desk comes in from the side."""
    long = "word" * 60 + "\n```\n" + "code " * 60 + "\n```\n|" + "a|" * 30 + "\n|" + "-|" * 30 + "\n"
    _, page = opened(
        lambda messages: [long, ("python", "x" * 300)],
        viewport={"width": 360, "height": 640},
        has_touch=True,
        is_mobile=True,
    )
    ask(page, "l" * 300)
    done(page)
    for selector in ("html", "main", "#thread", "#scroll"):
        assert page.locator(selector).evaluate("one => one.scrollWidth") <= 360, selector
    box = page.locator("#composer").bounding_box()
    assert box is not None and box["y"] + box["height"] <= 640
    assert not page.locator("#side").is_visible() and not page.locator("#panel").is_visible()
    page.tap("#menu")
    page.wait_for_selector("#side.open")
    assert page.evaluate("document.querySelector('main').inert") and page.locator("#new:focus").count() == 1
    page.touchscreen.tap(350, 400)
    page.wait_for_function("() => !document.querySelector('main').inert")
    page.tap("#show-panel")
    page.wait_for_selector("#panel.open")
    page.fill("#max_tokens", "99999")
    page.tap("#close-panel")
    page.wait_for_selector("#panel:not(.open)")
    assert json.loads(page.evaluate("localStorage['gptfast.settings']"))["max_tokens"] == 4096
    small = page.locator("button:visible").evaluate_all(TOO_SMALL)
    assert small == []  # WCAG's least size of what is touched
