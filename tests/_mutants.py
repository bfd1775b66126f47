"""Files of every format that is read, and broken copies of them, each made from a number.

A mutation is random bytes, or one that knows the format: a number in a header that is negative, huge or none, a
checksum that is right all the same, a footer that lies. Whatever is done, `Mutant.certain` says how many samples lie
wholly before it.
"""

import bz2
import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

__all__ = ["Mutant", "Original", "mutant", "originals"]

Random = random.Random
Mutate = Callable[[bytes, Random], bytes]

BLOCK: Final = 512  # of tar


@dataclass(frozen=True)
class Original:
    """A file as its writer made it.

    Attributes:
        name: What kind of file, and of which writer.
        suffix: Of its path: says the format.
        content: Before it was compressed.
        packed: The bytes of the file.
        known: For each sample, in order, how far the content must be intact for that sample to come.
        footer: Bytes at the end of the file that must be intact for any sample to come.
        pages: Where pages begin in it.
    """

    name: str
    suffix: str
    content: bytes
    packed: bytes
    known: tuple[int, ...]
    footer: int = 0
    pages: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mutant:
    """A broken copy.

    Attributes:
        seed: Makes it again.
        original: Of what.
        data: The bytes of the file.
        story: What was done.
        certain: So many samples, from the first on, lie before what was done.
    """

    seed: int
    original: Original
    data: bytes
    story: str
    certain: int


def mutant(seed: int) -> Mutant:
    """The same for the same number."""
    rng = Random(seed)
    families = _families()
    family = families[seed % len(families)]
    original = rng.choice(family)
    packs = original.content is not original.packed
    inside = packs and rng.random() < 0.5
    mutations = _mutations(original, rng.choice(family), inside)
    before = data = original.content if inside else original.packed
    names = []
    while data == before or rng.random() < 0.3:
        mutate = rng.choice(mutations)
        data = mutate(data, rng)
        names.append(getattr(mutate, "func", mutate).__name__.strip("_"))
    prefix = _common(before, data)
    if inside:
        data = _pack(original.suffix, data)
    elif packs:
        prefix = len(_unpacked(original.suffix, before[:prefix]))
    certain = sum(1 for _ in takewhile(lambda end: end <= prefix, original.known))
    if original.footer and before[-original.footer :] != data[-original.footer :]:
        certain = 0
    where = "in the content" if inside else "in the file"
    return Mutant(seed, original, data, f"{original.name}: {', '.join(names)} {where}, at byte {prefix}", certain)


@cache
def originals() -> tuple[Original, ...]:
    """All of them."""
    return tuple(original for family in _families() for original in family)


@cache
def _families() -> tuple[tuple[Original, ...], ...]:
    """Those of one format, so that each format gets as many mutants."""
    tars = [_tar(name, format) for name, format in _TAR_FORMATS.items()]
    lines = [_json_lines(), _text_lines()]
    return (
        tuple(tars),
        tuple(_packed(tar, ".tar.gz") for tar in tars),
        tuple(_packed(tar, ".tar.zst") for tar in tars),
        tuple(_parquet(**options) for options in _PARQUET_OPTIONS),
        tuple(lines),
        tuple(_packed(one, f"{one.suffix}.gz") for one in lines),
        tuple(_packed(one, f"{one.suffix}.zst") for one in lines),
    )


def _common(one: bytes, other: bytes) -> int:
    """How many bytes at the beginning are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _mutations(original: Original, other: Original, inside: bool) -> list[Mutate]:
    """What may be done to a file, or to its content; half of it knows the format."""
    suffix = original.suffix
    if suffix == ".parquet":
        special: Sequence[Mutate] = (*_PARQUET, partial(_page_header, original.pages))
    elif suffix.endswith(".gz") and not inside:
        special = _GZIP
    elif suffix.endswith(".zst") and not inside:
        special = _ZSTD
    else:
        special = _TAR if ".tar" in suffix else _LINES
    return [*special, *special, *_ANY, partial(_splice, other.content if inside else other.packed)]


# -- what can be done to any bytes -------------------------------------------------------------------------------------


def _flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, rng: Random) -> bytes:
    return _put(data, _place(data, rng), _noise(rng))


def _number(data: bytes, rng: Random) -> bytes:
    """One of the numbers that programs do not expect, as a machine writes it."""
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice((0, 1, -1, 1 << (8 * width - 1), (1 << (8 * width - 1)) - 1)) % (1 << 8 * width)
    return _put(data, _place(data, rng), value.to_bytes(width, rng.choice(("little", "big"))))


def _insert(data: bytes, rng: Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + _noise(rng) + data[at:]


def _append(data: bytes, rng: Random) -> bytes:
    return data + _noise(rng)


def _truncate(data: bytes, rng: Random) -> bytes:
    at = _place(data, rng)
    return data[: at - at % rng.choice((1, 1, 16, BLOCK))]


def _delete(data: bytes, rng: Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def _duplicate(data: bytes, rng: Random) -> bytes:
    start, stop = _range(data, rng)
    at = rng.choice((stop, _place(data, rng)))
    return data[:at] + data[start:stop] + data[at:]


def _splice(other: bytes, data: bytes, rng: Random) -> bytes:
    """The beginning of one and the end of another."""
    at = _place(data, rng)
    return data[:at] + other[rng.choice((at, _place(other, rng))) :]


def _put(data: bytes, at: int, new: bytes) -> bytes:
    """`data` with `new` written over it from `at` on."""
    return data[:at] + new + data[at + len(new) :]


def _place(data: bytes, rng: Random) -> int:
    return rng.randrange(len(data) + 1)


def _range(data: bytes, rng: Random) -> tuple[int, int]:
    start = _place(data, rng)
    return start, min(len(data), start + rng.choice((1, 8, 100, BLOCK, 2000)))


def _noise(rng: Random) -> bytes:
    length = rng.choice((1, 4, 16, BLOCK, 1500))
    kind = rng.randrange(4)
    return rng.randbytes(length) if kind == 3 else (b"\0", b"\xff", b"\n")[kind] * length


_ANY: Final[Sequence[Mutate]] = (_flip, _overwrite, _number, _insert, _append, _truncate, _delete, _duplicate)

# -- tar ---------------------------------------------------------------------------------------------------------------

TarFormat = Literal[0, 1, 2]

_TAR_FORMATS: Final[dict[str, TarFormat]] = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}

_FIELDS: Final = {  # of a header: where, and how long
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "kind": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "major": (329, 8),
    "prefix": (345, 155),
    "sparse": (386, 96),
    "extended": (482, 1),
    "real size": (483, 12),
}
_KINDS: Final = b"0000\x007123456xxXgLKSVMNDA~"


def _tar(name: str, format: TarFormat) -> Original:
    """Samples, and between them everything else that an archive may hold.

    What stands between samples has a name that begins with "odd": whether these are samples or errors is not what is
    tested here.
    """
    file = io.BytesIO()
    rng = Random(name)
    starts: list[int] = []  # of samples
    firsts: list[int] = []  # where the first member of each ends
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for number in range(12):
            for odd in _odd_members(number, format):
                tar.fileobj.write(odd)
                tar.offset += len(odd)
            stem = f"{'f' * 60}/{'g' * 60}/{number:04}" if number % 4 == 1 else f"{number:04}"
            members = {
                "json": json.dumps({"number": number, "text": "ä" * number}).encode(),
                "txt": f"{number} ".encode() * 50,
                "bin": rng.randbytes(rng.choice((0, 511, 512, 513, 1500))),
            }
            starts.append(tar.offset)
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size = len(content)
                info.mtime = 1 << 34 if format != tarfile.USTAR_FORMAT and number % 5 == 2 else 1
                if format == tarfile.PAX_FORMAT and number % 3 == 0:
                    info.pax_headers = {"comment": "ü" * 20, "size": str(len(content))}
                tar.addfile(info, io.BytesIO(content))
                if len(firsts) < len(starts):
                    firsts.append(tar.offset)
        end = tar.offset
    content = file.getvalue()
    return Original(f"tar {name}", ".tar", content, content, (*firsts[1:], end + 2 * BLOCK))


def _odd_members(number: int, format: TarFormat) -> Iterator[bytes]:
    """What comes before the sample with this number."""

    def header(name: str, kind: bytes, **fields: Any) -> bytes:
        info = tarfile.TarInfo(f"odd/{name}")
        info.type = kind
        for field, value in fields.items():
            setattr(info, field, value)
        return info.tobuf(format)

    if number == 2:
        yield header("folder", tarfile.DIRTYPE)
    elif number == 4:
        yield header("link.txt", tarfile.SYMTYPE, linkname="../elsewhere" * (20 if format else 1))
        yield header("hard.txt", tarfile.LNKTYPE, linkname="0001.txt")
    elif number == 6:
        yield header("pipe.txt", tarfile.FIFOTYPE)
        yield header("device.txt", tarfile.CHRTYPE, devmajor=1, devminor=3)
    elif number == 8 and format == tarfile.PAX_FORMAT:
        records = _record("comment", "for all") + _record("mtime", "1.5")
        info = tarfile.TarInfo("odd/global")
        info.type, info.size = tarfile.XGLTYPE, len(records)
        yield info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(BLOCK, b"\0")
        sparse = _record("GNU.sparse.major", "1") + _record("GNU.sparse.minor", "0")
        sparse += _record("GNU.sparse.name", "odd/sparse.txt") + _record("GNU.sparse.realsize", "100000")
        info = tarfile.TarInfo("odd/GNUSparseFile.0/sparse.txt")
        info.type, info.size = tarfile.XHDTYPE, len(sparse)
        yield info.tobuf(tarfile.USTAR_FORMAT) + sparse.ljust(BLOCK, b"\0")
        yield header("GNUSparseFile.0/sparse.txt", tarfile.REGTYPE, size=2 * BLOCK)
        yield b"1\n99488\n512\n".ljust(BLOCK, b"\0") + b"s" * BLOCK
    elif number == 8 and format == tarfile.GNU_FORMAT:
        block = bytearray(header("sparse.txt", b"S", size=BLOCK))
        block[386:410] = b"%011o\0%011o\0" % (1 << 20, BLOCK)
        block[482] = 1
        block[483:495] = b"%011o\0" % (2 << 20)
        yield _with_checksum(bytes(block)) + (b"%011o\0%011o\0" % (2 << 20, 0)).ljust(BLOCK, b"\0") + b"s" * BLOCK


def _record(key: str, value: str) -> bytes:
    """Of a pax header."""
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def _with_checksum(block: bytes) -> bytes:
    total = sum(block[:148]) + sum(block[156:]) + 256
    return block[:148] + b"%06o\0 " % total + block[156:]


def _headers(content: bytes) -> list[int]:
    """Where headers are."""
    found = []
    for at in range(0, len(content) - BLOCK + 1, BLOCK):
        block = content[at : at + BLOCK]
        if block[257:262] == b"ustar" and block[148:156] == _with_checksum(block)[148:156]:
            found.append(at)
    return found


def _header_field(content: bytes, rng: Random) -> bytes:
    """Another value in a field of a header, most often with a checksum that says it is right."""
    headers = _headers(content)
    if not headers:
        return _flip(content, rng)
    at = rng.choice(headers)
    field = rng.choice(("size", "size", "size", "kind", "kind", *_FIELDS))
    start, length = _FIELDS[field]
    value = rng.choice(_KINDS).to_bytes() if field == "kind" else _field_value(length, rng)
    block = _put(content[at : at + BLOCK], start, value)
    return _put(content, at, block if field == "checksum" or rng.random() < 0.1 else _with_checksum(block))


_NO_NUMBERS: Final = (
    *(b"-1", b"-0", b"+5", b"xx", b"0x10", b"1_0", b"8", b"1 2", b" 7 ", b"", b"\xd9\xa1", b"1e3", b".5"),
)
_PAX_VALUES: Final = (
    *("-1536", "-1", "0", "1", "511", "1536", str(1 << 62), str(1 << 64), "9" * 5000, "", "x", "1.5", "1e3", " 8 "),
    *("٣", "+5", "1_0", "0x10", "a\0b.txt", "../up.txt", "/abs.txt", "odd/x.txt", "a" * 5000 + ".txt"),
)
_PAX_KEYS: Final = (
    *("size", "size", "path", "linkpath", "mtime", "hdrcharset", "GNU.sparse.major", "GNU.sparse.realsize"),
    *("GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.name", "SCHILY.realsize", ""),
)


def _field_value(length: int, rng: Random) -> bytes:
    """What may be found where a number is expected."""
    octal = b"%0*o" % (length - 1, rng.choice((0, 1, 511, 512, 513, 1 << 16, 8 ** (length - 1) - 1))) + b"\0"
    base_256 = rng.choice((0, 1, 1 << 31, 1 << 62, 1 << 63, -1, -512, -(1 << 62))) % (1 << (8 * length - 1))
    text = rng.choice((*_NO_NUMBERS, b"-%o" % BLOCK))
    return rng.choice(
        (
            octal[-length:],
            (base_256 | 1 << (8 * length - 1)).to_bytes(length, "big"),
            text.rjust(length - 1, b"0")[: length - 1] + b"\0",
            text.ljust(length, b"\0")[:length],
            text.rjust(length, b" ")[:length],
            rng.choice((b"\xff", b"7", b"9", b" ", b"a")) * length,
            rng.randbytes(length),
        )
    )


def _pax_record(content: bytes, rng: Random) -> bytes:
    """A pax header in front of a member: right but for one record."""
    headers = _headers(content)
    if not headers:
        return _flip(content, rng)
    at = rng.choice(headers)
    records = _record(rng.choice(_PAX_KEYS), rng.choice(_PAX_VALUES))
    if rng.random() < 0.3:
        end = records.index(b" ")
        length = rng.choice((b"-5", b"0", b"1", b"9", b"999999", b"9" * 5000, b"", b"x", b"+1", b" 1", b"\xd9\xa1"))
        records = rng.choice((length + records[end:], records[:-1], records[:end] + records[end + 1 :], records + b"5"))
    info = tarfile.TarInfo("odd/pax")
    info.type, info.size = rng.choice((b"x", b"x", b"X", b"g")), len(records)
    header = info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % BLOCK)
    return content[:at] + header + content[at:]


def _long_name(content: bytes, rng: Random) -> bytes:
    """A GNU long name in front of a member."""
    headers = _headers(content)
    if not headers:
        return _flip(content, rng)
    at = rng.choice(headers)
    name = rng.choice((b"", b"\0", b"odd/x.txt", b"odd/" + b"a" * 5000 + b".txt", b"\xff\xfe.txt", b"../../etc/x.txt"))
    info = tarfile.TarInfo("odd/long")
    info.type, info.size = rng.choice((b"L", b"L", b"K")), len(name)
    header = info.tobuf(tarfile.USTAR_FORMAT) + name + bytes(-len(name) % BLOCK)
    times = rng.choice((1, 1, 2, 30))
    return content[:at] + header * times + content[at:]


def _blocks(content: bytes, rng: Random) -> bytes:
    """Whole blocks come twice, are missing, or are zeros: an end mark in the middle."""
    at, stop = (place - place % BLOCK for place in sorted((_place(content, rng), _place(content, rng))))
    stop = min(stop, at + BLOCK * rng.choice((1, 2, 5)))
    moved = rng.choice((b"", content[at:stop] * 2, bytes(stop - at), content[at:stop] + bytes(2 * BLOCK)))
    return content[:at] + moved + content[stop:]


_TAR: Final[Sequence[Mutate]] = (_header_field, _header_field, _pax_record, _long_name, _blocks)

# -- lines -------------------------------------------------------------------------------------------------------------


def _json_lines() -> Original:
    values = [
        {"number": number, "text": "ä" * (number % 3), "list": [number / 7, None, True, {"deep": [[number]]}]}
        for number in range(40)
    ]
    texts = [json.dumps(value, ensure_ascii=number % 2 == 0) for number, value in enumerate(values)]
    return _lines("json", ".jsonl", texts)


def _text_lines() -> Original:
    return _lines("text", ".txt", [f"line {number} {'ß' * (number % 5)}" for number in range(40)])


def _lines(name: str, suffix: str, texts: list[str]) -> Original:
    known = []
    content = b""
    for text in texts:
        content += text.encode() + b"\n"
        known.append(len(content))
    return Original(f"{name} lines", suffix, content, content, tuple(known))


_NO_JSON: Final = (
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"[" * 100_000 + b"]" * 100_000,
    b"[" * 900 + b"]" * 900,
    b"\0",
    b'"\0"',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe[\0]\0",
    b'"\\ud800"',
    b'"\xed\xa0\x80"',
    b"9" * 5000,
    b"-" + b"9" * 5000,
    b"[" + b"9" * 5000 + b"]",
    b"1e999",
    b"1" + b"0" * 300 + b".5e-400",
    b"1e" + b"9" * 5000,
    b"NaN",
    b"-Infinity",
    b'{"a":1,"a":2}',
    b'"open',
    b"\x0b",
    b" \t ",
    b"\r",
    b"{}\r{}",
    b"\xe2\x80\xa8",
    b"1 2",
    b"x" * 300_000,
    b"[" + b"1," * 50_000 + b"1]",
    b"nul",
    b"tru",
    b"-",
    b"",
)


def _line(content: bytes, rng: Random) -> bytes:
    """A line that is no JSON, or JSON that few expect."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at : at + rng.randrange(2)] = [rng.choice(_NO_JSON)]
    return b"\n".join(lines)


def _joined(content: bytes, rng: Random) -> bytes:
    """Lines without their ends, or with others."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    stop = at + rng.choice((2, 5, 40))
    joined = rng.choice((b"", b"\r", b"\r\n", b"\0", b"\n\n")).join(lines[at:stop])
    return b"\n".join([*lines[:at], joined, *lines[stop:]])


_LINES: Final[Sequence[Mutate]] = (_line, _line, _joined)

# -- gzip and zstd -----------------------------------------------------------------------------------------------------


def _packed(original: Original, suffix: str) -> Original:
    packed = _pack(suffix, original.content)
    return Original(f"{original.name} in {suffix}", suffix, original.content, packed, original.known)


def _pack(suffix: str, content: bytes) -> bytes:
    """In three frames, each with other headers."""
    cuts = (0, len(content) // 3, 2 * len(content) // 3, len(content))
    pack = _gzip_member if suffix.endswith(".gz") else _zstd_frame
    return b"".join(pack(number, content[cuts[number] : cuts[number + 1]]) for number in range(3))


def _gzip_member(number: int, content: bytes) -> bytes:
    """The second one has all the optional fields (RFC 1952, 2.3)."""
    header = b"\x1f\x8b\x08" + (b"\x1f" if number == 1 else b"\0") + b"\0\0\0\0\0\x03"
    if number == 1:
        header += b"\x06\0AB\x02\0xy" + b"a name\0" + b"a comment\0"
        header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    compressor = zlib.compressobj(level=6, wbits=-15)
    body = compressor.compress(content) + compressor.flush()
    return header + body + struct.pack("<II", zlib.crc32(content), len(content) % (1 << 32))


def _zstd_frame(number: int, content: bytes) -> bytes:
    """With and without its length and checksum; the second one after a frame to be skipped."""
    parameters = zstandard.ZstdCompressor(write_checksum=number != 1, write_content_size=number != 2)
    if number != 2:
        frame = parameters.compress(content)
    else:
        compressor = parameters.compressobj()
        frame = compressor.compress(content) + compressor.flush()
    return (b"\x50\x2a\x4d\x18\x05\0\0\0skip!" if number == 1 else b"") + frame


@cache
def _bomb(pack: Callable[[int, bytes], bytes]) -> bytes:
    """Few bytes that become more than may be held."""
    return pack(0, bytes(72 << 20))


def _unpacked(suffix: str, packed: bytes) -> bytes:
    """What the beginning of a compressed file gives, as far as its format lets it be known."""
    content = b""
    while packed:
        decoder: Any
        if suffix.endswith(".gz"):
            decoder = zlib.decompressobj(wbits=31)
        else:
            decoder = zstandard.ZstdDecompressor().decompressobj()
        content += decoder.decompress(packed)
        if not decoder.eof:
            break
        packed = decoder.unused_data
    return content


def _starts(data: bytes, magic: bytes) -> list[int]:
    found = []
    at = data.find(magic)
    while at >= 0:
        found.append(at)
        at = data.find(magic, at + 1)
    return found


def _gzip_header(data: bytes, rng: Random) -> bytes:
    """Method, flags, lengths of the optional fields."""
    at = rng.choice(_starts(data, b"\x1f\x8b") or [0]) + rng.choice((2, 3, 3, 3, 4, 9, 10, 11, 12, 14))
    return _put(data, at, rng.choice((b"\0", b"\1", b"\2", b"\4", b"\x08", b"\x10", b"\xe0", b"\xff", b"\xff\xff")))


def _gzip_trailer(data: bytes, rng: Random) -> bytes:
    """Checksum and length."""
    ends = [*_starts(data, b"\x1f\x8b\x08")[1:], len(data)]
    at = max(0, rng.choice(ends) - rng.choice((4, 8)))
    return _put(data, at, rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80", rng.randbytes(4))))


def _gzip_padding(data: bytes, rng: Random) -> bytes:
    """Something between members or after the last: zeros, an empty member, another format."""
    at = rng.choice([*_starts(data, b"\x1f\x8b\x08"), len(data)])
    empty = _gzip_member(rng.randrange(3), b"")
    what = (b"\0", b"\0" * 1000, empty, empty * 100, b"PK\3\4", b"\x1f", b"\x1f\x8b", bz2.compress(b"bz"), b"\n")
    return data[:at] + rng.choice((*what, _bomb(_gzip_member))) + data[at:]


def _gzip_blocks(data: bytes, rng: Random) -> bytes:
    """Another kind of block in the deflate stream: stored with a wrong length, the reserved one, broken tables."""
    at = rng.choice(_starts(data, b"\x1f\x8b\x08") or [0]) + 10 + rng.choice((0, 0, 1, 5))
    values = (b"\0\xff\xff\0\0", b"\x07", b"\x06", b"\1\5\0\xfa\xff", b"\x05\xff\xff\xff", b"\x03\0")
    return _put(data, at, rng.choice(values))


_GZIP: Final[Sequence[Mutate]] = (_gzip_header, _gzip_trailer, _gzip_padding, _gzip_blocks)

_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


def _zstd_header(data: bytes, rng: Random) -> bytes:
    """Frame header: descriptor, window, dictionary, content size (RFC 8878, 3.1.1)."""
    at = rng.choice(_starts(data, _ZSTD_MAGIC) or [0]) + rng.choice((3, 4, 4, 4, 5, 5, 6, 7, 8))
    values = (b"\0", b"\x20", b"\x60", b"\xa0", b"\xe0", b"\1", b"\2", b"\3", b"\4", b"\x08", b"\x88", b"\xf8", b"\xff")
    return _put(data, at, rng.choice((*values, b"\xff" * 8, b"\xff" * 4)))


def _zstd_block(data: bytes, rng: Random) -> bytes:
    """Block header: last, kind, size."""
    at = rng.choice(_starts(data, _ZSTD_MAGIC) or [0]) + rng.choice((5, 6, 7, 8, 9))
    size = rng.choice((0, 1, 100, 1 << 17, (1 << 17) + 1, (1 << 21) - 1))
    return _put(data, at, (size << 3 | rng.randrange(8)).to_bytes(3, "little"))


def _zstd_frames(data: bytes, rng: Random) -> bytes:
    """Something between frames or after the last: frames to be skipped, an empty frame, old versions, zeros."""
    at = rng.choice([*_starts(data, _ZSTD_MAGIC), len(data)])
    skip = b"\x5f\x2a\x4d\x18"
    dictionary = _ZSTD_MAGIC + b"\x23\x10\xff\xff\xff\x7f\1\0\0"
    what = (skip + b"\0\0\0\0", skip + b"\xff\xff\xff\xff", skip + b"\x01\0\0\0", _zstd_frame(0, b""), dictionary)
    more = (
        b"\x27\xb5\x2f\xfd",
        b"\x37\xa4\x30\xec",
        b"\0" * 100,
        _zstd_frame(0, b"") * 100,
        _ZSTD_MAGIC,
        _bomb(_zstd_frame),
    )
    return data[:at] + rng.choice(what + more) + data[at:]


_ZSTD: Final[Sequence[Mutate]] = (_zstd_header, _zstd_header, _zstd_block, _zstd_frames)

# -- Parquet -----------------------------------------------------------------------------------------------------------

_PARQUET_OPTIONS: Final[Sequence[dict[str, Any]]] = (
    {"compression": "none", "use_dictionary": False},
    {"compression": "none", "data_page_version": "2.0", "write_page_checksum": True},
    {"compression": "snappy", "write_page_index": True},
    {"compression": "gzip", "store_schema": False},
    {"compression": "zstd", "data_page_size": 50, "write_batch_size": 5},
    {"compression": "brotli", "version": "1.0"},
    {"compression": "lz4", "data_page_version": "2.0", "use_byte_stream_split": ["float"], "use_dictionary": ["text"]},
)

PARQUET_ROWS: Final = 40
GROUP_ROWS: Final = 10


def _parquet(**options: Any) -> Original:
    rows = range(PARQUET_ROWS)
    table = pa.table(
        {
            "number": pa.array(rows, pa.int64()),
            "small": pa.array([row % 100 for row in rows], pa.int8()),
            "float": pa.array([row / 7 for row in rows], pa.float32()),
            "flag": pa.array([row % 3 == 0 for row in rows]),
            "text": pa.array(["ä" * (row % 4) for row in rows]),
            "maybe": pa.array([None if row % 4 == 1 else f"{row}" for row in rows], pa.large_string()),
            "bytes": pa.array([bytes([row]) * row for row in rows]),
            "list": pa.array([[row] * (row % 3) for row in rows], pa.list_(pa.int32())),
            "vector": pa.array([[row, row, row] for row in rows], pa.list_(pa.float64(), 3)),
            "struct": pa.array([{"a": row, "b": [{"c": "x"}]} for row in rows]),
            "time": pa.array([row * 1_000_003 for row in rows], pa.timestamp("us")),
            "date": pa.array(rows, pa.date32()),
            "decimal": pa.array(list(rows), pa.decimal128(20, 2)),
            "word": pa.array(["one", "two"] * (PARQUET_ROWS // 2)).dictionary_encode(),
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=GROUP_ROWS, **options)
    data = file.getvalue()
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    known: list[int] = []
    pages: list[int] = []
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(at) for at in range(metadata.num_columns)]
        end = max(_begin(column) + column.total_compressed_size for column in columns)
        known += [end] * metadata.row_group(group).num_rows
        pages += [place for column in columns for place in {_begin(column), column.data_page_offset}]
    said = ", ".join(f"{name}={value}" for name, value in options.items())
    name, footer = f"parquet {said}", _footer_bytes(data) + 8
    return Original(name, ".parquet", data, data, tuple(known), footer, tuple(sorted(pages)))


def _begin(column: Any) -> int:
    return int(column.dictionary_page_offset or column.data_page_offset)


def _footer_bytes(data: bytes) -> int:
    return int.from_bytes(data[-8:-4], "little")


def _footer_length(data: bytes, rng: Random) -> bytes:
    """The last eight bytes: length and magic."""
    length = _footer_bytes(data)
    near = length - 1, length + 1, length // 2, len(data) - 8, len(data)
    value = rng.choice((*near, 0, 1, 7, 8, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)) % (1 << 32)
    magic = rng.choice((b"PAR1", b"PAR1", b"PARE", b"PAR2", b"\0\0\0\0"))
    return data[:-8] + value.to_bytes(4, "little") + magic


def _footer_number(data: bytes, rng: Random) -> bytes:
    """Another number, length or type in the footer, whose own length is right again."""
    length = _footer_bytes(data)
    start = len(data) - 8 - length
    places = _thrift_places(data, start) if start > 0 else []
    if not places:
        return _flip(data, rng)
    footer = data[start:-8]
    for _ in range(rng.choice((1, 1, 1, 3))):
        at, end = (place - start for place in rng.choice(places))
        footer = footer[:at] + _thrift_value(end - at, rng) + footer[end:]
        places = _thrift_places(data[:start] + footer, start) or places
    return data[:start] + footer + len(footer).to_bytes(4, "little") + data[-4:]


def _page_header(pages: Sequence[int], data: bytes, rng: Random) -> bytes:
    """Another number in the header of a page; what follows stays where it is."""
    places = _thrift_places(data, rng.choice(pages))
    if not places:
        return _flip(data, rng)
    at, end = rng.choice(places)
    return _put(data, at, _thrift_value(end - at, rng))


def _thrift_value(width: int, rng: Random) -> bytes:
    """A number as compact Thrift writes it, or what cannot be one."""
    large = (1 << 31) - 1, -(1 << 31), 1 << 31, (1 << 63) - 1, -(1 << 63), 1 << 40
    value = rng.choice((0, 1, -1, 2, 100, 100_000, *large))
    zigzag = (value << 1) ^ (value >> 63)
    return rng.choice((_varint(zigzag), _varint(zigzag), b"\x80" * 20, b"\xff" * 9 + b"\x01", rng.randbytes(width)))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _thrift_places(data: bytes, at: int) -> list[tuple[int, int]]:
    """Where a struct in compact Thrift has its numbers, lengths and types; those before anything that makes no sense.

    Source: Apache Thrift, "Thrift Compact protocol encoding".
    """
    places: list[tuple[int, int]] = []

    def number(at: int) -> tuple[int, int]:
        end = at
        while data[end] & 0x80:
            end += 1
        places.append((at, end + 1))
        return sum((byte & 0x7F) << 7 * place for place, byte in enumerate(data[at : end + 1])), end + 1

    def skip(kind: int, at: int) -> int:
        """The end of a value; of one in a list a bool is a byte."""
        if kind in (1, 2, 3):
            return at + 1
        if kind in (4, 5, 6):
            return number(at)[1]
        if kind == 7:
            return at + 8
        if kind == 8:
            length, at = number(at)
            return at + length
        if kind in (9, 10):
            places.append((at, at + 1))
            size, kind = data[at] >> 4, data[at] & 15
            at += 1
            if size == 15:
                size, at = number(at)
            for _ in range(size):
                at = skip(kind, at)
            return at
        if kind == 12:
            return fields(at)
        raise IndexError(kind)

    def fields(at: int) -> int:
        while data[at]:
            places.append((at, at + 1))
            kind, delta = data[at] & 15, data[at] >> 4
            at += 1
            if not delta:
                at = number(at)[1]
            if kind not in (1, 2):
                at = skip(kind, at)
        return at + 1

    with suppress(IndexError, RecursionError):
        fields(at)
    return places


_PARQUET: Final[Sequence[Mutate]] = (_footer_number, _footer_number, _footer_length)
