"""What a card, a prompt or a name holds is shown as text, wherever it is shown."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from test_plots import believe_cards, write_run

from specdistill.errors import SpecDistillError
from specdistill.quoting import block, code, drawn, prose, shortened, visible
from specdistill.report import write_report
from specdistill.report.plots import plot_all
from specdistill.report.text import _name

HOSTILE = (
    "![x](/etc/hostname)",
    "![x](plots/speedup.png)",
    "![x][y]\n\n[y]: ../../../etc/hostname",
    "[a](https://example.com) https://example.com www.example.com a@example.com",
    "<https://example.com> <img src=/etc/hostname> <b>",
    "\n\n# heading\n\n- item\n\n1. item\n\n> quote\n\n---\n\n```\ncode",
    "x\n===\n\nTitle\n---",
    "`` ` a ` ``` | *b* _c_ ~~d~~ &lt;e&gt; \\",
    "| a | b |\n| --- | --- |\n| c | d |",
    "$$E = mc^2$$ \\(x\\) :smile: [^1]",
    "\x1b[31mred\x1b[0m \x9b2J \u202egnp.exe \u2028 \r\n \x00 \ud800",
)
STRUCTURE = (
    "image",
    "link_open",
    "html_inline",
    "html_block",
    "heading_open",
    "fence",
    "code_block",
    "table_open",
    "td_open",
    "hr",
    "blockquote_open",
    "bullet_list_open",
    "ordered_list_open",
    "list_item_open",
    "em_open",
    "strong_open",
    "s_open",
)


def structure(text: str) -> Counter[str]:
    """How many of each kind of element a renderer of GitHub's Markdown sees, bare addresses among
    the links.
    """
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    inline = [child for token in tokens for child in token.children or []]
    found = Counter(t.type for t in [*tokens, *inline] if t.type in STRUCTURE)
    words = "\0".join(child.content for child in inline if child.type == "text")
    # Escaped characters end a text of the parser's; only what GitHub reads as one can be a link.
    raw = re.sub(r"`+.*?`+", "", re.sub(r"\\.", "\0", text), flags=re.DOTALL)
    found["link_open"] += len(re.findall(r"https?://|www\.|\w@\w", raw))
    assert "\x1b" not in words
    return found


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a document strings stand."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from strings(item, (*path, key))


def put(document: Any, path: tuple[Any, ...], value: str) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


def shown(character: str) -> bool:
    return character == "\n" or visible(character) == character


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    (folder / "config.yaml").write_text("target: my/target\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        believe_cards(patch)  # they are drawn, not measured
        plot_all(folder)
        yield folder


def test_no_text_of_a_card_is_read_as_markdown_or_html(run_dir: Path) -> None:
    """Each of its strings in turn, and the names in the configuration. A card that is refused for
    what stands there shows nothing.
    """
    card = run_dir / "scorecard.json"
    sound = json.loads(card.read_text(encoding="utf-8"))

    def report_with(path: tuple[Any, ...], text: str) -> str | None:
        document = json.loads(json.dumps(sound))
        put(document, path, text)
        card.write_text(json.dumps(document), encoding="utf-8")
        try:
            return write_report(run_dir).read_text(encoding="utf-8")
        except SpecDistillError:
            return None

    usual = structure(write_report(run_dir).read_text(encoding="utf-8"))
    pictures = (run_dir / "report.html").read_text(encoding="utf-8").count("<img ")
    assert pictures == usual["image"] > 3
    places = [p for p in strings(sound) if p[0] not in ("per_prompt", "example", "schema")]
    written = 0
    for number, path in enumerate(places):
        hostile = HOSTILE[number % len(HOSTILE) :] + HOSTILE[: number % len(HOSTILE)]
        harmless = report_with(path, "words")  # another engine, say, has another report
        for text in hostile[: 3 if number % 4 else None]:
            report = report_with(path, text)
            if report is None or harmless is None:
                continue
            written += 1
            assert structure(report) == structure(harmless), (path, text)
            assert all(map(shown, report)), (path, text)
            page = (run_dir / "report.html").read_text(encoding="utf-8")
            assert page.count("<img ") == pictures
            assert "<a " not in page
    card.write_text(json.dumps(sound), encoding="utf-8")
    assert written > len(places)
    for text in HOSTILE:
        name = text.replace("\ud800", "")
        (run_dir / "config.yaml").write_text(json.dumps({"target": name}), encoding="utf-8")
        assert structure(write_report(run_dir).read_text(encoding="utf-8")) == usual, text


def test_the_page_takes_in_no_file_but_pictures_that_were_drawn(run_dir: Path) -> None:
    picture, secret = run_dir / "plots" / "speedup.png", run_dir / "secret.txt"
    drawn_bytes = picture.read_bytes()
    secret.write_text("secret", encoding="utf-8")
    for make in (
        lambda: picture.symlink_to(secret),
        lambda: picture.symlink_to(run_dir / "plots" / "time.png"),
        lambda: picture.write_text("secret", encoding="utf-8"),
    ):
        picture.unlink()
        make()
        write_report(run_dir)
        assert "plots/speedup.png" not in (run_dir / "report.md").read_text(encoding="utf-8")
        page = (run_dir / "report.html").read_text(encoding="utf-8")
        assert "c2VjcmV0" not in page  # base64 of "secret"
    picture.unlink()
    picture.write_bytes(drawn_bytes)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("quote", [code, prose, lambda text: f"| a |\n| --- |\n| {prose(text)} |"])
def test_quoted_text_is_read_back_as_it_was(quote: Callable[[str], str], text: str) -> None:
    tokens = (
        MarkdownIt("commonmark")
        .enable(["table", "strikethrough"])
        .parse(f"x {quote(text)} y" if quote in (code, prose) else quote(text))
    )
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "code_inline", "text_special"}
    assert visible(text).strip() in "".join(child.content for child in inline)


def test_a_block_holds_any_text() -> None:
    for text in HOSTILE:
        (fence,) = MarkdownIt("commonmark").parse(block(text, "yaml"))
        assert fence.type == "fence"
        assert fence.content == visible(text, keep="\n") + "\n"


def test_what_is_shown_has_no_orders_to_a_terminal() -> None:
    assert visible("plain ä 漢字 👩‍🔬 γ × –") == "plain ä 漢字 👩‍🔬 γ × –"
    assert visible("a\x1b[2Jb\r\x9b\x07\u202e\n") == r"a\x1b[2Jb\r\x9b\x07\u202e\n"
    assert visible("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert visible("\ud800") == r"\ud800"


def test_long_text_is_shortened_in_its_middle() -> None:
    assert shortened("a" * 50 + "b" * 50, 21) == "aaaaaaa [...] bbbbbbb"
    assert shortened("short", 21) == "short"
    assert drawn("$x$") == r"\$x\$"


def test_names_of_facts_begin_a_line_and_are_no_markdown() -> None:
    assert [_name(text) for text in ("max_new_tokens", "draft weights")] == [
        "max_new_tokens",
        "draft weights",
    ]
    for text in (*HOSTILE, "_a_", "a _b_", "__a__", "1. a", "- a", "+ a", "", "a:"):
        assert structure(f"- {_name(text)}: b") == {"bullet_list_open": 1, "list_item_open": 1} | {
            "link_open": 0
        }, text
