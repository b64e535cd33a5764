"""HTML pages: what a reader sees of them, lists and tables in their layout, without scripts and menus.

All of a page's content is taken, not what a heuristic finds to be its article: that loses tables, code and whole pages
of links without a word.
"""

from __future__ import annotations

import codecs
import re
from typing import Any

from pipeline.converters.protocol import ConversionError, Converted
from pipeline.decoding import EncodingError, decode, mark_of

# What pages mean by these names is a larger set of characters, as in browsers (WHATWG Encoding, 4.2).
_AS_IN_BROWSERS = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "shift_jis": "cp932", "euc_kr": "cp949",
}  # fmt: skip
_DECLARED = re.compile(rb"""<(?:meta\b[^>]*?\bcharset|\?xml\b[^>]*?\bencoding)\s*=\s*["']?\s*([\w.:-]+)""", re.I)
_DECLARED_WITHIN = 4096
# Of the elements that browsers begin a new line for, those that inscriptis would run together.
_BLOCKS = ("dl", "dt", "section", "form", "fieldset", "legend", "details", "summary", "optgroup", "option", "center")
# Elements in a line that a reader sees apart from their neighbours; "text" is one of a drawing (SVG).
_APART = ("button", "select", "textarea", "text")
_UNSEEN = "//script|//style|//template|//noscript|//nav|//*[@hidden]|//comment()|//processing-instruction()"


def convert(data: bytes, encoding: str) -> Converted:
    """The text of a page. encoding: of one that declares none. Raises ConversionError."""
    return Converted(page_text(decoded(data, encoding)))


def decoded(data: bytes, encoding: str) -> str:
    """The source of a page. Its byte order mark decides, then what it declares, then `encoding`."""
    mark = mark_of(data)
    if not mark and not data.startswith(codecs.BOM_UTF8) and (found := _DECLARED.search(data[:_DECLARED_WITHIN])):
        try:
            declared = codecs.lookup(found[1].decode("ascii")).name
        except LookupError:
            raise ConversionError(f"it declares an encoding that is not known: {found[1].decode('ascii')!r}") from None
        # A declaration in ASCII letters cannot be one in UTF-16.
        declared = "utf-8" if declared.startswith(("utf-16", "utf-32")) else declared
        return data.decode(_AS_IN_BROWSERS.get(declared, declared), errors="replace")
    try:
        return decode(data, mark or encoding)
    except EncodingError as error:
        raise ConversionError(str(error)) from None


def page_text(source: str) -> str:
    """The text of a page's source. Raises ConversionError."""
    from lxml.etree import ParserError
    from lxml.html import HTMLParser, document_fromstring

    # Marks that do not nest in a finite depth are cut off by the parser without a word, unless it may go deep.
    parser = HTMLParser(encoding="utf-8", huge_tree=True, no_network=True)
    try:
        return tree_text(document_fromstring(source.encode("utf-8", errors="replace"), parser=parser))
    except ParserError:  # there is no element in it
        raise ConversionError("its text is empty") from None


def tree_text(tree: Any) -> str:
    """The text of a tree of HTML elements, as a page is laid out."""
    from inscriptis.html_engine import Inscriptis
    from inscriptis.model.config import ParserConfig

    for element in tree.xpath(_UNSEEN):
        if element.getparent() is not None:
            element.drop_tree()
    for block in tree.xpath("//pre"):
        _flatten(block)
    for numbered in tree.xpath("//ol[@start]/li[1][not(@value)]"):
        numbered.set("value", numbered.getparent().get("start"))
    return tidy(Inscriptis(tree, ParserConfig(css=_layout(), display_links=False)).get_text())


def _layout() -> dict[str, Any]:
    """How elements are laid out, as in browsers: inscriptis' profile and what it lacks."""
    from inscriptis.css_profiles import STRICT_CSS_PROFILE
    from inscriptis.html_properties import Display, VerticalAlignment
    from inscriptis.model.html_element import HtmlElement

    cell = HtmlElement(valign=VerticalAlignment.top)  # what a row is about begins on its first line
    return (
        STRICT_CSS_PROFILE
        | {tag: HtmlElement(display=Display.block) for tag in _BLOCKS}
        | {tag: HtmlElement(prefix=" ", suffix=" ", limit_whitespace_affixes=True) for tag in _APART}
        | {
            "dd": HtmlElement(display=Display.block, padding_inline=4),
            "td": cell,
            "th": cell,
        }
    )


def _flatten(block: Any) -> None:
    """Leave a preformatted block its text alone: inside elements of it, inscriptis would join the lines."""
    for line_break in block.iter("br"):
        line_break.tail = "\n" + (line_break.tail or "")
    text, tail = block.text_content(), block.tail
    block.clear()
    block.text, block.tail = text, tail


def tidy(text: str) -> str:
    """Text without what layout leaves: spaces at the ends of lines, long gaps in them, many empty lines.

    Nor are there soft hyphens, which nobody sees within a line.
    """
    text = text.replace("\u00ad", "")
    lines = [re.sub(r"(?<=\S)[ \u00a0]{9,}(?=\S)", 8 * " ", line.rstrip()) for line in text.splitlines()]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")
