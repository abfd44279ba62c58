"""The page of `inspect`: one self-contained HTML file with the tokens by origin, totals, settings and the picture."""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import isnan
from typing import Any

from twigvlm.cli.answer import Answer
from twigvlm.evaluation.metrics import acceptance_rate
from twigvlm.evaluation.token_origins import Origin, origins, pieces

_STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --back: #ffffff; --line: #d0d0d5; --draft: #c9ecd0; --base: #ffd9a8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ececf0; --back: #16161a; --line: #44444c; --draft: #1f5a31; --base: #7a4a0c; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
.answer { white-space: pre-wrap; line-height: 2; border: 1px solid var(--line); border-radius: 6px; padding: 0.8rem; }
.draft, .base { border-radius: 3px; padding: 0.1em 1px; margin-right: 1px; }
.draft { background: var(--draft); }
.base { background: var(--base); text-decoration: underline dotted; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 1.5rem 0.25rem 0; text-align: left; font-weight: normal;
  overflow-wrap: anywhere; }
img { max-width: 100%; border-radius: 6px; }
"""
_DRAFTED, _CHOSEN = "drafted by the twig and accepted", "chosen by the base"


def answer_page(
    question: str,
    answer: Answer,
    decode: Callable[[Sequence[int]], str],
    picture: bytes,
    settings: Mapping[str, Any],
) -> str:
    """Make the page.

    Args:
        question: the question.
        answer: answer of a twig.
        decode: turns token ids into text, special tokens included.
        picture: the picture, as the bytes of a PNG.
        settings: settings of the answer, by name.
    """
    drafted, accepted = answer.drafted_lengths or [], answer.accepted_lengths or []
    rate = acceptance_rate(drafted, accepted)
    totals = {
        "tokens": answer.num_tokens,
        "steps, prefill included": len(accepted),
        "drafted tokens": sum(drafted),
        "accepted tokens": sum(accepted),
        "TokAR (accepted of drafted)": "–" if isnan(rate) else f"{100 * rate:.1f} %",
    }
    whose = origins(accepted, answer.num_tokens)
    tokens = "".join(map(_token, pieces(answer.token_ids, decode), whose))
    image = b64encode(picture).decode()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(question)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(question)}</h1>
<p class="answer">{tokens}</p>
<p><span class="draft">green</span> {_DRAFTED} · <span class="base">orange, underlined</span> {_CHOSEN}: a correction of the
draft, or the token after an accepted one</p>
<h2>Totals</h2>
{_table(totals)}
<h2>Patches</h2>
<p><img src="data:image/png;base64,{image}" alt="Scores of the picture's patches by several rankings, and the kept patches"></p>
<h2>Settings</h2>
{_table(settings)}
</body>
</html>
"""


def _token(piece: str, origin: Origin) -> str:
    kind, words = ("draft", _DRAFTED) if origin.drafted else ("base", _CHOSEN)
    step = f"step {origin.step}" if origin.step else "prefill"
    return f'<span class="{kind}" title="{step}: {words}">{escape(piece)}</span>'


def _table(rows: Mapping[str, Any]) -> str:
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"
