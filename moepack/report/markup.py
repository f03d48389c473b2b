"""HTML and SVG as trees: what is put in as text stays text."""

from __future__ import annotations

from xml.etree import ElementTree as ET

Element = ET.Element
Child = Element | str


def element(tag: str, *children: Child, **attributes: str | float) -> Element:
    """An element with its children, texts among them.

    Parameters
    ----------
    attributes
        ``class_`` is ``class``, and ``_`` is ``-``; numbers are written with two decimals at most.
    """
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    made = ET.Element(tag, {name: _text(value) for name, value in names.items()})
    add(made, *children)
    return made


def add(parent: Element, *children: Child) -> None:
    """Put children, texts among them, behind those that an element has."""
    for child in children:
        if isinstance(child, ET.Element):
            parent.append(child)
        elif len(parent):
            parent[-1].tail = (parent[-1].tail or "") + child
        else:
            parent.text = (parent.text or "") + child


def to_html(root: Element) -> str:
    """A whole document."""
    text = ET.tostring(root, encoding="unicode", method="html")
    return f"<!doctype html>\n{text}\n"


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
