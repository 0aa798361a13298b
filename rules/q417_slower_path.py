"""Q417 slower-path: slower code path was used.

Why: the quality of the result is the same, but a run that silently takes several times as long looks like a slow
program or a broken device.

Seen as:
- GPTQModel: `Triton is not installed`
- AutoAWQ: `torch is not compiled with CUDA`
- the same model takes an hour on one machine and four on its twin

Do: see the reason and install what is missing (nvidia-cuda-nvrtc, greenlet, a C compiler when installing doctor), or
ignore it.

False alarms: none; it reports what was done.

Fix safety: no fix: what is missing is on the machine, not in the checkpoint.

Sources: doctor's kernels and loops (doctor/quant/solve/kernels.py, doctor/quant/solve/cpu.py,
doctor/quant/forward/staged.py).
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import measured


@rule("Q417", "info")
def slower_path(checkpoint, slower_paths):
    for sentence in slower_paths:
        yield finding(sentence, advice=_("the result is the same; install what is missing to save time"))


def bad():
    reason = _(
        "no CUDA kernel runs on {device}, torch does their work: {reason}",
        device="cuda:0",
        reason="libcuda does not load",
    )
    case = measured()
    case.put("checkpoint:", "slower_paths", (reason,))
    return case, "no CUDA kernel runs on cuda:0, torch does their work: libcuda does not load"


def good():
    case = measured()
    case.put("checkpoint:", "slower_paths", ())
    return case
