"""What waits on disk comes back bit by bit, and a disk that is full says so."""

import errno
import os

import pytest
import torch

from doctor.core.errors import MachineError
from doctor.quant.forward import spill as module
from doctor.quant.forward.held_storages import HeldStorages
from doctor.quant.forward.spill import SpillFile
from doctor.quant.forward.suspended import SuspendedForward


@pytest.mark.parametrize("at_once", [1 << 30, 100])
def test_storages_come_back_from_their_places(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    file = SpillFile(tmp_path)
    first, second = torch.randn(257), torch.randn(3, 5).to(torch.bfloat16)
    first[7] = float("nan")
    places = [file.reserve(t.untyped_storage().nbytes()) for t in (first, second)]
    copies = [t.clone() for t in (first, second)]
    for tensor, place in zip((first, second), places, strict=False):
        file.spill(place, tensor.untyped_storage())
        tensor.fill_(-1)
    for tensor, place, copy in zip((first, second), places, copies, strict=False):
        file.restore(place, tensor.untyped_storage())
        assert tensor.view(torch.uint8).equal(copy.view(torch.uint8))
    assert list(tmp_path.iterdir()) == []  # it has no name
    assert places == [0, 1028] and file.end == os.fstat(file._file.fileno()).st_size == 1028 + 30
    file.release(1028)
    assert file.reserve(4) == 1028 and os.fstat(file._file.fileno()).st_size == 1032


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        MachineError, match=rf"{tmp_path}: cannot spill 4,000 bytes \(memory limit reached\): No space left on device"
    ):
        file = SpillFile(tmp_path)
        file.spill(file.reserve(4000), torch.zeros(1000).untyped_storage())


def test_a_file_that_was_cut_off_is_an_error(tmp_path):
    file = SpillFile(tmp_path)
    place = file.reserve(400)
    os.ftruncate(file._file.fileno(), 100)
    with pytest.raises(MachineError, match="400 spilled bytes cannot be read back: the file ends before them"):
        file.restore(place, torch.zeros(100).untyped_storage())


def test_only_what_a_pass_made_itself_is_put_away(tmp_path):
    """Views of what was there before, weights and what a module keeps stay; views of what is put away come back with
    it.
    """
    weight, kept = torch.randn(64, 64), []
    seen = {}

    def compute():
        x = weight[:32] * 2
        kept.append(x.cos())
        view, old = x.view(-1)[5:], weight.T
        seen.update(x=x.clone(), parts=(x, view, old))
        one.suspend(0, [])
        return x.sum() + view.sum() + old.sum()

    one = SuspendedForward(compute, True, SpillFile(tmp_path))
    one.resume()
    want = [t.clone() for t in seen["parts"]]
    assert one.spill(lambda: {kept[0].untyped_storage()._cdata}, 100) == 100
    x, view, _old = seen["parts"]
    assert x.untyped_storage().nbytes() == view.untyped_storage().nbytes() == 0
    assert weight.untyped_storage().nbytes() == 64 * 64 * 4 and kept[0].untyped_storage().nbytes() == 32 * 64 * 4
    result = one.output()
    assert all(a.equal(b) for a, b in zip(seen["parts"], want, strict=False)) and torch.isfinite(result)
    assert result == want[0].sum() + want[1].sum() + want[2].sum()


def test_what_fits_into_memory_stays(tmp_path):
    tensors = []

    def compute():
        tensors.extend(torch.arange(n).float() for n in (64, 16, 32, 8))
        one.suspend(0, [])
        return sum(t.sum() for t in tensors)

    one = SuspendedForward(compute, True, file := SpillFile(tmp_path))
    one.resume()
    assert one.spill(set, 200) == 200 - 64 - 128
    assert [t.untyped_storage().nbytes() for t in tensors] == [0, 64, 128, 0] and file.written == 288
    assert one.restore() == 192 and one.restore() == 0
    assert one.output() == sum(sum(range(n)) for n in (64, 16, 32, 8))


def test_a_storage_counts_once_and_only_while_it_lives():
    outside = torch.randn(16)
    with HeldStorages() as made:
        mine = torch.zeros(10)
        views = [mine[2:], mine.view(2, 5)]
        foreign = outside[3:]
        both = [mine + 1, outside * 2]
        mine += 1
    assert sorted(s.nbytes() for s in made.storages().values()) == [40, 40, 64]
    del mine, both
    assert [s.nbytes() for s in made.storages().values()] == [40]
    del views
    assert made.storages() == {} and foreign.numel() == 13
