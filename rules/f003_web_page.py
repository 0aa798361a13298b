"""F003 web-page: a weight file is an HTML page.

Why: a link to a page (a login form, an error, the file's preview) was saved in place of the file.

Seen as:
- safetensors: `Error while deserializing header: header too large`
- PyTorch: `UnpicklingError: invalid load key, '<'.`

Do: download the file itself, with a token where the model is gated.

False alarms: none known: the file begins with `<html` or `<!DOCTYPE`.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
the data are elsewhere.

Sources: safetensors safetensors/src/tensor.rs (0.8): the first eight letters are read as a header length.
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("F003", "error")
def web_page(shard, base):
    if any(d.kind == "web-page" for d in shard.defects):
        yield finding(
            f"{shard.name} is an HTML page of {shard.size:,} bytes",
            at=Place(shard.name),
            evidence={"bytes": shard.size},
            fix=from_base(base, shard.name, f"download {shard.name} itself; a gated model needs an access token"),
        )


def bad():
    case = tiny()
    case.files["model.safetensors"] = b"<!DOCTYPE html><html><body>Sign in to continue</body></html>"
    return case, "model.safetensors is an HTML page of 60 bytes"


def good():
    return tiny()
