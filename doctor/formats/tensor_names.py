"""What the tensors that stand for one packed linear are called, by quantization method: every reader and rule asks
here.

A packed linear has words (the codes), a scale for each group, and what its method adds. NEEDED is what no reader can do
without beside the words; compressed-tensors leaves the zero points of a symmetric file out.
"""

PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
}
WORDS = {method: parts[0] for method, parts in PARTS.items()}
SCALES = {"gptq": "scales", "awq": "scales", "compressed-tensors": "weight_scale"}
NEEDED = {"gptq": ("scales", "qzeros"), "awq": ("scales", "qzeros"), "compressed-tensors": ("weight_scale",)}
WORD_TAILS = tuple(f".{words}" for words in dict.fromkeys(WORDS.values()))
PACKED_TAILS = (*WORD_TAILS, ".q_weight")  # and those of EXL2, which are known and not read
