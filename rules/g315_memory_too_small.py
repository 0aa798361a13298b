"""G315 memory-too-small: not enough free memory to quantize.

Why: the run holds one decoder layer as it is stored, its output, the Hessian of its widest linear and the working
memory to solve that, whatever the number of calibration rows. With less memory the system kills the process without a
message, or swaps for days.

Seen as:
- Linux: `Out of memory: Killed process`
- PyTorch: `CUDA out of memory`
- PyTorch: `DefaultCPUAllocator: can't allocate memory`
- PyTorch: `torch.OutOfMemoryError: CUDA out of memory. Tried to allocate`
- Linux: `Killed`
- zsh: `zsh: killed`

Do: close other programs, use a machine with the memory named, or `--method rtn`, which needs no Hessian. Fewer
calibration rows change nothing.

False alarms: memory that another program releases before the run.

Fix safety: no fix is needed in the files.

Sources: mit-han-lab/llm-awq issue 157; vllm-project/llm-compressor issue 109; doctor/quant/budget.py.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, with_capacity

GIB = 2**30


@rule("G315", "warning", certainty="likely")
def memory_too_small(checkpoint, machine, layout, recipe):
    if layout.quantized or machine.memory_need <= machine.memory_free:
        return
    yield finding(
        _(
            "this machine has {free:.1f} GiB of memory free; {recipe} takes {need:.1f} GiB",
            free=machine.memory_free / GIB,
            recipe=recipe.label(),
            need=machine.memory_need / GIB,
        ),
        evidence={"memory_free": machine.memory_free, "memory_need": machine.memory_need},
        advice=_("use a machine with more memory, or --method rtn, which needs no Hessian")
        if recipe.calibrated
        else _("use a machine with more memory"),
    )


def bad():
    case = with_capacity()
    change(case, "checkpoint:", "given_machine", memory_free=3 * GIB, memory_need=5 * GIB)
    return case, "this machine has 3.0 GiB of memory free; gptq 4-bit g32 takes 5.0 GiB"


def good():
    case = with_capacity()
    change(case, "checkpoint:", "given_machine", memory_free=5 * GIB, memory_need=5 * GIB)
    return case
