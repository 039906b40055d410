"""HTML pages as tests read them."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "use", "image", "path"}


class Page(HTMLParser):
    """The tags, attributes, tables and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.sections: list[str] = []
        self.words: list[str] = []  # outside of tables
        self.all_words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "section":
            self.sections.append(dict(attrs)["id"] or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.all_words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data.replace("\N{NON-BREAKING HYPHEN}", "-")
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def all_text(self) -> str:
        return " ".join(" ".join(self.all_words).split())

    def table(self, *first: str) -> list[list[str]]:
        """Return the rows after the first of the table whose first row begins with these cells."""
        (chosen,) = (table for table in self.tables if tuple(table[0][: len(first)]) == first)
        return chosen[1:]
