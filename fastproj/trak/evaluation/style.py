"""The style sheet of a report, light and dark, from a phone's width on."""

from __future__ import annotations

# Text on each of the backgrounds has a contrast of at least 4.5 to 1; the tests compute it.
LIGHT = {
    "text": "#1b1f24", "back": "#ffffff", "soft": "#5a6472", "line": "#d5dae1",
    "panel": "#f5f7f9", "good": "#14733c", "bad": "#b3261e", "mark": "#2a64cc",
    "h1": "#e3f4e8", "h2": "#c2e8cd", "h3": "#9bd8ad", "h4": "#6fc488",
    "d1": "#fde7e5", "d2": "#f9cbc7", "d3": "#f3aaa4", "d4": "#ea8880",
}  # fmt: skip
DARK = {
    "text": "#e4e7eb", "back": "#14171b", "soft": "#98a2b0", "line": "#343b45",
    "panel": "#1d2127", "good": "#5fce8e", "bad": "#ff8a80", "mark": "#82aaff",
    "h1": "#1c3325", "h2": "#1f4a30", "h3": "#21603a", "h4": "#1f6e40",
    "d1": "#3d2220", "d2": "#5a2a27", "d3": "#77312d", "d4": "#8f3833",
}  # fmt: skip


def variables(colours: dict[str, str]) -> str:
    """The colours as custom properties."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def marks() -> str:
    """Marked tokens: what helps has a line, what harms a broken one, so that colour isn't all."""
    rules = [
        f"mark.{name} {{ background: var(--{name}); }}" for name in LIGHT if name[1:].isdigit()
    ]
    return "\n".join(rules)


STYLE = f"""
:root {{ color-scheme: light dark; {variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 66rem; color: var(--text);
  background: var(--back); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .6rem; }}
h3 {{ font-size: 1rem; margin: 0; flex: 1 0 100%; }}
h4 {{ font-size: .9rem; margin: 0 0 .3rem; font-weight: 600; }}
p {{ margin: .3rem 0; max-width: 46rem; }}
a {{ color: var(--mark); }}
:focus-visible {{ outline: 3px solid var(--mark); outline-offset: 2px; }}
.soft, figcaption {{ color: var(--soft); }}
.big {{ font-size: 1.9rem; font-variant-numeric: tabular-nums; }}
.row {{ display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; align-items: flex-start; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: 0; list-style: none; }}
nav a {{ display: inline-block; min-height: 24px; }}
.target {{ border: 1px solid var(--line); background: var(--panel); border-radius: .5rem;
  padding: .8rem 1rem; margin: .8rem 0; display: flex; flex-wrap: wrap; gap: .6rem 1.4rem; }}
.samples {{ display: flex; flex-wrap: wrap; gap: .5rem; margin: 0; padding: 0; list-style: none; }}
.texts .samples {{ display: block; }}
.texts .samples li {{ border-top: 1px solid var(--line); padding: .5rem 0; display: flex; gap: 1rem;
  flex-wrap: wrap; }}
.texts .samples figure {{ min-width: 3.4rem; }}
.texts .samples li > div {{ flex: 1 1 12rem; min-width: 0; }}
.side {{ flex: 1 1 20rem; min-width: 0; }}
.question {{ flex: 0 1 auto; min-width: 0; }}
.texts .question {{ flex: 1 0 100%; display: flex; flex-wrap: wrap; gap: .4rem 1rem; }}
.texts .question > div {{ flex: 1 1 12rem; min-width: 0; }}
figure {{ margin: 0; text-align: center; font-size: .78rem; line-height: 1.3;
  font-variant-numeric: tabular-nums; }}
img {{ display: block; margin: 0 auto .15rem; height: 3.4rem; min-width: 3.4rem; max-width: 100%;
  border: 1px solid var(--line); }}
img.small {{ image-rendering: pixelated; }}
.question img {{ height: 6.4rem; }}
.passage {{ white-space: pre-wrap; }}
.soft {{ font-size: .85rem; }}
mark {{ color: var(--text); background: none; border-bottom: 2px solid; }}
mark[class^=d] {{ border-bottom-style: dashed; }}
{marks()}
.help {{ color: var(--good); }} .hurt {{ color: var(--bad); }}
.wide {{ overflow-x: auto; flex: 1 0 100%; max-width: 100%; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .12rem 1.2rem .12rem 0; vertical-align: top; text-align: left; }}
.wide th, .wide td {{ overflow-wrap: normal; }} .wide th {{ white-space: nowrap; }}
.wide tbody tr > * {{ border-top: 1px solid var(--line); }}
th {{ font-weight: 600; }} th[scope=row] {{ font-weight: 400; color: var(--soft); }}
svg {{ max-width: 100%; height: auto; }} svg text {{ fill: var(--soft); font-size: 11px; }}
svg .axis {{ stroke: var(--line); }} svg .mark {{ fill: var(--mark); }}
"""
