import pytest
import torch

from doctor.core.errors import DoctorError, MachineError
from doctor.quant.device import device_memory, device_of


@pytest.mark.parametrize("name", ["cuba", "cuda:x", "gpu", "cuda:-1", "meta", ""])
def test_a_name_that_is_no_device_is_said(name):
    with pytest.raises(DoctorError, match=rf"^--device {name}: must be auto, cpu, cuda, or cuda:N"):
        device_of(name)


@pytest.mark.parametrize("version, why", [(None, "was built without CUDA"), ("12.8", "sees no GPU")])
def test_a_gpu_that_is_not_there_is_said_before_anything_is_read(version, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(MachineError, match=f"^--device cuda: torch .* {why}"):
        device_of("cuda")
    assert device_of("cpu") == "cpu"


def test_auto_is_a_gpu_where_torch_sees_one_and_else_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for seen, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: seen)
        assert device_of("auto") == device
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of("auto") == "cuda:1"


def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (device_of("cuda"), device_of("cuda:1")) == ("cuda", "cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (device_of("cuda"), device_of("cuda:0")) == ("cuda:1", "cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MachineError, match=r"^--device cuda:2: this process sees 2 GPUs, numbered from 0"):
        device_of("cuda")


def test_a_full_device_is_an_error_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 24 << 30))
    with (
        pytest.raises(
            MachineError, match=r"^cuda:0: out of memory: Tried to allocate 3.00 GiB. 1.00 of 24.00 GiB are free now"
        ) as caught,
        device_memory("cuda:0"),
    ):
        raise torch.cuda.OutOfMemoryError("Tried to allocate 3.00 GiB.\nsecond line")
    assert "--resume" in caught.value.hint
    with pytest.raises(RuntimeError, match=r"^another$"), device_memory("cuda:0"):
        raise RuntimeError("another")
