"""Other people's weights into our checkpoint, and back."""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import fvdm_jax
from fvdm_jax.program import Parser, Refusal, alone, folder_output, leave, plain, run
from fvdm_jax.prompts import fingerprint

EPILOG = """\
A SOURCE is a .safetensors, .pth or .pt file, an index of shards, the folder of a model as Wan, diffusers or
ComfyUI have it, hf:OWNER/REPO, or hf:OWNER/REPO/PATH for one file of it. What is in it is told from its
contents; several make one model:

  python -m convert Wan2.1-T2V-1.3B/ model            everything that the folder has
  python -m convert dit.safetensors vae.pth t5.pth model
  python -m convert model wan --to official           and back
  python -m convert lora.safetensors adapters         a LoRA, to be used with sample --lora
  python -m convert Wan2.1-T2V-1.3B/ model --lora style.safetensors:0.8      merged into the transformer
  python -m convert DATASET model records      clips that Pusa's own program has encoded for training, as
                                               records; `model` (it may be left out) tells the empty prompt

OUT is there when it is whole, and not before.
"""


LAYOUTS = ("official", "diffusers", "comfy", "pusa", "peft")
FOR_BACK = ("source", "out", "to", "dry_run", "debug")
FOR_CLIPS = ("source", "out", "dry_run", "debug")


def parser() -> Parser:
    """The flags of the program."""
    flags = Parser(prog="python -m convert", description=__doc__, epilog=EPILOG)
    flags.add_argument(
        "source", nargs="+", metavar="SOURCE", help="what to read; of two experts high=FILE low=FILE"
    )
    flags.add_argument("out", metavar="OUT", type=Path, help="the folder to make, right after the sources")
    flags.add_argument(
        "--as", dest="said", metavar="FAMILY", help="what it is, such as wan_14b, whatever it looks like"
    )
    flags.add_argument("--config", type=Path, metavar="FILE", help="the config.json of the network")
    flags.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="round weights to this type"
    )
    loras = "merge this LoRA into the transformer, or into one expert: high=FILE, low=FILE; repeatable"
    flags.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help=loras)
    layouts = "the other way: official or diffusers; of a LoRA comfy, pusa or peft"
    flags.add_argument("--to", choices=LAYOUTS, metavar="LAYOUT", help=layouts)
    flags.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    verify = (
        "read OUT again and compare it with SOURCE; with --dry-run, read SOURCE and say what is known of it"
    )
    flags.add_argument("--verify", action="store_true", help=verify)
    return flags


def main(argv: list[str]) -> None:
    """Converts what `argv` says."""
    given = parser().parse_args(argv)
    try:
        _check(given, vars(parser().parse_args(["SOURCE", "OUT"])))
        from . import sources

        if given.to:
            _back(given)
        elif sources.has_clips(Path(given.source[0])):
            _clips(given)
        else:
            _convert(given)
    except OSError as failure:
        if failure.errno != errno.ENAMETOOLONG:
            raise
        raise Refusal(plain(failure.filename), "is too long a name", "give a shorter one") from failure


def _check(given, unset: dict) -> None:
    """Raises Refusal for what can be told to be wrong without reading a source."""
    if "" in given.source or not given.out.name:
        raise Refusal("SOURCE or OUT", "is empty", "give a name")
    if given.to:
        late = [name for name, value in vars(given).items() if value != unset[name] and name not in FOR_BACK]
        if late:
            raise Refusal(f"--{late[0].replace('said', 'as')}", "has no effect with --to", "leave it out")
        if len(given.source) > 1:
            raise Refusal("--to", f"takes one source, not {len(given.source)}", "give one of our folders")
    if given.config and not given.config.is_file():
        raise Refusal("--config", f"{given.config} is no file", "give the config.json of the network")
    parent = Path(os.path.realpath(given.out)).parent
    if not parent.is_dir():
        raise Refusal(given.out, f"has no folder to lie in: {parent} is none", "make it first")


def _back(given) -> None:
    from . import jobs

    job = jobs.give_back(Path(given.source[0]), given.to)
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise Refusal(given.out, "exists", "give a name that is free")
    print(*job.lines, sep="\n", end="\n" if job.lines else "")
    if given.dry_run:
        return
    _check_room(given.out, job.bytes)
    began = time.perf_counter()
    with folder_output(given.out) as draft, _bar("convert", job.bytes) as progress:
        job.fill(draft, progress)
    print(_told(given.out, job.bytes, time.perf_counter() - began))


def _clips(given) -> None:
    """Makes records of clips that are encoded already, or adds them to those that are there."""
    from . import caches

    unset = vars(parser().parse_args(["SOURCE", "OUT"]))
    if late := [name for name in unset if vars(given)[name] != unset[name] and name not in FOR_CLIPS]:
        raise Refusal(f"--{late[0].replace('said', 'as')}", "has no effect on encoded clips", "leave it out")
    folder, *models = map(Path, given.source)
    if len(models) > 1:
        raise Refusal(plain(models[1]), "is one source too many", "give DATASET [MODEL] OUT")
    found = caches.find(folder)
    size = sum(cache.latents.bytes + cache.states.bytes for cache in found)
    print(f"{folder}: {len(found):,} clips that Pusa's program has encoded, {size / 1e6:,.1f} MB")
    if given.dry_run:
        return
    _check_room(given.out, size)
    with alone(given.out), _bar("import", size) as progress:
        added = caches.write(given.out, found, models[0] if models else None, progress)
    print(f"{len(found) - added:,} of {len(found):,} already there; wrote {added:,} records to {given.out}")
    if not models:
        print("note: without the MODEL that has encoded them, captions cannot be left out in training")


def _convert(given) -> None:
    from . import sources

    found = [sources.find(*_local(name)) for name in given.source]
    # What is no whole file has been refused before jax is imported.
    from . import jobs
    from . import merges as loras

    merges = [loras.asked(text) for text in given.lora]
    parts = [part for source in found for part in source.parts] + [merge.part for merge in merges]
    job = jobs.plan(given, found, merges)
    merged = [[merge.goal, merge.strength] for merge in merges]
    experts = [part.expert for part in parts]
    options = {"as": given.said, "dtype": given.dtype, "merged": merged, "experts": experts}
    made = {"options": options, "version": fvdm_jax.__version__}
    files = [file for part in parts for file in part.files]
    files += [source.tokenizer for source in found if source.tokenizer]
    complete = _complete(given.out, job.config, options, files)
    if not complete:
        print(*job.lines, sep="\n")
        if not given.dry_run:
            _make(given.out, job, job.manifest | made, files)
    if given.verify and given.dry_run:
        with _bar("read", sum(file.stat().st_size for file in files)) as progress:
            digests = [_digest(file, threading.Event(), progress) for file in files]
        print(*_identify(files, digests), sep="\n")
    elif given.verify:
        with _bar("verify", job.bytes) as progress:
            job.check(given.out, progress)
        print(f"verified {given.out}: every array is what was read and asked for")


def _local(name: str) -> tuple[Path, str]:
    """The path of a source, and "high" or "low" where it is said to be one of two experts."""
    from . import sources

    expert, name = sources.expert_of(name)
    if not name.startswith("hf:"):
        return Path(name), expert
    from . import hub

    return hub.place(name.removeprefix("hf:")), expert


def _make(out: Path, job, manifest: dict, files: list[Path]) -> None:
    """Fills OUT, with a bar, and says what was done."""
    _check_room(out, job.bytes)
    began, stop = time.perf_counter(), threading.Event()
    with ThreadPoolExecutor(1) as pool, folder_output(out) as draft:
        try:
            digests = pool.submit(lambda: [_digest(file, stop) for file in files])
            with _bar("convert", job.bytes) as progress:
                job.fill(draft, progress)
            manifest["sources"] = digests.result()
            lines = _identify(files, manifest["sources"])
            (draft / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        finally:
            stop.set()
    print(*lines, sep="\n")
    print(_told(out, job.bytes, time.perf_counter() - began))


def _identify(files: list[Path], digests: list[dict]) -> list[str]:
    """What to say of each file that has been read; its digest learns which of the known ones it is.

    Raises Refusal for one that says to be known and is not.
    """
    from . import known

    lines = []
    for file, digest in zip(files, digests, strict=True):
        size, sha256 = digest["size"], digest["sha256"]
        found = known.identify(file, size, sha256)
        digest["known"] = str(found) if found else None
        lines.append(f"read {file}  {size:,} bytes  sha256 {sha256}  {known.told(file, size, found)}")
    return lines


def _told(out: Path, size: int, seconds: float) -> str:
    return f"wrote {out}: {size / 1e6:,.1f} MB in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s"


def _complete(out: Path, config: dict, options: dict, files: list[Path]) -> bool:
    """Whether OUT has been made of these files in this way. Raises Refusal where it is something else."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    try:
        manifest, said = (
            json.loads((out / name).read_text("utf-8")) for name in ("manifest.json", "config.json")
        )
        made = [{key: source[key] for key in ("name", "size", "sampled")} for source in manifest["sources"]]
        made = made, manifest["options"], said
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as broken:
        raise Refusal(out, "exists and is no checkpoint of ours", "give a name that is free") from broken
    if made != ([_sampled(file) for file in files], options, json.loads(json.dumps(config))):
        raise Refusal(out, "has been made of something else, or otherwise", "give a name that is free")
    print(f"{out} is complete, made of {', '.join(map(str, files))}; nothing to do")
    return True


def _sampled(file: Path) -> dict:
    """What tells a file from others without reading all of it: its name, size, and bytes from all over it."""
    return {"name": file.name, "size": file.stat().st_size, "sampled": fingerprint(file, dated=False)}


def _check_room(out: Path, needed: int) -> None:
    """Raises Refusal unless so many bytes are free where OUT is to be."""
    parent = Path(os.path.realpath(out)).parent
    free = shutil.disk_usage(parent).free
    if free < needed + (16 << 20):
        what = f"needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free in {plain(parent)}"
        raise Refusal(out, what, "free some space, or give a place on another disk")


def _digest(file: Path, stop: threading.Event, progress: Callable = lambda count: None) -> dict:
    """`_sampled` and the sha256 of a file; unfinished where `stop` is set."""
    found = hashlib.sha256()
    with open(file, "rb", buffering=0) as opened:
        buffer = bytearray(1 << 22)
        while (count := opened.readinto(buffer)) and not stop.is_set():
            found.update(memoryview(buffer)[:count])
            progress(count)
    return _sampled(file) | {"sha256": found.hexdigest()}


@contextmanager
def _bar(what: str, total: int) -> Iterator:
    """A bar in bytes on standard error; gives a function that is told of each piece's."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(24), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=total)
        yield lambda count: shown.update(task, advance=count)


def cli() -> None:
    """The program, as `python -m convert` and as `fvdm-convert`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
