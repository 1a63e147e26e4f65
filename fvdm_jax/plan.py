"""Says what a step would take on TPUs that are not there: it compiles the real program for them."""

import time
from collections.abc import Iterator

from fvdm_jax.chips import Slice
from fvdm_jax.planning.aot import TooLarge, devices, prepare
from fvdm_jax.planning.request import parse
from fvdm_jax.program import Refusal, leave, legible, outputs, run

GB = 1e9


def main(argv: list[str]) -> int:
    """Plans what `argv` asks for."""
    prepare()
    asked, place = parse(argv)
    from fvdm_jax import train
    from fvdm_jax.planning import programs

    flags, settings = asked.flags, asked.settings
    network = train.sizes(asked)
    case = programs.Case(flags.task, settings, network, place, flags.sampling_steps, flags.guided)
    if place.gpu and case.codes:
        what = f"{flags.task} has no formula, and for GPUs there is no compiler here"
        raise Refusal("--task", what, "name a slice of TPUs, or plan train or sample")
    found = [] if place.gpu else there(place)
    try:
        layouts = programs.layouts_of(case)
    except ValueError as wrong:
        flag = "--mesh" if settings.mesh else "--batch" if flags.task == "train" else "--topology"
        raise Refusal(flag, str(wrong)) from wrong
    tried = list(tries(case, layouts[: flags.tries], found))
    best = fastest(tried)
    told = best | {"tried": tried} | costing(best, flags, settings)
    if flags.json:
        with outputs(flags.json) as (draft,):
            draft.write_text(legible(told), "utf-8")
    print(*lines(told), sep="\n")
    return 0


def there(over: Slice) -> list:
    """The devices of a slice of TPUs. Raises Refusal where there is no such slice."""
    try:
        return devices(over)
    except ValueError as wrong:
        raise Refusal("--topology", str(wrong), "give a shape that Google sells") from wrong


def tries(case, layouts: list[dict[str, int]], found: list) -> Iterator[dict]:
    """A record for each layout, told while they are compiled for the devices, if there are several layouts.

    Without devices it is by formulas alone.
    """
    from fvdm_jax.planning import programs

    if not found:
        yield from (programs.estimated(case, sizes) for sizes in layouts)
        return
    for sizes in layouts:
        programs.check(case, sizes, found)
        began = time.perf_counter()
        try:
            runs = list(programs.compiled(case, sizes, found))
            told = programs.record(case, sizes, runs, [tuple(device.coords) for device in found])
        except TooLarge as large:
            told = {"mesh": sizes, "bytes": {"reserved": large.needed, "there": large.there}}
        told["compiling_seconds"] = time.perf_counter() - began
        if len(layouts) > 1:
            print(brief(told), flush=True)
        yield told


def over(told: dict) -> float:
    """Bytes that a device lacks; 0 or less where it fits."""
    return told["bytes"]["reserved"] - told["bytes"]["there"]


def fastest(tried: list[dict]) -> dict:
    """Of the layouts that fit, the one that could be fastest. Raises Refusal where none fits."""
    fitting = [told for told in tried if "seconds" in told and over(told) <= 0]
    if fitting:
        return min(fitting, key=lambda told: told["seconds"]["overlapped"])
    least = min(tried, key=over)
    sizes = least["bytes"]
    what = (
        f"by {mesh(least)} a device needs {sizes['reserved'] / GB:.1f} GB and has {sizes['there'] / GB:.1f}: "
        f"{over(least) / GB:.1f} GB too much"
    )
    raise Refusal(
        "--topology", what, "more chips, another --mesh, --remat full, --parts or --offload need less"
    )


def costing(told: dict, flags, settings) -> dict:
    """What the config's run would take: chip-hours and, at a price, money."""
    seconds = told["seconds"]["overlapped"]
    steps = settings.steps if told["task"] == "train" else 1
    hours = told["chips"] * seconds * steps / 3600
    money = {} if flags.price is None else {"price": flags.price, "cost": hours * flags.price}
    return {"config": flags.config, "steps": steps, "per_hour": 3600 / seconds, "chip_hours": hours} | money


def mesh(told: dict) -> str:
    """The layout as --mesh takes it."""
    from fvdm_jax.layouts import text

    return text(told["mesh"])


def brief(told: dict) -> str:
    """One line of a layout that was tried."""
    took = f"compiled in {told['compiling_seconds']:.0f} s"
    if over(told) > 0:
        return f"{mesh(told):<36} does not fit: {over(told) / GB:.1f} GB too much a device; {took}"
    seconds = told["seconds"]["overlapped"]
    return (
        f"{mesh(told):<36} {told['bytes']['reserved'] / GB:.1f} GB a device, {seconds:.3g} s at best; {took}"
    )


def lines(told: dict) -> Iterator[str]:
    """The plan as text."""
    names = [told["exchange"]] if told.get("exchange") else []
    names += [f"remat {told['remat']}"] if told["task"] == "train" else []
    yield f"{told['task']} on {told['topology']}, {told['chips']} chips: {', '.join([mesh(told), *names])}"
    yield from _sizes(told)
    yield from _work(told)
    yield from _sent(told)
    yield from _time(told)


def _sizes(told: dict) -> Iterator[str]:
    if "parameters" in told:
        yield f"network      {told['parameters']:,} parameters, {told['trained']:,} trained"
    clip, many = "x".join(map(str, told["clip"])), f", {told['tokens']:,} tokens" if "tokens" in told else ""
    what = f"a step       {told['batch']} clips of" if told["task"] == "train" else "a clip      "
    yield f"{what} {clip} latents{many}"
    sizes = told["bytes"]
    parts = ", ".join(f"{name} {sizes[name] / GB:.2f}" for name in ("arguments", "temporaries"))
    host = f", {sizes['host'] / GB:.2f} in the host's memory" if sizes.get("host") else ""
    alive = f", {sizes['peak'] / GB:.2f} alive at once" if "peak" in sizes else ""
    yield f"a device     {sizes['reserved'] / GB:.2f} GB of {sizes['there'] / GB:.2f}: {parts}{alive}{host}"


def _work(told: dict) -> Iterator[str]:
    work = told["operations"]
    if "formula" in work:
        yield f"operations   {work['formula']:.3g} by the formula, {work['again']:.3g} again to save memory"
    if work["compiled"] is not None:
        wanted = work.get("formula", 0) + work.get("again", 0)
        times = f", {work['compiled'] / wanted:.2f} times that" if wanted else ""
        yield f"compiled     {work['compiled']:.3g}{times}"
    if told.get("uncounted_loops"):
        yield f"note: {told['uncounted_loops']} loops were counted as if they turned once"


def _sent(told: dict) -> Iterator[str]:
    sent = told.get("collectives", {})
    for kind, each in sent.items():
        took = f"{each['seconds']:.3g} s, {each['runs']} runs"
        yield f"{kind:<20} {each['bytes'] / GB:8.2f} GB a device, {took}"
    least = told.get("lower_bound")
    if least:
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in least.items() if size)
        total = sum(each["bytes"] for each in sent.values())
        times = f"; the program sends {total / sum(least.values()):.2f} times that" if total and parts else ""
        yield f"at least     {sum(least.values()) / GB:.2f} GB a device{': ' if parts else ''}{parts}{times}"


def _time(told: dict) -> Iterator[str]:
    seconds = told["seconds"]
    parts = ", ".join(
        f"{name} {seconds[name]:.3g}" for name in ("products", "attention", "memory", "collectives")
    )
    ends = f"{seconds['overlapped']:.3g} at best, {seconds['apart']:.3g} one after the other"
    yield f"seconds      {parts}: {ends}"
    what = {"train": "steps"}.get(told["task"], "clips")
    share = f"{told['mfu']:.1%} of the peak, " if "mfu" in told else ""
    yield f"at best      {share}{told['per_hour']:,.1f} {what} an hour"
    money = f", {told['cost']:,.2f} dollars at {told['price']:g} an hour" if "cost" in told else ""
    run_of = f"{told['steps']} steps" if told["task"] == "train" else "a clip"
    yield f"{run_of:<12} {told['chip_hours']:,.3g} chip-hours{money}"
    if told.get("published"):
        from fvdm_jax.planning.published import Published

        yield f"published    {Published(**told['published'])}"


def cli() -> None:
    """The program, as `python -m fvdm_jax.plan` and as `fvdm-plan`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
