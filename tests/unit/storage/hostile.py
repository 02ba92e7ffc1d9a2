"""Archives built byte by byte, the way nobody's tool builds them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from dataclasses import dataclass, field

BLOCK = 512
END = bytes(2 * BLOCK)


def header(
    name="f",
    kind=b"0",
    size=0,
    *,
    target="",
    mode=0o644,
    mtime=1_600_000_000,
    prefix="",
    raw_size=None,
    magic=b"ustar\x0000",
):
    """One header block; `raw_size` stands in the size field as it is."""
    block = bytearray(BLOCK)
    block[: len(name.encode())] = name.encode()
    block[100:108] = b"%07o\0" % mode
    block[108:124] = b"0000000\x000000000\0"
    block[124:136] = raw_size if raw_size is not None else b"%011o\0" % size
    block[136:148] = b"%011o\0" % mtime
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[157 : 157 + len(target.encode())] = target.encode()
    block[257:265] = magic
    block[345 : 345 + len(prefix.encode())] = prefix.encode()
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def entry(name, data=b"", kind=b"0", **more):
    return header(name, kind, len(data), **more) + padded(data)


def pax(records, kind=b"x"):
    body = b""
    for key, value in records.items():
        record = b" " + key.encode() + b"=" + (value if isinstance(value, bytes) else value.encode()) + b"\n"
        length = len(record)
        while len(str(length)) + len(record) != length:
            length = len(str(length)) + len(record)
        body += str(length).encode() + record
    return header("pax", kind, len(body)) + padded(body)


def long_name(name, kind=b"L"):
    return entry("././@LongLink", name.encode() + b"\0", kind)


def tar(*entries):
    return b"".join(entries) + END


def symlink(name, target):
    return header(name, b"2", target=target)


def hardlink(name, target):
    return header(name, b"1", target=target)


def zipped(*entries):
    """Entries are (name, data) or (ZipInfo, data)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return out.getvalue()


def zip_info(name, mode=0, system=3):
    info = zipfile.ZipInfo(name, (2020, 1, 2, 3, 4, 6))
    info.create_system = system
    info.external_attr = mode << 16
    return info


def ordinary():
    """A small archive with one of each kind, made by `tarfile`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, data, target in (
            ("pkg", tarfile.DIRTYPE, b"", ""),
            ("pkg/sub", tarfile.DIRTYPE, b"", ""),
            ("pkg/sub/mod.py", tarfile.REGTYPE, b"x=1\n" * 300, ""),
            ("train.py", tarfile.REGTYPE, b"print(1)\n", ""),
            ("pkg/" + "long" * 40 + "é", tarfile.REGTYPE, b"long", ""),
            ("link.py", tarfile.SYMTYPE, b"", "train.py"),
            ("pkg/sub/up", tarfile.SYMTYPE, b"", "../../train.py"),
            ("hard.py", tarfile.LNKTYPE, b"", "train.py"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size, info.mode, info.mtime = (
                kind,
                target,
                len(data),
                0o755,
                1_600_000_000,
            )
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@dataclass
class Stream:
    """What a store hands out: short reads, and an error in the middle when told so."""

    data: bytes
    most: int = 1 << 30
    fail_at: int | None = None
    error: Exception | None = None
    at: int = field(default=0, init=False)
    largest: int = field(default=0, init=False)

    def read(self, size=-1, /):
        self.largest = max(self.largest, size)
        if self.fail_at is not None and self.at >= self.fail_at:
            assert self.error is not None
            raise self.error
        end = len(self.data) if size < 0 else min(self.at + min(size, self.most), len(self.data))
        if self.fail_at is not None:
            end = min(end, self.fail_at)
        piece = self.data[self.at : end]
        self.at = end
        return piece
