"""Click a pixel, see what is like it (red): `python examples/similarity.py IMAGE [ROW COLUMN [FOLDER]]`.

With a pixel on the command line there is no window; the image is written to heat.png. FOLDER as in quickstart.py.
"""

import sys

import numpy as np
from PIL import Image
from quickstart import load


def main(path: str, *pixel_and_folder: str) -> None:
    pixel, folder = pixel_and_folder[:2], dict(enumerate(pixel_and_folder)).get(2)
    image = Image.open(path).convert("RGB")
    feature_map = load(folder).extract(image)

    def heat_image(row: int, column: int) -> Image.Image:
        similarity = feature_map.similarity((row + 0.5, column + 0.5)).clamp(0, 1)  # at the pixel's centre
        heat = np.asarray(Image.fromarray(similarity.numpy()).resize(image.size, Image.Resampling.BILINEAR))
        colours = np.stack([heat, 0 * heat, 1 - heat], axis=-1) * 255
        return Image.blend(image, Image.fromarray(colours.astype(np.uint8)), 0.6)

    if pixel:
        heat_image(int(pixel[0]), int(pixel[1])).save("heat.png")
        return
    from tkinter import Label, Tk

    from PIL.ImageTk import PhotoImage

    shown = [PhotoImage(image, master=(window := Tk(className="similarity")))]
    label = Label(window, image=shown[0], borderwidth=0)
    label.bind("<Button-1>", lambda at: label.configure(image=shown[0].paste(heat_image(at.y, at.x)) or shown[0]))
    label.pack()
    window.mainloop()


if __name__ == "__main__":
    main(*sys.argv[1:])
