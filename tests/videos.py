"""Videos that tests write, with PyAV itself where ours does not write such files."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image


def grey_levels(count, height=24, width=32):
    """Frames of one grey each, 8 apart, so that a decoded frame says which one it is: :func:`number_of`."""
    return [np.full((height, width, 3), 20 + 8 * number, np.uint8) for number in range(count)]


def number_of(rgb):
    return round((float(np.asarray(rgb).mean()) - 20) / 8)


def write(path, pixels, *, times=None, codec="libx264", pix_fmt="yuv420p", rotation=None, sound=False, **settings):
    """Write frames with PyAV; ``times`` in milliseconds, 40 apart by default. ``settings``: fields of the context."""
    options = settings.pop("options", {})
    flags = settings.pop("movflags", None)
    tick = Fraction(1, 25) if times is None else Fraction(1, 1000)
    with av.open(str(path), "w", options={} if flags is None else {"movflags": flags}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *pixels[0].shape[:2], pix_fmt
        stream.codec_context.time_base = tick
        stream.options = {"crf": "4", **options} if codec == "libx264" else options
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if rotation is not None:
            stream.set_display_rotation(*rotation)
        tone = container.add_stream("aac", rate=8000) if sound else None
        for number, array in enumerate(pixels):
            frame = array if isinstance(array, av.VideoFrame) else av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if tone is not None:
            _add_silence(container, tone)
    return path


def write_sound(path):
    with av.open(str(path), "w") as container:
        _add_silence(container, container.add_stream("aac", rate=8000))
    return path


def _add_silence(container, stream):
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_davis(folder, videos=("boat", "cat"), count=4, size="480p"):
    """Videos of 24 x 36 px: object 1 moves to the right, object 3 stays."""
    for number, name in enumerate(videos):
        for kind in ("JPEGImages", "Annotations"):
            (folder / kind / size / name).mkdir(parents=True)
        for time in range(count):
            mask = np.zeros((24, 36), np.uint8)
            mask[4:12, 2 + 4 * time : 12 + 4 * time] = 1
            mask[14:22, 20:30] = 3
            colours = np.full((24, 36, 3), 60, np.uint8)
            colours[mask == 1] = [220, 40, 40 + 30 * number]
            colours[mask == 3] = [40, 60, 220]
            Image.fromarray(colours).save(folder / "JPEGImages" / size / name / f"{time:05d}.jpg", quality=95)
            palette = Image.fromarray(mask).convert("P")
            palette.putpalette([value for i in range(5) for value in (40 * i, 250 - 50 * i, 99)])
            palette.save(folder / "Annotations" / size / name / f"{time:05d}.png")
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("\n".join(videos) + "\n\n")
    return folder
