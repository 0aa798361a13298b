"""The quantizer: from here upward torch and transformers are there."""

import os

# torch asks once, at its first allocation: tensors of 2 MiB and more in huge pages, where the kernel leaves that to programs.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
