"""Other people's weights into our checkpoint, and back."""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import fvdm_jax
from fvdm_jax.program import Parser, Refusal, folder_output, leave, plain, run

EPILOG = """\
A SOURCE is a .safetensors, .pth or .pt file, an index of shards, the folder of a model as Wan, diffusers or
ComfyUI have it, or hf:OWNER/REPO. What is in it is told from its contents; several make one model:

  python -m convert Wan2.1-T2V-1.3B/ model            everything that the folder has
  python -m convert dit.safetensors vae.pth t5.pth model
  python -m convert model wan --to official           and back
  python -m convert lora.safetensors adapters         a LoRA, to be used with sample --lora
  python -m convert Wan2.1-T2V-1.3B/ model --lora style.safetensors:0.8      merged into the transformer

OUT is there when it is whole, and not before.
"""


def parser() -> Parser:
    """The flags of the program."""
    flags = Parser(prog="python -m convert", description=__doc__, epilog=EPILOG)
    flags.add_argument("source", nargs="+", metavar="SOURCE", help="what to read")
    flags.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    flags.add_argument(
        "--as", dest="said", metavar="FAMILY", help="what the network is, whatever it looks like"
    )
    flags.add_argument("--config", type=Path, metavar="FILE", help="the config.json of the network")
    flags.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="round weights to this type"
    )
    flags.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="merge this LoRA"
    )
    layouts = "the other way: official or diffusers; of a LoRA comfy, pusa or peft"
    flags.add_argument("--to", metavar="LAYOUT", help=layouts)
    flags.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    flags.add_argument("--verify", action="store_true", help="read OUT again and compare it with SOURCE")
    return flags


def main(argv: list[str]) -> None:
    """Converts what `argv` says."""
    given = parser().parse_args(argv)
    from . import sources

    found = [] if given.to else [sources.find(_local(name)) for name in given.source]
    # What is no whole file has been refused before jax is imported.
    from . import jobs

    if given.to:
        jobs.give_back(given)
        return
    files = [file for source in found for part in source.parts for file in part.files]
    if given.dry_run or not _complete(given, files):
        job = jobs.plan(given, found)
        for line in job.lines:
            print(line)
        if given.dry_run:
            return
        _make(given, job, files)
    elif given.verify:
        job = jobs.plan(given, found)
    if given.verify:
        with _bar("verify", job.bytes) as progress:
            job.check(given.out, progress)
        print(f"verified {given.out}: every array is what {', '.join(given.source)} has")


def _local(name: str) -> Path:
    from . import hub

    return hub.folder(name.removeprefix("hf:")) if name.startswith("hf:") else Path(name)


def _make(given, job, files: list[Path]) -> None:
    """Fills OUT, with a bar, and says what was done."""
    _check_room(given.out, job.bytes)
    began, stop = time.perf_counter(), threading.Event()
    with ThreadPoolExecutor(1) as pool, folder_output(given.out) as draft:
        try:
            digests = pool.submit(lambda: [_digest(file, stop) for file in files])
            with _bar("convert", job.bytes) as progress:
                job.fill(draft, progress)
            manifest = job.manifest | {"options": _options(given), "sources": digests.result()}
            manifest["version"] = fvdm_jax.__version__
            (draft / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        finally:
            stop.set()
    seconds = time.perf_counter() - began
    for digest in manifest["sources"]:
        print(f"read {digest['name']}  {digest['size']:,} bytes  sha256 {digest['sha256']}")
    size = job.bytes / 1e9
    print(f"wrote {given.out}: {size:.2f} GB in {seconds:.1f} s, {size / seconds:.2f} GB/s")


def _options(given) -> dict:
    return {"as": given.said, "dtype": given.dtype, "lora": [Path(name).name for name in given.lora]}


def _complete(given, files: list[Path]) -> bool:
    """Whether OUT has been made of these files. Raises Refusal where it is something else."""
    if not given.out.exists() or given.out.is_dir() and not any(given.out.iterdir()):
        return False
    try:
        manifest = json.loads((given.out / "manifest.json").read_text("utf-8"))
        made = [(source["name"], source["size"]) for source in manifest["sources"]], manifest["options"]
    except (OSError, ValueError, KeyError, TypeError) as broken:
        raise Refusal(
            given.out, "exists and is no checkpoint of ours", "give a name that is free"
        ) from broken
    if made != ([(file.name, file.stat().st_size) for file in files], _options(given)):
        raise Refusal(given.out, "has been made of something else", "give a name that is free")
    print(f"{given.out} is complete, made of {', '.join(name for name, _ in made[0])}; nothing to do")
    return True


def _check_room(out: Path, needed: int) -> None:
    """Raises Refusal unless there is a folder for OUT with so many bytes free."""
    parent = Path(os.path.realpath(out)).parent
    if not parent.is_dir():
        raise Refusal(out, f"has no folder to lie in: {parent} is none", "make it first")
    free = shutil.disk_usage(parent).free
    if free < needed + (16 << 20):
        what = f"needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {plain(parent)}"
        raise Refusal(out, what, "free some space, or give a place on another disk")


def _digest(file: Path, stop: threading.Event) -> dict:
    """Name, size and sha256 of a file; unfinished where `stop` is set."""
    found, size = hashlib.sha256(), 0
    with open(file, "rb", buffering=0) as opened:
        buffer = bytearray(1 << 22)
        while (count := opened.readinto(buffer)) and not stop.is_set():
            found.update(memoryview(buffer)[:count])
            size += count
    return {"name": file.name, "size": size, "sha256": found.hexdigest()}


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
