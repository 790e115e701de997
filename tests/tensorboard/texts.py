"""Values of hyperparameters that Markdown or HTML could take for their own."""

TEXTS = {
    "carriage return": "a\r<img src=http://example.com/x.png>",
    "lines": "one\ntwo\r\nthree\u2028four",
    "ticks": "`a``b` ``",
    "picture and link": "![x](http://example.com/y.png) [z](http://example.com) <http://example.com>",
    "bars": "a|b\\|c",
    "emphasis": "*a* __b__ ~~c~~ #d",
    "entities": "&lt;b&gt; &#60;&amp;",
    "spaces": "  a  b ",
    "letters": "é漢𝛼",
    "nothing": "",
    "script": "<script>fetch('http://example.com')</script>",
    "![name](http://example.com/n.png)": "`",
}
UNPRINTABLE = {"control": ("a\x00b\x1b\tc", r"a\x00b\x1b\tc"), "half": ("caf\udce9", r"caf\udce9")}
