"""Extract the dense feature map of one image, and colour it by its three main directions.

    python examples/quickstart.py brixel/assets/scene.jpg [FOLDER]

FOLDER: a model that save_pretrained wrote, or a backbone; without it, the model inside the package.
"""

import sys
from pathlib import Path

from PIL import Image

from brixel import BrixelFeatures


def load(folder: str | None = None) -> BrixelFeatures:
    if folder is None:
        return BrixelFeatures.from_pretrained()
    if (Path(folder) / "adapter.safetensors").exists():
        return BrixelFeatures.from_pretrained(folder)
    return BrixelFeatures.from_backbone(folder)  # with the universal upsampler


def main(path: str, folder: str | None = None, output: str = "features.safetensors") -> None:
    model = load(folder)
    feature_map = model.extract(path)  # a FeatureMap: features (D, Hf, Wf), and their geometry on the image
    print(feature_map)

    height, width = feature_map.image_hw
    centre = feature_map.at([(height / 2, width / 2)])  # (1, D); coordinates in pixels of the image
    print("at the centre:", centre.shape, "length", float(centre.norm()))

    feature_map.save(output)
    colours = Image.fromarray(feature_map.pca())
    colours.resize((width, height), Image.Resampling.NEAREST).save(Path(output).with_suffix(".png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
