"""Chinese for texts that come from the floors below, numbers and names in them: reasons, notes, lines of progress,
places.

Those floors know no language. `known(text)` finds the sentence that a text was made from and says it with the same
values. A text that is not here is shown as it is; tests/locale/test_chinese.py runs every command and finds it.
"""

import re
from functools import cache

from doctor.locale.fixes_zh import CURES

# An earlier one is tried first: what is more special stands above.
SENTENCES = {
    # reasons of skipped rules
    "no place for the output was named: --capacity DIR measures disk and memory": "没有指定输出位置：--capacity DIR 才测磁盘和内存",
    "the linears are packed: the family's table knows plain weights": "线性层是打包的：该模型族的表只认识未打包的权重",
    "the weights are packed already: their layout is judged instead": "权重已经打包：改为检查打包的布局",
    "linears differ in more than their width ({key}): their shapes are not judged": "各线性层之间不止位数不同（{key}）：不检查它们的形状",
    "quantization by {method} has no packed groups of columns": "{method} 量化没有打包的列分组",
    "no table of {runtime}'s kernels for grouped weights": "没有 {runtime} 分组权重内核的表",
    "the quantization block has no usable {name}": "量化配置里没有可用的 {name}",
    "{key} {value}: its packing is not judged here, only {known}": "{key} {value}：这种打包不作检查，只检查 {known}",
    "{version} with {bits} bits is not unpacked here": "{version} 的 {bits} 位权重在这里不拆包",
    "{dtype} values are not judged": "不判断 {dtype} 的值",
    "stage {stage} was not asked for": "没有要求 {stage} 这一步",
    "{name} is absent or cannot be read": "{name} 不存在或读不出来",
    "no {fact} for this checkpoint": "这个检查点没有 {fact}",
    "no {fact} for {subject}": "{subject} 没有 {fact}",
    # places of a model
    "the output of {name}": "{name} 的输出",
    "the input of {name}": "{name} 的输入",
    "the residual stream after {name}": "{name} 之后的残差流",
    # progress of quantize
    "check before: {errors} errors, {warnings} warnings ({seconds} s)": "量化前检查：{errors} 个错误，{warnings} 个警告（{seconds} 秒）",
    "calibrate: {rows} rows, {tokens} tokens of {source} ({seconds} s)": "校准：{source} 的 {rows} 行，{tokens} 个词元（{seconds} 秒）",
    "block {i} of {n}: {linears} linears in {seconds} s, largest relative error {worst}; damp raised: {names}": "第 {i} 层，共 {n} 层：{linears} 个线性层，{seconds} 秒，最大相对误差 {worst}；加大了阻尼：{names}",
    "block {i} of {n}: {linears} linears in {seconds} s, largest relative error {worst}": "第 {i} 层，共 {n} 层：{linears} 个线性层，{seconds} 秒，最大相对误差 {worst}",
    "block {i} of {n}: {linears} linears in {seconds} s": "第 {i} 层，共 {n} 层：{linears} 个线性层，{seconds} 秒",
    "block {i} is quantized again": "重新量化第 {i} 层",
    "block {i} of {n}: done before": "第 {i} 层，共 {n} 层：之前已完成",
    "quantize: {outcomes} ({seconds} s)": "量化：{outcomes}（{seconds} 秒）",
    "check after: {errors} errors ({seconds} s)": "量化后检查：{errors} 个错误（{seconds} 秒）",
    "not quantized: {errors} errors": "没有量化：{errors} 个错误",
    "hidden states take {size} GiB, more than {limit} GiB: kept in {path}": "隐藏状态占 {size} GiB，超过 {limit} GiB：存放在 {path}",
    "calibration: {text}": "校准：{text}",
    "fix: {title}": "修复：{title}",
    "rows have {positions} tokens instead of {length}: the model has no more positions": "每行 {positions} 个词元而不是 {length} 个：模型没有更多位置",
    "{found} rows instead of {rows}: {source} has no more text": "{found} 行而不是 {rows} 行：{source} 没有更多文本",
    "no text is sampled from the model: {reason}": "没有用模型自己写的文本：{reason}",
    "Python's documentation and text sampled from the model": "Python 文档和模型自己写的文本",
    "fewer than {n} rows": "少于 {n} 行",
    "its logits are not finite": "它的 logits 不是有限数",
    "the whole model takes {need}, {limit} are allowed": "整个模型要 {need}，只允许 {limit}",
    "{count} B parameters would take minutes on this device": "{count} B 个参数，在这台设备上要几分钟",
    "the model does not run: {error}": "模型跑不起来：{error}",
    "it ended its texts at once": "它一开头就结束文本",
    "several processes would each have to hold it": "每个进程都得装下整个模型",
    "{model} has no key/value cache": "{model} 没有键值缓存",
    "the tokenizer has no token to start with": "分词器没有可以开头的词元",
    # quantize --plan and --preflight
    "        {peak} before the first block, where the whole model writes a part of the calibration rows": "        第 1 层之前为 {peak}：整个模型在内存中写出一部分校准行",
    "memory  {peak} at the peak: {parts}; passes that wait between stages take what is left": "内存    峰值 {peak}：{parts}；各阶段之间等待的前向计算用剩下的",
    "GPU     up to {size} of its memory, with --device cuda": "GPU     用 --device cuda 时最多占用其内存 {size}",
    "disk    {peak} at the peak, {end} at the end; {free} free": "磁盘    峰值 {peak}，最后 {end}；空闲 {free}",
    "time    about {clock} for {blocks} blocks: measured on block {tried} of {n} with {few} of {rows} rows": "时间    {blocks} 层约 {clock}：在第 {tried} 层实测（共 {n} 层），用了 {rows} 行中的 {few} 行",
    "        block {last} got the outputs of block 1, not its own inputs: its errors are a hint": "        第 {last} 层的输入取自第 1 层的输出，不是它自己的：其误差只是线索",
    "would fail: {problem}": "将会失败：{problem}",
    "memory: {need} at least, {limit} allowed": "内存：至少 {need}，允许 {limit}",
    "memory: {need} at least, {limit} free": "内存：至少 {need}，空闲 {limit}",
    "disk: {need} at {place}, {free} free": "磁盘：{place} 需要 {need}，空闲 {free}",
    # notes of kvcache
    "transformers cannot read this config ({error}): layers are read from its keys alone": "transformers 读不了这个配置（{error}）：只按它的键判断各层",
    "layer type {kind} is not known here: counted as full attention, which is the most it can be": "不认识层类型 {kind}：按完整注意力计，这是上限",
    "the constant state of its linear-attention layers is not known for this family, and not counted": "不知道该模型族线性注意力层的固定状态大小，没有计入",
    # the end of fix
    "waits for {codes}": "等待 {codes}",
    # last, for it fits every sentence with an "and"
    "{one} and {other}": "{one} 和 {other}",
}
# Names inside a list of parts.
PARTS = {
    "one block in float32": "一层（float32）",
    "the next block as stored": "下一层（原样）",
    "Hessians of one stage": "一个阶段的 Hessian",
    "solving one linear": "求解一个线性层",
    "one batch of rows": "一批校准行",
    "embeddings": "嵌入",
    "hidden states in a file": "隐藏状态在文件里",
    "hidden states": "隐藏状态",
    "Python, torch and transformers": "Python、torch 和 transformers",
    ", ": "，",
}


@cache
def _patterns() -> tuple[tuple[re.Pattern, str], ...]:
    """(pattern with a named group a value, sentence in Chinese)."""
    return tuple(
        (re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(english)), re.S), chinese)
        for english, chinese in (CURES | SENTENCES).items()
    )


def chinese(text: str) -> str | None:
    """The text in Chinese; None for one that is not here."""
    for pattern, sentence in _patterns():
        if found := pattern.fullmatch(text):
            return sentence.format(**{name: _value(name, value) for name, value in found.groupdict().items()})
    return None


def _value(name: str, value: str) -> str:
    if name == "parts":
        for english, translated in PARTS.items():
            value = value.replace(english, translated)
        return value
    return chinese(value) or value if name in ("tried", "text", "problem", "title") else value
