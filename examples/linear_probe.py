"""How well do features tell your own classes: the dense map beside bilinear upsampling and the large image.

python examples/linear_probe.py DATA --teacher-px 1024

DATA/{train,val}/images holds images, DATA/{train,val}/masks a PNG of the same name for each, whose numbers are
classes from 0 (255: none); DATA/classes.json, if there, names them. A source of your own is any function from
normalised pixels to maps: here the images' own colours, averaged over squares of 16 px, which all should beat.
"""

import argparse
from pathlib import Path

import torch.nn.functional as F

from brixel import BrixelFeatures
from brixel.evaluate import FeatureSource, ProbeSettings, read_labelled, segmentation, sources_of


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="brixel-tiny")
    parser.add_argument("--teacher-px", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--cache", type=Path, help="a folder for features: later runs find them there")
    options = parser.parse_args(arguments)

    model = BrixelFeatures.from_pretrained(options.model)
    train, val = (read_labelled("plain", options.data, split) for split in ("train", "val"))
    colours = FeatureSource("colours", lambda pixels: F.avg_pool2d(pixels, 16), 16, scale=4)
    sources = [*sources_of(model, ["bilinear", "student", "teacher"]), colours]
    settings = {"settings": ProbeSettings(steps=options.steps), "cache": options.cache}
    report = segmentation(sources, train, val, [options.teacher_px], model=options.model, **settings)
    print(report.markdown("python examples/linear_probe.py"))


if __name__ == "__main__":
    main()
