"""What must hold for any file: no exception that is not ours, no rule that crashes, nothing outside its bounds."""

import contextlib
import io
import json
import os
import shutil
import time
from functools import cached_property
from pathlib import Path

from mutate import Mutator, header_of

from doctor.api import check, fix, quantize
from doctor.checkpoint.directory import JsonFile
from doctor.checkpoint.json_text import JsonError, JsonPlaces, cleaned, parse_bytes, pointer, set_value
from doctor.checkpoint.safetensors import parse_header
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny, tiny_gguf
from doctor.lint.tiny_gguf import file_bytes
from doctor.report import FORMATS, render

RECIPE = Recipe(group_size=32)
FAMILIES = ("llama", "qwen2", "gpt2")
PACKED = (
    Recipe(method="rtn", group_size=32),
    Recipe(method="rtn", group_size=32, format="awq"),
    Recipe(method="rtn", group_size=32, format="compressed-tensors"),
    Recipe(method="rtn", bits=8, group_size=-1, format="float-quantized", activations="fp8"),
    Recipe(method="rtn", bits=4, group_size=16, format="nvfp4-pack-quantized"),
    Recipe(method="rtn", group_size=32, format="mxfp4-pack-quantized"),
)
MUTATED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def same(one: object, other: object) -> bool:
    """Whether two JSON values are equal, NaN to NaN, in whatever order their keys are."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


class Fuzz:
    """Cases by seed, from whole checkpoints in `folder`. slowest: seconds and seed of the slowest case of each kind."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.whole = {}
        for family in FAMILIES:
            case = tiny(family)
            case.shards = 2
            self.whole[family] = case.write(folder / family)
        self.headers = [header_of(path.read_bytes()) for f in self.whole.values() for path in f.glob("*.safetensors")]
        self.documents = [json.loads(p.read_text()) for f in self.whole.values() for p in sorted(f.glob("*.json"))]
        self.gguf_file = file_bytes(tiny_gguf().keys)
        self.slowest: dict[str, tuple[float, int]] = {}

    def run(self, kind: str, seed: int) -> None:
        """One case. Raises what a case must not raise, AssertionError for a law that does not hold."""
        started = time.process_time()
        getattr(self, kind)(Mutator(seed))
        seconds = time.process_time() - started
        self.slowest[kind] = max(self.slowest.get(kind, (0.0, -1)), (seconds, seed))

    def header(self, made: Mutator) -> None:
        raw = made.shard(*made.draw.choice(self.headers))
        file = io.BytesIO(raw)

        def read(offset: int, n: int) -> bytes:
            file.seek(offset)
            return file.read(n)

        shard = parse_header("x.safetensors", len(raw), read)
        for info in shard.tensors:
            assert shard.data_begin <= info.begin <= info.end <= len(raw)
            assert info.dtype.nbytes(info.numel) == info.nbytes
        assert shard.defects or shard.header_bytes + 8 <= len(raw)

    def json(self, made: Mutator) -> None:
        raw = made.text(made.draw.choice(self.documents))
        file = JsonFile("config.json", raw)
        assert (file.value is None) or file.broken is None
        try:
            doc = parse_bytes(raw)
        except JsonError:
            return
        text = raw.decode("utf-8")
        assert repr(doc.value) == repr(json.loads(text.removeprefix("\ufeff")))
        assert same(json.loads(cleaned(text)), doc.value)
        if not isinstance(doc.value, dict):
            return
        places = JsonPlaces(text)
        for key in doc.value:
            span = places.find(pointer(key))
            assert repr(json.loads(text[span.begin : span.end])) == repr(doc.value[key])
        edited = set_value(text, "/fuzz", "\ud800")
        assert json.loads(edited.removeprefix("\ufeff"))["fuzz"] == "\ud800" and edited.encode("utf-8")

    def checkpoint(self, made: Mutator) -> None:
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.whole[made.draw.choice(FAMILIES)], folder)
        for name in made.draw.sample(MUTATED, made.draw.randint(0, 2)):
            document = json.loads((folder / name).read_text()) if (folder / name).exists() else {"a": 1}
            (folder / name).write_bytes(made.text(document))
        for path in made.draw.sample(sorted(folder.glob("*.safetensors*")), made.draw.randint(0, 2)):
            raw = path.read_bytes()
            path.write_bytes(
                made.shard(*header_of(raw)) if path.suffix == ".safetensors" else made.text(json.loads(raw))
            )
        self.judge(folder, made)
        with contextlib.suppress(DoctorError):
            fix(folder, self.folder / "out", RECIPE, unsafe_fixes=True, dry_run=made.draw.random() < 0.5)
        shutil.rmtree(self.folder / "out", ignore_errors=True)

    def judge(self, folder: Path, made: Mutator) -> None:
        report = check(folder, RECIPE, figures=made.draw.random() < 0.2)
        assert not report.crashed, [(r.rule.code, r.crashed) for r in report.crashed]
        render(made.draw.choice(FORMATS), [report]).encode("utf-8", "backslashreplace")

    def packed(self, made: Mutator) -> None:
        """A quantized checkpoint whose quantization_config, and at times a header, is changed."""
        whole = made.draw.choice(self.quantized)
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = made.tree(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        if made.draw.random() < 0.3:
            path = made.draw.choice(sorted(folder.glob("*.safetensors")))
            path.write_bytes(made.shard(*header_of(path.read_bytes())))
        self.judge(folder, made)

    @cached_property
    def quantized(self) -> list[Path]:
        """A quantized checkpoint of each recipe in PACKED, made in a process of its own: this one imports no torch."""
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                for n, recipe in enumerate(PACKED):
                    quantize(self.whole["llama"], self.folder / f"packed{n}", recipe)
            os._exit(0)
        os.waitpid(pid, 0)
        made = [self.folder / f"packed{n}" for n in range(len(PACKED))]
        assert all((folder / "config.json").is_file() for folder in made), made
        return made

    def gguf(self, made: Mutator) -> None:
        """A GGUF file of which numbers, lengths or bytes of the header are others."""
        folder = self.folder / "gguf"
        folder.mkdir(exist_ok=True)
        (folder / "model.gguf").write_bytes(made.binary(self.gguf_file, 4000))
        self.judge(folder, made)
