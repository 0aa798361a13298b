"""G315 memory-too-small: the machine has less memory free than quantizing takes.

Why: the run holds one block in float32, the Hessians of its linears and what solving the widest of them takes, whatever
the number of calibration rows. With less, the system ends the process without a message, or swaps for days.

Seen as:
- Linux: `Out of memory: Killed process`
- PyTorch: `CUDA out of memory`
- PyTorch: `DefaultCPUAllocator: can't allocate memory`
- PyTorch: `torch.OutOfMemoryError: CUDA out of memory. Tried to allocate`
- Linux: `Killed`
- zsh: `zsh: killed`

Do: close other programs, take a machine with the memory named, or `--method rtn`, which needs no Hessian. Fewer
calibration rows change nothing.

False alarms: memory that another program gives back before the run.

Fix safety: no fix is needed in the files.

Sources: mit-han-lab/llm-awq issue 157; vllm-project/llm-compressor issue 109; doctor/quant/budget.py.

标题: 机器的可用内存少于量化所需

原因: 无论校准多少行，运行时都要放下 float32 的一层、这一层各线性层的 Hessian，以及求解最宽线性层的工作区。内存
不够时，系统会不声不响地终止进程，或长时间换页。

处理: 关闭其他程序，换内存足够的机器，或用不需要 Hessian 的 `--method rtn`。减少校准行数没有作用。

误报: 其他程序可能在运行前归还内存。

修复: 文件无需修复。
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import change, roomy

GIB = 2**30


@rule("G315", "warning", certainty="likely")
def memory_too_small(checkpoint, machine, layout, recipe):
    if layout.quantized or machine.memory_need <= machine.memory_free:
        return
    yield finding(
        f"this machine has {machine.memory_free / GIB:.1f} GiB of memory free; {recipe.label()} takes {machine.memory_need / GIB:.1f} GiB",
        evidence={"memory_free": machine.memory_free, "memory_need": machine.memory_need},
        advice="take a machine with more memory"
        + ("" if recipe.method == "rtn" else ", or --method rtn, which needs no Hessian"),
    )


def bad():
    case = roomy()
    change(case, "checkpoint:", "given_machine", memory_free=3 * GIB, memory_need=5 * GIB)
    return case, "this machine has 3.0 GiB of memory free; gptq 4-bit g32 takes 5.0 GiB"


def good():
    case = roomy()
    change(case, "checkpoint:", "given_machine", memory_free=5 * GIB, memory_need=5 * GIB)
    return case
