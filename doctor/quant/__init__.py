"""The quantizer: from here upward torch and transformers are there.

Sets the environment variables that their libraries read once, when they are loaded. A value that the user set is kept.
"""

import os

# torch asks at its first allocation: tensors of 2 MiB and more in huge pages, where the kernel leaves that to programs.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# torch's products and SciPy's have threads of their own, which wait for the next one by spinning, on processors that
# the others need then: a decoder layer of SmolLM2-135M took 4.8 s on two processors, and takes 2.9 where they sleep at
# once.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 cycles, the least; 2^26 by default
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # 300,000 by default
