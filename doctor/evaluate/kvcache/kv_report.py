"""The result of `doctor kvcache` as plain data, and back from the JSON that was saved."""

from dataclasses import dataclass

from doctor.core.errors import DoctorError
from doctor.core.messages import _, collected, restored
from doctor.core.version import __version__

SCHEMA = "doctor.kvcache/1"


@dataclass
class KvReport:
    """What was found, as plain data: `data` is what other reports carry under extra["kvcache"]."""

    checkpoint: str
    data: dict
    version: str = __version__

    @property
    def extra(self) -> dict:
        return {"kvcache": self.data}

    def to_dict(self) -> dict:
        return {
            "schema": SCHEMA,
            "version": self.version,
            "checkpoint": self.checkpoint,
            **self.extra,
            "messages": collected(self.data),
        }


def from_dict(document: dict) -> KvReport:
    """The KvReport of a document that `doctor kvcache -f json` wrote. Raises DoctorError for what is none."""
    if document.get("schema") != SCHEMA or not isinstance(document.get("kvcache"), dict):
        raise DoctorError(
            _("not a report on a cache: the schema must be {schema}.", schema=repr(SCHEMA)),
            _("Make one with `{command}`.", command="doctor kvcache CHECKPOINT -f json:kv.json"),
        )
    data = restored(document["kvcache"], document.get("messages"))
    return KvReport(str(document.get("checkpoint", "")), data, str(document.get("version", "")))
