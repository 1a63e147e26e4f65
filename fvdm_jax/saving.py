"""Checkpoints of a run: written beside the training, committed whole, checked before training goes on."""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from fvdm_jax import config, integrity, machine
from fvdm_jax.config import Training
from fvdm_jax.program import Refusal, flush, outputs, plain
from fvdm_jax.together import meet, most
from fvdm_jax.training import TrainState

CHECKPOINTS = "checkpoints"
PATIENCE = 3
"""Checkpoints in a row that may fail to be written before the run ends."""


class Position(NamedTuple):
    """Where in its data a run is: the next batch, and how many clips it has taken."""

    batch: int
    clips: int


class Damaged(Exception):
    """A checkpoint is not what was saved."""


class Checkpoints:
    """The checkpoints of a run, by Orbax, each with the digest of every array.

    Each holds the whole TrainState, the Position, the settings and the revision of the code. The newest
    `keep_last` stay, and those of steps that `keep_every` divides. `tell` is given a line of what goes wrong
    and does not stop the run: a checkpoint that cannot be written, or that is damaged.
    """

    def __init__(
        self, folder: Path, settings: Training, read_only: bool = False, tell: Callable[[str], None] = print
    ):
        self._folder = (folder / CHECKPOINTS).absolute()
        self._settings, self._read_only, self.tell = settings, read_only, tell
        self._told = {"settings": config.snapshot(settings), "versions": machine.versions()}
        self._told |= {"format": 2, **machine.revision()}
        self._writing: int | None = None
        self._failed = 0
        self._manager = self._managed()

    def _managed(self):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as rules

        keep = [rules.LatestN(self._settings.keep_last)]
        if self._settings.keep_every:
            keep.append(rules.EveryNSteps(self._settings.keep_every))
        # What is being written beside one who only reads is not to be cleaned up.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if self._read_only else rules.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _flush(self) -> None:
        """What was committed is on the disk, and a failure of power cannot take it and those before it."""
        folder = self._folder / str(self._writing)
        if jax.process_index() == 0 and folder.is_dir():
            for path in (*folder.rglob("*"), folder, self._folder):
                flush(path)
            with outputs(folder / integrity.FILES) as (draft,):
                draft.write_text(json.dumps(integrity.files(folder)), "utf-8")

    def save(self, state: TrainState, position: Position) -> None:
        """Begins to write the state under its step, if that is not there; training may go on at once.

        Raises Refusal where an array is not finite, where devices differ in what they should have alike, and
        where PATIENCE checkpoints in a row could not be written.
        """
        import orbax.checkpoint as ocp

        self.settle()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        tree = raw(state)
        digests = _sound(tree, step)
        stored = self._told | {"position": position._asdict()}
        stored |= {"digests": {path: digest[:3] for path, digest in digests.items()}}
        stored["seal"] = _seal(stored)
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), run=ocp.args.JsonSave(stored))
        self._writing = step

        def begin() -> None:
            self._check_room(tree)
            self._manager.save(step, args=args, force=True)

        # Orbax copies arrays before it returns, but those on the host, which the next step writes over.
        if self._tried(begin) and any(map(_on_host, jax.tree.leaves(tree))):
            self.settle()

    def _check_room(self, tree: dict) -> None:
        needed = size(tree)
        try:
            room = shutil.disk_usage(self._folder).free
        except OSError:
            # A place that cannot be asked has none, and the others are told.
            room = 0
        if most(int(needed > room)):
            raise OSError(f"it takes {needed / 2**20:,.1f} MiB, and {room / 2**20:,.1f} MiB are free")

    def _tried(self, work: Callable[[], None]) -> bool:
        """Whether all processes did `work`; what cannot be written is told of, cleaned up and counted."""
        failure = None
        try:
            work()
        except (OSError, ValueError, RuntimeError, Refusal) as wrong:
            failure = wrong
        if most(int(failure is not None)) == 0:
            return True
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._manager.close()
        if jax.process_index() == 0:
            for left in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        meet("cleaned up")
        self._manager = self._managed()
        self._failed += 1
        last = self._manager.latest_step()
        good = "no checkpoint is there" if last is None else f"the last good one is of step {last}"
        why = _first_line(failure) if failure else "another process could not"
        lacks = "has no hashes" if last == self._writing else "cannot be written"
        what = f"the checkpoint of step {self._writing} {lacks}: {why}"
        self._writing = None
        if self._failed >= PATIENCE:
            raise Refusal(self._folder, what, f"free some space; {good}") from failure
        self.tell(f"warning: {what}; {good}")
        return False

    def settle(self) -> None:
        """Returns when what was begun is committed, or has failed, which is told of."""
        if self._tried(self._committed) and self._writing is not None:
            self._failed, self._writing = 0, None

    def _committed(self) -> None:
        self._manager.wait_until_finished()
        if self._writing is not None:
            self._flush()

    def finish(self, state: TrainState, position: Position) -> None:
        """Returns when this state is committed. Raises Refusal where it cannot be, after a second try."""
        self.settle()
        self._failed = PATIENCE - 2
        while int(state.step) not in self._manager.all_steps():
            self.save(state, position)
            self.settle()
        self._failed = 0

    def newest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all checkpoints."""
        return sorted(self._manager.all_steps())

    def restore(
        self, wanted: TrainState, fallback: bool = True, only: int | None = None
    ) -> tuple[TrainState, Position]:
        """The newest sound state, in the places of the shapes `wanted`, on whatever mesh it was saved.

        Damaged checkpoints that are newer are told of and set aside, as STEP.corrupt. Raises Refusal where
        none is sound, where a damaged one is newest and there is to be no `fallback`, and where what was
        saved has other arrays. With `only` it is the state of that step, or a Refusal.
        """
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(state=ocp.args.StandardRestore(raw(wanted)))

        def read(step: int) -> dict:
            return self._manager.restore(step, args=args)["state"]

        fallback = fallback and only is None
        state, stored = self._first_sound(
            read, raw(wanted), fallback, self.steps() if only is None else [only]
        )
        key = jax.random.wrap_key_data(state["key"])
        return TrainState(**(state | {"key": key})), Position(**stored["position"])

    def part(self, name: str, wanted: dict) -> tuple[dict, int]:
        """One part of the newest sound state alone, "params" or "average", and its step."""
        import orbax.checkpoint as ocp

        restoring = ocp.checkpoint_utils.construct_restore_args({name: wanted})
        args = ocp.args.PyTreeRestore(item={name: wanted}, restore_args=restoring, partial_restore=True)

        def read(step: int) -> dict:
            return ocp.PyTreeCheckpointer().restore(self._folder / str(step) / "state", args=args)

        found, stored = self._first_sound(read, {name: wanted}, True, self.steps())
        return found[name], stored["position"]["batch"]

    def _first_sound(
        self, read: Callable[[int], dict], wanted: dict, fallback: bool, steps: list[int]
    ) -> tuple[dict, dict]:
        damaged = {}
        for step in reversed(steps):
            try:
                found = self._checked(step, read, wanted)
            except Damaged as wrong:
                damaged[step] = f"the checkpoint of step {step} is damaged: {plain(wrong, 300)}"
                if not fallback:
                    right = "leave --no-fallback out, if it is given, or take another step"
                    raise Refusal(self._folder, damaged[step], right) from wrong
                continue
            for bad, why in damaged.items():
                done = "passed over" if self._read_only else "set aside"
                self.tell(f"warning: {why}; it is {done}, and that of step {step} taken")
                self._set_aside(bad)
            return found
        what = f"none of its {len(damaged)} checkpoints is sound; {next(iter(damaged.values()), '')}"
        raise Refusal(self._folder, what, "begin again with another --out")

    def _checked(self, step: int, read: Callable[[int], dict], wanted: dict) -> tuple[dict, dict]:
        """What is read of a step, and what is stored with it. Raises Damaged, alike on all processes."""
        import orbax.checkpoint as ocp

        if changed := _attempted(lambda: integrity.changed(self._folder / str(step))):
            raise Damaged(f"{changed[0]} is not as it was written")
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        stored = _attempted(lambda: self._manager.restore(step, args=args)["run"])
        digests = stored.get("digests")
        if stored.get("format", 1) > 1:
            if stored.pop("seal", "") != _seal(stored):
                raise Damaged("what is stored with it has changed")
            self._check_kind(digests, wanted)
        else:
            self.tell(f"note: the checkpoint of step {step} is of an older version, which kept no checksums")
        found = _attempted(lambda: read(step))
        if digests is not None:
            for path, digest in integrity.digests(found).items():
                if digest.sums != digests[path][2]:
                    raise Damaged(f"{path} is not what was saved")
        return found, stored

    def _check_kind(self, digests: dict, wanted: dict) -> None:
        parts = tuple(wanted)
        saved = {
            path: (tuple(shape), dtype)
            for path, (shape, dtype, _) in digests.items()
            if path.split("/")[0] in parts
        }
        ours = {
            integrity.path_name(path): (leaf.shape, str(leaf.dtype))
            for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)
        }
        for path in sorted(saved.keys() | ours.keys()):
            if saved.get(path) != ours.get(path):
                what = (
                    f"{path} was saved as {saved.get(path, 'no part')}, and is now {ours.get(path, 'none')}"
                )
                raise Refusal(self._folder, what, "give the optimizer and sizes that the run began with")

    def _set_aside(self, step: int) -> None:
        if self._read_only:
            return
        if jax.process_index() == 0:
            numbered = (self._folder / f"{step}.corrupt-{count}" for count in itertools.count(2))
            names = itertools.chain([self._folder / f"{step}.corrupt"], numbered)
            name = next(name for name in names if not name.exists())
            (self._folder / str(step)).rename(name)
        meet("set aside")
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()


def size(tree) -> int:
    """Bytes of all arrays of a tree, wherever they lie."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _on_host(leaf) -> bool:
    """Whether an array lies in the host's memory while devices compute with it: of --offload."""
    return getattr(leaf.sharding, "memory_kind", None) == "pinned_host"


def _attempted(work: Callable[[], dict]) -> dict:
    """What `work` returns. Raises Damaged, on all processes if on one: of damaged files anything may come.

    Raises Refusal where what was to be read may be sound, and cannot be read now.
    """
    found, wrong, bad = None, None, 0
    try:
        found = work()
    except Exception as failure:
        wrong, bad = failure, 2 if _passing(failure) else 1
    bad = most(bad)
    why = _first_line(wrong) if wrong else "another process cannot read it"
    if bad == 2:
        raise Refusal("checkpoint", f"cannot be read now: {why}", "try again; nothing was changed") from wrong
    if bad:
        raise Damaged(why) from wrong
    return found


def _passing(failure: Exception) -> bool:
    """Whether it tells of the machine, and not of what was to be read."""
    if isinstance(failure, OSError):
        return not isinstance(failure, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    return isinstance(failure, MemoryError) or "RESOURCE_EXHAUSTED" in str(failure)


def _first_line(failure: BaseException) -> str:
    return plain((str(failure).strip() or type(failure).__name__).splitlines()[0], 300)


def _seal(stored: dict) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def _sound(tree: dict, step: int) -> dict[str, integrity.Digest]:
    """The digests of a state. Raises Refusal where it must not be kept."""
    digests = integrity.digests(tree)
    for path, digest in digests.items():
        if digest.strays:
            what = (
                f"{', '.join(map(str, digest.strays))} has not what the others have of {path}, at step {step}"
            )
            raise Refusal("device", what, "replace it, and go on from the last checkpoint")
        if not digest.finite:
            what = f"{path} is not finite, and is not saved"
            raise Refusal(f"step {step}", what, "lower --rate; the last checkpoint is sound")
    return digests


def raw(state: TrainState) -> dict:
    """The state as a plain tree: its key as the numbers that it is made of."""
    if isinstance(state.key, jax.ShapeDtypeStruct):
        shape = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), state.key.dtype))
        data = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=state.step.sharding)
    else:
        data = jax.random.key_data(state.key)
    return state._asdict() | {"key": data}
