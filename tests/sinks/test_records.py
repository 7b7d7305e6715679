"""Event files are framed as TensorBoard frames them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from dyndiag.sinks.records import record


@given(st.binary(max_size=3000))
def test_a_record_holds_length_and_both_checksums(data: bytes) -> None:
    framed = record(data)
    assert framed[:8] == len(data).to_bytes(8, "little")
    assert framed[8:12] == pywrap_tensorflow.masked_crc32c(framed[:8]).to_bytes(4, "little")
    assert framed[12:-4] == data
    assert framed[-4:] == pywrap_tensorflow.masked_crc32c(data).to_bytes(4, "little")
