"""Weight formats, one class a file; see base.py. Their order is the order in which people are shown them.

A format is known once its module is imported, and that happens here, with any part of this package.
"""

from doctor.formats import (  # noqa: F401, I001 - their order
    gptq,
    gptq_v2,
    awq,
    compressed_tensors,
    float_quantized,
    int_quantized,
    autoround,
    mxfp8,
    fp8,
    int8,
    nvfp4,
    mxfp4,
    bitsandbytes,
    exl2,
    exl3,
    gguf,
)
