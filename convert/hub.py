"""Repositories of the Hugging Face hub, by the library of its makers, which is an extra."""

from pathlib import Path

from fvdm_jax import machine
from fvdm_jax.program import Refusal

WANTED = ("*.safetensors", "*.pth", "*.pt", "*.json", "google/umt5-xxl/*", "tokenizer/*")


def place(repository: str) -> Path:
    """The folder of a repository, or a file of it: what is there already, else downloaded; a broken-off
    download goes on.

    OWNER/NAME, OWNER/NAME@REVISION (a name without a slash), or either with /PATH, for one file. Raises
    Refusal where it cannot be had, naming what to do.
    """
    try:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as absent:
        raise Refusal(f"hf:{repository}", "needs huggingface_hub", "pip install 'fvdm_jax[hub]'") from absent
    parts = repository.split("/", 2)
    path = parts.pop() if len(parts) > 2 else ""
    name, _, revision = "/".join(parts).partition("@")
    wanted = {"repo_id": name, "revision": revision or None}
    wanted["allow_patterns"] = [path] if path else list(WANTED)
    if path:
        # Apart, since the library cannot tell a repository of which one file is there from a whole one.
        wanted["cache_dir"] = machine.cache("hub")
    try:
        found = _downloaded(wanted, path)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as failure:
        what = f"cannot be had: {type(failure).__name__}"
        raise Refusal(
            f"hf:{repository}", what, "check the name and the network, or download it by hand"
        ) from failure
    if not found.exists():
        raise Refusal(f"hf:{repository}", f"has no file {path}", "give one of those that it lists")
    return found


def _downloaded(wanted: dict, path: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        here = Path(snapshot_download(**wanted, local_files_only=True)) / path
        broken_off = here.parent.parent.glob("blobs/*.incomplete")
        if here.exists() if path else not any(broken_off):
            return here
    except LocalEntryNotFoundError:
        pass
    return Path(snapshot_download(**wanted)) / path
