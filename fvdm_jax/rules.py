"""What each setting may be. A rule says of a bad value what is wrong with it and what to give instead."""

from collections.abc import Callable, Sequence

from fvdm_jax import zoo
from fvdm_jax.program import Refusal, plain
from fvdm_jax.video import STRIDE

SOLVERS = ("unipc", "dpm++", "euler")
SPACINGS = ("wan", "pusa", "ddpm")
KERNELS = ("auto", "splash", "cudnn", "xla")
PROCESSES = ("flow", "ddpm", "ddpm_v")

Rule = Callable[[object], tuple[str, str] | None]


def obey(where: str, value, rule: Rule) -> None:
    """Raises Refusal, named `where`, for a value that is against the rule."""
    if wrong := rule(value):
        shown = "x".join(map(str, value)) if isinstance(value, tuple) else plain(value)
        raise Refusal(where, f"{shown} {wrong[0]}", wrong[1])


def whole_from(least: int, most: int) -> Rule:
    """The rule of a whole number, ends included."""

    def rule(value):
        if type(value) is not int or not least <= value <= most:
            return "is not a possible number", f"give a whole number from {least} to {most}"

    return rule


def between(least: float, most: float, note: str = "") -> Rule:
    """The rule of a number, ends included; `note` is added to what is said of a bad one."""

    def rule(value):
        if type(value) not in (int, float) or not least <= value <= most:
            return "is out of range", f"give a number from {least} to {most}{note}"

    return rule


def _one_of(names: Sequence[str]) -> Rule:
    return lambda value: None if value in names else ("is unknown", f"give one of {', '.join(names)}")


def _frames(value):
    if wrong := whole_from(1, 10_001)(value):
        return wrong[0], wrong[1] + " of the form 1 + 4n"
    if value % STRIDE != 1:
        below = value - (value - 1) % STRIDE
        return "is not of the form 1 + 4n", f"give {below} or {below + STRIDE}"


def sides(multiple: int) -> Rule:
    """The rule of a (height, width) in pixels whose sides are multiples of a number."""

    def rule(value):
        if not isinstance(value, tuple) or len(value) != 2:
            return "is not a height and a width", "give HxW, such as 480x832"
        if any(type(side) is not int or not multiple <= side <= 8192 for side in value):
            return "is out of range", f"give sides from {multiple} to 8192 pixels, multiples of {multiple}"
        if any(side % multiple for side in value):
            height, width = (max(multiple, round(side / multiple) * multiple) for side in value)
            return f"has a side that is not a multiple of {multiple}", f"the nearest is {height}x{width}"

    return rule


def _text(value):
    if not isinstance(value, str):
        return "is not text", "give a string"
    if "\0" in value or not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
        return "is not valid text", "give it in UTF-8, without NUL"


def texts(value):
    """The rule of a tuple of texts."""
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        return "is no list of texts", ""


def strengths(value):
    """The rule of a tuple of numbers 0 … 1."""
    rule = between(0, 1)
    if not isinstance(value, tuple) or any(rule(strength) for strength in value):
        return "is no list of strengths", ""


def _schedule(value):
    if not isinstance(value, str):
        return "is no schedule", "give the name of one"
    try:
        if not value.endswith(".json"):
            zoo.parsed(value)
    except ValueError as wrong:
        what, _, right = str(wrong).partition("; ")
        return f"cannot be: {what}", right


def _guidance(value):
    rule = between(0, 100, "; 1 turns guidance off, two, as 4,3, are of the experts of high and low noise")
    both = isinstance(value, tuple | list) and len(value) == 2
    return next(filter(None, map(rule, value if both else (value,))), None)


def _context_noise(value):
    scale, power = value if isinstance(value, tuple | list) and len(value) == 2 else (value, 0)
    if wrong := between(0, 1, "; 0 turns it off")(scale):
        return wrong
    return between(0, 100, " as the power")(power)


def _if_any(rule: Rule) -> Rule:
    return lambda value: None if value is None else rule(value)


RULES: dict[str, Rule] = {
    "prompt": _text,
    "negative": _text,
    "frames": _frames,
    "steps": whole_from(1, 1000),
    "solver": _one_of(SOLVERS),
    "process": _one_of(PROCESSES),
    "spacing": _one_of(SPACINGS),
    "schedule": _schedule,
    "shift": between(0.01, 1000, "; 1 spaces the steps evenly"),
    "guidance": _guidance,
    "boundary": _if_any(between(0, 1)),
    "rescale": between(0, 1),
    "history": between(0, 100, "; 1 turns it off"),
    "history_level": between(0, 1),
    "history_windows": whole_from(1, 64),
    "context_noise": _context_noise,
    "cache": between(0, 100, "; 0 turns it off"),
    "length": _if_any(between(0.01, 1e6)),
    "overlap": whole_from(0, 10_000),
    "anchors": whole_from(0, 10_000),
    "fps": between(0.1, 240),
    "seed": whole_from(0, 2**64 - 1),
}
