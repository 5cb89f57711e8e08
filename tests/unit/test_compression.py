"""Compressed bodies: those of Celery's clients are read, up to a limit on their size."""

from __future__ import annotations

import kombu.compression
import pytest

from worker.runtime.compression import Undecodable, decompress

BODY = b'[[], {"request": {}}, {}]' * 100


@pytest.mark.parametrize("method", ["gzip", "zlib", "bzip2", "bzip", "lzma", "xz"])
def test_a_body_compressed_by_kombu_is_read_by_its_name_and_its_content_type(method: str) -> None:
    compressed, content_type = kombu.compression.compress(BODY, method)

    assert decompress(compressed, method, len(BODY)) == BODY
    assert decompress(compressed, content_type, len(BODY)) == BODY


@pytest.mark.parametrize("method", ["gzip", "bzip2", "lzma"])
def test_a_body_longer_than_the_limit_is_refused(method: str) -> None:
    compressed, _ = kombu.compression.compress(b"\0" * (64 << 20), method)

    with pytest.raises(Undecodable, match="longer than 1000"):
        decompress(compressed, method, 1000)


@pytest.mark.parametrize("method", ["gzip", "bzip2", "lzma"])
@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_truncated_body_is_refused(method: str, kept: int) -> None:
    compressed, _ = kombu.compression.compress(BODY, method)

    with pytest.raises(Undecodable):
        decompress(compressed[:kept], method, len(BODY))


@pytest.mark.parametrize("method", ["", "zip", "brotli", "application/zstd"])
def test_an_unsupported_compression_is_refused_by_name(method: str) -> None:
    with pytest.raises(Undecodable, match="compression"):
        decompress(b"x", method, 1000)
