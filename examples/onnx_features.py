"""Dense features without torch: an exported model, a photograph, and a picture of the map's principal components.

    brixel export --model brixel-small -o brixel-small.onnx
    python examples/onnx_features.py brixel-small.onnx photo.jpg -o features.png

Needs onnxruntime, numpy and pillow alone. Shapes: H x W pixels, D channels, Hf x Wf cells.
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def pixels_of(image, facts):
    """The image as the model takes it: its short side as trained, normalised, padded to whole patches; 1 3 H W."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    short, patch = facts["short_side_px"], facts["patch_px"]
    sides = [short if side == min(image.size) else int(side * short / min(image.size) + 0.5) for side in image.size]
    channels = [channel.convert("F").resize(sides, Image.Resampling.BICUBIC) for channel in image.split()]
    rgb = np.stack([np.asarray(channel) for channel in channels]).clip(0, 255) / 255  # 3 H W
    mean, std = (np.array(facts[name], np.float32)[:, None, None] for name in ("mean", "std"))
    padding = [(0, -side % patch) for side in rgb.shape[1:]]
    return np.pad((rgb - mean) / std, [(0, 0), *padding], mode="edge")[None].astype(facts["dtype"])


def features_of(session, facts, image):
    """The dense map of the image, without the padding: D Hf Wf, one cell every ``stride_px`` resized pixels."""
    pixels = pixels_of(image, facts)
    features = session.run([facts["output"]["name"]], {facts["input"]["name"]: pixels})[0][0]
    width, height = ImageOps.exif_transpose(image).size
    scale = facts["short_side_px"] / min(width, height)
    rows, columns = (int(np.ceil(int(side * scale + 0.5) / facts["stride_px"])) for side in (height, width))
    return features[:, :rows, :columns]


def colours_of(features):
    """The three directions of largest variance as red, green and blue: (D, Hf, Wf) to (Hf, Wf, 3) bytes."""
    cells = features.reshape(len(features), -1).T.astype(np.float32)
    cells -= cells.mean(0)
    colours = cells @ np.linalg.eigh(cells.T @ cells)[1][:, -1:-4:-1]
    low, high = np.quantile(colours, (0.01, 0.99), axis=0)
    return ((colours - low) / (high - low + 1e-9) * 255).clip(0, 255).astype(np.uint8).reshape(*features.shape[1:], 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `brixel export` wrote, an .onnx")
    parser.add_argument("image")
    parser.add_argument("-o", "--output", default="features.png", help="the picture; the map itself goes beside it")
    options = parser.parse_args()
    session = onnxruntime.InferenceSession(options.model, providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["brixel"])
    features = features_of(session, facts, Image.open(options.image))
    Image.fromarray(colours_of(features)).resize(features.shape[:0:-1] * np.array(8)).save(options.output)
    np.save(options.output + ".npy", features)
