"""Files as torch writes them, assembled byte by byte, and what can be wrong with them.

Each case is a file, and words that its refusal must have. A program that runs leaves a file `canary`.
"""

import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np

DATA = np.arange(6, dtype=np.float32).tobytes()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, last: str) -> bytes:
    return f"c{module}\n{last}\n".encode()


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(module: str, last: str, *arguments: bytes) -> bytes:
    return name(module, last) + group(*arguments) + b"R"


def storage(kind: str = "FloatStorage", **odd: object) -> bytes:
    """A record; `odd` are other values, as texts, numbers or bytes of a program."""
    usual = {"what": "storage", "named": name("torch", kind), "key": "0", "place": "cpu", "count": 6} | odd
    made = [text(value) if isinstance(value, str) else value for value in usual.values()]
    return group(*(whole(value) if isinstance(value, int) else value for value in made)) + b"Q"


def tensor(of: bytes | None = None, **odd: object) -> bytes:
    """A call for a tensor; each of the arguments behind the storage can be numbers, or bytes of a program."""
    usual = {"offset": 0, "shape": (2, 3), "strides": (3, 1), "grad": b"\x89", "hooks": b"}"} | odd
    made = [group(*map(whole, value)) if isinstance(value, tuple) else value for value in usual.values()]
    made = [whole(value) if isinstance(value, int) else value for value in made]
    return call("torch._utils", "_rebuild_tensor_v2", storage() if of is None else of, *made)


def program(value: bytes) -> bytes:
    return b"\x80\2" + value + b"."


def state(*items: bytes, **values: bytes) -> bytes:
    named = b"".join(text(key) + value for key, value in values.items())
    return b"}(" + b"".join(items) + named + b"u"


def zipped(*members: tuple, tail: bytes = b"", wide: dict | None = None, **end: object) -> bytes:
    """A zip file of (name, data, odd fields of both headers, of the local one, of the central one).

    `end` are odd fields of the end record; `wide`, of a zip64 end record, which else is not there.
    """
    body = directory = b""
    for path, data, *odd in members:
        both, local, central = odd + [{}] * (3 - len(odd))
        usual = {"flags": 0, "method": 0, "crc": zlib.crc32(data), "packed": len(data), "length": len(data)}
        usual |= {"name": path.encode(), "extra": b"", "header": len(body)} | both
        for fields, form in ((usual | local, "<4s5H3L2H"), (usual | central, "<4s6H3L5H2L")):
            sizes = len(fields["name"]), len(fields["extra"])
            known = fields["flags"], fields["method"], 0, 0, fields["crc"], fields["packed"], fields["length"]
            if form == "<4s5H3L2H":
                body += struct.pack(form, b"PK\3\4", 0, *known, *sizes) + fields["name"] + fields["extra"]
            else:
                rest = struct.pack(form, b"PK\1\2", 0, 0, *known, *sizes, 0, 0, 0, 0, fields["header"])
                directory += rest + fields["name"] + fields["extra"]
        body += data
    said = {"disk": 0, "first": 0, "here": len(members), "count": len(members)}
    said |= {"length": len(directory), "begin": len(body)}
    tail_end = struct.pack("<4s4H2LH", b"PK\5\6", *(said | end).values(), 0)
    if wide is not None:
        at = len(body) + len(directory)
        tail_end = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1) + tail_end
        tail_end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, *(said | wide).values()) + tail_end
    return body + directory + tail_end + tail


def saved(value: bytes, *members: tuple, **end) -> bytes:
    """A file of torch whose program leaves `value`, with a record of six float32 unless others are given."""
    return zipped(("x/data.pkl", program(value)), *(members or (("x/data/0", DATA),)), **end)


GOOD = state(w=tensor())
PKL, ZERO, ORDER = ("x/data.pkl", program(GOOD)), ("x/data/0", DATA), ("x/byteorder", b"little")
RUN, OPEN = text("touch canary"), text("open('canary', 'w').close()")
CHAIN = call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system"))
META = state(_metadata=b"}")
HUGE = 2**64 + 6


def wide_member(header: int) -> dict:
    return {"length": 2**32 - 1, "packed": 2**32 - 1, "header": 2**32 - 1,
            "extra": struct.pack("<2H3Q", 1, 24, 24, 24, header)}  # fmt: skip


ACCEPTED = {
    "as assembled": saved(GOOD),
    "saved from a GPU": saved(state(w=tensor(storage(place="cuda:0")))),
    "sizes behind the content": zipped(PKL, (*ZERO, {"flags": 0x808}, {"crc": 0, "packed": 0, "length": 0})),
    "zip64 end record": zipped(PKL, ZERO, wide={}),
    "zip64 end record alone has the numbers": zipped(PKL, ZERO, wide={}, count=0xFFFF, begin=2**32 - 1),
    "zip64 fields of a member": zipped(PKL, (*ZERO, {}, {}, wide_member(38 + 2 + len(PKL[1])))),
    "padding to align, another field": zipped(PKL, (*ZERO, {"extra": b"FB\2\0ZZ"}), ORDER),
    "one at a time, remembered": saved(b"}q\1" + text("w") + tensor() + b"sr\2\0\0\0"),
    "any stride of an axis of one": saved(state(w=tensor(shape=(2, 1, 3), strides=(3, 2**48 - 1, 1)))),
    "not ASCII": zipped(("鍵/data.pkl", PKL[1]), ("鍵/data/0", DATA)),
}  # fmt: skip

CODE = {
    "os.system": (call("posix", "system", RUN), "posix.system"),
    "eval": (call("builtins", "eval", OPEN), "builtins.eval"),
    "exec": (call("builtins", "exec", OPEN), "builtins.exec"),
    "old eval": (call("__builtin__", "eval", OPEN), "__builtin__.eval"),
    "getattr chain": (CHAIN + RUN + b"\x85R", "builtins.getattr"),
    "subprocess": (call("subprocess", "getoutput", RUN), "subprocess.getoutput"),
    "nested pickle": (call("pickle", "loads", text("x")), "pickle.loads"),
    "pickle in torch": (call("torch.storage", "_load_from_bytes"), "torch.storage._load_from_bytes"),
    "torch.load": (call("torch", "load", RUN), "torch.load"),
    "import of a submodule": (name("torch._utils", "os.system"), "torch._utils.os.system"),
    "torchao": (name("torchao.dtypes", "AffineQuantizedTensor"), "torchao.dtypes.AffineQuantizedTensor"),
    "numpy": (call("numpy.core.multiarray", "scalar"), "numpy.core.multiarray.scalar"),
    "a set": (call("builtins", "set"), "builtins.set"),
    "terminal escapes in a name": (name("\x1b[2Jo", "s\x07"), "\\x1b[2Jo"),
    "name without an end": (b"cposix", "needs posix"),
    "stack global": (text("os") + text("system") + b"\x93" + RUN + b"\x85R", "0x93"),
    "inst": (b"(" + RUN + b"iposix\nsystem\n", "0x69"),
    "obj": (b"(" + name("collections", "OrderedDict") + RUN + b"o", "0x6f"),
    "newobj": (name("collections", "OrderedDict") + b")\x81", "0x81"),
    "extension": (b"\x82\1", "0x82"),
    "persistent text": (b"Pstorage\n", "0x50"),
    "build of a tensor": (tensor() + META + b"b", "changes an object"),
    "build of a class": (name("collections", "OrderedDict") + META + b"b", "changes an object"),
    "build with attributes": (b"}" + state(_metadata=b"}", keys=b"N") + b"b", "changes an object"),
    "build by a text": (b"}" + text("_metadata") + b"b", "changes an object"),
    "OrderedDict of items": (call("collections", "OrderedDict", group(RUN)), "calls collections.OrderedDict"),
    "storage called": (call("torch", "FloatStorage", whole(6)), "calls torch.FloatStorage"),
    "text called": (RUN + b")R", "calls what is no function"),
    "tensor called": (tensor() + b")R", "calls what is no function"),
    "called with a dict": (name("torch._utils", "_rebuild_tensor_v2") + b"}R", "calls what is no function"),
    "parameter of a dict": (call("torch._utils", "_rebuild_parameter", b"}", b"\x88", b"}"), "otherwise"),
    "parameter with hooks": (call("torch._utils", "_rebuild_parameter", tensor(), b"\x88", META), "calls"),
    "tensor of a name": (tensor(name("torch", "FloatStorage")), "no plain tensor"),
    "tensor with hooks": (tensor(hooks=META), "no plain tensor"),
    "tensor with a seventh": (tensor(metadata=b"}"), "calls torch._utils._rebuild_tensor_v2"),
}  # fmt: skip

DEEP = b"}" + (text("a") + b"}") * 3000 + b"s" * 3000
SHAPES = {
    "shape of bools": (tensor(shape=group(b"\x88", whole(3))), "no whole number"),
    "offset true": (tensor(offset=b"\x88"), "no whole number"),
    "offset a fraction": (tensor(offset=b"G" + bytes(8)), "no whole number"),
    "offset a deep dict": (tensor(offset=DEEP), "no whole number"),
    "offset a dict that holds itself": (tensor(offset=b"}q\0" + text("a") + b"h\0s"), "no whole number"),
    "shape a text": (tensor(shape=text("23")), "no plain tensor"),
    "grad a number": (tensor(grad=whole(0)), "no plain tensor"),
    "negative size": (tensor(shape=(-2, -3)), "has offset, shape and strides [0, -2, -3"),
    "negative stride": (tensor(offset=5, shape=(6,), strides=(-1,)), "has offset"),
    "negative offset": (tensor(offset=-1), "has offset"),
    "stride 0 bomb": (tensor(shape=(2**40,), strides=(0,)), "beyond its 6"),
    "stride 0 bomb of two axes": (tensor(shape=(2**31, 2**31), strides=(0, 0)), "beyond its 6"),
    "sizes that wrap": (tensor(shape=(2**32, 2**32), strides=(0, 0)), "beyond its 6"),
    "size that wraps alone": (tensor(shape=(HUGE,), strides=(1,)), "has offset"),
    "offset that wraps": (tensor(offset=HUGE), "has offset"),
    "stride that wraps": (tensor(strides=(2**63 - 1, 1)), "has offset"),
    "offset beyond": (tensor(offset=1), "beyond its 6"),
    "stride beyond": (tensor(strides=(4, 1)), "beyond its 6"),
    "shape beyond": (tensor(shape=(7,), strides=(1,)), "beyond its 6"),
    "empty, offset beyond": (tensor(offset=7, shape=(0,), strides=(1,)), "beyond its 6"),
    "empty and too large for numpy": (tensor(shape=(0, 2**40, 2**40), strides=(1, 1, 1)), "beyond its 6"),
    "more strides than sizes": (tensor(shape=(6,)), "has offset"),
    "nine axes": (tensor(shape=(1,) * 9, strides=(1,) * 9), "larger or deeper"),
    "record too long": (tensor(storage(count=5)), "wants 5 elements"),
    "record too short": (tensor(storage(count=7)), "wants 7 elements"),
    "count that wraps": (tensor(storage(count=HUGE)), f"wants {HUGE} elements"),
    "count negative": (tensor(storage(count=-6)), "wants -6 elements"),
    "count true": (tensor(storage(count=b"\x88")), "names no storage"),
    "no such record": (tensor(storage(key="1")), "names no storage with 1"),
    "record outside": (tensor(storage(key="../0")), "names no storage with ../0"),
    "storage of no type": (tensor(storage(named=text("torch.FloatStorage"))), "no storage"),
    "storage of a function": (tensor(storage(named=name("collections", "OrderedDict"))), "no storage"),
    "other persistent thing": (tensor(storage(what="module")), "no storage"),
    "persistent with six": (tensor(storage(place="cpu", more=b"N")), "no storage"),
    "storage by a dict": (tensor(b"}Q"), "names no storage"),
    "storage as a tensor": (storage(), "w is no tensor"),
    "sparse": (call("torch._utils", "_rebuild_sparse_tensor"), "torch._utils._rebuild_sparse_tensor"),
    "number": (whole(3), "w is no tensor"),
    "dict of tensors": (GOOD, "w is no tensor"),
}  # fmt: skip

TWO = state(w=tensor(), v=tensor(storage("IntStorage")))
PROGRAMS = {
    "two types of one record": (TWO, "as float32 and as int32"),
    "key twice": (state(text("w") + tensor(), text("w") + tensor()), "the key w twice"),
    "key a number": (state(whole(1) + tensor()), "no text but int"),
    "key a tuple": (state(b")" + tensor()), "no text but tuple"),
    "key a tensor": (state(tensor() + tensor()), "no text but _View"),
    "key of 1 MB": (state(text("k" * 2**20) + tensor()), "a text of 1048576"),
    "key with escapes": (state(text("\x1b[31m") + tensor()), "\\x1b[31m"),
    "key empty": (state(text("") + tensor()), "no possible name"),
    "key not UTF-8": (b"}X\2\0\0\0\xc3(" + tensor() + b"s", "not UTF-8"),
    "value without key": (b"}(" + tensor() + b"u", "no dict"),
    "items into a tuple": (b")" + text("w") + tensor() + b"s", "no dict"),
    "list": (b"](" + tensor() + b"e", "0x5d"),
    "tensor alone": (tensor(), "no dict of tensors"),
    "nothing": (b"N", "no dict of tensors"),
    "empty dict": (b"}", "no tensors"),
    "wrapped twice": (state(model=state(state_dict=GOOD)), "state_dict is no tensor"),
    "two wrapped": (state(model=GOOD, module=b"}"), "beside module"),
    "tensor beside": (state(model=GOOD, v=tensor()), "beside model"),
    "dict that holds itself": (b"}q\0" + text("model") + b"h\0s", "model is no tensor"),
    "stack underflow": (b"s", "more than it has given"),
    "takes from below the mark": (b"}" + text("w") + b"(" + tensor() + b"s", "more than it has given"),
    "remembers nothing": (b"q\0", "more than it has given"),
    "mark missing": (b"t", "a mark that it has not set"),
    "mark left": (b"(" + GOOD, "more or less than one"),
    "two values": (GOOD + b"}", "more or less than one"),
    "no value": (b"", "more or less than one"),
    "recalls what is not there": (b"h\7", "recalls number 7"),
    "remembers far off": (b"}r\xff\xff\xff\x7f", "remembers too much"),
    "marks without end": (b"(" * 100_000, "nested too deeply"),
    "tuples without end": (b")" + b"\x85" * 100_000, "larger or deeper"),
    "billion laughs": (b")" + b"q\0h\0\x86" * 40, "larger or deeper"),
    "values without end": (b"N" * 100_000, "piles up"),
    "tuple of thousands": (b"(" + b"N" * 5000 + b"t", "larger or deeper"),
    "number of 255 bytes": (b"\x8a\xff" + bytes(255), "a number of 255 bytes"),
    "number of 4 GB": (b"\x8b\0\0\0\x7f", "0x8b"),
    "text of 4 GB": (b"X\xff\xff\xff\xff", "a text of 4294967295"),
    "protocol said again": (b"\x80\2" + GOOD, "0x80"),
    "stops twice": (GOOD + b".", "goes on after its end"),
    "bytes after the stop": (GOOD + b".cposix\nsystem\n" + RUN + b"\x85R", "goes on after its end"),
}  # fmt: skip

TORN = saved(GOOD)
FLIPPED = ("x/data/0", bytes([DATA[0] ^ 1]) + DATA[1:], {"crc": zlib.crc32(DATA)})
DEFLATED = io.BytesIO()
with zipfile.ZipFile(DEFLATED, "w", zipfile.ZIP_DEFLATED) as bomb:
    bomb.writestr("x/data.pkl", program(GOOD))
    bomb.writestr("x/data/0", bytes(1 << 22))
TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w", format=tarfile.USTAR_FORMAT) as tar:
    tar.addfile(tarfile.TarInfo("storages"))
LONGER = len(PKL[1]) + 9
FULL = {"length": 2**32 - 1, "packed": 2**32 - 1}
HUGE_SIZE = FULL | {"extra": struct.pack("<2H2Q", 1, 16, 2**63, 2**63)}
IDLE64 = {"extra": struct.pack("<2HQ", 1, 8, 24)}
CUT64 = {"length": 2**32 - 1, "extra": b"\1\0\4\0abcd"}
ZIPS = {
    "deflated": (DEFLATED.getvalue(), "compressed"),
    "encrypted": (zipped((*PKL, {"flags": 1}), ZERO), "compressed or encrypted"),
    "another size packed": (zipped(PKL, (*ZERO, {"packed": 2})), "compressed"),
    "overlap": (zipped(PKL, (*ZERO, {}, {}, {"header": 0})), "cannot be"),
    "overlap inside": (zipped((*PKL, {"length": LONGER, "packed": LONGER}), ZERO), "cannot be"),
    "two of one name": (zipped(PKL, ZERO, ZERO), "two members of one name"),
    "two data.pkl": (zipped(PKL, PKL, ZERO), "two members of one name"),
    "two folders": (zipped(PKL, ("y/data/0", DATA)), "more than one folder"),
    "member above": (zipped(("../data.pkl", PKL[1])), "../data.pkl"),
    "member at the root": (zipped(("/x/data.pkl", PKL[1])), "/x/data.pkl"),
    "member above in the middle": (zipped(PKL, ("x/data/../0", DATA)), "x/data/../0"),
    "member with backslashes": (zipped(PKL, ("x\\data/0", DATA)), "torch does not write"),
    "member with escapes": (zipped(PKL, ("\x1b/data/0", DATA)), "\\x1b/data/0"),
    "member of no kind": (zipped(PKL, ZERO, ("x/extra.py", b"")), "x/extra.py"),
    "member with a long name": (zipped(("x" * 600 + "/data.pkl", PKL[1])), "torch does not write"),
    "folder as a member": (zipped(PKL, ("x/data/", b"")), "torch does not write"),
    "no data.pkl": (zipped(ZERO), "without a data.pkl"),
    "TorchScript": (zipped(PKL, ("x/constants.pkl", b""), ("x/code/__torch__.py", b"")), "TorchScript"),
    "other local name": (zipped(PKL, (*ZERO, {}, {"name": b"x/data/1"})), "does not agree"),
    "other local size": (zipped(PKL, (*ZERO, {}, {"length": 23})), "does not agree"),
    "other local CRC": (zipped(PKL, (*ZERO, {}, {"crc": 1})), "does not agree"),
    "other local method": (zipped(PKL, (*ZERO, {}, {"method": 8})), "does not agree"),
    "no local header": (zipped(PKL, (*ZERO, {}, {}, {"header": 43 + len(PKL[1])})), "does not agree"),
    "member beyond the end": (zipped(PKL, (*ZERO, {}, {}, {"header": 2**31})), "beyond its end"),
    "size beyond the end": (zipped(PKL, (*ZERO, {"length": 2**31, "packed": 2**31})), "beyond its end"),
    "size of 2^63": (zipped(PKL, (*ZERO, {}, {}, HUGE_SIZE)), "does not agree"),
    "size of 2^63 in both": (zipped(PKL, (*ZERO, {}, FULL, HUGE_SIZE)), "beyond its end"),
    "zip64 field cut": (zipped(PKL, (*ZERO, {}, {}, CUT64)), "directory that is damaged"),
    "zip64 field that is not needed": (zipped(PKL, (*ZERO, {}, {}, IDLE64)), "is damaged"),
    "zip64 field twice": (zipped(PKL, (*ZERO, {}, {}, {"extra": b"\1\0\0\0" * 2})), "is damaged"),
    "extra field cut": (zipped(PKL, (*ZERO, {}, {}, {"extra": b"FB\x09\0"})), "directory that is damaged"),
    "CRC of data.pkl": (zipped((*PKL, {"crc": 1}), ZERO), "data.pkl is damaged"),
    "CRC of a record": (zipped(PKL, (*ZERO, {"crc": 1})), "w is damaged"),
    "flipped bit": (zipped(PKL, FLIPPED), "w is damaged"),
    "byte order": (zipped(PKL, ZERO, ("x/byteorder", b"big")), "byte order"),
    "byte order of 1 MB": (zipped(PKL, ZERO, ("x/byteorder", b"l" * 2**20)), "bytes of byteorder"),
    "cut": (TORN[:-1], "zip end record"),
    "cut in half": (TORN[: len(TORN) // 2], "zip end record"),
    "cut to the magic": (TORN[:4], "ends at byte"),
    "bytes behind": (saved(GOOD, tail=b"\0"), "zip end record"),
    "comment": (TORN[:-2] + b"\3\0abc", "zip end record"),
    "comment that is not there": (TORN[:-2] + b"\3\0", "zip end record"),
    "two files in one": (TORN + TORN, "does not fit the file"),
    "bytes before": (b"PK\3\4" + TORN, "does not fit the file"),
    "count too small": (saved(GOOD, here=1, count=1), "its zip directory goes on"),
    "count too large": (saved(GOOD, here=3, count=3), "directory that is damaged"),
    "count of counts": (saved(GOOD, here=1), "does not fit the file"),
    "another disk": (saved(GOOD, disk=1), "does not fit the file"),
    "too many": (saved(GOOD, here=40000, count=40000), "too many"),
    "zip64 end of another count": (saved(GOOD, wide={"here": 1, "count": 1}), "do not agree"),
    "zip64 end of another place": (saved(GOOD, wide={"begin": 5}), "do not agree"),
    "zip without members": (zipped(), "no zip file"),
    "empty": (b"", "is empty"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "tar": (TAR.getvalue(), "tar file"),
    "legacy": (b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\2M\xe9\3.", "bare pickle"),
    "safetensors": (b"\2" + bytes(7) + b"{}", "safetensors"),
    "GGUF": (b"GGUF" + bytes(30), "GGUF"),
    "noise": (bytes(range(256)), "no zip file"),
    "protocol 3": (zipped(("x/data.pkl", b"\x80\3" + GOOD + b"."), ZERO), "protocol"),
    "protocol 4": (zipped(("x/data.pkl", b"\x80\4\x95" + bytes(8) + GOOD + b"."), ZERO), "protocol"),
    "no protocol": (zipped(("x/data.pkl", GOOD + b"."), ZERO), "protocol"),
    "no stop": (zipped(("x/data.pkl", PKL[1][:-1]), ZERO), "ends too early"),
    "empty program": (zipped(("x/data.pkl", b""), ZERO), "ends too early"),
}  # fmt: skip
REFUSED = ZIPS | {
    f"{kind}: {case}": (saved(wrap(value)), words)
    for kind, cases, wrap in (
        ("code", CODE, lambda value: state(w=value)),
        ("code", {f"{case}, alone": found for case, found in CODE.items()}, bytes),
        ("tensor", SHAPES, lambda value: state(w=value)),
        ("program", PROGRAMS, bytes),
    )
    for case, (value, words) in cases.items()
}
