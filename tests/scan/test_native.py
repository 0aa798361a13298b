"""The native library: found or not, turned off, lowered to another level, and loud when it is not the one it should
be.
"""

import pytest

from doctor.core.errors import MachineError
from doctor.scan import counters, native

needs_library = pytest.mark.skipif(not native.LIBRARY.exists(), reason="no native library was built here")


@pytest.fixture
def fresh():
    """Caches emptied before and after, for tests that put another library in place."""
    native._library.cache_clear()
    native._symbol.cache_clear()
    yield
    native._library.cache_clear()
    native._symbol.cache_clear()


def test_zero_turns_the_library_off(monkeypatch):
    monkeypatch.setenv("DOCTOR_NATIVE", "0")
    assert (native.level(), native.native_path(), native.function("doctor_scan_f32")) == (None, None, None)


def test_an_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("DOCTOR_NATIVE", "avx1024")
    with pytest.raises(MachineError, match="DOCTOR_NATIVE=avx1024: must be 0, 1 or one of base, avx2, avx512"):
        native.level()


@needs_library
def test_a_level_can_be_lowered_but_not_raised_above_the_processor(monkeypatch):
    monkeypatch.delenv("DOCTOR_NATIVE", raising=False)
    best = native.level()
    monkeypatch.setenv("DOCTOR_NATIVE", "base")
    assert native.level() == "base"
    monkeypatch.setenv("DOCTOR_NATIVE", "avx512")
    assert native.level() == best
    assert native.native_path() == str(native.LIBRARY)


@needs_library
def test_a_function_the_library_lacks_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("DOCTOR_NATIVE", raising=False)
    with pytest.raises(MachineError, match=r"has no function doctor_nothing.*built from older sources. Reinstall"):
        native.function("doctor_nothing")


def test_without_a_library_numpy_counts(monkeypatch, tmp_path, fresh):
    monkeypatch.delenv("DOCTOR_NATIVE", raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libdoctor_cpu.so")
    assert native.native_path() is None
    assert counters.scan(b"\xc0\x7f\x00\x40", "BF16").n_nan == 1


def test_a_library_that_does_not_load_is_an_error_and_not_a_fallback(monkeypatch, tmp_path, fresh):
    monkeypatch.delenv("DOCTOR_NATIVE", raising=False)
    broken = tmp_path / "libdoctor_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    with pytest.raises(MachineError, match=r"does not load: .*Reinstall the package here, or set DOCTOR_NATIVE=0"):
        native.level()
