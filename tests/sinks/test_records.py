"""Event files are framed as TensorBoard frames them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from dyndiag.sinks.records import crc32c, record


@given(st.binary(min_size=4, max_size=40) | st.binary(min_size=1000, max_size=3100))
def test_the_checksum_is_tensorboards(data: bytes) -> None:
    assert crc32c(data) == pywrap_tensorflow.crc32c(data)


def test_the_checksum_of_the_standard() -> None:
    """RFC 3720, appendix B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_a_record_holds_length_and_both_checksums() -> None:
    data = bytes(range(256)) * 9
    framed = record(data)
    assert framed[:8] == len(data).to_bytes(8, "little")
    assert framed[8:12] == pywrap_tensorflow.masked_crc32c(framed[:8]).to_bytes(4, "little")
    assert framed[12:-4] == data
    assert framed[-4:] == pywrap_tensorflow.masked_crc32c(data).to_bytes(4, "little")
