"""F023 pickle-only: the weights are there only as pickle or as a format of another program.

Why: opening a pickle runs whatever code stands in it, so doctor does not. GGUF and the like are finished products, not sources.

Seen as:
- transformers: `Due to a serious vulnerability issue in `torch.load`, even with `weights_only=True``
- transformers: `no file named model.safetensors`

Do: `doctor fix` for files of torch.save (pytorch_model.bin, adapter_model.bin); else convert on a machine where that risk is yours: load with transformers
and `save_pretrained(..., safe_serialization=True)`.

False alarms: none known; a directory with safetensors beside the pickles is not counted.

Fix safety: safe for files of torch.save since PyTorch 1.6 that hold a dictionary of plain tensors: their small pickle is followed as data,
nothing in it is imported or called, and every byte of every tensor is copied as it lies there. Anything else that stands in one is named
and left alone: manual, as for the formats of other programs.

Sources: Python docs of `pickle`; CVE-2025-32434 (torch.load with weights_only=True); pytorch/pytorch torch/serialization.py.

标题: 权重只有 pickle 或其他程序的格式

原因: 打开 pickle 会执行其中的任意代码，所以 doctor 不打开。GGUF 之类是成品，不是量化的来源。

处理: torch.save 的文件（pytorch_model.bin、adapter_model.bin）用 `doctor fix`；其余在能承担该风险的机器上转换：用 transformers 加载，再
`save_pretrained(..., safe_serialization=True)`。

误报: 暂无已知；pickle 旁边有 safetensors 的目录不计。

修复: PyTorch 1.6 以来 torch.save 写的、只含普通张量字典的文件，安全：其中那份小 pickle 只当作数据来读，不导入也不调用任何东西，每
个张量的每个字节原样复制。文件里若有别的东西，会写明是什么并保持不动：需手动，其他程序的格式也一样。
"""

import re

from doctor.rule import DropFile, Fix, Place, ReadPickle, RebuildIndex, finding, rule
from doctor.testing import tiny, torch_file

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHERS = (".gguf", ".h5", ".msgpack", ".npz")
INDEX = "pytorch_model.bin.index.json"
BY_HAND = "save the model as safetensors, on a machine where its code may run"


@rule("F023", "error")
def pickle_only(checkpoint, files, pickles):
    if any(n.endswith(".safetensors") for n in files):
        return
    found = sorted(n for n in files if n.endswith(PICKLES + OTHERS) and n != "training_args.bin")
    if found:
        kind = "pickle" if found[0].endswith(PICKLES) else found[0].rpartition(".")[2]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield finding(f"the weights are there only as {kind}: {found[0]}{more}", at=Place(found[0]), evidence={"files": len(found)},
                      fix=_read(pickles, files) if pickles else Fix(BY_HAND, (), "manual"))


def _read(pickles, files):
    """The files as safetensors of the same numbers; by hand where one of them is not read, absent, or holds a name of another."""
    why = next((f"{name}: {tensors}" for name, tensors in pickles.items() if isinstance(tensors, str)), "")
    parts = sorted(re.findall(r"\d+", name) for name in pickles)
    if not why and parts != [[]] and parts != [[f"{i:05d}", f"{len(parts):05d}"] for i in range(1, len(parts) + 1)]:
        why = f"{len(parts)} files are not all the parts that their names say"
    names = [info.name for tensors in pickles.values() for info in tensors] if not why else []
    if len(set(names)) < len(names):
        why = "two files hold a tensor of the same name"
    if why:
        return Fix(f"{BY_HAND}: {why}", (), "manual")
    edits = [ReadPickle(name, name.removeprefix("pytorch_").removesuffix("bin") + "safetensors") for name in pickles]
    edits += ([RebuildIndex()] if len(edits) > 1 else []) + ([DropFile(INDEX)] if INDEX in files else [])
    count = f"{len(names):,} {'tensor' if len(names) == 1 else 'tensors'}"
    return Fix(f"write {count} as safetensors, byte for byte, without running what stands in the pickle", tuple(edits))


def bad():
    case = tiny()
    case.damage.append(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))
    return case, "the weights are there only as pickle: pytorch_model.bin"


def good():
    return tiny()


def more():
    """Cases whose cures the example above does not show."""
    case = tiny()
    case.files["pytorch_model.bin"] = torch_file(case.tensors, case.dtypes)
    case.damage.append(lambda folder: (folder / "model.safetensors").unlink())
    yield case
    case = tiny()
    names = sorted(case.tensors)
    for i in (0, 1):
        case.files[f"pytorch_model-0000{i + 1}-of-00002.bin"] = torch_file({n: case.tensors[n] for n in names[i::2]}, case.dtypes)
    case.files[INDEX] = b"{}"
    case.damage.append(lambda folder: (folder / "model.safetensors").unlink())
    yield case
