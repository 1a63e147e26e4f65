"""Repositories of the Hugging Face hub, by the library of its makers, which is an extra."""

from pathlib import Path

from fvdm_jax.program import Refusal

WANTED = ("*.safetensors", "*.pth", "*.json", "google/umt5-xxl/*", "tokenizer/*")


def folder(repository: str) -> Path:
    """The folder of a repository: what is there already, else downloaded; a broken-off download goes on.

    OWNER/NAME or OWNER/NAME@REVISION. Raises Refusal where it cannot be had, naming what to do.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as absent:
        raise Refusal(f"hf:{repository}", "needs huggingface_hub", "pip install 'fvdm_jax[hub]'") from absent
    name, _, revision = repository.partition("@")
    wanted = {"repo_id": name, "revision": revision or None, "allow_patterns": list(WANTED)}
    try:
        try:
            here = Path(snapshot_download(**wanted, local_files_only=True))
            broken_off = list((here.parent.parent / "blobs").glob("*.incomplete"))
            return Path(snapshot_download(**wanted)) if broken_off else here
        except LocalEntryNotFoundError:
            return Path(snapshot_download(**wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as failure:
        what = f"cannot be had: {type(failure).__name__}"
        raise Refusal(
            f"hf:{repository}", what, "check the name and the network, or download it by hand"
        ) from failure
