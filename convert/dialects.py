"""How other programs spell the keys of adapters: every dialect is a row of a table."""

from collections.abc import Iterable
from typing import NamedTuple, NoReturn

from fvdm_jax.program import Refusal

from .tensors import Tensor

DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation"}
"""Endings of full differences, and of the parameter that each is added to."""

FOREIGN = {
    ".hada_": "LoHa of LyCORIS", ".lokr_": "LoKr of LyCORIS", ".oft_": "OFT", ".lora_mid": "a Tucker LoRA",
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
}  # fmt: skip
"""Parts of keys that tell of adapters that are no sum of low ranks and differences."""


class Dialect(NamedTuple):
    """A key is prefix + module + ending. `pair` are the endings of A [r in] and B [out r].

    Modules are named as `spelling` says: "official", "diffusers", "either", or "flat" for official with `_`
    for every dot. `alpha` is "key" where it lies beside the pair, or "config", "none".
    """

    prefix: str
    pair: tuple[str, str]
    spelling: str = "official"
    alpha: str = "key"
    differences: bool = False

    @property
    def endings(self) -> tuple[str, ...]:
        more = tuple(DIFFERENCES) if self.differences else ()
        return self.pair + ((".alpha",) if self.alpha == "key" else ()) + more


_AB = (".lora_A.weight", ".lora_B.weight")
_NAMED_AB = (".lora_A.default.weight", ".lora_B.default.weight")
_DOWN_UP = (".lora_down.weight", ".lora_up.weight")
DIALECTS = {
    "comfy": Dialect("diffusion_model.", _AB, differences=True),
    "lightx2v": Dialect("diffusion_model.", _DOWN_UP, differences=True),
    "lightx2v_bare": Dialect("", _DOWN_UP, differences=True),
    "kohya": Dialect("lora_unet_", _DOWN_UP, "flat"),
    "wan_fun": Dialect("lora_unet__", _DOWN_UP, "flat"),
    "pusa": Dialect("", _NAMED_AB, alpha="none"),
    "diffsynth": Dialect("", _AB, alpha="none"),
    "peft": Dialect("base_model.model.", _AB, "either", "config"),
    "diffusers": Dialect("transformer.", _AB, "diffusers", "config"),
    "diffusers_2": Dialect("transformer_2.", _AB, "diffusers", "config"),
}
"""Kohya's has been seen with dots left in its modules, which reads the same; comfy's is Kijai's too."""

EXPERTS = ("transformer", "transformer_2")


def recognised(keys: Iterable[str]) -> bool:
    """Whether these are the keys of adapters of any kind, those that `planned` refuses included."""
    endings = tuple({ending for each in DIALECTS.values() for ending in each.endings} - {".alpha"})
    return any(key.endswith(endings) or any(part in key for part in FOREIGN) for key in keys)


def dialect(tensors: dict[str, Tensor]) -> str:
    """The name of the one dialect of all keys. Raises Refusal, naming a key, where there is none."""
    common, first = set(DIALECTS), next(iter(tensors), "")
    for key, tensor in tensors.items():
        if kind := next((kind for part, kind in FOREIGN.items() if part in key), None):
            what = f"{key} is of {kind}, which cannot be read"
            raise Refusal(tensor.file, what, "merge it into a checkpoint with the program that made it")
        if not (spoken := _dialects(key)):
            refuse(tensors, key, "is no key of an adapter", "")
        if not (common := common & spoken):
            refuse(tensors, key, f"is of another dialect than {first}", "give one file for each dialect")
    return next(name for name in DIALECTS if name in common)


def chosen(tensors: dict[str, Tensor], expert: str | None) -> dict[str, Tensor]:
    """The tensors of one expert, "transformer" or "transformer_2", where diffusers' file has both, else all.

    Raises Refusal where it has both and none of them is chosen.
    """
    each = {name: {k: t for k, t in tensors.items() if k.startswith(f"{name}.")} for name in EXPERTS}
    if not all(each.values()):
        return tensors
    if expert not in EXPERTS:
        what = "adapts both experts, transformer and transformer_2"
        raise Refusal(
            next(iter(tensors.values())).file,
            what,
            "choose one: high=FILE is transformer, low=FILE transformer_2",
        )
    other = EXPERTS[1 - EXPERTS.index(expert)]
    return {key: tensor for key, tensor in tensors.items() if key not in each[other]}


def _dialects(key: str) -> set[str]:
    prefix = max((each.prefix for each in DIALECTS.values() if key.startswith(each.prefix)), key=len)
    return {name for name, d in DIALECTS.items() if d.prefix == prefix and key.endswith(d.endings)}


def refuse(tensors: dict[str, Tensor], key: str, what: str, right: str) -> NoReturn:
    """Raises the Refusal of a key of these tensors."""
    raise Refusal(tensors[key].file, f"{key} {what}", right)
