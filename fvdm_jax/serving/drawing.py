"""What the form asks for, drawn: the strip of latent frames, and the levels of every step."""

import html
from collections.abc import Sequence

from fvdm_jax.evaluating.page import heat
from fvdm_jax.zoo import Matrix

STYLE = """
.strip { display: flex; gap: 3px; overflow-x: auto; padding: 4px 0 }
.strip div { flex: 1 0 1.6rem; height: 2.2rem; border-radius: 3px; text-align: center; line-height: 2.2rem;
             font-size: .75rem; background: #3f3f46; color: #d6d6da }
.strip .kept { background: #f5b242; color: #18181b } .told { font-size: .85rem; opacity: .8 }
.strip .loose { background: repeating-linear-gradient(45deg, #f5b242 0 4px, #8a6a30 4px 8px); color: #18181b }
.refused { border-left: 4px solid #e5484d; padding: .4rem .8rem; overflow-wrap: anywhere }
.levels img { width: 100%; height: 7rem; image-rendering: pixelated; border-radius: 3px }
#command textarea { font: .8rem/1.5 ui-monospace, monospace; overflow-x: auto; white-space: pre }
.slot .wrap { font-size: .8rem; line-height: 1.4 } .slot .download { display: none }
.strip .aimed { outline: 2px solid #f5b242 } footer { display: none !important }
"""

DROPPING = """
() => {
  const aimed = event => event.target.closest ? event.target.closest('#strip .strip div') : null;
  const mark = cell => document.querySelectorAll('#strip .strip div').forEach(
    each => each.classList.toggle('aimed', each === cell));
  const say = (input, value) => {
    input.value = value;
    for (const kind of ['input', 'change', 'blur']) input.dispatchEvent(new Event(kind, { bubbles: true }));
  };
  document.addEventListener('dragover', event => {
    mark(aimed(event));
    if (event.dataTransfer.types.includes('Files')) event.preventDefault();
  });
  document.addEventListener('dragleave', event => event.relatedTarget || mark(null));
  document.addEventListener('drop', event => {
    const cell = aimed(event), files = event.dataTransfer.files;
    mark(null);
    if (!files.length) return;
    event.preventDefault();
    if (!cell) return;
    if (files.length > 1) alert('One file at a time: the first one is taken.');
    const inputs = [...document.querySelectorAll('.slot input[type=file]')];
    if (!inputs.length) return alert('Every slot has a file: take one out first.');
    const slot = inputs[0].closest('.slot').id.slice(-1), one = new DataTransfer();
    say(document.querySelector(`#at${slot} input[type=number]`), cell.textContent);
    one.items.add(files[0]);
    inputs[0].files = one.files;
    inputs[0].dispatchEvent(new Event('change', { bubbles: true }));
  });
}
"""
"""A file that is dropped on a frame of the strip goes into the first free slot, kept at that frame."""


def refused(line: str) -> str:
    """A refusal, as HTML."""
    return f'<div class="refused">{html.escape(line)}</div>'


def strip(strength: Sequence[float], levels: Matrix, calls: int) -> str:
    """The latent frames [f] by how much is kept of each, above their levels [s f], as HTML."""
    cells = "".join(
        f'<div class="{_kind(s)}" title="latent frame {i}: {_word(s)}">{i}</div>'
        for i, s in enumerate(strength)
    )
    told = (
        f"{len(strength)} latent frames (yellow: kept, striped: kept loosely, gray: made), {calls} calls of"
    )
    return (
        f'<div class="strip">{cells}</div><div class="levels">{heat(levels)}</div>'
        f'<div class="told">{told} the network; below, their noise from the first step (top) to the last: '
        "white is noise, black is clean</div>"
    )


def _kind(strength: float) -> str:
    return "kept" if strength == 0 else "made" if strength == 1 else "loose"


def _word(strength: float) -> str:
    return {0.0: "kept", 1.0: "made"}.get(strength, f"kept, loosened {strength:g}")
