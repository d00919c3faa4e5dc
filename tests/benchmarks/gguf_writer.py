"""Writes small GGUF files, as the tests of their reader need them."""

import struct

import numpy as np

F32, Q4_1, Q8_0 = 0, 3, 8
ALIGNMENT = 32


def write_gguf(path, metadata, tensors, version=3):
    """`tensors` maps names to (type, shape as torch has it, bytes)."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _typed(value)]
    offset, blobs = 0, []
    for name, (kind, shape, data) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), sizes, struct.pack("<IQ", kind, offset)]
        blobs.append(data + bytes(-len(data) % ALIGNMENT))
        offset += len(blobs[-1])
    head = b"".join(parts)
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + b"".join(blobs))
    return path


def f32(array):
    return F32, tuple(array.shape), np.asarray(array, np.float32).tobytes()


def q8_0_block(scale, integers):
    return np.float16(scale).tobytes() + np.array(integers, np.int8).tobytes()


def q4_1_block(scale, minimum, integers):
    low, high = np.array(integers[:16], np.uint8), np.array(integers[16:], np.uint8)
    return np.array([scale, minimum], np.float16).tobytes() + (low | high << 4).tobytes()


def _string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _typed(value):
    if isinstance(value, list):
        kind, pack = (8, _string) if isinstance(value[0], str) else (5, _int)
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(map(pack, value))
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<IQ", 10, value)


def _int(value):
    return struct.pack("<i", value)
