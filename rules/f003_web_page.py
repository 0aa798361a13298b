"""F003 web-page: weight file is an HTML page.

Why: a link to a page (a login form, an error page, the file's preview) was saved instead of the file.

Seen as:
- safetensors: `Error while deserializing header: header too large`
- PyTorch: `UnpicklingError: invalid load key, '<'.`

Do: download the file itself; a gated model needs an access token.

False alarms: none known: the file begins with `<html` or `<!DOCTYPE`.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: the data is elsewhere.

Sources: safetensors safetensors/src/tensor.rs (0.8): the first eight letters are read as a header length.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("F003", "error")
def web_page(shard, base):
    if any(d.kind == "web-page" for d in shard.defects):
        yield finding(
            _("{file} is an HTML page of {size:,} bytes", file=shard.name, size=shard.size),
            at=Place(shard.name),
            evidence={"bytes": shard.size},
            fix=from_base(
                base, shard.name, _("download {file} itself; a gated model needs an access token", file=shard.name)
            ),
        )


def bad():
    case = tiny()
    case.files["model.safetensors"] = b"<!DOCTYPE html><html><body>Sign in to continue</body></html>"
    return case, "model.safetensors is an HTML page of 60 bytes"


def good():
    return tiny()
