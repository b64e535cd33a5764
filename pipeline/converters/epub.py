"""EPUB books: the chapters along the spine, as their pages are laid out."""

from __future__ import annotations

import html.entities
import posixpath
import re
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.converters.archives import Archive
from pipeline.converters.html import decoded, page_text, tree_text
from pipeline.converters.protocol import ConversionError, Converted

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
# The encoding is known, and what a DTD defines is not put in.
_PROLOGUE = re.compile(r"^\s*<\?xml[^>]*\?>|<!DOCTYPE[^\[>]*(?:\[.*?\]\s*)?>", re.DOTALL)
_XML_ENTITIES = ("amp", "lt", "gt", "quot", "apos")
# Fonts are obfuscated by these, which protects no text.
_OF_FONTS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
_PAGES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml", "text/x-oeb1-document")


def convert(data: bytes, encoding: str) -> Converted:
    """The text of a book. encoding: of chapters that declare none. Raises ConversionError."""
    archive = Archive(data, "EPUB file")
    if _CONTAINER not in archive.names:
        raise ConversionError(f"it is no EPUB file: its archive has no {_CONTAINER}")
    _refuse_protected(archive)
    chapters = [_chapter(archive.read(name), encoding) for name in _spine(archive)]
    text = "\n\n".join(filter(None, chapters))
    if not text:
        raise ConversionError(f"its text is empty: none of its {len(chapters)} chapters holds any")
    return Converted(text)


def _refuse_protected(archive: Archive) -> None:
    if _ENCRYPTION in archive.names:
        methods = _xml(archive.read(_ENCRYPTION), _ENCRYPTION).xpath("//*[local-name()='EncryptionMethod']/@Algorithm")
        if any(method not in _OF_FONTS for method in methods):
            raise ConversionError("it is protected against copying (DRM); no text can be taken out of it")


def _spine(archive: Archive) -> list[str]:
    """The names of the chapters' files, in reading order. Items of the spine may be places in one file."""
    packages = _xml(archive.read(_CONTAINER), _CONTAINER).xpath("//*[local-name()='rootfile']/@full-path")
    if not packages:
        raise ConversionError(f"it is no EPUB file: {_CONTAINER} names no package")
    package = _xml(archive.read(packages[0]), packages[0])
    items = {item.get("id"): item for item in package.xpath("//*[local-name()='manifest']/*[local-name()='item']")}
    spine = package.xpath("//*[local-name()='spine']/*[local-name()='itemref']/@idref")
    if not spine:
        raise ConversionError("it is no whole EPUB file: its package has no spine")
    names = []
    for idref in dict.fromkeys(spine):
        if idref not in items:
            raise ConversionError(f"it is not whole: its spine names {idref!r}, which the manifest has not")
        if items[idref].get("media-type") in _PAGES:  # a picture has no text
            path = unquote(urlsplit(items[idref].get("href", "")).path)
            names.append(posixpath.normpath(posixpath.join(posixpath.dirname(packages[0]), path)))
    return list(dict.fromkeys(names))


def _chapter(data: bytes, encoding: str) -> str:
    """The text of a chapter: XML if it is well-formed, else read as browsers read a page."""
    from lxml import etree

    source = decoded(data, encoding)
    if not source.strip():
        return ""
    source = re.sub(r"&(\w+);", _as_character, _PROLOGUE.sub("", source))
    try:
        tree = etree.fromstring(source.encode("utf-8", errors="replace"), _parser())
    except etree.XMLSyntaxError:
        return page_text(source)
    for element in tree.iter(etree.Element):
        element.tag = etree.QName(element).localname.lower()
    return tree_text(_as_html(tree))


def _as_character(entity: re.Match[str]) -> str:
    """HTML's named characters, which XML knows only by a DTD, and DTDs are not read."""
    name = entity[1]
    return entity[0] if name in _XML_ENTITIES else html.entities.html5.get(name + ";", entity[0])


def _as_html(tree: Any) -> Any:
    """The tree as lxml's HTML elements, which can be dropped from it without the text behind them."""
    from lxml import etree
    from lxml.html import HTMLParser, document_fromstring

    page = etree.tostring(tree, encoding="utf-8", method="html", doctype="<!DOCTYPE html>")
    return document_fromstring(page, parser=HTMLParser(encoding="utf-8", huge_tree=True, no_network=True))


def _xml(data: bytes, name: str) -> Any:
    from lxml import etree

    try:
        return etree.fromstring(data, _parser())
    except etree.XMLSyntaxError as error:
        raise ConversionError(f"its {name} is not well-formed XML: {error}") from None


def _parser() -> Any:
    """Nothing is fetched or put in for an entity."""
    from lxml import etree

    return etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
