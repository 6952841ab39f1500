"""Mutations of valid inputs: of folders, of formats (JSON, zip, tar, PNG, ...) and of plain bytes.

An input is a folder as a dict: relative name -> content (bytes), or where a link leads (str).
"""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

Tree = dict[str, bytes | str]

OUTSIDE = "../secret.txt"  # beside the folder of the case, see `guard.py`
NUMBERS = (0, 1, 2, 3, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62)
NUMBERS += (2**63 - 1, 2**63, 2**64 - 1)
TEXTS = ["", " ", "\x00", "\n", "\ud800", "\u2028", "../x", "..", "/", "/etc/passwd", "~", "C:\\x", "a" * 9999, "1e999"]
TEXTS += [OUTSIDE, "os.system", "posix.system", "builtins.eval", "fuzz_canary.Payload", "fuzz_canary", "${x}", "${x.y}"]
TEXTS += [
    "${oc.env:HOME}",
    "pkl",
    "pil",
    "ndarray:float64:99999,99999",
    f"file://{'/etc/passwd'}",
    "http://127.0.0.1:9/x",
]
TEXTS += ["torch.nn.Linear", "emmdit.files.os.system", "\x1b[2J", "%s%n", "{0.__class__}", "None", "null", "NaN"]
DEEP, HUGE = "@deep@", "@huge@"  # written as they can not be held: nesting beyond the stack, an endless number
STAND_INS = {f'"{DEEP}"': "[" * 5000 + "]" * 5000, f'"{HUGE}"': "9" * 5000}
PICKLES = (b"cposix\nsystem\n(S'echo'\ntR", b"cbuiltins\neval\n(S'1'\ntR", b"cfuzz_canary\nPayload\n(tR", b"\x94", b"0")
PICKLES += (b"cbuiltins\ngetattr\n", b"ctorch\nload\n", b"(I1\n", b"}db", b"2" * 9, b"\x8a\xff", b"J\xff\xff\xff\x7f")
PICKLES += (b"ctorch._utils\n_rebuild_tensor_v2\n", b"R", b"b", b"t", b"u", b"s", b"r\xff\xff\xff\x7f", b"\x8c\x01a")
ALIASES = "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(9))
YAMLS = (ALIASES, "x: !!python/object/apply:os.system [echo]\n", "&a [*a]\n", "? [a]\n: b\n", "---\n---\n", "\t- x\n")
YAMLS += (
    "<<: 1\n",
    "x: 2001-99-99\n",
    "0x: 1_0\n? {a: b}\n: c\n",
    "base: [base.yaml]\n",
    "base: {a: b}\n",
    "%TAG ! x\n",
)


def mutated(valid: list[Tree], random: Random) -> Tree:
    """One of the valid inputs, mutated up to five times."""
    tree = dict(random.choice(valid))
    shares, changes = zip(*WAYS, strict=True)
    for change in random.choices(changes, shares, k=random.choice((1, 1, 1, 2, 2, 3, 4, 5))):
        if tree:
            change(tree, random.choice(sorted(tree)), random)
    return tree


def write(tree: Tree, folder: Path) -> None:
    """The input as files in `folder`, which does not exist yet."""
    folder.mkdir()
    for name, content in tree.items():
        path = folder / name
        if "/" in name:
            path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


def read(folder: Path) -> Tree:
    """A folder as an input."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else p.read_bytes() for p in paths}


# -- plain bytes ---------------------------------------------------------------------------------------


def change_bytes(data: bytes, random: Random) -> bytes:
    """Flip, cut, insert, repeat, or set what may be the field of a length."""
    if not data:
        return random.randbytes(random.choice((1, 8, 100)))
    # headers and indices lie at both ends
    end = random.choice((len(data), min(len(data), 64), min(len(data), 600)))
    at = random.randrange(end) if random.random() < 0.7 else len(data) - 1 - random.randrange(end)
    length = random.choice((1, 2, 4, 8, 30, 512))
    match random.randrange(9):
        case 0:
            return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[:at] + random.randbytes(length) + data[at:]
        case 4:
            return data[:at] + data[at : at + length] * random.choice((2, 3, 100)) + data[at + length :]
        case 5:
            other = random.randrange(len(data))
            return data[:at] + data[other : other + length] + data[at + length :]
        case 6:
            text = random.choice(TEXTS).encode("utf-8", "surrogatepass")
            return data[:at] + text + data[at + random.choice((0, len(text))) :]
        case 7:
            digits = [i for i in range(at, min(len(data), at + 200)) if 48 <= data[i] < 58]
            at = digits[0] if digits else at
            return data[:at] + str(random.choice((-1, *NUMBERS))).encode() + data[at + 1 :]
    width = random.choice((1, 2, 4, 8))
    at -= at % width if random.random() < 0.7 else 0
    value = random.choice((*NUMBERS, len(data), len(data) - 1, random.getrandbits(64))) % (1 << 8 * width)
    return data[:at] + value.to_bytes(width, random.choice(("little", "big"))) + data[at + width :]


# -- formats -------------------------------------------------------------------------------------------


def odd_value(random: Random) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: random.choice((None, True, False, [], {}, [[]], {"": None}, [None], DEEP, HUGE)),
        lambda: random.choice((*NUMBERS, -1, -(2**63), 1e308, 1e-320, -0.0, float("nan"), float("inf"), 0.5)),
        lambda: random.choice(TEXTS),
        lambda: {"class_path": random.choice(TEXTS), "init_args": random.choice(({}, None, {"x": 1}, [1]))},
    ]
    return random.choice(kinds)()


def change_value(value: Any, random: Random) -> Any:
    """Of nested dicts and lists, in one place: another value, another name, nothing, or twice."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        return odd_value(random)
    copy: Any = value.copy()
    key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
    match random.randrange(10):
        case 0:
            del copy[key]
        case 1 if isinstance(value, dict):
            copy[random.choice(TEXTS)] = copy.pop(key)
        case 1:
            copy.insert(key, copy[key])
        case 2 if isinstance(value, dict):
            copy[random.choice((*TEXTS, *value))] = odd_value(random)
        case 2:
            copy *= random.choice((0, 2, 50))
        case 3:
            copy[key] = odd_value(random)
        case _:
            copy[key] = change_value(value[key], random)
    return copy


def dumped(value: Any) -> bytes:
    text = json.dumps(value)
    for stand_in, meant in STAND_INS.items():
        text = text.replace(stand_in, meant)
    return text.encode()


def change_json(data: bytes, random: Random) -> bytes:
    return dumped(change_value(json.loads(data), random))


def change_lines(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    change = random.choice((change_json, change_bytes))
    lines[at : at + 1] = random.choice(([change(lines[at], random)], [lines[at]] * 2, [], [b""]))
    return b"\n".join(lines)


def change_yaml(data: bytes, random: Random) -> bytes:
    if random.random() < 0.2:
        return b"".join(random.sample([data, random.choice(YAMLS).encode()], 2))
    if b"*a" in data:  # aliases of aliases would be written out
        return change_bytes(data, random)
    return dumped(change_value(yaml.safe_load(data), random))  # JSON is YAML


def change_safetensors(data: bytes, random: Random) -> bytes:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = dumped(change_value(json.loads(data[8:end]), random))
    return struct.pack("<Q", len(header)) + header + data[end:]


def change_zip(data: bytes, random: Random) -> bytes:
    """One member of a zip, with its checksum; checkpoints and npz files are zips."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    at = random.randrange(len(members))
    name, content = members[at]
    change = change_pickle if name.endswith(".pkl") else change_bytes
    kept = random.choice(([], [(name, content)] * 2, [(random.choice(TEXTS)[:99] or "x", content)]))
    members[at : at + 1] = kept if random.random() < 0.2 else [(name, change(content, random))]
    packed = io.BytesIO()
    kind = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with (
        warnings.catch_warnings(action="ignore"),
        zipfile.ZipFile(packed, "w", kind) as new,
    ):  # a name may be twice there
        for name, content in members:
            new.writestr(zipfile.ZipInfo(name.replace("\ud800", "?")), content)
    return packed.getvalue()


def change_pickle(data: bytes, random: Random) -> bytes:
    if random.random() < 0.5:
        return change_bytes(data, random)
    at = random.randrange(len(data))
    return data[:at] + random.choice(PICKLES) + data[at + random.choice((0, 0, 1, 5)) :]


def change_tar(data: bytes, random: Random) -> bytes:
    """A field of one header, whose checksum is made right again."""
    at = 512 * random.choice([i for i in range(len(data) // 512) if data[512 * i + 257 :][:5] == b"ustar"] or [0])
    header = bytearray(data[at : at + 512])
    place, length = random.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)))
    numbers = [b"%o" % number for number in NUMBERS] + [b"\x80" + b"\xff" * 11, b"\x80" + b"\0" * 10 + b"\x01"]
    texts = [text.encode("utf-8", "surrogatepass") for text in TEXTS]
    kinds = [b"%d" % kind for kind in range(8)] + [b"x", b"g", b"L", b"K", b"S", b"\0"]
    value = random.choice({1: kinds, 12: numbers, 8: numbers}.get(length, texts))
    header[place : place + length] = value[:length].ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % (sum(header) % 8**6)
    return data[:at] + bytes(header) + data[at + 512 :]


def change_png(data: bytes, random: Random) -> bytes:
    """A chunk, whose checksum is made right again, or a chunk more."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    place = random.randrange(len(chunks))
    more = [(b"zTXt", b"emmdit\0\0" + zlib.compress(b"a" * 2_000_000)), (b"eXIf", b"MM\0*\0\0\0\x08\xff\xff")]
    more += [(b"tRNS", b"\0\0"), (b"iCCP", b"x\0\0" + zlib.compress(b"\xff" * 999)), (b"acTL", b"\0\0\xff\xff\0\0\0\0")]
    if random.random() < 0.2:
        chunks.insert(random.randrange(1, len(chunks)) if len(chunks) > 1 else 0, random.choice(more))
    else:
        chunks[place] = (chunks[place][0], change_bytes(chunks[place][1], random))
    out = [
        struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4, "big") for kind, body in chunks
    ]
    return data[:8] + b"".join(out)


FORMATS: dict[str, Callable[[bytes, Random], bytes]] = {
    **{".json": change_json, ".jsonl": change_lines, ".txt": change_lines, ".csv": change_lines, ".yaml": change_yaml},
    **{".safetensors": change_safetensors, ".ckpt": change_zip, ".pt": change_zip, ".npz": change_zip},
    **{".metadata": change_pickle, ".distcp": change_zip, ".tar": change_tar, ".png": change_png},
}


# -- ways to change an input ---------------------------------------------------------------------------


def by_format(tree: Tree, name: str, random: Random) -> None:
    content, suffix = tree[name], Path(name).suffix or Path(name).name
    change = FORMATS.get(suffix, change_bytes)
    try:
        tree[name] = change(content, random) if isinstance(content, bytes) else random.choice(TEXTS[6:10])
    except Exception:  # it was changed beyond its format before
        tree[name] = change_bytes(content, random)


def by_bytes(tree: Tree, name: str, random: Random) -> None:
    content = tree[name]
    tree[name] = change_bytes(content, random) if isinstance(content, bytes) else b""


def by_random(tree: Tree, name: str, random: Random) -> None:
    tree[name] = random.randbytes(random.choice((0, 0, 1, 7, 100, 3000)))


def by_file(tree: Tree, name: str, random: Random) -> None:
    """The file is gone, a folder, another one's content, or a link: out of the folder, nowhere, or to itself."""
    match random.randrange(6):
        case 0:
            del tree[name]
        case 1:
            tree[f"{name}/x"] = tree.pop(name)
        case 2:
            tree[name] = tree[random.choice(sorted(tree))]
        case 3:
            tree[name] = "../" * name.count("/") + OUTSIDE
        case 4:
            tree[name] = random.choice(("gone", Path(name).name, ".", "/dev/null"))
        case _:
            tree[f"{name}-loop"], tree[f"{name}-loop2"] = ".", "."


WAYS: list[tuple[int, Callable[[Tree, str, Random], None]]] = [
    (12, by_format),
    (8, by_bytes),
    (2, by_random),
    (2, by_file),
]
