"""Q420 calibrated-on-text-alone: a vision or audio model was calibrated on text alone.

Why: the features of an image are inputs of every decoder layer, and their statistics are not those of words. Without
them no Hessian has seen an image. Towers and projectors stay in 16 bits either way.

Do: use `--calibration FILE.jsonl` with conversations of the kind to be served, a line each, such as
`{"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "…"}]}]}`.
Paths begin at the file's folder; sounds are WAV files. `pip install 'checkpoint-doctor[vision]'` brings what images need.

False alarms: a model of this kind that serves text alone.

Fix safety: no fix: you provide the images.

Sources: doctor/quant/calibration/pictures.py; arXiv 2412.19509 (MBQ: modality-balanced quantization).
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import measured

TOWERS = ("vision_config", "audio_config")


@rule("Q420", "info")
def calibrated_on_text_alone(checkpoint, calibration, config):
    towers = [key for key in TOWERS if isinstance(config.get(key), dict)]
    if towers and not calibration.seen_rows:
        yield finding(
            _(
                "calibrated on {rows} rows of text alone; config.json has {towers}",
                rows=calibration.rows,
                towers=" and ".join(towers),
            ),
            at=Place("config.json", pointer=f"/{towers[0]}"),
            evidence={"rows": calibration.rows, "towers": towers},
            advice=_("use --calibration FILE.jsonl with conversations that name images or sounds"),
        )


def bad():
    case = measured()
    case.config["vision_config"] = {"model_type": "clip_vision_model"}
    return case, "calibrated on 16 rows of text alone; config.json has vision_config"


def good():
    return measured()
