"""The words of screens and pages in two languages: one catalogue, English sentence -> Chinese sentence.

Code reads in English: `say("{n} skipped", n=3)` gives the sentence in the language that is set around a rendering.
Machine formats are made in English, whatever the user speaks; so are findings' messages and the titles of fixes, which
carry the exact numbers. tests/locale/test_catalogue.py keeps the catalogue complete: what is said has a translation,
and what is translated is said.
"""

import locale
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LANGUAGES = ("en", "zh")
HUMAN = ("full", "markdown", "html")  # the formats that are translated
_current: ContextVar[str] = ContextVar("language", default="en")


def current() -> str:
    return _current.get()


def chinese() -> bool:
    return _current.get() == "zh"


@contextmanager
def language(lang: str) -> Iterator[None]:
    """Inside it, everything said is in this language. Raises ValueError for one that is not here."""
    if lang not in LANGUAGES:
        raise ValueError(f"language {lang!r}: must be one of {', '.join(LANGUAGES)}")
    token = _current.set(lang)
    try:
        yield
    finally:
        _current.reset(token)


def from_environment() -> str:
    """The language of the locale, by POSIX's order: the first of LC_ALL, LC_MESSAGES and LANG that is set decides."""
    named = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if locale.normalize(named).lower().startswith("zh") else "en"


def say(sentence: str, /, **values: object) -> str:
    """A sentence of the catalogue, with its values. Raises KeyError for one that has no translation."""
    return (ZH[sentence] if chinese() else sentence).format(**values)


def known(text: str) -> str:
    """A text from elsewhere, translated if the catalogue or reasons.py has it: reasons of skipped rules are
    open-ended.
    """
    from doctor.locale import reasons

    return (ZH.get(text) or reasons.chinese(text) or text) if chinese() else text


def counted(number: int, word: str, plural: str = "") -> str:
    """`1 rule`, `3 rules`, `3 条规则`. Raises KeyError for a noun without a translation."""
    if chinese():
        return f"{number:,} {NOUNS[word]}"
    return f"{number:,} {word if number == 1 else plural or word + 's'}"


def pad(text: str, cells: int) -> str:
    """Text with blanks behind it to a width in cells, of which a Chinese character takes two."""
    from rich.cells import cell_len

    return text + " " * (cells - cell_len(text))


# Each with its measure word: Chinese does not count bare nouns.
NOUNS = {
    "error": "个错误",
    "warning": "个警告",
    "note": "条提示",
    "rule": "条规则",
    "shard": "个分片",
    "tensor": "个张量",
    "linear": "个线性层",
    "checkpoint": "个检查点",
    "subject": "个对象",
    "safe fix": "项安全修复",
    "defect": "种缺陷",
    "finding": "个发现",
    "file": "个文件",
    "token": "个词元",
    "row": "行",
    "sequence": "条序列",
}

ZH = {
    # severities, areas, certainties
    "error": "错误",
    "warning": "警告",
    "info": "提示",
    "certain": "确定",
    "likely": "很可能",
    "hint": "线索",
    "Files": "文件",
    "Tensors": "张量",
    "Tokenizer": "分词器",
    "Config": "配置",
    "Weights": "权重",
    "Geometry": "尺寸",
    "Calibration": "校准",
    "Serving": "推理服务",
    "Output": "输出",
    "Settings": "设置",
    # labels of a finding
    "why": "原因",
    "else": "别处",
    "do": "处理",
    "fix": "修复",
    "fix!": "修复!",
    "you": "手动",
    "then": "连带",
    "you would see": "别处报错",
    "fix (safe)": "修复（安全）",
    "fix (unsafe)": "修复（不安全）",
    "for you": "需手动",
    "what to do": "处理",
    "also reported because of this: {codes}": "由此还报出：{codes}",
    " (once {codes} is gone)": "（待 {codes} 解决之后）",
    " (once {codes} are gone)": "（待 {codes} 解决之后）",
    "{title}: a guess, only by name with --unsafe-fixes={code}": "{title}（这是猜测，只能用 --unsafe-fixes={code} 点名执行）",
    "and {n} more": "另有 {n} 处",
    "{n} more": "另有 {n} 处",
    "new": "新增",
    "{n} alike": "{n} 处相同",
    # verdict
    "ready for {plan}": "可以量化：{plan}",
    "not ready for {plan}": "尚不能量化：{plan}",
    "agrees with its original: {plan}": "与原模型相符：{plan}",
    "does not agree with its original: {plan}": "与原模型不符：{plan}",
    "quantized to {plan}": "已量化：{plan}",
    "not quantized to {plan}": "未能量化：{plan}",
    "follows from {causes}: {codes}": "由 {causes} 引起：{codes}",
    "interrupted: no verdict for {plan}": "已中断：{plan} 没有结论",
    "interrupted: {read} of {total} read, {tensors} not looked at": "已中断：读了 {total} 中的 {read}，{tensors}没有检查",
    "interrupted before its weights were read": "还没读到这个权重就中断了",
    "no verdict for {plan}: {rules} crashed": "{plan} 没有结论：{rules}崩溃",
    "nothing was judged for {plan}": "{plan}：什么也没有检查",
    " (headers only)": "（仅文件头）",
    ", with warnings": "，有警告",
    "no findings": "没有发现问题",
    "{rules} run": "运行 {rules}",
    "{n} skipped": "跳过 {n} 条",
    "{n} crashed": "崩溃 {n} 条",
    "{n} suppressed": "抑制 {n} 个",
    " ({n} by the checkpoint itself)": "（其中 {n} 个由检查点自己抑制）",
    "{n} new since {base}": "比 {base} 新增 {n} 个",
    "{n} new, {gone} gone since {base}": "比 {base} 新增 {n} 个，消失 {gone} 个",
    "every byte read": "逐字节读完",
    "weights not read": "未读权重",
    "{tensors} of a type that is not judged": "{tensors}的类型不作判断",
    " (doctor check -v says why)": "（原因见 doctor check -v）",
    "plan": "计划",
    "default plan; --for, --bits, --group-size, --tp change it": "默认计划；可用 --for、--bits、--group-size、--tp 更改",
    "per channel": "逐通道",
    "group {n}": "分组 {n}",
    "{n} bit": "{n} 位",
    "sym": "对称",
    "asym": "非对称",
    "tensor parallel {n}": "张量并行 {n}",
    "1 GPU": "1 GPU",
    # areas
    "{rules} crashed": "{rules}崩溃",
    "{rules} skipped": "跳过 {rules}",
    "{n} values read, {size}": "读取 {n} 个值，{size}",
    "{shards}, {size}, {tensors}": "{shards}，{size}，{tensors}",
    "{tensors} as config.json asks": "{tensors}，与 config.json 一致",
    "{what}, {n} blocks": "{what}，{n} 层",
    "tokenizer and special tokens agree with config.json": "分词器和特殊词元与 config.json 一致",
    "{linears} fit {plan}": "{linears}符合 {plan}",
    "nothing against serving with {runtime}": "用 {runtime} 做推理没有障碍",
    "nothing against serving with any runtime": "做推理没有障碍（未指定运行时）",
    "{known} ({rules})": "{known}（{rules}）",
    "{rules} on {subjects}": "{rules}检查了 {subjects}",
    "skipped: {reason} ({rules})": "已跳过：{reason}（{rules}）",
    "no checkpoint to judge": "没有可检查的检查点",
    "no shard to judge": "没有可检查的分片",
    "no tensor to judge": "没有可检查的张量",
    "no linear to judge": "没有可检查的线性层",
    "this is a defect of doctor, please report it": "这是 doctor 的缺陷，请报告",
    "{code} crashed": "{code} 崩溃",
    # reasons of skipped rules
    "no safetensors tensor can be read": "读不到任何 safetensors 张量",
    "tokenizer.json has no vocabulary": "tokenizer.json 没有词表",
    "the checkpoint is not quantized": "检查点未量化",
    "no runtime was named: --runtime asks for one": "没有指定运行时：用 --runtime 指定",
    "the tensors are packed but no file says how": "张量是打包的，却没有文件说明如何打包",
    "no numbered blocks with linears among the tensors": "张量里没有带编号、含线性层的层",
    "jinja2 is not installed": "没有安装 jinja2",
    "neither an embedding nor vocab_size is there": "既没有嵌入表也没有 vocab_size",
    "the weights were not read": "没有读权重",
    "no calibration in this run: doctor quantize measures it": "本次没有校准：doctor quantize 时才测",
    "nothing was quantized in this run": "本次没有量化",
    "no quantized output was compared: doctor verify does it": "没有比较量化结果：doctor verify 才做",
    "after safe fixes": "安全修复之后",
    "after padding": "补零之后",
    # results of a quantization or a comparison
    "linears": "线性层",
    "perplexity": "困惑度",
    "divergence": "散度",
    "replies": "回答",
    "; damp raised for {n}": "；{n} 个加大了阻尼",
    "; error {share} of plain rounding's (median)": "；误差为直接取整的 {share}（中位数）",
    "{change} on {tokens} tokens, {context} at a time": "{change}，共 {tokens} 个词元，每次 {context} 个",
    "KL {mean} nats on average, {p99} at the 99th percentile; same next token {top1}": "KL 平均 {mean} nat，第 99 百分位 {p99}；下一词元相同 {top1}",
    "none: not quantized": "无：未量化",
    "entropy": "熵",
    "block": "层",
    "not taken": "未计算",
    "when": "时间",
    "relative error of what each block adds, given the original's input: one that stands out is wrong; and of its output, with all that is carried along": "给各层原模型的输入时，其增量的相对误差：突出的那层有问题；以及累积到各层输出的相对误差",
    "{name} states {stored} of itself; judged against {asked}, which was asked for": "{name} 自称为 {stored}；按所要求的 {asked} 检查",
    "each block alone": "每层单独",
    "carried along": "累积",
    "blocks": "各层",
    "each alone off by {median} (median), block {worst} the most by {most}; carried along to the last block {last}": "单独误差中位数 {median}，第 {worst} 层最大，为 {most}；累积到最后一层 {last}",
    "size of a weight, as a power of two": "权重的大小（2 的幂）",
    "Where the engine stores full heads": "引擎按完整的头存储时",
    "Keys by layer": "逐层的键",
    "Measured": "实测",
    "{before} → {after} nats a token; one and the same first choice at most {one_before} → {one_after}": "每词元 {before} → {after} nat；同一个词元排第一的比例至多 {one_before} → {one_after}",
    "{tokens}, longest repeat {repeat}, token 0 {share}": "{tokens}，最长重复 {repeat}，词元 0 占 {share}",
    "not generated: {reason}": "没有生成：{reason}",
    "no prompts": "没有提示词",
    "a whole model in float32 does not fit the {size} GiB given to it; --memory raises it": "float32 的整个模型放不进给它的 {size} GiB；可用 --memory 加大",
    "float16": "float16",
    "KL of the original rounded to float16 {fp16}, to bfloat16 {bf16}": "原模型舍入到 float16 时 KL {fp16}，到 bfloat16 时 {bf16}",
    "overflows: {place} reaches {size}, float16 ends at 65,504": "溢出：{place} 达到 {size}，而 float16 只到 65,504",
    "the original fits: its largest activation is {size}, {share} of the range": "原模型放得下：最大激活值 {size}，占范围的 {share}",
    # what to do next
    "next": "接着",
    "{n} for you: {codes}": "{n} 项需手动：{codes}",
    "when you are ready": "准备好之后",
    # plans by GPU count
    "in the way": "障碍",
    "{n} GPUs {codes}": "{n} GPU：{codes}",
    "{n} GPUs also {codes}": "{n} GPU 另有 {codes}",
    "GPUs": "GPU",
    "no matrix: without readable tensors and config.json there is nothing to plan": "没有计划表：读不到张量和 config.json，无从规划",
    "by block, 0 → {last}": "逐层，0 → {last}",
    "by block, 0 → {last}, the largest of each {n}": "逐层，0 → {last}，每 {n} 层取最大",
    "{subjects}, {ms} ms": "{subjects}，{ms} 毫秒",
    "; {n} not judged: {reason}": "；{n} 个未判断：{reason}",
    # Markdown and the HTML page
    "{n} more findings do not fit here; `doctor check` prints them all.": "还有 {n} 个发现放不下；`doctor check` 会全部列出。",
    "{rules} run, {n} skipped": "运行 {rules}，跳过 {n} 条",
    "{size} of weights read, in {time}": "读取权重 {size}，用时 {time}",
    "safe": "安全",
    "with": "需加",
    "only by name": "只能点名",
    "This is a defect of doctor: please report it. The other rules ran.": "这是 doctor 的缺陷，请报告。其他规则已运行。",
    "Results": "结果",
    "prompt": "提示词",
    "original": "原模型",
    "quantized": "量化后",
    "Where this model can go": "这个模型能用在哪里",
    "plans by GPUs that share it": "按共用的 GPU 数列出各计划",
    "Findings": "发现",
    "and": "另有",
    "byte": "字节",
    "the whole page": "完整说明",
    "By area": "按类别",
    "Quantization, linear by linear": "逐个线性层的量化",
    "shade: error against its own kind; red: fell back or failed": "颜色深浅：与同类相比的误差；红色：退回或失败",
    "error of each linear by block": "各线性层逐层的误差",
    "Weights, block by block": "逐层权重",
    "shade: largest |w| against its own kind; red: NaN or Inf": "颜色深浅：与同类相比的最大 |w|；红色：NaN 或 Inf",
    "largest weight of each linear by block": "各线性层逐层的最大权重",
    "Special tokens": "特殊词元",
    "who says what; shaded where files disagree": "各文件的说法；不一致处有底色",
    "token": "词元",
    "every distinct linear, cut into groups and over GPUs": "每种线性层如何分组、如何切到各 GPU",
    "linear": "线性层",
    "count": "数量",
    "groups of {n}": "每组 {n} 个的组数",
    "a row": "一行",
    "whole on": "可整分到",
    "file": "文件",
    "size": "大小",
    "tensors": "张量",
    "Rules": "规则",
    "what was looked at, and what was not": "检查了什么，没检查什么",
    "not judged": "未判断",
    "As Markdown, to copy": "Markdown 版，供复制",
    "Made by doctor {version}.": "由 doctor {version} 生成。",
    "The report as JSON lies in this file.": "JSON 报告就在本文件里。",
    "The report as JSON is too large to lie in this file:": "JSON 报告太大，没有放进本文件：",
    "Nothing here was fetched from a network.": "本页没有从网络取任何内容。",
    "block {n}": "第 {n} 层",
    "{label} by block": "{label}（逐层）",
    "The original's activations": "原模型的激活值",
    "largest |value| by block; float16 ends at 65,504": "逐层最大绝对值；float16 只到 65,504",
    "residual": "残差流",
    "largest": "最大值",
    "linears with the largest error": "误差最大的线性层",
    "how": "方式",
    "relative error": "相对误差",
    "plain rounding": "直接取整",
    "damp": "阻尼",
    "tokens seen": "见过的词元",
    "source": "来源",
    " (doctor's own texts)": "（doctor 自带的文本）",
    "rows": "行数",
    "tokens": "词元数",
    "shortest / median / longest row": "最短 / 中位 / 最长行",
    "distinct tokens": "不同的词元",
    "rows that repeat another": "与别行重复的行",
    "padding tokens": "填充词元",
    "rows with two BOS tokens": "有两个 BOS 的行",
    "scripts": "文字",
    "Exponents of the weights": "权重的指数",
    "of {n} sampled values, logarithmic; red: float16 cannot hold them": "抽样 {n} 个值，对数刻度；红色：float16 放不下",
    "histogram of exponents: {beyond} values beyond float16, {lost} too small for it, {zeros} zeros, {nonfinite} NaN or Inf": "指数直方图：{beyond} 个值超出 float16，{lost} 个太小，{zeros} 个零，{nonfinite} 个 NaN 或 Inf",
    "fp16 subnormal": "fp16 次正规数",
    "fp16 normal": "fp16 正规数",
    "fp16 ends": "fp16 上限",
    "zeros: {zeros}; NaN or Inf: {nonfinite}; values that float16 makes Inf: {beyond}, that it makes 0: {lost}": "零：{zeros}；NaN 或 Inf：{nonfinite}；转成 float16 变成 Inf：{beyond}，变成 0：{lost}",
    "keys of 4 bits will do": "键用 4 位即可",
    "keys need 6 to 8 bits": "键需要 6 到 8 位",
    "never store these keys in 4 bits": "这些键绝不能用 4 位",
    "the keys could not be judged": "键无法判断",
    "key/value cache": "键值缓存",
    "Size of the cache": "缓存大小",
    "engines": "引擎",
    "how far each way to store keys moves the attention logits (rms)": "各种存键方式使注意力 logits 偏移多少（均方根）",
    "Receipt": "凭据",
    "what doctor did to {source}, for {plan}": "doctor 对 {source} 做了什么，为了 {plan}",
    # pages of rules
    "Why it matters": "为什么要紧",
    "Ways out": "怎么处理",
    "When not to worry": "何时不必担心",
    "How safe the fix is": "修复是否安全",
    "Sources": "出处",
    "Seen as": "别处的报错",
    "What it checks": "检查什么",
    "Checked by": "由谁检查",
    "See also": "另见",
    "To know": "怎样确认",
    "rules/{file}, with its bad and good examples": "rules/{file}，内含反例和正例",
    "find me by": "可搜到",
    "needs {stage}": "需要 {stage}",
    "   no rule quotes this message.": "   没有规则收录这条报错。",
    "nearest by shared words": "用词最接近的规则",
    "If doctor check finds nothing either, please report the message: a rule is missing.": "若 doctor check 也没有发现，请报告这条信息：这里缺一条规则。",
    "{tools} · {defects} ends in words like these:": "{tools} · {defects}会以这样的话收场：",
    "one defect": "一种缺陷",
    "{tools} · {defects} end in words like these:": "{tools} · {defects}会以这样的话收场：",
    "Order 1: the very first element of the diagonal is not positive. As a rule all of H is NaN then, and no damping helps.": "阶数 1：对角线的第一个元素就不是正数。这时通常整个 H 都是 NaN，加大阻尼没有用。",
    "Order {n}: H breaks at input column {column} of the linear, counted from 0 in the order the tool takes them (with act-order "
    "not that of the weights). Late in the width it is rounding, which more damping cures; at one more than the number of "
    "calibration tokens there are too few tokens; NaN or Inf in a column stops there as well.": "阶数 {n}：H 在该线性层的第 {column} 个输入列（从 0 数起，按工具处理的次序；用 act-order 时与权重的次序不同）处分解失败。"
    "靠近末尾多为舍入误差，加大阻尼即可；恰为校准词元数加一，是词元太少；某列有 NaN 或 Inf 时也会停在那里。",
    "start with": "先运行",
    "after that": "再运行",
    "read more": "再阅读",
    "{rules}; `doctor explain CODE` shows a page": "共 {rules}；`doctor explain CODE` 看说明",
    "code": "编号",
    "name": "名称",
    "severity": "级别",
    "certainty": "把握",
    "needs": "需要",
    "what it finds": "检查什么",
    # the plan of a fix
    "unsafe": "不安全",
    "by name": "点名",
    "manual": "需手动",
    "note: {text}": "说明：{text}",
    "(after {n}: same file)": "（在 {n} 之后：同一文件）",
    "{shape} added": "{shape} 新增",
    "{shape} dropped": "{shape} 删除",
    "{shape} values change": "{shape} 数值改变",
    "proof: {text}": "证明：{text}",
    "logits on {n} fixed prompts, before and after, must agree to float32 rounding": "{n} 条固定提示词的 logits，修复前后须在 float32 舍入范围内一致",
    "not run: {text}": "未运行：{text}",
    "with --unsafe-fixes": "需加 --unsafe-fixes",
    "with --unsafe-fixes={code}": "需加 --unsafe-fixes={code}",
    "   (unblocks {steps})": "   （解决后可进行 {steps}）",
    "{n} of {findings}": "{n} / {findings}",
    " now, {n} more once {codes} is gone": "，待 {codes} 解决后再修 {n} 个",
    " now, {n} more once {codes} are gone": "，待 {codes} 解决后再修 {n} 个",
    "Nothing to fix": "没有可修的",
    "No fix can be carried out now": "目前没有可执行的修复",
    "{what}: nothing was written.": "{what}：没有写入任何内容。",
    "Would fix {tally}. Would write {files} ({size}), link {linked} ({linked_size}).": "将修复 {tally}。将写入 {files}（{size}），链接 {linked} 个（{linked_size}）。",
    "Would stop: {problem}.": "将会中止：{problem}。",
    "Nothing was written.": "没有写入任何内容。",
    "Fixed {tally}. Wrote {files} ({size}); {linked} unchanged ({linked_size}).": "已修复 {tally}。写入 {files}（{size}）；{linked} 个未改（{linked_size}）。",
    "Wrote {out}/ · receipt {receipt} · undo: {undo}": "已写入 {out}/ · 凭据 {receipt} · 撤销：{undo}",
    "delete {out}/": "删除 {out}/",
    "doctor undo {out}; until then {out}.before-fix/ holds what was there": "doctor undo {out}；在此之前，原来的内容在 {out}.before-fix/",
    " No findings remain.": "没有遗留的发现。",
    " No findings would remain.": "不会遗留发现。",
    " Exit {code}: {codes} would remain.": "退出码 {code}：将遗留 {codes}。",
    " Exit {code}: {codes} remain.": "退出码 {code}：遗留 {codes}。",
    " Exit {code}: {codes} remains.": "退出码 {code}：遗留 {codes}。",
    "{most} and {last}": "{most} 和 {last}",
    ", ": "、",
    # bars of a run through the blocks
    "Machine": "机器",
    "system": "系统",
    "processor": "处理器",
    "cores": "核数",
    "memory": "内存",
    "seconds": "用时",
    "versions": "版本",
    "recipe": "配方",
    "calibration": "校准",
    "how these files were made": "这些文件是怎样做出来的",
    "Wrote {file}": "已写入 {file}",
    "compare": "比较",
    "predict": "预测",
    "measure": "实测",
    # the key/value cache
    "note": "说明",
    "where the engine stores full heads": "引擎按完整的头存储时",
    "{sequences} of {n} tokens": "{sequences}，每条 {n} 个词元",
    "weights {n} GiB": "权重 {n} GiB",
    "made for {n} positions": "位置数 {n}",
    "cache": "缓存",
    "K bits": "K 位数",
    "V bits": "V 位数",
    "KiB/token": "KiB/词元",
    "past {n}": "超过 {n} 后",
    "longest in {n} GiB": "{n} GiB 内最长",
    "any": "任意",
    "none": "放不下",
    "beside the weights; activations and the engine's own memory are not counted": "已扣除权重；激活值和引擎自身的内存未计入",
    "keys by layer": "逐层的键",
    "|key bias|": "|键偏置|",
    "error, {name}": "{name} 误差",
    "4-bit": "4 位",
    "8-bit": "8 位",
    "layer": "层",
    "by bias": "按偏置",
    "4-bit error": "4 位误差",
    "advice": "建议",
    "{n}+ bits": "≥{n} 位",
    "and {n} more; -f json has them all": "另有 {n} 层；全部见 -f json",
    "not measured: {reason}": "没有实测：{reason}",
    "measured": "实测",
    "on {source}: {tokens}, {rows} of at most {n}": "文本 {source}：{tokens}，{rows}，每行至多 {n}",
    "× FP16": "FP16 的倍数",
    "KL, nats": "KL（nat）",
    "same top token": "首选词元相同",
    "worst layer's error": "最差一层的误差",
    "Q4": "4 位键可用",
    "Q6": "键需要 6 到 8 位",
    "never Q4": "键不能用 4 位",
    "unknown": "无法判断",
    # what to do about the keys: evaluate/kvcache.py
    "Q4 is fine where memory is short; verify recall over long contexts, which no short test shows. Q6 and Q8 cost next to nothing.": "内存紧张时可用 Q4；请在长上下文里检验召回，短测试看不出来。Q6 和 Q8 几乎没有代价。",
    "Take Q6 (8-bit keys, 4-bit values): ExLlamaV2 Q6, llama.cpp --cache-type-k q8_0 --cache-type-v q4_0. Q4 costs some quality.": "用 Q6（8 位键、4 位值）：ExLlamaV2 的 Q6，llama.cpp 的 --cache-type-k q8_0 --cache-type-v q4_0。Q4 会损失一些质量。",
    "Never store these keys in 4 bits. Take Q6 (8-bit keys, 4-bit values): ExLlamaV2 Q6, llama.cpp --cache-type-k q8_0 "
    "--cache-type-v q4_0; Q8 where memory allows. In vLLM leave the cache dtype on auto.": "这些键绝不能用 4 位。用 Q6（8 位键、4 位值）：ExLlamaV2 的 Q6，llama.cpp 的 --cache-type-k q8_0 --cache-type-v q4_0；内存够就用 Q8。"
    "vLLM 里缓存类型保持 auto。",
    "4-bit keys move the attention logits of layer {layer} by {error} (rms), more than those of any other layer: below 0.5, where 4 bits cost a "
    "few percent of perplexity.": "4 位键使第 {layer} 层的注意力 logits 偏移 {error}（均方根），为各层之最：低于 0.5，困惑度只变差几个百分点。",
    "4-bit keys move the attention logits of layer {layer} by {error} (rms), more than those of any other layer: between 0.5 and 1, where text "
    "gets worse.": "4 位键使第 {layer} 层的注意力 logits 偏移 {error}（均方根），为各层之最：在 0.5 和 1 之间，文本会变差。",
    "4-bit keys move the attention logits of layer {layer} by {error} (rms), more than those of any other layer: above 1, where heads attend to "
    "the wrong tokens.": "4 位键使第 {layer} 层的注意力 logits 偏移 {error}（均方根），为各层之最：高于 1，注意力头会看错词元。",
    "The key bias of layer {layer} reaches {size}, by its size alone a reason for {bits} bits; against this layer's queries it weighs little. "
    "--measure settles it.": "第 {layer} 层的键偏置达到 {size}，单看大小需要 {bits} 位；但相对本层的查询影响很小。用 --measure 可以确定。",
    "Not judged: {reason}.": "未判断：{reason}。",
    "Q8 is the choice that needs no judgement; --measure decides.": "Q8 不需要判断也能用；用 --measure 可以确定。",
    "there is no layer with plain keys": "没有存普通键的层",
    "there are no weights to look at": "没有权重可看",
    "By the key biases alone (the layers could not be simulated: {reason}): the largest is {size}, in layer {layer}.": "只看键偏置（无法模拟各层：{reason}）：最大 {size}，在第 {layer} 层。",
    "FP8 (e5m2) keys move them by {fp8}, more than 4-bit keys do, and take more room.": "FP8（e5m2）键使其偏移 {fp8}，比 4 位键还多，占用也更大。",
    "{n} of {layers} layers are this bad ({list}): an engine with a type per layer needs wide keys only there.": "{layers} 层中有 {n} 层如此（{list}）：能逐层设类型的引擎只需在这些层用宽键。",
    "There 8-bit keys move the logits by at most {eight}, FP8 (e5m2) by {fp8}.": "在这些层，8 位键使 logits 至多偏移 {eight}，FP8（e5m2）{fp8}。",
    "There 8-bit keys move the logits by at most {eight}, FP8 (e5m2) by {fp8}. Run --measure before relying on 8 bits.": "在这些层，8 位键使 logits 至多偏移 {eight}，FP8（e5m2）{fp8}。依赖 8 位之前先用 --measure 实测。",
    "q·k reaches {peak} in layer {layer}: attention that multiplies in float16 before it scales overflows (65,504), whatever the cache.": "第 {layer} 层的 q·k 达到 {peak}：先用 float16 相乘再缩放的注意力会溢出（65,504），与缓存无关。",
    "the keys have no bias, so there is none to store apart": "键没有偏置，因此无从单独存放",
    "Q4, key bias apart": "Q4，键偏置单独存",
    "its cache holds latent vectors, and transformers runs the model on full heads": "它的缓存存的是潜向量，而 transformers 按完整的头运行模型",
    "latent attention: engines that do not absorb its matrices keep full heads instead; figures for both": "潜在注意力：不吸收其矩阵的引擎改存完整的头；两种数字都给出",
    # what a layer keeps: evaluate/kv_size.py
    "{n} full: {keys} + {values} numbers a token": "{n} 层完整注意力：每词元 {keys} + {values} 个数",
    "{n} latent: {keys} numbers a token for all heads": "{n} 层潜在注意力：所有头共用，每词元 {keys} 个数",
    "{n} sliding: {keys} + {values} numbers a token, of the last {window} tokens": "{n} 层滑动窗口：每词元 {keys} + {values} 个数，只留最近 {window} 个词元",
    "{n} hybrid: {keys} + {values} numbers a token and a state of {state} KiB": "{n} 层混合：每词元 {keys} + {values} 个数，另有 {state} KiB 的状态",
    "{n} state: a state of {state} KiB at any length": "{n} 层状态：任意长度都是 {state} KiB",
    "{n} none: nothing of its own": "{n} 层没有自己的缓存",
    "{n} tokens are more than the {positions} positions the model is made for": "{n} 个词元超过了模型的位置数 {positions}",
}
