"""Damaged and hostile data sets: a small good one, and what can be done to each kind of file in it.

A data set is a dictionary of file names and bytes here. A mutation takes the parts of a good one and a generator, and
gives the files of a bad one with a line that says what was done. Whoever damages a file by chance does not sign it
again; who does it on purpose does, so both are made.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from megaclass.data.manifest import FORMAT, INDEX_DTYPE
from tests.support.hostile_images import SPECIAL_IMAGES
from tests.support.mutated_json import mutated
from tests.support.tiny_dataset import encode, tar_member, tiny_image

NUM_CLASSES = 5
SIZES = (7, 4, 9)
CANARY = "canary"  # what a hostile file would make if anything in it were executed or unpacked
BLOCK = 512


@dataclass
class Parts:
    """A data set before it becomes files: per sample key, extension, image, label bytes, and what the index says."""

    samples: list[list[dict]] = field(default_factory=list)


@functools.cache
def _good_image(label: int, number: int, extension: str) -> bytes:
    return encode(tiny_image(label, number, 8, 1), extension)


def good_parts() -> Parts:
    """20 samples in three shards, PNG and JPEG."""
    parts, number = Parts(), 0
    for size in SIZES:
        shard = []
        for _ in range(size):
            label, extension = number % NUM_CLASSES, ("png", "jpg")[number % 3 == 1]
            image = _good_image(label, number, extension)
            shard.append({"key": f"s{number:03d}", "extension": extension, "image": image, "label": label})
            number += 1
        parts.samples.append(shard)
    return parts


def stem(shard: int) -> str:
    return f"train-{shard:06d}"


def to_files(parts: Parts) -> dict[str, bytes]:
    """The files of a data set that agree with each other."""
    files: dict[str, bytes] = {}
    shards = []
    for number, samples in enumerate(parts.samples):
        tar, records = b"", []
        for sample in samples:
            stored = sample.get("label_bytes", struct.pack("<q", sample["label"]))
            members = tar_member(f"{sample['key']}.{sample['extension']}", sample["image"])
            members += tar_member(f"{sample['key']}.label", stored)
            records.append((len(tar), len(members), -1, sample["label"]))
            tar += members
        files[f"{stem(number)}.tar"] = tar + bytes(1024)
        files[f"{stem(number)}.index.npy"] = npy(np.array(records, INDEX_DTYPE))
        shards.append(
            {"file": f"{stem(number)}.tar", "index": f"{stem(number)}.index.npy", "num_samples": len(samples)}
        )
    files["train.classes.json"] = json.dumps({"names": [f"class {n}" for n in range(NUM_CLASSES)]}).encode()
    split = {
        "num_classes": NUM_CLASSES, "num_samples": sum(map(len, parts.samples)), "classes": "train.classes.json",
        "sources": [], "shards": shards,
    }  # fmt: skip
    content = {"format": FORMAT, "name": "hostile", "image_mode": "L", "splits": {"train": split}}
    files["dataset.json"] = json.dumps(content).encode()
    return sign(files)


def sign(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same with sizes and hashes of the files as they are now in the manifest."""
    content = json.loads(files["dataset.json"])
    split = content["splits"]["train"]
    split["classes_sha256"] = hashlib.sha256(files["train.classes.json"]).hexdigest()
    for shard in split["shards"]:
        tar, index = files[shard["file"]], files[shard["index"]]
        shard["num_bytes"] = len(tar)
        shard["sha256"], shard["index_sha256"] = hashlib.sha256(tar).hexdigest(), hashlib.sha256(index).hexdigest()
    return {**files, "dataset.json": json.dumps(content).encode()}


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


class Canary:
    """What a pickle would call; makes the file `canary` in the folder above."""

    def __reduce__(self) -> tuple:
        return (exec, (f"open('../{CANARY}', 'w').close()",))


Mutation = Callable[[Parts, random.Random], tuple[dict[str, bytes], str]]


def mutate(number: int, seed: int) -> tuple[dict[str, bytes], str, bool]:
    """Case `number`: files, what was done to them, and whether they may agree with their manifest."""
    chance = random.Random(f"{seed} {number}")
    mutations: list[Mutation] = [tar_bytes, tar_headers, tar_members, index_file, index_records, labels, images, images,
                                 manifest, manifest, class_names, any_bytes, kinds]  # fmt: skip
    mutation = mutations[number % len(mutations)]
    files, what = mutation(good_parts(), chance)
    changes_manifest = mutation in (manifest, any_bytes)
    is_signed = mutation in (labels, images) or (
        not changes_manifest and mutation is not kinds and chance.random() < 0.6
    )
    is_same = files == to_files(good_parts())
    return (
        (sign(files) if is_signed else files),
        f"{mutation.__name__}: {what}",
        is_signed or changes_manifest or is_same,
    )


def damage(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Bytes flipped, cut, inserted, repeated, zeroed or swapped somewhere."""
    size = max(len(data), 1)
    start, length = chance.randrange(size), chance.choice((1, 1, 1, 2, 7, 64, 512, 5000))
    end = min(start + length, len(data))
    kind = chance.choice(("flip", "set", "cut", "remove", "insert", "repeat", "zero", "swap", "empty"))
    if kind == "flip":
        changed = data[:start] + bytes(byte ^ (1 << chance.randrange(8)) for byte in data[start:end]) + data[end:]
    elif kind == "set":
        changed = data[:start] + chance.randbytes(end - start) + data[end:]
    elif kind == "cut":
        changed = data[:start]
    elif kind == "remove":
        changed = data[:start] + data[end:]
    elif kind == "insert":
        changed = data[:start] + chance.randbytes(length) + data[start:]
    elif kind == "repeat":
        changed = data[:end] + data[start:end] * chance.choice((1, 2, 50)) + data[end:]
    elif kind == "zero":
        changed = data[:start] + bytes(end - start) + data[end:]
    elif kind == "swap":
        other = chance.randrange(size)
        first, last = sorted((start, other))
        changed = data[last:] + data[first:last] + data[:first]
    else:
        changed = b""
    return changed, f"{kind} {length} at {start}"


def any_bytes(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    files = to_files(parts)
    name = chance.choice(sorted(files))
    files[name], what = damage(files[name], chance)
    return files, f"{name}: {what}"


def tar_bytes(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    files, name = to_files(parts), f"{stem(chance.randrange(3))}.tar"
    files[name], what = damage(files[name], chance)
    return files, f"{name}: {what}"


SIZES_OF_MEMBERS = (
    b"-0000000001\0", b"-1\0", b"77777777777\0", b"\x80" + bytes(10) + b"\x05", b"\xff" * 12, b"\x80" + b"\xff" * 11,
    b"\xff" + bytes(11), b"00000001000\0", b"00000000000\0", b"            ", bytes(12), b"0x10\0\0\0\0\0\0\0\0",
    b"00000000009\0", b"+0000000010\0", b"1_0\0\0\0\0\0\0\0\0\0", b"00000002000\0", b"\xd9\xa1" * 6,
)  # fmt: skip
NAMES_OF_MEMBERS = (
    b"../../canary.png", b"/tmp/canary.png", b"..\\canary.png", b"pipe:touch canary.png", b".png", b"png", b"",
    b"a" * 100, b"s000.png", b"s001.label", b"\xff\xfe.png", b"a\0b.png", b"./s000.png", b"s 0.png",
    b"s000.png.png", b"s000.PNG", b"s000.pyd", b"__key__.png", b"__url__.label", b"s000.jpg",
    b"s000.json", b"s000.pickle", b"\xc5\xbf000.png",
)  # fmt: skip


def header_fields(header: bytearray, chance: random.Random) -> str:
    """Change one field of a tar header; most of the time with a checksum that is right again."""
    kind = chance.choice(
        ("size", "size", "type", "type", "name", "name", "prefix", "magic", "link", "byte", "checksum")
    )
    if kind == "size":
        header[124:136] = value = chance.choice(SIZES_OF_MEMBERS)
    elif kind == "type":
        value = bytes([chance.choice(b"1234567SLKxgDVMXN\0A\xff")])
        header[156:157] = value
        header[157:257] = chance.choice(
            (bytes(100), b"../../canary".ljust(100, b"\0"), b"/etc/passwd".ljust(100, b"\0"))
        )
    elif kind == "name":
        value = chance.choice(NAMES_OF_MEMBERS)
        header[:100] = value.ljust(100, b"\0")
    elif kind == "prefix":
        value = chance.choice((b"..", b"/", b"../../..", b"a/b", b"\xff"))
        header[345:500] = value.ljust(155, b"\0")
    elif kind == "magic":
        value = chance.choice((bytes(8), b"ustar  \0", b"USTAR\0000", b"ustar\x0099"))
        header[257:265] = value
    elif kind == "link":
        value = b"/etc/passwd"
        header[157:257] = value.ljust(100, b"\0")
    elif kind == "byte":
        place = chance.randrange(BLOCK)
        value = chance.randbytes(1)
        header[place : place + 1] = value
    else:
        value = chance.choice((b"-1\0\0\0\0\0\0", b"99999999", b"\x80\0\0\0\0\0\0\1", bytes(8)))
        header[148:156] = value
        return f"checksum {value!r}"
    if chance.random() < 0.85:
        checksum(header)
    return f"{kind} {value!r:.40}"


def checksum(header: bytearray) -> None:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def header_places(tar: bytes) -> list[int]:
    places, offset = [], 0
    while tar[offset : offset + BLOCK].strip(b"\0"):
        places.append(offset)
        offset += BLOCK + -(-int(tar[offset + 124 : offset + 135], 8) // BLOCK) * BLOCK
    return places


def tar_headers(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    files, name = to_files(parts), f"{stem(chance.randrange(3))}.tar"
    tar = bytearray(files[name])
    told = []
    for place in chance.sample(header_places(tar), chance.choice((1, 1, 1, 2))):
        header = tar[place : place + BLOCK]
        told.append(f"byte {place} {header_fields(header, chance)}")
        tar[place : place + BLOCK] = header
    files[name] = bytes(tar)
    return files, f"{name}: {', '.join(told)}"


def hostile_member(chance: random.Random) -> tuple[bytes, str]:
    """A whole member of a kind that has no place in a shard."""
    records = chance.choice(
        (
            b"path=../../canary", b"size=99999999999999", b"size=-1", b"GNU.sparse.major=1\n", b"linkpath=/etc/passwd",
            b"GNU.sparse.map=0,99999999999", b"hdrcharset=BINARY", b"mtime=nan", b"SCHILY.xattr.x=y",
        )
    )  # fmt: skip
    pax = b"%d %s\n" % (len(records) + len(str(len(records))) + 2, records)
    kind, data = chance.choice(
        (
            (b"x", pax), (b"g", pax), (b"x", b"99999999 path=x\n"), (b"L", b"../../canary.png\0"),
            (b"K", b"/etc/passwd\0"),
            (b"S", bytes(512)), (b"1", b""), (b"2", b""), (b"3", b""), (b"4", b""), (b"5", b""), (b"6", b""),
            (tarfile.REGTYPE, b"x" * 100), (tarfile.REGTYPE, b""),
        )
    )  # fmt: skip
    name = chance.choice(NAMES_OF_MEMBERS).decode("utf-8", "replace").replace("\0", "")[:90]
    return tar_member(name, data, kind), f"member {name!r} of type {kind!r}"


def tar_members(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    """Members added, doubled, left out or put elsewhere; the index knows of it or does not."""
    files, number = to_files(parts), chance.randrange(3)
    name, index = f"{stem(number)}.tar", f"{stem(number)}.index.npy"
    tar = files[name]
    places = [*header_places(tar), len(tar) - 1024]
    members = [tar[start:end] for start, end in pairwise(places)]
    kind = chance.choice(("add", "add", "double", "leave out", "shuffle", "swap", "double sample", "zeros", "end"))
    place, what = chance.randrange(len(members)), kind
    if kind == "add":
        member, what = hostile_member(chance)
        members.insert(place, member)
    elif kind == "double":
        members.insert(place, members[place])
    elif kind == "leave out":
        del members[place]
    elif kind == "shuffle":
        chance.shuffle(members)
    elif kind == "swap":
        other = chance.randrange(len(members))
        members[place], members[other] = members[other], members[place]
    elif kind == "double sample":
        members += members[place // 2 * 2 : place // 2 * 2 + 2]
    elif kind == "zeros":
        members.insert(place, bytes(BLOCK * chance.choice((1, 2))))
    end = (
        chance.choice((b"", bytes(512), bytes(1024) + b"x", bytes(20480), b"x" * 512)) if kind == "end" else bytes(1024)
    )
    files[name] = b"".join(members) + end
    if chance.random() < 0.5:
        records, offset = np.load(io.BytesIO(files[index])), 0
        sizes = [len(member) for member in members]
        for record, first in zip(records, range(0, len(sizes), 2), strict=False):
            record["offset"], record["length"] = offset, sum(sizes[first : first + 2])
            offset += int(record["length"])
        files[index] = npy(records)
        what += ", index follows"
    return files, f"{name}: {what} at member {place}"


def index_file(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    files, name = to_files(parts), f"{stem(chance.randrange(3))}.index.npy"
    records = np.load(io.BytesIO(files[name]))
    good = files[name]
    header = good[10 : good.index(b"\n") + 1]
    kinds: list[tuple[str, bytes]] = [
        ("object dtype", npy(np.array([Canary()] * len(records), object))),
        ("pickle alone", npy(np.array(Canary(), object))[128:]),
        ("float", npy(np.zeros(len(records)))),
        ("two dimensions", npy(records.reshape(1, -1))),
        ("big-endian", npy(records.astype(INDEX_DTYPE.newbyteorder(">")))),
        ("bytes", npy(np.zeros(len(records), "S24"))),
        ("zero-sized", npy(np.zeros(len(records), "V0"))),
        ("other names", npy(records.astype([("a", "<i8"), ("b", "<i4"), ("c", "<i4"), ("d", "<i8")]))),
        ("scalar", npy(records[0])),
        ("none", npy(records[:0])),
        ("npz", b"PK\x03\x04" + good),
    ]
    for shape in (
        "(99999999999999999,)",
        "(1000000000,)",
        "(-1,)",
        "(9, 99999999999, 99999999999)",
        "(1.5,)",
        "()",
        "None",
    ):
        text = header.replace(f"({len(records)},)".encode(), shape.encode())
        kinds.append((f"shape {shape}", good[:8] + struct.pack("<H", len(text)) + text + good[good.index(b"\n") + 1 :]))
    code = f"{{'descr': __import__('os').system('touch ../{CANARY}'), 'fortran_order': False, 'shape': (1,)}}\n"
    for label, text in (
        ("code", code),
        ("nesting", "(" * 5000 + "\n"),
        ("huge", "[" + "0," * 30000 + "]\n"),
        ("nul", "\0\n"),
    ):
        kinds.append((f"header of {label}", good[:8] + struct.pack("<H", len(text) & 0xFFFF) + text.encode()))
    kinds.append(("version 3, long header", good[:6] + b"\3\0" + struct.pack("<I", 2**31) + header))
    if chance.random() < 0.3:
        files[name], what = damage(good, chance)
    elif chance.random() < 0.3:
        files[name], what = damage(good[: len(header) + 10], chance)
    else:
        what, files[name] = chance.choice(kinds)
    return files, f"{name}: {what}"


def index_records(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    files, name = to_files(parts), f"{stem(chance.randrange(3))}.index.npy"
    records = np.load(io.BytesIO(files[name]))
    place, column = chance.randrange(len(records)), chance.choice(INDEX_DTYPE.names or ())
    bits = INDEX_DTYPE[column].itemsize * 8 - 1
    values = [
        0,
        1,
        -1,
        511,
        512,
        1536,
        2**bits - 1,
        -(2**bits),
        2 ** (bits - 1),
        int(records[column][place - 1]),
        3,
        10**6,
    ]
    value = chance.choice(values)
    records[column][place] = value
    what = f"record {place} has {column} {value}"
    if chance.random() < 0.2:
        records = records[np.array(chance.sample(range(len(records)), len(records)))]
        what += ", shuffled"
    files[name] = npy(records)
    return files, f"{name}: {what}"


def labels(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    sample = chance.choice(chance.choice(parts.samples))
    if chance.random() < 0.5:
        sample["label_bytes"] = chance.randbytes(chance.choice((0, 1, 4, 7, 9, 16, 511, 512, 513, 100_000)))
        what = f"{len(sample['label_bytes'])} bytes"
    else:
        value = chance.choice((-1, NUM_CLASSES, 2**63 - 1, -(2**63), 0, 1, 2, 2**32, 256))
        sample["label_bytes"] = struct.pack("<q", value)
        what = str(value)
        if chance.random() < 0.5:
            sample["label"], what = value, f"{value} in the index, too"
    return to_files(parts), f"{sample['key']} has label {what}"


def images(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    sample = chance.choice(chance.choice(parts.samples))
    kind = chance.random()
    if kind < 0.5:
        sample["image"], what = damage(sample["image"], chance)
    else:
        what, extension, sample["image"] = chance.choice(SPECIAL_IMAGES)
        if kind < 0.9:
            sample["extension"] = extension
        if kind > 0.95:
            sample["image"], more = damage(sample["image"], chance)
            what += f", {more}"
    return to_files(parts), f"{sample['key']}.{sample['extension']}: {what}"


KINDS = ("fifo", "folder", "loop", "missing", "socket")


def kinds(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    """Something else in the place of a file; its kind stands for the content."""
    files = to_files(parts)
    name, kind = chance.choice(sorted(files)), chance.choice(KINDS)
    files[name] = kind.encode()
    return files, f"{name} is {kind}"


def manifest(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    files = to_files(parts)
    files["dataset.json"], what = mutated(files["dataset.json"], chance)
    return files, f"dataset.json: {what}"


def class_names(parts: Parts, chance: random.Random) -> tuple[dict[str, bytes], str]:
    files = to_files(parts)
    files["train.classes.json"], what = mutated(files["train.classes.json"], chance)
    return files, f"train.classes.json: {what}"
