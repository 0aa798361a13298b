"""Two thousand broken files, the same in every run; `make fuzz` takes as many as it is asked for."""

import pytest
from cases import Fuzz

SHARE = {"header": 1100, "json": 600, "checkpoint": 100, "packed": 80, "gguf": 120}
FOUND = {"packed": (252, 263, 493)}  # beyond those seeds, and a crash until it was mended
PARTS = 4  # of each kind, so that several processes share them


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", SHARE)
def test_any_file_gives_findings_or_an_error_of_ours(fuzz, kind, part):
    for seed in (*range(part, SHARE[kind], PARTS), *FOUND.get(kind, ())[part::PARTS]):
        try:
            fuzz.run(kind, seed)
        except Exception as error:
            raise AssertionError(f"{kind} {seed}: {type(error).__name__}: {error}") from error
