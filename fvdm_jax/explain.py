"""What a request will do, drawn in the terminal."""

from collections.abc import Sequence


def picture(strength: Sequence[float]) -> str:
    """One line with a character for every latent frame [f]: kept, kept loosely, or generated."""
    row = "".join("█" if s == 0 else "·" if s == 1 else "▒" for s in strength)
    loose = sorted({s for s in strength if 0 < s < 1})
    span = " to ".join(f"{s:g}" for s in dict.fromkeys((loose[0], loose[-1]))) if loose else ""
    legend = {"█": "█ kept", "▒": f"▒ kept, loosened {span}", "·": "· generated"}
    count = f"{len(row)} latent frame{'s' * (len(row) != 1)}"
    return f"{count}   {row}      {'   '.join(text for sign, text in legend.items() if sign in row)}"


def explain(schedule: Sequence[Sequence[float]]) -> str:
    """The level of every latent frame at every step [s f] as a table, and at a glance as shades of noise.

    100 columns hold 21 frames; the shades stand beside the table where there is room, else below it.
    """
    rows = [[float(level) for level in row] for row in schedule]
    frames = len(rows[0])
    names = ["start", *(f"{step:5d}" for step in range(1, len(rows)))]
    table = ["step ", *names]
    for index, column in enumerate(zip(*rows, strict=True)):
        cells = [str(index), *map(_level, column)]
        table = [f"{line}{cell:>4}" for line, cell in zip(table, cells, strict=True)]
    shades = ["".join(_shade(level) for level in row) for row in rows]
    title = "The noise level of every latent frame (across) after every step (down): 1 noise, 0 clean;"
    title += " as shades █ noise … · clean."
    if len(table[0]) + 3 + frames <= 100:
        return "\n".join([title, "", *(f"{a}   {b}" for a, b in zip(table, ["", *shades], strict=True))])
    glance = [f"{name}  {shade}" for name, shade in zip(names, shades, strict=True)]
    return "\n".join([title, "", *table, "", "At a glance", "", *glance])


def _level(level: float) -> str:
    return f"{level:.0f}" if level in (0, 1) else f"{level:.2f}".lstrip("0") if level < 0.995 else "1.0"


def _shade(level: float) -> str:
    return "·" if level == 0 else "░▒▓█"[min(3, int(level * 4))]
