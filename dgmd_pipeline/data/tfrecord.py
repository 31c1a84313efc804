"""The bytes of a `tf.train.Example` and of its frame in a TFRecord file."""

import struct

import google_crc32c


def serialize_example(features: dict[str, bytes | int]) -> bytes:
    """Serialise a `tf.train.Example`: bytes as a BytesList of one, an integer (>= 0) as an Int64List of one.

    Written out because importing TensorFlow for it costs every worker 3.6 s and 700 MB, and because protobuf promises
    no stable bytes. Source: protobuf.dev/programming-guides/encoding, tensorflow/core/example/{example,feature}.proto.
    """
    entries: list[bytes] = []
    for name, value in sorted(features.items()):
        kind, content = (1, _field(1, value)) if isinstance(value, bytes) else (3, _field(1, _varint(value)))
        entries += _field(1, *_field(1, name.encode()), *_field(2, *_field(kind, *content)))
    return b"".join(_field(1, *entries))


def _field(number: int, *content: bytes) -> tuple[bytes, ...]:
    """Return the parts of a field around those of its content: the picture is copied once, not at every level."""
    return (_varint(number << 3 | 2) + _varint(sum(map(len, content))), *content)


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def frame(record: bytes) -> bytes:
    """Length, its checksum, the record, its checksum. Source: "TFRecords format details", tensorflow.org/tutorials."""
    length = struct.pack("<Q", len(record))
    return length + _masked_crc(length) + record + _masked_crc(record)


def _masked_crc(content: bytes) -> bytes:
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
