"""Train a small decoder on frozen dense features, in plain PyTorch: python examples/train_decoder.py DATA

DATA/images holds images of any sizes, DATA/masks a PNG of the same stem for each: classes from 0, 255 for none.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from brixel import BrixelFeatures
from brixel.data import ImageDataset, collate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", type=Path)
parser.add_argument("--model", default="brixel-small")
parser.add_argument("--epochs", type=int, default=20)
options = parser.parse_args()

images = sorted((options.data / "images").iterdir())
masks = [np.array(Image.open(options.data / "masks" / f"{image.stem}.png"), np.int64) for image in images]
classes = 1 + max(int(mask[mask != 255].max(initial=0)) for mask in masks)
model = BrixelFeatures.from_pretrained(options.model)
layers = torch.nn.Conv2d(model.embed_dim, 64, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(64, classes, 1)
decoder = torch.nn.Sequential(*layers).to(model.device)
optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
for epoch in range(options.epochs):
    for batches in DataLoader(ImageDataset(images, model, masks), batch_size=4, shuffle=True, collate_fn=collate):
        for batch in batches:  # one for every size among four images
            batch = batch.to(model.device)
            with torch.no_grad():
                features = model(batch.pixels.to(model.dtype)).float()
            logits = batch.at_image_size(decoder(features))  # (K, height, width) for each image
            pairs = zip(logits, batch.targets, strict=True)
            loss = sum(cross_entropy(logit[None], mask[None], ignore_index=255) for logit, mask in pairs) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
torch.save(decoder.state_dict(), "decoder.pt")
