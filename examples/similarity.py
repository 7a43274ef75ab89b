"""Click a pixel to see how similar the rest of the image is to it: red is similar, blue is not.

    python examples/similarity.py IMAGE [ROW COLUMN [FOLDER]]

With a pixel on the command line, no window opens: the result is written to heat.png. FOLDER as in quickstart.py.
"""

import sys

import numpy as np
from PIL import Image
from quickstart import load


def main(path: str, row: str | None = None, column: str = "0", folder: str | None = None) -> None:
    image = Image.open(path).convert("RGB")
    feature_map = load(folder).extract(image)

    def heat_image(row: int, column: int) -> Image.Image:
        similarity = feature_map.similarity((row + 0.5, column + 0.5)).clamp(0, 1)  # at the pixel's centre
        heat = np.asarray(Image.fromarray(similarity.numpy()).resize(image.size, Image.Resampling.BILINEAR))
        colours = np.stack([heat, 0 * heat, 1 - heat], axis=-1) * 255
        return Image.blend(image, Image.fromarray(colours.astype(np.uint8)), 0.6)

    if row is not None:
        return heat_image(int(row), int(column)).save("heat.png")
    from tkinter import Label, Tk

    from PIL.ImageTk import PhotoImage

    photo = PhotoImage(image, master=(window := Tk(className="similarity")))
    label = Label(window, image=photo, borderwidth=0)
    label.bind("<Button-1>", lambda click: photo.paste(heat_image(click.y, click.x)))
    label.pack()
    window.mainloop()


if __name__ == "__main__":
    main(*sys.argv[1:])
