"""Decompression of message bodies that Celery clients compress (`task_compression`), within a limit.

A few compressed bytes can expand to gigabytes, so decompression stops at the longest permitted body.
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
    """The body cannot be decompressed. The text contains no part of it."""


def decompress(body: bytes, method: str, longest: int) -> bytes:
    """The decompressed body; `method` is the message's header `compression`.

    Raises Undecodable, also if the decompressed body is longer than `longest` bytes.
    """
    decoder = _DECODERS.get(method)
    if decoder is None:
        raise Undecodable(f"compression {method[:50]!r} is unknown; use one of {', '.join(_NAMES)}")
    try:
        text = decoder(body, longest + 1)
    except Undecodable:
        raise
    except Exception as error:  # each library has its own exceptions
        raise Undecodable(f"compression: the body is not valid {method[:50]}: {type(error).__name__}") from None
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
        raise Undecodable("compression: the brotli package of this worker cannot limit the decompressed size") from None


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
    raise Undecodable(f"compression: the Python package {names[-1]} is not installed at this worker")


#: Content type and decoder of each name that kombu.compression knows.
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
