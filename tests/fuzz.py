"""Mutated files and flags against their readers: `python tests/fuzz.py TARGET --seconds N`.

Every target takes bytes, and only this may happen: they are refused in one line (a Refusal), or what is read
of them is sound by the target's own measure, which each `check` in fuzz_targets.py states. Anything else,
another exception, a process that dies, or more than ten seconds of the processor, is a crash: the bytes stay
in --crashes, and the exit code is 1, or the signal's. With --guided mutants are chosen by the code that they
reach (pip install atheris).
"""

import argparse
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # The checkout that this file is of, whatever is installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz_targets import TARGETS, Target, put

from fvdm_jax.program import Refusal

SLOWEST = 10.0
MOST_MEMORY = 6 << 30


def mutant(seed: bytes, chance: random.Random, words: Sequence[bytes] = ()) -> bytes:
    """The seed with one to four flips, insertions, deletions, doublings, moves, cuts or words."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        at, kind, length = chance.randrange(len(data) + 1), chance.randrange(9), chance.randint(1, 8)
        if kind < 3 and at < len(data):
            data[at] ^= 1 << chance.randrange(8) if kind else chance.randrange(256)
        elif kind == 3:
            data[at:at] = chance.randbytes(length)
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = data[at : at + length]
        elif kind == 6 and not chance.randrange(4):
            del data[at:]
        elif kind == 7 and words:
            word = chance.choice(words)
            data[at : at + chance.choice((0, len(word)))] = word
        elif kind == 8:
            part = data[at : at + chance.randint(1, 64)]
            del data[at : at + len(part)]
            to = chance.randrange(len(data) + 1)
            data[to:to] = part
    return bytes(data)


def refused(target: Target, path: Path, case: bytes) -> bool:
    """Whether the case is refused. Raises what is neither that nor sound."""
    began = time.process_time()
    try:
        target.check(path, case)
        return False
    except Refusal as refusal:
        line = str(refusal)
        assert line.startswith("error: ") and line.isprintable() and len(line) <= 1500, line
        return True
    finally:
        taken = time.process_time() - began
        assert taken < SLOWEST, f"took {taken:.0f} s"


def by_chance(target: Target, folder: Path, until: float, chance: random.Random) -> tuple[int, int]:
    """How many mutants were tried, and how many were refused; the last one is in `folder`."""
    seeds, tried, times = target.seeds(folder), 0, 0
    for seed in seeds:
        assert not refused(target, folder / "case", seed), "a seed is refused"
    while time.monotonic() < until:
        case = mutant(chance.choice(seeds), chance, target.words)
        put(folder / "last", case)
        times += refused(target, folder / "case", case)
        tried += 1
    return tried, times


def guided(target: Target, folder: Path, seconds: int) -> None:
    """Mutants by the code that they reach; libFuzzer prints what it does, and ends the process."""
    import atheris

    with atheris.instrument_imports(include=["convert", "fvdm_jax"]):
        seeds = target.seeds(folder)
        for seed in seeds:
            refused(target, folder / "case", seed)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / f"{number}").write_bytes(seed)

    def one(case: bytes) -> None:
        put(folder / "last", case)
        refused(target, folder / "case", case)

    limits = [f"-max_total_time={seconds}", f"-timeout={SLOWEST:.0f}", "-rss_limit_mb=6000", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    """The program."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("target", choices=TARGETS)
    flags.add_argument("--seconds", type=float, default=60)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--crashes", type=Path, default=Path("crashes"))
    flags.add_argument("--guided", action="store_true", help="by coverage, with atheris")
    given = flags.parse_args()
    target, crashes = TARGETS[given.target], given.crashes.absolute()
    crashes.mkdir(parents=True, exist_ok=True)
    if not given.guided:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    folder = Path(tempfile.mkdtemp(dir=crashes, prefix=f"{given.target}-"))
    try:
        if given.guided:
            guided(target, folder, int(given.seconds))
        began = time.monotonic()
        tried, times = by_chance(target, folder, began + given.seconds, random.Random(given.seed))
    except Exception:
        traceback.print_exc()
        print(f"{given.target}: a crash; what led to it is {folder}/last", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(f"{given.target}: {tried} mutants in {time.monotonic() - began:.0f} s, {times} refused, 0 uncaught")
    return 0


if __name__ == "__main__":
    sys.exit(main())
