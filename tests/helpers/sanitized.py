"""Run by test_mutations.py in a process of its own under AddressSanitizer: each kernel of one build on buffers that end
where they end.

No torch and no numpy: both allocate in pools, which hide a read past the end. Every buffer here is one malloc.
"""

import ctypes
import struct
import sys

LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
LIBC.malloc.argtypes = [ctypes.c_size_t]


class Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("reversed", ctypes.c_int),
        ("error", ctypes.c_char * 256),
    ]


def buffer(size, content=b""):
    """Address of `size` bytes that hold content, repeated."""
    address = LIBC.malloc(size)
    data = (content * (size // max(1, len(content)) + 1))[:size] if content else bytes(size)
    ctypes.memmove(address, data, size)
    return address


def floats(count, *values):
    return buffer(4 * count, struct.pack(f"{len(values)}f", *values))


def launch(library, kernel, grid, threads, shared, *arguments):
    """arguments: bytes, each one parameter as it lies in memory."""
    kept = [ctypes.create_string_buffer(a, len(a)) for a in arguments]
    pointers = (ctypes.c_void_p * len(kept))(*[ctypes.addressof(k) for k in kept])
    what = Launch((*grid, 1), (threads, 1, 1), shared)
    status = getattr(library, f"shim_{kernel}")(ctypes.byref(what), pointers)
    if status:
        raise SystemExit(f"{kernel}: {what.error.decode()}")


def rule(mse):
    return struct.pack("3f7i", 15, 8, 0, 0, 0, mse, 1, 3, 2, 2)


def gptq_block(library):
    n, k = 37, 103
    for width in (0, 32):
        rows = 96 if width else k
        columns = struct.pack(
            "10P2q3i4x",
            floats(rows * n, 0.1, -0.2, 0.3),
            floats(rows * rows, 1, 0.1),
            buffer(4 * rows),
            floats(4 * n, 0.1),
            floats(4 * n, 8),
            buffer(rows * n),
            buffer(4 * 128 * n),
            buffer(8 * n),
            floats(rows, 1),
            floats(5, 1, 0.9, 0.8, 0.1, -0.1),
            n,
            rows,
            0,
            rows,
            width,
        )
        launch(library, "gptq_block", (2, 1), 32, (128 + 32) * 512, columns, rule(1))
        block = struct.pack(
            "8P2q3i4x",
            floats(rows * rows, 1, 0.1),
            buffer(4 * rows),
            floats(4 * n, 0.1),
            floats(4 * n, 8),
            buffer(rows * n, b"\7\6"),
            floats(rows * n, 0.1, -0.2, 0.3),
            buffer(4 * 128 * n),
            buffer(8 * n),
            n,
            rows,
            0,
            rows,
            width,
        )
        launch(library, "gptq_refine", (2, 1), 32, (128 + 32) * 512 + 128 * 32, block, rule(1))


def grid_search(library):
    n, k = 5, 240
    for kernel, width in (("1", 24), ("2", 48), ("4", 120), ("wide", 240)):
        count = n * k // width
        search = struct.pack(
            "5P3qi4x",
            floats(n * k, 0.1, -0.2, 0.35),
            floats(k, 1, 2),
            floats(5, 1, 0.9, 0.8, 0.1, -0.1),
            buffer(4 * count),
            buffer(4 * count),
            n,
            k,
            k,
            width,
        )
        launch(library, f"grid_search_{kernel}", (-(-count // 4), 1), 128, 0, search, rule(1))


def pack(library):
    m, c = 333, 7
    for bits in (2, 3, 4, 8):
        height = -(-m * bits // 32)
        stream = struct.pack(
            "2P7q2i", buffer(m * c, b"\1\2"), buffer(4 * height * c), c, m, height, 1, c, 1, c, bits, 0
        )
        launch(library, "pack_stream", (1, -(-m // 32)), 128, 0, stream)
        for odd in (0, 1):  # lines that begin at a multiple of 16 bytes, and lines that do not
            m = 352 + odd
            height = -(-m * bits // 32)
            stream = struct.pack(
                "2P7q2i", buffer(m * c, b"\1\2"), buffer(4 * height * c), c, m, height, m, 1, height, 1, bits, 1
            )
            launch(library, "pack_stream", (1, c), 128, 0, stream)
        m = 333
        n, k, groups = 64, 96, 3
        packed = struct.pack(
            "5P11q5i4x",
            buffer(k * bits // 8 * n),
            buffer(groups * n * bits // 8),
            buffer(2 * groups * n),
            buffer(4 * k),
            buffer(4 * n * k),
            n,
            k,
            groups,
            1,
            n,
            n * bits // 32,
            1,
            1,
            n,
            1,
            n,
            bits,
            1,
            1,
            32,
            1,
        )
        launch(library, "dequantize_stream", (1, k // 8), 128, 0, packed)
        for k in (96, 99):  # compressed-tensors
            width = -(-k * bits // 32)
            packed = struct.pack(
                "5P11q5i4x",
                buffer(4 * width * 5),
                0,
                buffer(2 * 3 * 5),
                0,
                buffer(4 * 5 * k),
                5,
                k,
                3,
                width,
                1,
                1,
                3,
                3,
                1,
                k,
                1,
                bits,
                8,
                1,
                k // 3,
                0,
            )
            launch(library, "dequantize_stream", (1, 5), 128, 0, packed)
    address, number = struct.Struct("P").pack, struct.Struct("q").pack
    launch(
        library,
        "pack_awq",
        (1, 5),
        128,
        0,
        address(buffer(24 * 5)),
        address(buffer(4 * 3 * 5)),
        number(5),
        number(3),
        number(5),
        number(1),
    )
    launch(
        library,
        "dequantize_awq",
        (1, 6),
        128,
        0,
        address(buffer(4 * 6 * 3)),
        address(buffer(4 * 2 * 3)),
        address(buffer(2 * 2 * 24)),
        address(buffer(4 * 6 * 24)),
        number(24),
        number(6),
        struct.pack("i", 3),
        struct.pack("i", 1),
    )


def awq_difference(library):
    n, k = 3, 96
    difference = struct.pack("3P2q2i", buffer(2 * n * k, b"\0\x3c"), floats(k, 1, 2), buffer(4 * n * k), n, k, 48, 1)
    launch(library, "awq_difference", (2, 1), 128, 0, difference, rule(0))


def kv_cache(library):
    count = 64 * 3
    for bits in (4, 8):
        codes, scales, x = buffer(count * bits // 8), buffer(count // 16), buffer(2 * count, b"\0\x3c\0\x40")
        words = [struct.pack("P", p) for p in (x, codes, scales)]
        rest = struct.pack("q", count), struct.pack("i", bits)
        launch(library, "kv_store", (1, 1), 128, 0, *words, *rest)
        launch(library, "kv_load", (1, 1), 128, 0, words[1], words[2], words[0], *rest)


def health_scan(library):
    for size, dtype in ((4, 0), (2, 1), (2, 2)):
        out = buffer(88, bytes(48) + b"\xff" * 8 + bytes(32))
        launch(
            library,
            "health_scan",
            (2, 1),
            256,
            8 * 80,
            struct.pack("P", buffer(1001 * size, b"\0\x3c")),
            struct.pack("P", out),
            struct.pack("q", 1001),
            struct.pack("q", 7),
            struct.pack("i", dtype),
        )


globals()[sys.argv[1]](ctypes.CDLL(sys.argv[2]))
print(f"{sys.argv[1]}: clean")
