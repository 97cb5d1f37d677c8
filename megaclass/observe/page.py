"""The HTML of the report: one style sheet and a few pieces, each of which escapes what it is given.

Separate from the report, which decides what is shown; this decides how it looks. Nothing in a page is fetched from
anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

NUM_COLOURS = 6

_STYLE = """
:root { color-scheme: light dark; --typeface: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d2125; --ink-soft: #667079; --grid: #e4e6e8;
  --series-1: #2563a8; --series-2: #d2691e; --series-3: #2a8c67; --series-4: #8a4fa3;
  --series-5: #b3891d; --series-6: #5b6b79; --good: #1f7a4d; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --card: #1d2125; --ink: #e7e9eb; --ink-soft: #99a2aa;
  --grid: #32383d; --series-1: #6ea8ea; --series-2: #ee9a5b; --series-3: #5fc79c; --series-4: #c495dc;
  --series-5: #e3c05c; --series-6: #a3b3c1; --good: #63c795; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 var(--typeface); font-variant-numeric: tabular-nums }
header p { color: var(--ink-soft); margin: .2rem 0 0; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .8rem }
.grid { display: grid; align-items: start; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.facts { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); margin: 1.2rem 0 0 }
.facts div, figure, .card { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; margin: 0;
  padding: .7rem .9rem; min-width: 0 }
.facts dt { color: var(--ink-soft); font-size: .8rem } .facts dd { margin: 0; font-size: 1.15rem; font-weight: 600;
  overflow-wrap: anywhere; line-height: 1.35 }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem .9rem; align-items: baseline; font-weight: 600 }
.below { margin-bottom: .8rem }
figcaption small { font-weight: 400; color: var(--ink-soft) } svg { display: block; width: 100%; height: auto }
i.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; margin-right: .35rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { padding: .35rem .8rem .35rem 0; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal }
th { font-size: .8rem; font-weight: 500; color: var(--ink-soft) } tr:last-child td { border-bottom: 0 }
td.strong { font-weight: 650 } .good { color: var(--good) } .bad { color: var(--bad) } .soft { color: var(--ink-soft) }
.bar { display: flex; height: .9rem; border-radius: .45rem; overflow: hidden; background: var(--grid); margin: .3rem 0 }
summary { cursor: pointer } pre { overflow-x: auto; font-size: .85rem; margin: .6rem 0 0 } p { margin: .5rem 0 0 }
"""


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """A whole document around finished sections; empty sections are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Even a hostile value that slipped through could load and run nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """A headed part of the page around finished content; nothing if there is no content."""
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Small cards of a name and a value each; empty values are left out."""
    cards = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs if value)
    return f'<dl class="facts">{"".join(cards)}</dl>'


def figure(title: str, labels: Sequence[str], svg: str) -> str:
    """A finished picture with its title; the legend is shown for more than one curve."""
    legend = (f"<small>{_swatch(index)}{escape(label)}</small>" for index, label in enumerate(labels, 1))
    return f"<figure><figcaption>{escape(title)}{''.join(legend) if len(labels) > 1 else ''}</figcaption>{svg}</figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], strong_column: int | None = None) -> str:
    """A table whose first column names the rows; `strong_column` is set off."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = []
    for row in rows:
        cells = (
            f"<td{' class=strong' if index == strong_column else ''}>{escape(cell)}</td>"
            for index, cell in enumerate(row)
        )
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="card scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def shares(parts: Sequence[tuple[str, float]]) -> str:
    """One bar with a legend; each part, at most `NUM_COLOURS`, is a label and a share of the whole in [0, 1]."""
    assert len(parts) <= NUM_COLOURS
    pieces, legend = [], []
    for index, (label, share) in enumerate(parts, 1):
        pieces.append(f'<span style="width:{100 * share:.3f}%;background:var(--series-{index})"></span>')
        legend.append(f"<small>{_swatch(index)}{escape(label)} ({share:.1%})</small>")
    legend_line = f"<figcaption>{''.join(legend)}</figcaption>"
    return f'<figure class="below"><div class="bar">{"".join(pieces)}</div>{legend_line}</figure>'


def folded(title: str, text: str) -> str:
    """A long text behind a line to open."""
    return f'<details class="card"><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>'


def paragraph(text: str, kind: str = "soft") -> str:
    """One line of text; `kind` is soft, good or bad."""
    return f'<p class="{kind}">{escape(text)}</p>'


def _swatch(index: int) -> str:
    return f'<i class="swatch" style="background:var(--series-{index})"></i>'
