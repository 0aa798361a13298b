"""Q417 slower-path: a run did its work in a slower way than it can.

Why: results are of the same quality, but a run that silently takes several times as long looks like a slow program or a
broken device.

Seen as:
- GPTQModel: `Triton is not installed`
- AutoAWQ: `torch is not compiled with CUDA`
- the same model takes an hour on one machine and four on its twin

Do: see the reason: install what is missing (nvidia-cuda-nvrtc, greenlet, a C compiler when installing doctor), or leave
it.

False alarms: none; it reports what was done.

Fix safety: no fix: what is missing is on the machine, not in the checkpoint.

Sources: doctor's own kernels and loops (doctor/quant/solve/kernels.py, doctor/quant/solve/cpu.py,
doctor/quant/forward/staged.py).

标题: 运行走了较慢的路径

原因: 结果质量相同，但若不说明，慢几倍的运行看上去像程序慢或设备坏了。

处理: 看原因：安装缺少的东西（nvidia-cuda-nvrtc、greenlet、安装 doctor 时的 C 编译器），或不管它。

误报: 无；如实报告所做的事。

修复: 不提供修复：缺的是机器上的东西，不在检查点里。
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import measured


@rule("Q417", "info")
def slower_path(checkpoint, slower_paths):
    for sentence in slower_paths:
        yield finding(sentence, advice="the result is the same; install what is missing to save time")


def bad():
    case = measured()
    case.put(
        "checkpoint:", "slower_paths", ("no CUDA kernel runs on cuda:0, torch does their work: libcuda does not load",)
    )
    return case, "no CUDA kernel runs on cuda:0, torch does their work: libcuda does not load"


def good():
    case = measured()
    case.put("checkpoint:", "slower_paths", ())
    return case
