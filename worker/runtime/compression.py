"""Compressed bodies of messages, as Celery clients send them (`task_compression`), decompressed within a bound.

A few bytes can be gigabytes, so nothing is decompressed beyond the longest body, nor with more memory than that takes.
"""

from __future__ import annotations

import bz2
import importlib
import lzma
import zlib
from collections.abc import Callable
from typing import Any, cast

#: Most memory that an lzma stream may ask for, in bytes; its highest preset takes 65 MiB.
_LZMA_MEMORY = 128 << 20


class Undecodable(Exception):
    """The body cannot be decompressed; the text has nothing of its contents."""


def decompress(body: bytes, method: str, longest: int) -> bytes:
    """The body as it was before its client compressed it; `method` is the message's header `compression`.

    Raises Undecodable, also where it would be longer than `longest` bytes.
    """
    decoder = _DECODERS.get(method)
    if decoder is None:
        raise Undecodable(f"compression {method[:50]!r}: unknown; known are {', '.join(_NAMES)}")
    try:
        text = decoder(body, longest + 1)
    except Undecodable:
        raise
    except Exception as error:  # each library has errors of its own
        raise Undecodable(f"compression: the body is no {method[:50]}: {type(error).__name__}") from None
    if len(text) > longest:
        raise Undecodable(f"compression: the body is longer than {longest} bytes")
    return text


def _zlib(body: bytes, most: int) -> bytes:
    decoder = zlib.decompressobj()
    return _whole(decoder.decompress(body, most), most, decoder)


def _bz2(body: bytes, most: int) -> bytes:
    decoder = bz2.BZ2Decompressor()
    return _whole(decoder.decompress(body, most), most, decoder)


def _lzma(body: bytes, most: int) -> bytes:
    decoder = lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)
    return _whole(decoder.decompress(body, most), most, decoder)


def _zstd(body: bytes, most: int) -> bytes:
    module = _optional("compression.zstd", "backports.zstd")
    decoder = module.ZstdDecompressor()
    return _whole(decoder.decompress(body, most), most, decoder)


def _brotli(body: bytes, most: int) -> bytes:
    module = _optional("brotli", "brotlicffi")
    decoder = module.Decompressor()
    try:
        return cast(bytes, decoder.process(body, output_buffer_limit=most))
    except TypeError:
        raise Undecodable("compression: this worker's brotli cannot bound what it decompresses") from None


def _whole(text: bytes, most: int, decoder: Any) -> bytes:
    if len(text) < most and not decoder.eof:
        raise EOFError
    return text


def _optional(*names: str) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise Undecodable(f"compression: this worker has no {names[-1]}")


#: By kombu's content types and their other names (kombu.compression).
_NAMES: dict[str, tuple[str, Callable[[bytes, int], bytes]]] = {
    "gzip": ("application/x-gzip", _zlib),
    "zlib": ("application/x-gzip", _zlib),
    "bzip2": ("application/x-bz2", _bz2),
    "bzip": ("application/x-bz2", _bz2),
    "lzma": ("application/x-lzma", _lzma),
    "xz": ("application/x-lzma", _lzma),
    "brotli": ("application/x-brotli", _brotli),
    "zstd": ("application/zstd", _zstd),
    "zstandard": ("application/zstd", _zstd),
}
_DECODERS = dict(_NAMES.values()) | {name: decoder for name, (_, decoder) in _NAMES.items()}
