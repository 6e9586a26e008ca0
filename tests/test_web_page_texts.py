"""Texts in the web page: fifty that would run something, Markdown to the letter, and long ones that lead nowhere."""

from __future__ import annotations

from typing import Any

import pytest
from browsing import Open, Page, ask, done
from fake_model import FakeModel
from hostile_texts import HOSTILE

from gptfast.serve.page import PAGE

pytest_plugins = ["browsing"]

# ---- hostile texts


PLACES = "#thread, #list, #title, #toast, #sure-text, .trouble"  # where there are texts of models and users
ALIEN = (
    "script, iframe, img, object, embed, form, input, style, link, meta, base, video, math, template, [style], [srcdoc]"
)
FOUND = """([places, alien]) => [...document.querySelectorAll(places)].flatMap((place) => [
  ...[...place.querySelectorAll(alien)].map((one) => one.outerHTML),
  ...[...place.querySelectorAll("a")].map((one) => one.href).filter((href) => !/^(https?|mailto):[^@]+$/.test(href)),
  ...[...place.querySelectorAll("*")].flatMap((one) => [...one.attributes].filter((a) => a.name.startsWith("on"))),
])"""


def nothing_ran(page: Page) -> None:
    assert page.evaluate("() => window.pwned") is None
    assert page.evaluate(FOUND, [PLACES, ALIEN]) == []


LAST = "() => JSON.parse(localStorage['gptfast.conversations'])[0].messages.at(-2).parts[0].text"


def test_hostile_texts_run_nothing(opened: Open) -> None:
    """As prompts, answers, calls, outputs, titles, system messages and errors; shown letter by letter, even so."""
    model, page = opened(
        lambda messages: [text := messages[-1]["content"], ("python", text), ("python_output", text), text]
    )
    for number, hostile in enumerate(HOSTILE):
        if number % 10 == 0:
            page.click("#new")
        page.fill("#words", hostile)
        page.press("#words", "Enter")
        done(page)
        assert model.requests[-1]["messages"][-1]["content"] == page.evaluate(LAST)
        if number % 10 == 9:
            nothing_ran(page)
    shown = page.locator("article.user .body").first.inner_text()
    assert len(model.requests) == 50 and HOSTILE[40].split("\n")[1] in shown
    page.reload()
    nothing_ran(page)
    assert page.locator(".odd", has_text="U+202E").count() >= 2 and page.locator(".odd", has_text="U+200B").count() >= 2
    for hostile in HOSTILE[::7]:
        model.refusals = [(400, {"message": hostile}, {})]
        ask(page, "x")
        done(page)
    nothing_ran(page)
    page.locator("#list li").first.hover()
    page.locator("#list li").first.get_by_label("Delete").click()
    nothing_ran(page)


def test_the_test_of_hostile_texts_sees_a_hole(browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same page with one innerHTML and no policy: it runs what it is told."""
    text = PAGE.read_text(encoding="utf-8").replace(
        "parent.append(text.slice(from))", "parent.innerHTML += text.slice(from)"
    )
    assert "innerHTML" in text
    monkeypatch.setattr("fake_model.read_page", lambda: (text.encode(), "img-src *"))
    model = FakeModel(lambda messages: ["harmless ", messages[-1]["content"]])
    page = browser.new_page()
    page.goto(model.url)
    ask(page, "<img src=x onerror=window.pwned=1>")
    page.wait_for_function("() => window.pwned === 1")
    page.close()
    model.close()


MARKDOWN = {
    "a *b* **c** ~~d~~ `e*f*`": "<p>a <em>b</em> <strong>c</strong> <del>d</del> <code>e*f*</code></p>",
    "***both*** and **a *b* c**": "<p><strong><em>both</em></strong> and <strong>a <em>b</em> c</strong></p>",
    "2 * 3 * 4, snake_case_name, a_b_": "<p>2 * 3 * 4, snake_case_name, a_b_</p>",
    r"\*not\* \`code\` \[x\](y)": "<p>*not* `code` [x](y)</p>",
    "# One\n\n#### Four ##\n#hash": "<h1>One</h1><h4>Four</h4><p>#hash</p>",
    "a\nb\n\nc": "<p>a<br>b</p><p>c</p>",
    "- a\n- b\n  1. c\n  2. d\n- e": "<ul><li>a</li><li>b<ol start=\"1\"><li>c</li><li>d</li></ol></li><li>e</li></ul>",
    "3.\n\n- \n\n+": "<p>3.</p><p>-</p><p>+</p>",
    "3. x\n4. y": '<ol start="3"><li>x</li><li>y</li></ol>',
    "> q **r**\n> - s": "<blockquote><p>q <strong>r</strong></p><ul><li>s</li></ul></blockquote>",
    "---": "<hr>",
    "`` a`b ``": "<p><code>a`b</code></p>",
    "unclosed **bold and `code": "<p>unclosed **bold and `code</p>",
    "|a|b|\n|-|-|\n|`c`|d|": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
    "<tbody><tr><td><code>c</code></td><td>d</td></tr></tbody></table></div>",
    "a | b is no table": "<p>a | b is no table</p>",
    "[t](https://x.example/p)": '<p><a href="https://x.example/p">t</a><span> (x.example)</span></p>',
    "see https://x.example/a_b_c, ok": '<p>see <a href="https://x.example/a_b_c">https://x.example/a_b_c</a>, ok</p>',
    "[t](/local) [u](javascript:x)": "<p>t u</p>",
    "```py\nx = 1  # one\n```": '<div><div><span>py</span><button>Copy</button></div>'
    '<pre><code>x = <span>1</span>  <span># one</span></code></pre></div>',
    "```\nnever closed <b>": "<div><div><span>text</span><button>Copy</button></div>"
    "<pre><code>never closed &lt;b&gt;</code></pre></div>",
}  # fmt: skip
BARE = """place => {
  const copy = place.cloneNode(true);
  const extra = (one) => [...one.attributes].filter((a) => !["href", "start"].includes(a.name));
  for (const one of copy.querySelectorAll("*")) for (const a of extra(one)) one.removeAttribute(a.name);
  return copy.innerHTML;
}"""


def test_markdown(opened: Open) -> None:
    """Each text as a whole and letter by letter gives the same."""
    _, page = opened(lambda messages: [MARKDOWNS[int(messages[-1]["content"])]])
    for number, wanted in enumerate(MARKDOWN.values()):
        ask(page, str(number))
        done(page)
        assert page.locator(".md").last.evaluate(BARE) == wanted
    _, page = opened(lambda messages: MARKDOWNS[13] + "\n\n" + MARKDOWNS[6] + "\n\n" + MARKDOWNS[18])
    ask(page, "letters")
    done(page)
    wanted = list(MARKDOWN.values())
    assert page.locator(".md").evaluate(BARE) == wanted[13] + wanted[6] + wanted[18]


MARKDOWNS = list(MARKDOWN)


def test_no_text_holds_the_page_up(opened: Open) -> None:
    """Long runs of what begins something and does not end it."""
    runs = [
        "[",
        "![",
        "*",
        "**a",
        "_ a",
        "`",
        "``` ",
        "<",
        "> ",
        "- ",
        "|-",
        "http://",
        "(",
        "\\",
        "~~",
        "*_",
        "[a](",
        "# ",
        "\u202e",
    ]
    model, page = opened(lambda messages: [runs[int(messages[-1]["content"])] * 4000])
    for number in range(len(runs)):
        page.click("#new")
        ask(page, str(number))
        done(page)
    assert len(model.requests) == len(runs)
