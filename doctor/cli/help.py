"""`--help` in Chinese: the same commands and options, with this table's texts for the English ones in cli.py.

click breaks lines at blanks and counts characters, so a page of its own is written here. tests/test_help_zh.py keeps
the table whole.
"""

import re

import click
from rich.cells import cell_len
from rich.text import Text

from doctor.core.messages import Message
from doctor.report.screen import console, wrap

_MOST, _NAMES = 100, 34  # cells of a line, and of the column of names

ZH = {
    ", ": "、",
    " and ": "和",
    'Finds, explains and fixes what makes quantizing a language model fail, then quantizes it.\n\n\b\ndoctor check ckpt/ --for gptq --tp 2       look, write nothing\ndoctor fix ckpt/ -o fixed/                 write a fixed copy beside it\ndoctor quantize fixed/ -o q4/              check, calibrate, quantize, check again\ndoctor explain "Hessian is not invertible" what an error points to': '找出、解释并修复使语言模型量化失败的问题，然后量化。\n\n\b\ndoctor check ckpt/ --for gptq --tp 2       只看，不写\ndoctor fix ckpt/ -o fixed/                 在旁边写一份修好的副本\ndoctor quantize fixed/ -o q4/              检查、校准、量化、再检查\ndoctor explain "Hessian is not invertible" 一条报错指向什么',
    "Every option can also be set in the environment: --fail-on as DOCTOR_FAIL_ON. DOCTOR_DEBUG=1 shows tracebacks.": "每个选项也可以用环境变量设置：--fail-on 即 DOCTOR_FAIL_ON。DOCTOR_DEBUG=1 显示调用栈。",
    "Show the version and exit.": "显示版本并退出。",
    "Show this message and exit.": "显示本帮助并退出。",
    "Language of this page and of the command's screens.  [default: the locale's]": "本页和命令界面的语言。  [默认：随系统区域设置]",
    "Say whether checkpoints are ready for a plan. Writes nothing, unless --fix asks for it.\n\nCHECKPOINT is a directory, a .safetensors file, or org/name[@revision] on the Hub, of which only headers are fetched.": "判断检查点能否用于某个计划。除非给了 --fix，什么也不写。\n\nCHECKPOINT 是目录、.safetensors 文件，或 Hub 上的 org/name[@revision]（只取文件头）。",
    "Quantization method of the plan.": "计划的量化方法。",
    "Bits per weight: 2, 3, 4 or 8.": "每个权重的位数：2、3、4 或 8。",
    "in_features that share a scale; -1 for whole rows.": "共用一个缩放因子的 in_features 个数；-1 为整行。",
    "Symmetric or asymmetric grid; asymmetric for awq, else symmetric.": "对称或非对称网格；awq 默认非对称，其余对称。",
    "GPUs that share each linear at serving.": "推理时分摊每个线性层的 GPU 数。",
    "This configuration; none for no file at all.  [default: the nearest doctor.toml or pyproject.toml]": "用这个配置文件；none 为不用任何文件。  [默认：最近的 doctor.toml 或 pyproject.toml]",
    "Only these codes, families (G, W2), names or certainties; commas or repeated.": "只用这些编号、类别（G、W2）、名称或把握程度；用逗号分隔或重复给出。",
    "These too, beside what is selected already.": "在已选之外再加上这些。",
    "All but these.": "除这些之外。",
    "Also load the rule files of DIR. They are Python: load only what you trust.": "另外加载 DIR 里的规则文件。它们是 Python 代码：只加载可信的。",
    "Least severity for exit code 1.": "达到哪一级别时退出码为 1。",
    "Exit 1 when a rule could not judge.": "有规则无法判断时退出码为 1。",
    "Short for -f concise.": "即 -f concise。",
    "Also list every rule, and why it was skipped.": "另外列出每条规则，以及跳过的原因。",
    "Language of screens, Markdown and HTML.  [default: the locale's]": "界面、Markdown 和 HTML 的语言。  [默认：随系统区域设置]",
    "Most expensive evidence to gather: header reads no weights.": "最多收集到哪一步的证据：header 不读权重。",
    "Also say whether this machine has the memory to quantize, and the disk to write into DIR.": "另外判断本机内存够不够量化、DIR 所在磁盘够不够写入。",
    "Also print methods, group sizes and GPU counts, and what stands in the way of each.": "另外列出各方法、分组大小、GPU 数，以及各自的障碍。",
    "Print counts by code instead of findings.": "只按编号打印数量，不打印各条发现。",
    "Branch, tag or commit of a Hub repository; org/name@REV says it too.": "Hub 仓库的分支、标签或提交；也可写作 org/name@REV。",
    "Fetch a Hub repository's files and check them whole.": "下载 Hub 仓库的文件，完整检查。",
    "Say what is new, unchanged and gone against it; exit 1 for what is new.": "与它相比，说明哪些新增、未变、消失；有新增时退出码为 1。",
    "Write a fixed copy to -o DIR, as `doctor fix` does, and report on that.": "像 `doctor fix` 那样把修好的副本写到 -o DIR，并报告它。",
    "With --fix: the directory to write.": "配合 --fix：要写入的目录。",
    "Print every setting and where it comes from, and check nothing.": "打印每项设置及其来源，不做检查。",
    "Write a fixed copy of a checkpoint, beside it.\n\nThe copy is checked again with all rules before it appears; the source is never changed.": "在检查点旁边写一份修好的副本。\n\n副本出现之前会用全部规则再检查一遍；来源绝不改动。",
    "Directory to write; the source is never changed.": "要写入的目录；来源绝不改动。",
    "Instead of -o: put the fixed copy in CHECKPOINT's place and keep the old one beside it.": "代替 -o：用修好的副本替换 CHECKPOINT，旧的保留在旁边。",
    "Show the edits, write nothing.": "只显示改动，不写入。",
    "Also fixes that change numbers or shapes; =CODES only those, and those that go by name only.": "也做会改变数值或形状的修复；=CODES 只做这些，包括只能点名的修复。",
    "Only the fixes of these rules.": "只做这些规则的修复。",
    "Base model, or a whole copy: lost files and tensors are taken from it, an adapter is merged into it.": "基座模型或完好的副本：从中取回缺失的文件和张量，或把适配器合并进去。",
    "Copy unchanged shards instead of linking them.": "未改动的分片用复制代替链接。",
    "Replace an existing DIR.": "替换已有的 DIR。",
    "Put back what `doctor fix --in-place` replaced.": "恢复 `doctor fix --in-place` 替换掉的内容。",
    "Check, calibrate, quantize and check the result.\n\n`torchrun --nproc-per-node N -m doctor quantize …` shares the work among N processes.": "检查、校准、量化，再检查结果。\n\n`torchrun --nproc-per-node N -m doctor quantize …` 由 N 个进程分担工作。",
    "Directory to write; must not exist.": "要写入的目录；必须尚不存在。",
    "Columns in order of importance; groups stay as they are.": "按重要性排列各列；分组不变。",
    "Search each group's scale for the least squared error.": "为每组搜索平方误差最小的缩放因子。",
    "File format.  [default: the method's own]": "文件格式。  [默认：该方法自己的格式]",
    "Share of the mean diagonal added to each Hessian.": "给每个 Hessian 加上其对角线平均值的多大比例。",
    "Most that a retry may raise it to.": "重试时最多加大到多少。",
    "Text, JSONL, Parquet or a dataset on the Hub.  [default: Python's documentation and text the model writes; yours is better]": "文本、JSONL、Parquet 或 Hub 上的数据集。  [默认：Python 文档和模型自己写的文本；用你自己的更好]",
    "Calibration rows.": "校准行数。",
    "Tokens per row, at most.": "每行最多词元数。",
    "Linears left in 16 bits; repeatable.": "保留 16 位的线性层；可重复。",
    "Apply safe fixes first, without writing the fixed copy.": "先做安全修复，但不写出修好的副本。",
    "Most memory to use, as 24GB.  [default: what is free]": "最多使用的内存，如 24GB。  [默认：全部空闲内存]",
    "Where to compute: cpu, cuda, cuda:1; under torchrun, cuda is one GPU a process.": "在哪里计算：cpu、cuda、cuda:1；用 torchrun 时，cuda 为每个进程一块 GPU。",
    "Only print the memory and disk that it takes, from headers alone.": "只看文件头，打印所需的内存和磁盘。",
    "Quantize the first and last decoder layer only, write nothing: would it fail, how long would it take?": "只量化首末两层，不写入：会不会失败，要多久？",
    "Go on where an interrupted run stopped.": "从中断处继续。",
    "Where to compute: cpu, cuda or cuda:1.": "在哪里计算：cpu、cuda 或 cuda:1。",
    "Compare a quantized model with its original.\n\nMeasures perplexity, divergence of the next-token distributions, and collapse of greedy replies.": "比较量化后的模型和原模型。\n\n测量困惑度、下一词元分布的散度，以及贪心回答是否崩坏。",
    "Text to compare on.  [default: texts of doctor]": "用来比较的文本。  [默认：doctor 自带的文本]",
    "Tokens of a row.  [default: 512]": "每行词元数。  [默认：512]",
    "Rows, at most; they do not overlap.  [default: 24]": "最多行数；各行不重叠。  [默认：24]",
    "Memory for whole models, as 24GB: greedy replies need them.  [default: half of what is free]": "给整个模型的内存，如 24GB：贪心回答需要它。  [默认：空闲内存的一半]",
    "Memory of the KV cache, and the fewest bits its keys survive.\n\nThe verdict comes from the weights: random states go through each layer's own projections, and the exact cache.": "KV 缓存的内存，以及键最少能用几位。\n\n结论来自权重：用随机状态通过每层自己的投影和真实的缓存格式。",
    "Tokens kept per sequence.": "每条序列保留的词元数。",
    "Sequences at a time.": "同时的序列数。",
    "GPU memory for weights and cache, as 24GB: prints the longest context that fits.": "给权重和缓存的 GPU 内存，如 24GB：打印放得下的最长上下文。",
    "One more row: keys of this width, 2 to 8, or 16.": "多列一行：这么多位的键，2 到 8，或 16。",
    "The same for values.": "同上，用于值。",
    "Also run the model on text with its cache quantized: perplexity of each scheme.": "另外在文本上用量化的缓存运行模型：各方案的困惑度。",
    "Text to measure on.  [default: texts of doctor]": "用来实测的文本。  [默认：doctor 自带的文本]",
    "Rows to measure, of 512 tokens.  [default: 2]": "实测的行数，每行 512 个词元。  [默认：2]",
    "A rule's page, or what a pasted error points to.\n\n- reads the error from stdin: `python quantize.py 2>&1 | tail -1 | doctor explain -`.": "一条规则的说明，或一条粘贴来的报错指向什么。\n\n- 从标准输入读报错：`python quantize.py 2>&1 | tail -1 | doctor explain -`。",
    "List the rules.": "列出规则。",
    "Only these codes, families, names or certainties.": "只列这些编号、类别、名称或把握程度。",
    "Render a saved report in another format.\n\nNeeds only the JSON that `doctor check -f json:REPORT.json` wrote (or quantize, verify, kvcache), not the checkpoint.": "把保存的报告转成另一种格式。\n\n只需要 `doctor check -f json:REPORT.json`（或 quantize、verify、kvcache）写出的 JSON，不需要检查点。",
    "Print the script that completes commands, options and rule codes in a shell.\n\n\b\nbash   doctor completion bash >> ~/.bashrc\nzsh    doctor completion zsh >> ~/.zshrc      after compinit\nfish   doctor completion fish > ~/.config/fish/completions/doctor.fish": "打印在 shell 里补全命令、选项和规则编号的脚本。\n\n\b\nbash   doctor completion bash >> ~/.bashrc\nzsh    doctor completion zsh >> ~/.zshrc      放在 compinit 之后\nfish   doctor completion fish > ~/.config/fish/completions/doctor.fish",
    "{formats}; repeatable, to stdout or to a FILE.  [default: full]": "{formats}；可重复，输出到屏幕或 FILE。  [默认：full]",
    "Where it will be served: {runtimes}.": "将在哪里做推理：{runtimes}。",
    "Other bits for some linears, as {example}; repeatable. In the GPTQ format transformers does not read them.": "为部分线性层指定别的位宽，例如 {example}；可重复。GPTQ 格式里的这种位宽 transformers 不读。",
    "Size of the KV cache, and the bits its keys need.": "KV 缓存的大小，以及键需要几位。",
    "Print the script that completes in a shell.": "打印用于 shell 补全的脚本。",
    "List the facts that a rule can ask for.": "列出规则可以引用的事实。",
    "List the facts that a rule can ask for: name, scope, what they cost, and what they say.\n\nA rule asks by naming a fact as a parameter. The cost is the stage that makes it: listing and header read no weights. every_NAME gathers a fact over all tensors, linears or shards. WORDS keep the facts that hold one of them.": "列出规则可以引用的事实：名称、作用范围、代价和含义。\n\n规则把事实名写成参数即可引用。代价是产生它的步骤：listing 和 header 不读权重。every_NAME 汇集所有张量、线性层或分片的同一事实。给出 WORDS 时只列含有其中一词的事实。",
    "Only facts of this scope.": "只列这一作用范围的事实。",
}


def said(text: str) -> str:
    """A help text in Chinese, however its source is indented. Raises KeyError for one that the table lacks."""
    if isinstance(text, Message):
        return text.rendered(lambda template, _many, _n: ZH[template])
    return ZH[text] if text else ""


def page(command: click.Command, ctx: click.Context) -> str:
    """What `command --help` prints."""
    width = min(_MOST, console().width)
    lines = [f"用法：{ctx.command_path} {' '.join(command.collect_usage_pieces(ctx))}", ""]
    for paragraph in said(command.help or "").split("\n\n"):
        verbatim = paragraph.startswith("\b")
        body = paragraph.splitlines()[1:] if verbatim else _wrapped(paragraph, width - 2)
        lines += [*("  " + line for line in body), ""]
    options = [record for p in command.get_params(ctx) if (record := _option(p, ctx))]
    lines += ["选项：", *_table(options, width)]
    if isinstance(command, click.Group):
        shown = [
            (name, said(one.short_help or one.help or "").split("\n")[0]) for name, one in command.commands.items()
        ]
        lines += ["", "命令：", *_table(shown, width)]
    if command.epilog:
        lines += ["", *("  " + line for line in _wrapped(said(command.epilog), width - 2))]
    return "\n".join(lines)


def _option(param: click.Parameter, ctx: click.Context) -> tuple[str, str] | None:
    record = param.get_help_record(ctx)
    if record is None or isinstance(param, click.Argument):
        return None
    names, text = record
    text = text.removeprefix(param.help or "").strip()
    extra = text.replace("[required]", "[必需]").replace("[default: ", "[默认：")
    # In brackets of Chinese, which no line ends with.
    return names, re.sub(r"\s*\[(默认：[^\]]*|必需)\]", r"（\1）", said(param.help or "") + extra)


def _table(rows: list[tuple[str, str]], width: int) -> list[str]:
    column = 4 + min(_NAMES, max((cell_len(names) for names, _ in rows), default=0))
    lines = []
    for names, text in rows:
        body = _wrapped(text, width - column) if text else [""]
        if cell_len(names) > column - 4:
            lines.append(f"  {names}")
            names = ""
        lines.append(f"  {names:<{column - 2}}{body[0]}".rstrip())
        lines += [" " * column + line for line in body[1:]]
    return lines


def _wrapped(text: str, room: int) -> list[str]:
    return [line.plain.rstrip() for line in wrap(console(width=room), Text(" ".join(text.split("\n"))), room)]
