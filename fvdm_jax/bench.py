"""Measures what this machine can do: how long each part takes, of which share of the peak, against torch."""

import dataclasses
import os
import re
from pathlib import Path

from fvdm_jax import machine, rules
from fvdm_jax.measuring.race import race, ratio, summary
from fvdm_jax.program import Parser, Refusal, check_output, leave, legible, outputs, run, whole
from fvdm_jax.progress import Stages

WHAT = ("dit", "sample", "train", "vae-encode", "vae-decode", "text")
DESCRIPTION = "Measures what this machine can do, with random weights."
HELP = """
  python -m fvdm_jax.bench                                          all of Wan 1.3B that fits
  python -m fvdm_jax.bench --what dit --layers 4 --clip 5x60x104 --dtype float32
  python -m fvdm_jax.bench --model FOLDER --what sample --json sample.json
sample is one step with guidance, train a step of all parameters with AdamW. The sides take turns in one
process, with as many threads; a first turn of each is not counted, and a turn lasts 0.2 s or more. The
processor's time is the process's, and so of the side whose turn it is. Operations are those of the formulas:
what is computed twice to save memory, --remat, counts once.
"""
OURS = "fvdm_jax"
MOST = 0.9
"""The share of the free memory that may be used."""


def parser() -> Parser:
    """The flags."""
    flags = Parser(prog="python -m fvdm_jax.bench", description=DESCRIPTION, epilog=HELP)
    add = flags.add_argument
    add("--what", nargs="+", choices=WHAT, default=WHAT, help="what to measure (default: all that fits)")
    add("--network", default="wan_1_3b", metavar="NAME", help="a published size (default: wan_1_3b)")
    add("--model", type=Path, metavar="FOLDER", help="the sizes of this model instead; no weights are read")
    add(
        "--layers",
        type=whole,
        metavar="N",
        help="layers of the transformer and the text encoder (on a CPU: 4)",
    )
    add("--clip", metavar="FxHxW", help="latents (default: 21x60x104, on a CPU 5x30x52)")
    add("--text", type=whole, default=512, metavar="N", help="tokens of a prompt (default: 512)")
    add("--batch", type=whole, default=1, metavar="N", help="clips at once (default: 1; sample takes one)")
    add("--dtype", choices=("float32", "bfloat16"), help="to compute in (default: each network's own)")
    add("--attention", choices=rules.KERNELS, default="auto", help="the implementation (default: auto)")
    add("--remat", default="none", metavar="NAME", help="what training computes again (default: none)")
    add("--turns", type=whole, default=3, metavar="N", help="how often each side is measured (default: 3)")
    add("--against", choices=("none", "diffusers"), help="the other side (default: diffusers, if installed)")
    add("--json", type=Path, metavar="FILE", help="where to write all that was measured")
    add("--overwrite", action="store_true", help="replace that file")
    return flags


def parse(argv: list[str]):
    """The flags. Raises Refusal for values that cannot be."""
    asked = parser().parse_args(argv)
    for name in ("layers", "text", "batch", "turns"):
        if (value := vars(asked)[name]) is not None:
            rules.obey(f"--{name}", value, rules.whole_from(1, 10_000))
    if asked.clip and not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){2}", asked.clip):
        raise Refusal("--clip", f"{asked.clip!r} is no size", "give FxHxW in latents, such as 21x60x104")
    if asked.json:
        check_output(asked.json, "--json", asked.overwrite)
    return asked


def main(argv: list[str]) -> None:
    """Measures what `argv` asks for, prints a table and writes JSON."""
    asked = parse(argv)
    # The sides share a GPU, of which jax would otherwise take most at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    device = jax.devices()[0]
    machine.keep_memory()
    case, other = described(asked, device), opponent(asked, device)
    record = about(case, device, other)
    print(*headlines(record, other), sep="\n")
    with Stages() as stages:
        record["works"] = {what: measured(what, case, other, asked.turns, stages) for what in asked.what}
    record["load"].append(os.getloadavg())
    show(record, device.platform == "cpu")
    if asked.json:
        with outputs(asked.json) as (draft,):
            draft.write_text(legible(record) + "\n", "utf-8")
        print("wrote", asked.json)


def described(asked, device):
    """The Subject that the flags describe. Raises Refusal where there is no such thing."""
    from fvdm_jax.measuring import workloads
    from fvdm_jax.models.dit import PATCH
    from fvdm_jax.models.layers import REMAT

    if asked.remat not in REMAT:
        raise Refusal("--remat", f"{asked.remat!r} is unknown", f"give one of {', '.join(REMAT)}")
    small = device.platform == "cpu"
    clip = tuple(map(int, (asked.clip or ("5x30x52" if small else "21x60x104")).split("x")))
    if clip[1] % PATCH or clip[2] % PATCH:
        raise Refusal("--clip", f"{asked.clip!r} has an odd side", f"give multiples of {PATCH}")
    nets = networks(asked)
    if nets.dit.channels_in != nets.dit.channels_out or nets.dit.image_width:
        what = "is one of Wan's own image-to-video networks"
        raise Refusal("--network", what, "give wan_14b, whose layers are the same")
    layers = asked.layers or (4 if small and not asked.model else None)
    changes = {} if layers is None else {"layers": layers}
    typed = {"dtype": asked.dtype} if asked.dtype else {}
    nets = dataclasses.replace(
        nets,
        dit=dataclasses.replace(nets.dit, **changes, **typed),
        vae=dataclasses.replace(nets.vae, **typed),
        text=dataclasses.replace(nets.text, **changes, **typed),
    )
    case = workloads.Subject(nets, clip, asked.text, asked.batch, asked.attention, asked.remat)
    checked_attention(case)
    return case


def networks(asked):
    """The networks, of the folder or of the published sizes."""
    from fvdm_jax import checkpoint
    from fvdm_jax.models import dit, text, vae

    if asked.model:
        if not (asked.model / "config.json").is_file():
            raise Refusal("--model", f"{asked.model} is no model", "give a folder as of python -m convert")
        return checkpoint.describe(asked.model)
    if asked.network not in dit.SIZES:
        raise Refusal("--network", f"{asked.network!r} is unknown", f"give one of {', '.join(dit.SIZES)}")
    network = dit.SIZES[asked.network]
    coder = next(config for config in vae.SIZES.values() if config.latent == network.channels_out)
    return checkpoint.Networks(network, coder, text.TextConfig())


def checked_attention(case) -> None:
    """Raises Refusal where the implementation of attention does not take the heads of the network."""
    from fvdm_jax.kernels.attention import chosen

    config = case.networks.dit
    try:
        chosen(config.dtype, config.width // config.heads, case.attention)
    except ValueError as wrong:
        raise Refusal("--attention", str(wrong), "leave it out") from wrong


def opponent(asked, device):
    """The other side as (module, device), or None."""
    from fvdm_jax.measuring import baseline

    if asked.against == "none" or asked.against is None and not baseline.installed():
        return None
    if not baseline.installed():
        remedy = 'pip install -e ".[parity]"'
        raise Refusal("--against", f"{', '.join(baseline.PACKAGES)} are not all installed", remedy)
    where = baseline.device(device.platform)
    if where is None and asked.against:
        raise Refusal("--against", f"torch does not see the {device.device_kind}", "install one that does")
    return None if where is None else (baseline, where)


def about(case, device, other) -> dict:
    """What was measured with, and on what, as JSON has it."""
    from fvdm_jax import costs
    from fvdm_jax.kernels.attention import chosen

    config = case.networks.dit
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "peak": costs.peak(device.device_kind),
        "case": case._asdict() | {"networks": dataclasses.asdict(case.networks)},
        "tokens": costs.tokens(case.clip),
        "attention": chosen(config.dtype, config.width // config.heads, case.attention),
        "versions": machine.versions() | (other[0].versions() if other else {}),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "load": [os.getloadavg()],
    }


def headlines(record: dict, other) -> list[str]:
    """What is to be known before the table."""
    networks, case = record["case"]["networks"], record["case"]
    dit, clip = networks["dit"], "x".join(map(str, case["clip"]))
    against = f"against {other[0].NAME} of torch {record['versions']['torch']}" if other else "alone"
    peak = f"peak {record['peak'] / 1e12:,.0f} TFLOP/s in bfloat16" if record["peak"] else "peak not known"
    return [
        f"{record['device']}, {peak}; jax {record['versions']['jax']}, {against}",
        f"{dit['layers']} layers of width {dit['width']} in {dit['dtype']}, clip {clip}: {record['tokens']:,}"
        f" tokens, {case['text']} of text, batch {case['batch']}, attention {record['attention']}",
        *([f"XLA_FLAGS {record['flags']}"] if record["flags"] else []),
    ]


def measured(what: str, case, other, turns: int, stages: Stages) -> dict:
    """One work, both sides in turn, as JSON has it."""
    from fvdm_jax.measuring import workloads

    work, load = workloads.WORKS[what], os.getloadavg()
    with stages("compile"):
        prepared = work.prepare(case)
        operations = work.operations(case)
    if shortage := short(prepared, other):
        return {"note": shortage, "compiled": prepared.seconds}
    starts = {OURS: prepared.begin}
    if other:
        module, where = other
        starts[module.NAME] = lambda: module.WORKS[what](case, where)
    with stages(what):
        sides = race(starts, turns)
    if other:
        module.release()
    return {
        "operations": operations,
        "compiled": prepared.seconds,
        "bytes": {"held": prepared.held, "taken": prepared.taken},
        "load": [load, os.getloadavg()],
        "sides": {name: summary(side, operations) for name, side in sides.items()},
        "ratio": ratio(sides[OURS], sides[module.NAME]) if other else None,
    }


def short(prepared, other) -> str:
    """How much memory is missing, if any: both sides hold what they need from turn to turn."""
    import jax

    needed = prepared.held * (2 if other else 1) + prepared.taken
    free = MOST * machine.free(jax.devices()[0])
    return "" if needed <= free else f"takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"


def show(record: dict, on_cpu: bool) -> None:
    """Prints the table."""
    import sys

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    names = [
        "",
        "side",
        "seconds",
        "least",
        "most",
        *(["user", "system"] if on_cpu else []),
        "TFLOP",
        "TFLOP/s",
    ]
    names += (["MFU"] if record["peak"] else []) + ["ratio"]
    for name in names:
        table.add_column(name, justify="left" if name in ("", "side") else "right")
    notes = []
    for what, work in record["works"].items():
        if "note" in work:
            notes.append(f"{what}: {work['note']}")
            continue
        for name, side in work["sides"].items():
            if "note" in side:
                notes.append(f"{what}, {name}: {side['note']}")
            else:
                table.add_row(*row(what, name, work, on_cpu, record["peak"]))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    compiled = ", ".join(f"{what} {work['compiled']:.1f}" for what, work in record["works"].items())
    print(*notes, f"compiled in seconds: {compiled}", sep="\n")
    print("load of the machine: " + ", ".join(f"{loads[0]:.1f}" for loads in record["load"]))


def row(what: str, name: str, work: dict, on_cpu: bool, peak: float | None) -> list[str]:
    """One side of a work as cells."""
    side = work["sides"][name]
    seconds, rate = side["seconds"], side["operations_per_second"]
    cells = [what, name, *(f"{seconds[which]:.3f}" for which in ("median", "min", "max"))]
    cells += [f"{side['processor'][which]:.2f}" for which in ("user", "system")] if on_cpu else []
    cells += [f"{work['operations'] / 1e12:.3f}", f"{rate / 1e12:.3f}"]
    cells += [f"{rate / peak:.1%}"] if peak else []
    kind = "processor" if on_cpu else "seconds"
    return [*cells, f"{work['ratio'][kind]:.2f}" if work["ratio"] and name == OURS else ""]


def cli() -> None:
    """The program, as `python -m fvdm_jax.bench` and as `fvdm-bench`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
