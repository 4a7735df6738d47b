"""Damage to files: of their bytes, and of what they say. The same generator, the same damage."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlp_plugins.runtime.artifacts import checksum, write_tensors

_SHARE_OF_BYTES = 0.35
"""How often a file that could be changed in what it says is changed in its bytes only."""


def bytes_only(rng: Random) -> bool:
    """Whether this time only bytes are damaged."""
    return rng.random() < _SHARE_OF_BYTES


def damaged_bytes(rng: Random, data: bytes) -> bytes:
    """The bytes cut off, flipped, with NUL or a part of them once more, or others at the end."""
    size = max(1, len(data))
    # The beginning of a file says what the rest means: half of the damage is there.
    at = rng.randrange(min(size, 200)) if rng.random() < 0.5 else rng.randrange(size)
    length = min(1 << rng.randrange(12), size)
    kind = rng.randrange(8)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[: size - 1 - rng.randrange(min(64, size))]
    if kind == 2:
        return data[:at] + bytes(length) + data[at:]
    if kind == 3:
        return data[:at] + bytes(length) + data[at + length :]
    if kind == 4:
        return data[:at] + data[at : at + length] + data[at:]
    if kind == 5:
        return data[:at] + data[at + length :]
    if kind == 6:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    changed = bytearray(data or b"\0")
    for _ in range(1 << rng.randrange(6)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


_RAW = re.compile(r'"@raw:([^"@]*)@"')


def raw(text: str) -> str:
    """A value that stands in JSON as this text, which no value of Python is written as."""
    return f"@raw:{text}@"


def json_text(value: Any) -> str:
    """JSON of what `damaged_value` gives."""
    return _RAW.sub(lambda found: _written(found[1]), json.dumps(value))


def _written(text: str) -> str:
    """`9*400` is 400 nines, `[*9` and `{*9` is 9 levels of lists or mappings."""
    sign, times, count = text.partition("*")
    if not times:
        return text
    if sign == "[":
        return "[" * int(count) + "]" * int(count)
    if sign == "{":
        return '{"a":' * int(count) + "1" + "}" * int(count)
    return sign * int(count)


ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**30, 1e308, -1e308, 0.5, -0.5, 2.0,
    raw("NaN"), raw("Infinity"), raw("-Infinity"), raw("1e999"), raw("9*400"), raw("9*5000"),
    raw("-1e-999"), "", " ", "\0", "a\0b", "text", "x" * 10_000, "\ud800", "\x1b[31mred", "%s {0}",
    "../../outside", "/etc/hostname", "~", "nan", "1", "é", "9" * 400,
    [], {}, [[]], [None], [-1], [1.5], ["a"], [0, 0], [2**40, 2**40], [[1, 2], [3]], [raw("9*400")],
    [1] * 1000, {"self": 1}, {"": None}, {"a": {"b": {"c": []}}}, {"1": 2},
    raw("[*100"), raw("{*100"), raw("[*3000"), raw("{*3000"), raw("[*200000"), raw("{*200000"),
)  # fmt: skip
"""Values that nobody expects anywhere."""
_KEYS = ("self", "cls", "unknown", "", "__class__", "\0", "schema", "kind", "model", "name", "0")


def odd(rng: Random) -> Any:
    """A value that nobody expects."""
    return rng.choice(ODD)


def damaged_value(rng: Random, value: Any) -> Any:
    """What JSON says with one to three changes of types, keys, sizes and depths."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(rng, json.loads(json.dumps(value)))  # no part stands there twice
    return value


def _changed(rng: Random, value: Any) -> Any:
    inside = list(value.items()) if isinstance(value, dict) else []
    inside = list(enumerate(value)) if isinstance(value, list) else inside
    if inside and rng.random() < 0.85:
        key, inner = rng.choice(inside)
        value[key] = _changed(rng, inner)
        return value
    if isinstance(value, dict) and rng.random() < 0.7:
        return _other_keys(rng, value)
    if isinstance(value, list) and rng.random() < 0.7:
        return _other_items(rng, value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice(
            (-value, value * 1000, value + 1, value - 1, str(value), [value], value / 3)
        )
    if isinstance(value, str) and not value.startswith("@raw:") and rng.random() < 0.3:
        return rng.choice(
            (value + "x", value[: len(value) // 2], [value], {value: value}, value * 50)
        )
    return odd(rng)


def _other_keys(rng: Random, value: dict[str, Any]) -> Any:
    kind = rng.randrange(5)
    if kind == 0 or not value:
        return {**value, rng.choice(_KEYS): odd(rng)}
    key = rng.choice(list(value))
    if kind == 1:
        return {name: inner for name, inner in value.items() if name != key}
    if kind == 2:
        return {f"{name}x" if name == key else name: inner for name, inner in value.items()}
    if kind == 3:
        return list(value.values())
    return {**value, key: value[rng.choice(list(value))]}


def _other_items(rng: Random, value: list[Any]) -> Any:
    kind = rng.randrange(5)
    if kind == 0 or not value:
        return [*value, odd(rng)]
    if kind == 1:
        return value[:-1]
    if kind == 2:
        return [*value, value[-1]]
    if kind == 3:
        return dict(enumerate(value))
    return value[::-1]


def damaged_json(rng: Random, data: bytes) -> bytes:
    """A file of JSON, with other bytes or other values."""
    if bytes_only(rng):
        return damaged_bytes(rng, data)
    return json_text(damaged_value(rng, json.loads(data))).encode()


def damaged_lines(rng: Random, data: bytes) -> bytes:
    """A file of JSON lines, with other bytes, or other values in one or in all lines."""
    if bytes_only(rng):
        return damaged_bytes(rng, data)
    lines = [json.loads(line) for line in data.splitlines()]
    at = rng.randrange(len(lines))
    if rng.random() < 0.3:
        value = odd(rng)
        key = rng.choice(list(lines[at])) if isinstance(lines[at], dict) else None
        lines = [{**line, key: value} if isinstance(line, dict) else line for line in lines]
    else:
        lines[at] = damaged_value(rng, lines[at])
    return "\n".join(map(json_text, lines)).encode()


_YAML = (
    "!!python/object/apply:os.getcwd []", "!!binary xx", "!!timestamp x", "2020-99-99",
    "2020-01-01", "190:20:30", "0o8", "08", "1e400", ".inf", "-.inf", ".nan", "&a [*a]", "*a",
    "{<<: 1}", "{? [1]: 2}", "{? {a: 1}: 2}", "!!set {a, b}", "!!omap [a: 1]", "!!int x",
    "!!int ''",
    "!!float ''", "!!float 1:x", "!!bool maybe", "!!null x", "!!str 1", "!unknown x", "\0",
    '"\\ud800"', '"\\0"', "\ufeff", "\t", "0x" + "f" * 400, "9" * 400, "9" * 5000, "0." + "1" * 400,
    "0b" + "1" * 20000, "[" * 50, "[" * 3000, "{a: " * 50, "{a: " * 3000, "- " * 3000, "'", "|",
    ">",
    "|9", "? ", "---", "...", "%YAML 9.9", "@", "`", "[1, 2", "{a: 1", "1_000", "+1", "~", "yes",
    "=", "<<", "!!pairs [a: 1]", "!!seq 1", "!!map 1", "!!map [1]", "!!seq {a: 1}", "9e9e9", "-",
    ":",
)  # fmt: skip


def damaged_yaml(rng: Random, data: bytes) -> bytes:
    """A file of YAML, with other bytes, other values, or what only YAML can say."""
    import yaml

    if bytes_only(rng):
        return damaged_bytes(rng, data)
    if rng.random() < 0.6:
        return json_text(damaged_value(rng, yaml.safe_load(data))).encode()
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    if not colon or rng.random() < 0.2:
        lines.insert(at, rng.choice(_YAML))
    else:
        lines[at] = f"{key}: {rng.choice(_YAML)}"
    return "\n".join(lines).encode()


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata of a safetensors file, and its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return dict(file.metadata() or {}), tensors


def write_damaged_artifact(rng: Random, source: Path, target: Path) -> None:
    """A safetensors file with other bytes, another header, or other tensors and their checksum."""
    if bytes_only(rng):
        target.write_bytes(damaged_bytes(rng, source.read_bytes()))
        return
    if rng.random() < 0.15:
        target.write_bytes(_other_layout(rng, source.read_bytes()))
        return
    metadata, tensors = read_header(source)
    (key, text), *_ = metadata.items()
    header = json.loads(text) if text.startswith("{") else {"format": text}
    if tensors and rng.random() < 0.4:
        tensors = damaged_tensors(rng, tensors)
        header["checksum"] = checksum(tensors)
    else:
        header = damaged_value(rng, header)
    text = json_text(header)
    if rng.random() < 0.03:
        key, text = rng.choice(((f"{key}x", text), (key, rng.choice(("", "{", "[]", "1", "null")))))
    write_tensors(target, tensors, {key: text})


def damaged_tensors(rng: Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of other widths, kinds, values and names; some lost, some more."""
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.randrange(12)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(("x", "", "a|b", f"{name}x", "values:x", "|", "state|x|y"))] = tensor
    elif kind == 2:
        tensors[f"{name}x"] = tensors.pop(name)
    elif kind == 3:
        tensors[name] = tensor.to(rng.choice((torch.float16, torch.int64, torch.uint8, torch.bool)))
    elif kind == 4:
        tensors[name] = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)].clone()
    elif kind == 5:
        tensors[name] = torch.zeros(rng.choice(((), (0,), (0, 3), (2, 0), (1, 1, 1, 1), (2, 7))))
    elif kind == 6:
        tensors[name] = (
            tensor[..., : max(0, tensor.shape[-1] - 1)].clone() if tensor.ndim else tensor
        )
    elif kind == 7:
        tensors[name] = torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(2)
    elif kind == 8:
        tensors[name] = tensor.transpose(0, -1).contiguous() if tensor.ndim > 1 else tensor[None]
    elif kind == 9 and tensor.is_floating_point():
        value = rng.choice((float("nan"), float("inf"), -1.0, 1e30))
        tensors[name] = torch.full_like(tensor, value)
    elif kind == 10:
        one, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
        tensors[one], tensors[other] = tensors[other], tensors[one]
    else:
        tensors[name] = ~tensor if tensor.dtype == torch.uint8 else torch.zeros_like(tensor)
    return tensors


def _other_layout(rng: Random, data: bytes) -> bytes:
    """Another header of a safetensors file before the same bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json_text(damaged_value(rng, json.loads(data[8 : 8 + size]))).encode()
    length = rng.choice((len(header), len(header), len(header), size, 2**40, 0))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def write_damaged_pickle(rng: Random, state: dict[str, Tensor], target: Path) -> None:
    """A file of `torch.save`: other bytes, other members, other tensors, other objects."""
    kind = rng.random()
    if kind < 0.15:
        target.write_bytes(pickle.dumps(_objects(rng, state)) if kind < 0.03 else _pickles(rng))
        return
    content = _objects(rng, state) if kind < 0.65 else dict(state)
    try:
        torch.save(content, target, _use_new_zipfile_serialization=rng.random() < 0.8)
    except Exception:  # torch refuses some of it already
        torch.save(state, target)
    if kind >= 0.65:
        data = target.read_bytes()
        target.write_bytes(_other_members(rng, data) if kind < 0.8 else damaged_bytes(rng, data))


def _objects(rng: Random, state: dict[str, Tensor]) -> Any:
    """A state dict that is none."""
    if rng.random() < 0.15:
        return rng.choice(
            (None, 1, "text", [], {}, (), [state], {"model": None}, {"model": []}, {"model": 1},
             {"model": {}}, {"state_dict": state, "epoch": 1}, {"model": {"model": state}},
             torch.zeros(2), {1: 2}, {None: state}, {"model": state, "model_cfg": 1}, {"a": {1, 2}})
        )  # fmt: skip
    if rng.random() < 0.3:
        changed = damaged_tensors(rng, state)
    else:
        changed = dict(state)
        name = rng.choice(sorted(state))
        every = rng.random() < 0.1
        for each in state if every else [name]:
            with suppress(RuntimeError):  # not every tensor can be of every kind
                changed[each] = rng.choice(_TENSORS)(state[each])
        if rng.random() < 0.05:
            changed["self"] = changed  # type: ignore[assignment]
    return rng.choice(
        (changed, changed, {"model": changed}, {f"module.{n}": t for n, t in changed.items()})
    )


_TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.reshape(1, -1).to_sparse_csr(),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()[:1]]),
    lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()[:1]], layout=torch.jagged),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: torch.zeros(1).expand(t.shape),
    lambda t: torch.zeros(1).expand(2**20, 2**20),
    lambda t: torch.full_like(t.float(), float("nan")),
    lambda t: torch.nn.Parameter(t.float()),
    lambda t: t.float().t() if t.ndim == 2 else t,
    lambda t: t.tolist(),
    lambda t: {"a": t},
    lambda t: [t],
    lambda t: torch.Size([1, 2]),
    lambda t: torch.device("cuda"),
    lambda t: torch.float16,
    lambda t: 10**5000,
    lambda t: None,
    lambda t: b"bytes",
    lambda t: torch.zeros(0),
    lambda t: torch.zeros((), dtype=torch.bool),
    lambda t: t.double(),
    lambda t: -t.float(),
    lambda t: t.bool(),
)


def _pickles(rng: Random) -> bytes:
    """Pickles that `torch.save` never writes."""
    return rng.choice(
        (b"", b"\x80\x02.", b"\x80\x02N.", b"\x80\x02}q\x00.", b"(" * 10_000, b"]" * 10_000 + b".",
         b"\x80\x02" + b"]" + b"q\x00h\x00a" + b".", b"cos\nsystem\n(S'true'\ntR.",
         b"\x80\x02L" + b"9" * 5000 + b"L\n.", b"\x80\x02\x8b\xff\xff\xff\x7f", b"PK\x03\x04",
         b"PK\x05\x06" + bytes(18),
         b"\x80\x02" + b"}q\x00" + b"X\x01\x00\x00\x00ah\x00s" * 100 + b".",
         b"\x80\x02" + b"(" * 2 + b"l" + b"a" * 5, b"\x80\x05\x95" + b"\xff" * 8 + b"N.",
         pickle.dumps(torch.zeros(2)), pickle.dumps({"a_pruning_mask": 1}))
    )  # fmt: skip


def _other_members(rng: Random, data: bytes) -> bytes:
    """A zip archive with one member other, more or lost."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return damaged_bytes(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    kind = rng.randrange(5)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[f"{name.partition('/')[0]}/constants.pkl"] = b""
    elif kind == 2:
        members["../outside"] = b"x"
    else:
        members[name] = damaged_bytes(rng, members[name])
    out = io.BytesIO()
    with zipfile.ZipFile(
        out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return out.getvalue()


IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


def image_bytes(rng: Random) -> bytes:
    """A small image of some kind, whole."""
    mode = rng.choice(("RGB", "RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"))
    image = Image.frombytes("RGB", (24, 20), rng.randbytes(24 * 20 * 3))
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    kind = rng.choice(IMAGES)
    out = io.BytesIO()
    options: dict[str, Any] = {}
    if kind in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((1, 3, 6, 8, 9, 0, 65535))
        options["exif"] = exif
    if kind == "TIFF" and rng.random() < 0.5:
        options["compression"] = rng.choice(("tiff_lzw", "tiff_deflate", "packbits"))
    if kind in ("GIF", "TIFF", "WEBP") and rng.random() < 0.3:
        options |= {"save_all": True, "append_images": [image] * 3}
    try:
        image.save(out, kind, **options)
    except (OSError, ValueError, TypeError, RuntimeError):  # not every format has every mode
        out = io.BytesIO()
        image.convert("RGB").save(out, kind)
    return out.getvalue()


def damaged_image(rng: Random) -> bytes:
    """An image with other bytes, or one that says of itself what is not so."""
    kind = rng.random()
    if kind < 0.7:
        return damaged_bytes(rng, image_bytes(rng))
    sizes = (0, 1, 24, 2**15, 2**16, 2**31 - 1, 2**32 - 1)
    width, height = rng.choice(sizes), rng.choice(sizes)
    if kind < 0.8:
        header = struct.pack(">IIBBBBB", width, height, rng.choice((1, 8, 16)),
                             rng.choice((0, 2, 3, 4, 6)), 0, 0, rng.randrange(2))  # fmt: skip
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
        if rng.random() < 0.3:
            parts.insert(1, (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**27), 1)))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in parts
        )
    if kind < 0.87:
        return b"%s\n%d %d\n%d\n" % (rng.choice((b"P3", b"P4", b"P5", b"P6", b"Pf")), width, height,
                                    rng.choice((0, 255, 65535, 10**9))) + bytes(200)  # fmt: skip
    if kind < 0.94:
        tags = [tag for tag in (256, 257, 258, 259, 262, 273, 277, 278, 279, 317, 322, 339)
                if rng.random() < 0.8]  # fmt: skip
        values = [rng.choice((0, 1, 3, 8, 24, 2**15, 2**31, 2**32 - 1)) for _ in tags]
        entries = (
            struct.pack("<HHII", tag, 4, 1, value) for tag, value in zip(tags, values, strict=True)
        )
        return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(200)
    return rng.choice(
        (b"", b"\0", b"%!PS-Adobe\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a",
         b"GIF89a" + b"\xff" * 20,
         b"BM" + struct.pack("<IIIIIIHH", 54, 0, 54, 40, width, height, 1, 24) + bytes(24),
         b"RIFF\x10\0\0\0WEBPVP8X", b"\xff\xd8\xff" + b"\xe1\xff\xff" * 50)
    )  # fmt: skip


def damaged_shard(rng: Random) -> bytes:
    """A tar of captioned images with other bytes, members, names or captions."""
    out = io.BytesIO()
    mode = rng.choice(("w", "w", "w", "w:gz"))
    as_json = rng.random() < 0.5
    bad = -1 if bytes_only(rng) else rng.randrange(3)
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for number in range(3):
            caption = (
                json.dumps({"caption": "a red", "n": number}).encode() if as_json else b"a red"
            )
            picture, name = image_bytes(rng), f"{number:04}"
            entry = tarfile.TarInfo()
            if number == bad:
                kind = rng.randrange(6)
                if kind == 0 and as_json:
                    caption = json_text(damaged_value(rng, json.loads(caption))).encode()
                elif kind == 1:
                    caption = rng.choice(
                        (b"", b"\xff\xfe", b"\0", b"[" * 10**5, b"9" * 5000, b"{}")
                    )
                elif kind == 2:
                    picture = damaged_image(rng)
                elif kind == 3:
                    name = rng.choice(
                        ("../../outside", "/outside", "a" * 300, "0000", "\0", ".", "é")
                    )
                elif kind == 4:
                    entry.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                                             tarfile.CHRTYPE, tarfile.DIRTYPE, b"Z"))  # fmt: skip
                    entry.linkname = rng.choice(("/etc/hostname", "0000.png", ""))
                else:
                    key = rng.choice(("size", "mtime", "path", "GNU.sparse.map"))
                    entry.pax_headers = {key: rng.choice(("9" * 400, "-1", "x", "", "9" * 30))}
            for ending, content in (("json" if as_json else "txt", caption), ("png", picture)):
                entry.name, entry.size = f"{name}.{ending}", len(content)
                tar.addfile(entry, io.BytesIO(content))
    data = out.getvalue()
    return damaged_bytes(rng, data) if bad < 0 or rng.random() < 0.1 else data


def damaged_csv(rng: Random, data: bytes) -> bytes:
    """A file of comma-separated values with other bytes, fields or quotes."""
    if bytes_only(rng):
        return damaged_bytes(rng, data)
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    change = rng.choice(
        ('"', '"a', ",,,", "", ",", "a,b,c,d,e", "\0", "x" * 200_000, ";".join("ab"), '"a""b",c',
         "../../outside,a", "/etc/hostname,a", ",a", "000.png,", "000.png", "\ud7ff,a",
         "9" * 5000 + ",a")
    )  # fmt: skip
    if rng.random() < 0.5:
        lines[at] = change
    else:
        lines.insert(at, change)
    return rng.choice(("\n", "\r\n", "\r")).join(lines).encode()
