"""What `fuzz.py` mutates: sound inputs of every reader, and what may be read of a mutant."""

import os
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


class Target(NamedTuple):
    """`seeds(folder)` are sound inputs; `check(path, case)` raises where a case is neither refused nor sound.

    `path` is a free name in a folder of the target's own, which `seeds` has filled; `words` go into mutants.
    """

    seeds: Callable[[Path], list[bytes]]
    check: Callable[[Path, bytes], None]
    words: tuple[bytes, ...] = ()


def put(path: Path, content: bytes) -> None:
    """Writes the file; over the old one, since cutting that to nothing first takes longer than all else."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.write(content)
        file.truncate()


@cache
def saved_by_torch() -> tuple[dict, ...]:
    """Every file of golden/torch as it should be read."""
    from test_torch_file import CONTROLS, expected_bits

    expected = expected_bits()
    return tuple(expected[control] for control in CONTROLS)


def check_torch(path: Path, case: bytes) -> None:
    """What is read of a damaged file equals one of the originals, or has other keys than any."""
    from test_torch_file import bits

    put(path, case)
    found = bits(path)
    for expected in saved_by_torch():
        assert found == expected or set(found) != set(expected) or found in saved_by_torch()


def torch_files(folder: Path) -> list[bytes]:
    """What torch saved."""
    return [path.read_bytes() for path in sorted((GOLDEN / "torch").glob("*.pth"))]


def programs(folder: Path) -> list[bytes]:
    """The same, of each its program alone, after the number of the file."""
    found = []
    for number, path in enumerate(sorted((GOLDEN / "torch").glob("*.pth"))):
        with zipfile.ZipFile(path) as file:
            found.append(bytes([number]) + file.read(file.namelist()[0]))
    return found


def check_program(path: Path, case: bytes) -> None:
    """A changed program in a sound file: it may say something else, which is then read in full."""
    import torch_cases
    from test_torch_file import bits

    every = sorted((GOLDEN / "torch").glob("*.pth"))
    with zipfile.ZipFile(every[case[0] % len(every) if case else 0]) as file:
        first, *others = file.namelist()
        members = (first, case[1:]), *((name, file.read(name)) for name in others)
    put(path, torch_cases.zipped(*members))
    bits(path)


def safetensors_files(folder: Path) -> list[bytes]:
    """Small files with every kind of element, without any tensor, and with metadata."""
    import ml_dtypes
    from safetensors.numpy import save

    kinds = (
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        np.int64,
        np.int32,
        np.int8,
        np.uint8,
        bool,
    )
    arrays = {f"blocks.{i}.w": np.arange(6).reshape(2, 3).astype(kind) for i, kind in enumerate(kinds)}
    odd = {
        "one": np.ones(1, np.float32),
        "empty": np.zeros((0, 4), np.float16),
        "é": np.ones((1, 1, 1), np.float32),
    }
    return [save(arrays), save({"w": arrays["blocks.1.w"]}, {"format": "pt", "a": "b"}), save(odd), save({})]


def check_safetensors(path: Path, case: bytes) -> None:
    """What is read of a file is what the reference library reads of it, which is less strict."""
    from safetensors import deserialize

    from convert import safetensors_file

    put(path, case)
    tensors, _ = safetensors_file.read(path)
    found = {key: (tensor.shape, tensor.read().tobytes()) for key, tensor in tensors.items()}
    reference = {key: (tuple(told["shape"]), bytes(told["data"])) for key, told in deserialize(case)}
    assert found == reference, "the reference library reads it otherwise"


def adapters(folder: Path) -> list[bytes]:
    """The keys of every dialect, a line each: key, element type, shape."""
    from safetensors.numpy import load_file

    files: dict[str, list[str]] = {}
    for name, array in sorted(load_file(GOLDEN / "lora_dialects.safetensors").items()):
        dialect, _, key = name.partition("/")
        line = f"{key}\t{array.dtype.name}\t{','.join(map(str, array.shape))}"
        files.setdefault(dialect, []).append(line)
    return ["\n".join(lines).encode() for name, lines in files.items() if not name.startswith("merged")]


def _tensors(path: Path, case: bytes) -> dict:
    """The tensors that lines of key, type and shape tell of, all of ones."""
    from convert.tensors import Tensor

    tensors = {}
    for line in case.decode("utf-8", "replace").split("\n"):
        key, _, rest = line.partition("\t")
        dtype, _, shape = rest.partition("\t")
        # What no safetensors file can say is not asked about.
        if not key.isprintable() or key in tensors or dtype not in ("float32", "float16", "int32", "int64"):
            continue
        sizes = tuple(min(int(n), 512) for n in shape.split(",") if n.isascii() and n.isdigit())[:8]
        if np.prod(sizes, dtype=np.int64) < 1 << 20:
            tensors[key] = Tensor(path, np.dtype(dtype), sizes, lambda d=dtype, s=sizes: np.ones(s, d))
    return tensors


def check_lora(path: Path, case: bytes) -> None:
    """Of a LoRA that is taken every pair and every difference is there, and can be read."""
    from convert import dialects, lora, wan

    tensors = _tensors(path, case)
    plans = lora.planned(tensors, wan.dit(), 2, {"lora_alpha": 4, "r": 4})
    pieces = {one.path: [one.piece(i) for i in range(one.layers or 1)] for one in plans}
    if not tensors:
        assert not plans
        return
    spoken = dialects.DIALECTS[dialects.dialect(tensors)]
    pairs = sum(key.endswith(spoken.pair[0]) for key in tensors)
    differences = sum(key.endswith(tuple(dialects.DIFFERENCES)) for key in tensors) * spoken.differences
    ranks = [rank for name, each in pieces.items() if name.endswith("/rank") for rank in each]
    deltas = [delta for name, each in pieces.items() if name.startswith("delta/") for delta in each]
    assert sum(int(rank) > 0 for rank in ranks) == pairs
    assert sum(bool(delta.any()) for delta in deltas) == differences


def pictures(folder: Path) -> list[bytes]:
    """Small pictures in every format that is read, and in every kind of pixel."""
    from PIL import Image, ImageCms

    drawn = np.random.default_rng(0).integers(0, 255, (24, 32, 4), dtype=np.uint8)
    image, found = Image.fromarray(drawn), []
    rgb, grey = image.convert("RGB"), image.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    deep = Image.fromarray(drawn[..., 0].astype(np.uint16) * 257)
    saved = [
        (image, "PNG", {}), (image.convert("P"), "PNG", {}), (image.convert("LA"), "PNG", {}),
        (deep, "PNG", {}), (image.convert("1"), "PNG", {}),
        (rgb, "PNG", {"icc_profile": profile, "exif": exif}),
        (rgb, "JPEG", {"exif": exif}), (image.convert("CMYK"), "JPEG", {}),
        (grey, "JPEG", {"progressive": True}),
        (image, "WEBP", {"lossless": True}), (rgb, "BMP", {}), (image.convert("P"), "BMP", {}),
        (deep, "TIFF", {}), (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (grey, "GIF", {"save_all": True, "append_images": [image.convert("P")], "duration": 50}),
    ]  # fmt: skip
    for number, (one, form, options) in enumerate(saved):
        one.save(folder / f"seed{number}", form, **options)
        found.append((folder / f"seed{number}").read_bytes())
    return found


def check_picture(path: Path, case: bytes) -> None:
    """A picture that is taken is a picture of the size that was asked for."""
    from fvdm_jax import video

    put(path, case)
    held = video.probe(path)
    made = video.read(path, 1, (32, 32))
    assert made.shape == (1, 32, 32, 3) and made.dtype == np.uint8 and held.frames >= 1
    assert min(held.width, held.height) >= 1


def clips(folder: Path) -> list[bytes]:
    """Small clips in every container."""
    import av

    drawn = (
        np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8).repeat(2, 1).repeat(2, 2)
    )
    found = []
    forms = (
        ("mp4", "libx264"),
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mov", "mjpeg"),
    )
    for form, codec in forms:
        path = folder / f"seed.{form}"
        with av.open(str(path), "w", format=form) as container:
            stream = container.add_stream(codec, 8)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for picture in drawn:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        found.append(path.read_bytes())
    return found


def check_clip(path: Path, case: bytes) -> None:
    """A clip that is taken says how many frames it has, and gives those that are asked for or is refused."""
    from fvdm_jax import video

    put(path, case)
    held = video.probe(path)
    assert 1 <= held.at(8) <= 10**6
    made = video.read(path, min(held.at(8), 5), (32, 32), fps=8)
    assert made.dtype == np.uint8 and made.shape[1:] == (32, 32, 3)


KEEPS = ("0=a.png", "last=a.png:0.3", "p9=a.png", "0-2=b.gif:0.5", "last=b.gif", "4=a.png:0.6-0.1",
         "0=a.png\nlast=b.gif:1", "7-last=b.gif", "p0=a.png\np5=a.png:0.2")  # fmt: skip


def keeps(folder: Path) -> list[bytes]:
    """Values of --keep, a line each, and the files that they name."""
    from PIL import Image

    drawn = np.random.default_rng(0).integers(0, 255, (16, 16, 16, 3), dtype=np.uint8)
    frames = [Image.fromarray(one) for one in drawn]
    frames[0].save(folder / "a.png")
    frames[0].save(folder / "b.gif", save_all=True, append_images=frames[1:], duration=120)
    return [keep.encode() for keep in KEEPS]


def check_keep(path: Path, case: bytes) -> None:
    """What is kept lies within the video, once each, of a file that is there, at a possible strength."""
    from fvdm_jax.keeps import placed

    os.chdir(path.parent)
    texts = [os.fsdecode(line) for line in case.split(b"\n")[:4]]
    kept = placed(texts, 9, 8.0)
    taken = [frame for keep in kept for frame in range(keep.first, keep.first + keep.count)]
    assert len(kept) == len(texts) and len(set(taken)) == len(taken) and set(taken) <= set(range(9))
    for keep in kept:
        assert keep.count >= 1 and 0 <= keep.strength <= 1 and 0 <= keep.settled <= 1 and keep.path.is_file()
        assert 0 <= keep.skip and keep.skip + keep.frames <= max(keep.total, keep.frames)


HEADER = (
    b"\"dtype\":", b"\"shape\":[", b"\"data_offsets\":[", b"\"F32\"", b"null", b"-1", b"1e3", b"true",
    b"__metadata__", b"[[", b"}", b"\\u0000", b"\\ud800", b"9223372036854775808", b" ", b"NaN",
)  # fmt: skip
LORA = (
    b".lora_A.weight", b".lora_down.weight", b".alpha", b".diff", b"lora_unet_", b"diffusion_model.", b"\t",
    b"transformer_2.", b"base_model.model.", b"blocks.0.", b"blocks.1.self_attn.q", b"\n", b"int32", b"0,",
)  # fmt: skip
KEEP = (
    b"last", b"p", b"-", b"=", b":", b"0.5", b"nan", b"1e400", b"/dev/zero", b"..", b"\0", b"\xff",
    "٣".encode(), b"http://x/", b"b.gif", b"a.png", b"\n", b"999999999",
)  # fmt: skip
MAGIC = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"WEBP", b"IHDR", b"IDAT", b"zTXt", b"iCCP", b"ftyp",
    b"moov", b"stsz", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"elst",
    b"II*\0", b"GIF89a",
)  # fmt: skip
NOISE = (1, 2, 2, 2, 3)


def noises(folder: Path) -> list[bytes]:
    """Noise in our order and in Wan's, of three types."""
    rng, found = np.random.default_rng(0), []
    for dtype in (np.float16, np.float32, np.float64):
        array = rng.standard_normal(NOISE).astype(dtype)
        for one in (array, array[0].transpose(3, 0, 1, 2)):
            np.save(folder / "noise.npy", one)
            found.append((folder / "noise.npy").read_bytes())
    return found


def check_noise(path: Path, case: bytes) -> None:
    """What is taken is finite numbers of the shape that was asked for."""
    from fvdm_jax.latents import noise

    put(path, case)
    found = noise(path, NOISE)
    assert found.shape == NOISE and found.dtype == np.float32 and np.isfinite(found).all()


TARGETS = {
    "safetensors": Target(safetensors_files, check_safetensors, HEADER),
    "torch": Target(torch_files, check_torch),
    "program": Target(programs, check_program),
    "lora": Target(adapters, check_lora, LORA),
    "image": Target(pictures, check_picture, MAGIC),
    "video": Target(clips, check_clip, MAGIC),
    "keep": Target(keeps, check_keep, KEEP),
    "noise": Target(noises, check_noise, (b"'descr': '<f4'", b"'shape': (", b"(" * 99, b"-" * 999, b"|O")),
}
